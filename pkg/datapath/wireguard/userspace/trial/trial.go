// Package trial finds out which segmentation offloads this kernel gets right,
// by sending through a link and sockets in a network namespace that nobody
// else sees: datagrams cut and put together by sockets, and UDP and TCP in both
// directions over a TUN link, in both families. What arrives has to be what was
// sent, byte for byte, with the right checksums.
//
// Kernels have refused packets they should take (the virtio check of 2024 that
// answers EINVAL) or lost them; then one gets along without, slower.
package trial

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"runtime"
	"time"

	"github.com/tailscale/wireguard-go/tun"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"meshd.dev/pkg/datapath/wireguard/userspace/link"
	"meshd.dev/pkg/datapath/wireguard/userspace/udp"
)

// Offloads that work.
type Offloads struct {
	Link link.Offloads
	// Sockets: several datagrams as one message.
	Sockets bool
}

// patience is how long one step may take. Nothing is on its way for longer
// than the scheduler makes it. A step that took longer ends with
// os.ErrDeadlineExceeded, which says little: on a busy machine it may do.
const patience = 2 * time.Second

// Run tries them all. The error says why the missing ones are missing; when it
// is os.ErrDeadlineExceeded, some may be found another time. It needs
// the right to make network namespaces; without it there are none.
func Run() (o Offloads, err error) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread() // never unlocked: thread and namespace end with this goroutine
		if err = unix.Unshare(unix.CLONE_NEWNET); err != nil {
			err = fmt.Errorf("make network namespace: %w", err)
			return
		}
		o, err = inside()
	}()
	<-done
	return o, err
}

// The namespace: we are 10.0.0.1 and fd00::1 on a link behind which there are
// 10.0.0.2 and fd00::2, played by this test.
const name = "trial"

var (
	ours   = []netip.Addr{netip.MustParseAddr("10.0.0.1"), netip.MustParseAddr("fd00::1")}
	theirs = []netip.Addr{netip.MustParseAddr("10.0.0.2"), netip.MustParseAddr("fd00::2")}
)

func inside() (o Offloads, err error) {
	d, err := link.Open(name, 1420)
	if err != nil {
		return o, err
	}
	defer d.Close()
	families, err := furnish()
	if err != nil {
		return o, err
	}
	var errs []error
	if err := sockets(families); err != nil {
		errs = append(errs, fmt.Errorf("datagrams in one message: %w", err))
	} else {
		o.Sockets = true
	}
	for f := range families {
		if err := reached(d, f); err != nil {
			return o, errors.Join(append(errs, err)...)
		}
	}
	have, err := d.SetOffloads(link.TCP | link.UDP)
	if err != nil {
		return o, errors.Join(append(errs, err)...)
	}
	for offload, try := range map[link.Offloads]func(*link.Device, int) error{link.TCP: tcp, link.UDP: datagrams} {
		if have&offload == 0 {
			errs = append(errs, fmt.Errorf("%s over TUN: the kernel does not know it", offload))
			continue
		}
		for f := range families {
			if err := try(d, f); err != nil {
				have &^= offload
				errs = append(errs, fmt.Errorf("%s over TUN to %s: %w", offload, ours[f], err))
				break
			}
		}
	}
	o.Link = have & d.Offloads() // the link gives up what was refused
	return o, errors.Join(errs...)
}

// furnish gives the namespace its addresses, and returns how many families
// there are.
func furnish() (families int, err error) {
	for _, n := range []string{"lo", name} {
		l, err := netlink.LinkByName(n)
		if err != nil {
			return 0, err
		}
		if err := netlink.LinkSetUp(l); err != nil {
			return 0, fmt.Errorf("set up %s: %w", n, err)
		}
		if n == "lo" {
			continue
		}
		for f, bits := range []int{24, 64} {
			addr := &netlink.Addr{IPNet: &net.IPNet{IP: ours[f].AsSlice(), Mask: net.CIDRMask(bits, ours[f].BitLen())}, Flags: unix.IFA_F_NODAD}
			if err := netlink.AddrAdd(l, addr); err != nil {
				if f == 1 { // a machine without IPv6
					return 1, nil
				}
				return 0, fmt.Errorf("add address %s: %w", addr, err)
			}
		}
	}
	return 2, nil
}

// content is what is sent: three parts, of which the last is shorter.
func content(size int) (parts [][]byte) {
	all := make([]byte, 2*size+size/3)
	for i := range all {
		all[i] = byte(i*7 + i>>8)
	}
	return [][]byte{all[:size], all[size : 2*size], all[2*size:]}
}

// sockets sends datagrams in one message over lo.
func sockets(families int) error {
	for f, network := range []string{"udp4", "udp6"}[:families] {
		to := []netip.Addr{netip.AddrFrom4([4]byte{127, 0, 0, 1}), netip.IPv6Loopback()}[f]
		a, err := udp.Open(network, 0)
		if err != nil {
			return err
		}
		defer a.Close()
		b, err := udp.Open(network, 0)
		if err != nil {
			return err
		}
		defer b.Close()
		if err := errors.Join(a.SetOffload(true), b.SetOffload(true)); err != nil {
			return err
		}
		want := content(1000)
		if _, err := a.Send(want, 0, netip.AddrPortFrom(to, b.Port()), netip.Addr{}); err != nil {
			return err
		}
		if err := receive(b, want); err != nil {
			return fmt.Errorf("%s: %w", network, err)
		}
	}
	return nil
}

