package userspace

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"sync"
	"sync/atomic"
	"syscall"

	"github.com/tailscale/wireguard-go/conn"

	"meshd.dev/pkg/datapath/wireguard/userspace/udp"
)

// batchSize is how many packets pass between bind and engine at once.
const batchSize = conn.IdealBatchSize

// bind is a socket for each family of addresses, on the same port.
type bind struct {
	roaming *roaming
	// opened, if there is one, is called when it was.
	opened func()

	mu sync.RWMutex
	// four and six are nil while closed, six also where there is no IPv6.
	four, six *udp.Socket
	offload   bool
}

func newBind() *bind { return &bind{roaming: newRoaming()} }

// Open is on port in both families, or in one where there is no other.
func (b *bind) Open(port uint16) (fns []conn.ReceiveFunc, actual uint16, err error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.four != nil || b.six != nil {
		return nil, 0, conn.ErrBindAlreadyOpen
	}
	for try := 0; ; try++ {
		actual = port
		if port == 0 {
			actual = uint16(32768 + rand.IntN(28000)) // both must be free
		}
		err = b.openBoth(actual)
		if err == nil || port != 0 || try == 100 || !errors.Is(err, syscall.EADDRINUSE) {
			break
		}
	}
	if err != nil {
		return nil, 0, err
	}
	for _, s := range []*udp.Socket{b.four, b.six} {
		if s != nil {
			fns = append(fns, b.receiver(s))
			_ = s.SetOffload(b.offload) // without it also works
		}
	}
	if b.opened != nil {
		b.opened()
	}
	return fns, actual, nil
}

// open says whether packets can be sent.
func (b *bind) open() bool {
	b.mu.RLock()
	defer b.mu.RUnlock()
	return b.four != nil || b.six != nil
}

func (b *bind) openBoth(port uint16) (err error) {
	if b.four, err = udp.Open("udp4", port); err != nil && !errors.Is(err, syscall.EAFNOSUPPORT) {
		return err
	}
	if b.six, err = udp.Open("udp6", port); err == nil || errors.Is(err, syscall.EAFNOSUPPORT) && b.four != nil {
		return nil
	}
	return errors.Join(err, b.close())
}

// Close ends what Open returned.
func (b *bind) Close() error {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.close()
}

func (b *bind) close() error {
	var errs []error
	for _, s := range []*udp.Socket{b.four, b.six} {
		if s != nil {
			errs = append(errs, s.Close())
		}
	}
	b.four, b.six = nil, nil
	return errors.Join(errs...)
}

// setOffload says whether several datagrams may be one message, now and when
// it is opened again.
func (b *bind) setOffload(on bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.offload = on
	for _, s := range []*udp.Socket{b.four, b.six} {
		if s != nil {
			_ = s.SetOffload(on)
		}
	}
}

// SetMark implements conn.Bind.
func (b *bind) SetMark(mark uint32) error {
	b.mu.RLock()
	defer b.mu.RUnlock()
	var errs []error
	for _, s := range []*udp.Socket{b.four, b.six} {
		if s != nil {
			errs = append(errs, s.SetMark(mark))
		}
	}
	return errors.Join(errs...)
}

// Send implements conn.Bind.
func (b *bind) Send(bufs [][]byte, to conn.Endpoint, offset int) error {
	var e *endpoint
	switch to := to.(type) {
	case *endpoint:
		e = to
	case *source: // a cookie for whom we do not know
		e = &to.endpoint
	default:
		return conn.ErrWrongEndpointType
	}
	if caller := b.roaming.caller(bufs[0][offset:]); caller != nil {
		e = caller
	}
	b.mu.RLock()
	s := b.four
	if e.to.Addr().Is6() {
		s = b.six
	}
	b.mu.RUnlock()
	if s == nil {
		return fmt.Errorf("send to %s: %w", e.to, syscall.EAFNOSUPPORT)
	}
	refused, err := s.Send(bufs, offset, e.to, e.SrcIP())
	if refused {
		e.ClearSrc()
	}
	return err
}

// ParseEndpoint implements conn.Bind.
func (b *bind) ParseEndpoint(s string) (conn.Endpoint, error) {
	if p, ours := unmark(s); ours {
		return &endpoint{place: p}, nil
	}
	b.roaming.told()
	to, err := netip.ParseAddrPort(s)
	if err != nil {
		return nil, err
	}
	return &endpoint{place: place{to: netip.AddrPortFrom(to.Addr().Unmap(), to.Port())}}, nil
}

// BatchSize implements conn.Bind.
func (b *bind) BatchSize() int { return batchSize }

// receiver is the function that receives from s.
func (b *bind) receiver(s *udp.Socket) conn.ReceiveFunc {
	messages := make([]udp.Message, batchSize)
	sources := sources{roaming: b.roaming}
	return func(slab []byte, packets []conn.ReceivedPacket) (n int, err error) {
		got, err := s.Receive(slab, messages, len(packets))
		for _, m := range messages[:got] {
			from := sources.of(place{m.From, m.To})
			for at := 0; at < m.Size && n < len(packets); at += m.Segment {
				p := conn.ReceivedPacket{Offset: m.Offset + at, Size: min(m.Segment, m.Size-at), Endpoint: from}
				if b := p.Bytes(slab); beginsHandshake(b) {
					p.Endpoint = from.beginning(b)
				}
				packets[n] = p
				n++
			}
		}
		return n, err
	}
}

// endpoint is where packets to a peer go.
type endpoint struct {
	place
	// anyFrom: our own address is the kernel's choice after all.
	anyFrom atomic.Bool
}

// place is an address of a peer, and one of ours that it knows; the latter may
// be invalid, for any.
type place struct {
	to   netip.AddrPort
	from udp.Local
}

// ClearSrc, SrcToString and so on implement conn.Endpoint.
func (e *endpoint) ClearSrc()           { e.anyFrom.Store(true) }
func (e *endpoint) SrcToString() string { return e.SrcIP().String() }
func (e *endpoint) DstToString() string { return e.to.String() }
func (e *endpoint) DstToBytes() []byte  { b, _ := e.to.MarshalBinary(); return b } // never fails
func (e *endpoint) DstIP() netip.Addr   { return e.to.Addr() }
func (e *endpoint) SrcIP() netip.Addr {
	if e.anyFrom.Load() {
		return netip.Addr{}
	}
	return e.from
}