// receive waits for these datagrams, in order.
func receive(s *udp.Socket, want [][]byte) error {
	if err := s.SetReadDeadline(time.Now().Add(patience)); err != nil {
		return err
	}
	slab, messages := make([]byte, 1<<16), make([]udp.Message, 1)
	for i := 0; i < len(want); {
		if _, err := s.Receive(slab, messages, len(want)); err != nil {
			return fmt.Errorf("datagram %d of %d: %w", i+1, len(want), err)
		}
		m := messages[0]
		for rest := slab[m.Offset : m.Offset+m.Size]; len(rest) > 0; i++ {
			n := min(m.Segment, len(rest))
			if i >= len(want) || !bytes.Equal(rest[:n], want[i]) {
				return fmt.Errorf("datagram %d arrived otherwise than it was sent", i+1)
			}
			rest = rest[n:]
		}
	}
	return nil
}

// reached waits until packets from the link find our address: for IPv6 that is
// a moment after it was given.
func reached(d *link.Device, f int) error {
	s, err := udp.Open([]string{"udp4", "udp6"}[f], 0)
	if err != nil {
		return err
	}
	defer s.Close()
	c := conversation{us: netip.AddrPortFrom(ours[f], s.Port()), them: netip.AddrPortFrom(theirs[f], 7)}
	slab, messages := make([]byte, 1<<16), make([]udp.Message, 1)
	for deadline := time.Now().Add(patience); ; {
		if _, err := d.Write(c.datagrams([][]byte{[]byte("ready?")}), headroom); err != nil {
			return err
		}
		if err := s.SetReadDeadline(time.Now().Add(10 * time.Millisecond)); err != nil {
			return err
		}
		if _, err := s.Receive(slab, messages, 1); err == nil {
			return nil
		} else if time.Now().After(deadline) {
			return fmt.Errorf("%s is not reached: %w", ours[f], err)
		}
	}
}

// datagrams sends UDP through the link, both ways.
func datagrams(d *link.Device, f int) error {
	s, err := udp.Open([]string{"udp4", "udp6"}[f], 0)
	if err != nil {
		return err
	}
	defer s.Close()
	want := content(1000)
	c := conversation{us: netip.AddrPortFrom(ours[f], s.Port()), them: netip.AddrPortFrom(theirs[f], 7)}
	if _, err := d.Write(c.datagrams(want), headroom); err != nil {
		return err
	}
	if err := receive(s, want); err != nil {
		return fmt.Errorf("written: %w", err)
	}
	if err := s.SetOffload(true); err != nil {
		return nil // nobody will send such messages here
	}
	if _, err := s.Send(want, 0, c.them, c.us.Addr()); err != nil {
		return err
	}
	return read(d, bytes.Join(want, nil), c.payloadOfDatagram)
}

// tcp opens a connection through the link and sends over it, both ways.
func tcp(d *link.Device, f int) error {
	l, err := net.ListenTCP("tcp", net.TCPAddrFromAddrPort(netip.AddrPortFrom(ours[f], 0)))
	if err != nil {
		return err
	}
	defer l.Close()
	deadline := time.Now().Add(patience)
	if err := l.SetDeadline(deadline); err != nil {
		return err
	}
	c := conversation{us: l.Addr().(*net.TCPAddr).AddrPort(), them: netip.AddrPortFrom(theirs[f], 7), seq: 1000}
	if _, err := d.Write([][]byte{c.segment(tcpSyn, nil)}, headroom); err != nil {
		return err
	}
	c.seq++
	if err := each(d, func(p []byte) bool { return c.greeted(p) }); err != nil {
		return fmt.Errorf("answer to SYN: %w", err)
	}
	want := content(1000)
	packets := [][]byte{c.segment(tcpAck, nil)}
	for _, part := range want {
		packets = append(packets, c.segment(tcpAck, part))
	}
	if _, err := d.Write(packets, headroom); err != nil {
		return err
	}
	conn, err := l.AcceptTCP()
	if err != nil {
		return err
	}
	defer conn.Close()
	if err := errors.Join(conn.SetDeadline(deadline), conn.SetLinger(0)); err != nil {
		return err
	}
	all := bytes.Join(want, nil)
	got := make([]byte, len(all))
	if _, err := io.ReadFull(conn, got); err != nil || !bytes.Equal(got, all) {
		return fmt.Errorf("written: it arrived otherwise than it was sent, %w", err)
	}
	if _, err := conn.Write(all); err != nil {
		return err
	}
	return read(d, all, c.payloadOfSegment)
}

// read waits until the payloads of packets from the link make up want.
func read(d *link.Device, want []byte, payload func(packet []byte) ([]byte, error)) error {
	var got []byte
	var bad error
	err := each(d, func(p []byte) bool {
		more, err := payload(p)
		got, bad = append(got, more...), errors.Join(bad, err)
		return len(got) >= len(want) || err != nil
	})
	switch {
	case bad != nil:
		return fmt.Errorf("read: %w", bad)
	case err != nil:
		return fmt.Errorf("read: %d bytes of %d: %w", len(got), len(want), err)
	case !bytes.Equal(got, want):
		return errors.New("read: it arrived otherwise than it was sent")
	}
	return nil
}

// each reads packets from the link until f has enough.
func each(d *link.Device, f func(packet []byte) (enough bool)) error {
	if err := d.File().SetReadDeadline(time.Now().Add(patience)); err != nil {
		return err
	}
	slab, packets := make([]byte, 2<<16), make([]tun.ReadPacket, d.BatchSize())
	for {
		n, err := d.Read(slab, packets)
		if err != nil {
			return err
		}
		for _, p := range packets[:n] {
			if f(slab[p.Offset : p.Offset+p.Size]) {
				return nil
			}
		}
	}
}
