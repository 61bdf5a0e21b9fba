// Package udp is the engine's socket: many datagrams a system call.
//
// Datagrams to one address that have the same size leave as one message, cut
// by the kernel (UDP_SEGMENT), and come in as one (UDP_GRO). Both are off until
// SetOffload: kernels have got them wrong, and the engine tries first. A
// message that cannot go that way, because a device on its way cannot make
// checksums or its datagrams are too large for the link, goes singly.
//
// Each datagram says at which of our addresses it came in, and one may be sent
// from that address: the other side, or a translator of addresses between us,
// may know no other one.
//
// Over IPv4 a datagram too large for a path is split there, whatever ICMP says;
// over IPv6 the kernel splits it once it has been told.
package udp

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"strconv"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// buffer is what the kernel may hold for us in each direction.
const buffer = 7 << 20

// Socket is bound to one port of one family, on all addresses. Use Open.
// Receive is for one goroutine at a time; the rest may be called by any.
type Socket struct {
	conn *net.UDPConn
	raw  syscall.RawConn
	six  bool

	// segment: whether messages of several datagrams are sent.
	segment atomic.Bool
	in      receiver
}

// Open binds to port in the family of network, "udp4" or "udp6".
func Open(network string, port uint16) (*Socket, error) {
	s := &Socket{six: network == "udp6"}
	config := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) error {
		var err error
		return errors.Join(c.Control(func(fd uintptr) { err = s.options(int(fd)) }), err)
	}}
	conn, err := config.ListenPacket(context.Background(), network, ":"+strconv.Itoa(int(port)))
	if err != nil {
		return nil, err
	}
	s.conn = conn.(*net.UDPConn)
	if s.raw, err = s.conn.SyscallConn(); err != nil {
		s.conn.Close()
		return nil, err
	}
	s.in.init(s)
	return s, nil
}

func (s *Socket) options(fd int) error {
	for _, o := range []int{unix.SO_RCVBUF, unix.SO_SNDBUF, unix.SO_RCVBUFFORCE, unix.SO_SNDBUFFORCE} {
		_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, o, buffer) // as much as may be
	}
	if !s.six {
		// Whoever reaches this machine with one ICMP message may have the
		// kernel remember 552 bytes for a path. OMIT neither believes that nor
		// forbids routers to split (DF). PROBE would forbid it, and lose what
		// must pass through paths of less than 1280 and our overhead. Over IPv6
		// the kernel remembers nothing below 1280, and routers never split.
		return errors.Join(unix.SetsockoptInt(fd, unix.IPPROTO_IP, unix.IP_PKTINFO, 1),
			unix.SetsockoptInt(fd, unix.IPPROTO_IP, unix.IP_MTU_DISCOVER, unix.IP_PMTUDISC_OMIT))
	}
	return errors.Join(unix.SetsockoptInt(fd, unix.IPPROTO_IPV6, unix.IPV6_RECVPKTINFO, 1),
		unix.SetsockoptInt(fd, unix.IPPROTO_IPV6, unix.IPV6_V6ONLY, 1))
}

// SetOffload says whether several datagrams may be one message.
func (s *Socket) SetOffload(on bool) error {
	value := 0
	if on {
		value = 1
	}
	err := s.control(func(fd int) error { return unix.SetsockoptInt(fd, unix.IPPROTO_UDP, unix.UDP_GRO, value) })
	if err == nil && on { // asked only to see whether the kernel knows it
		err = s.control(func(fd int) error {
			_, err := unix.GetsockoptInt(fd, unix.IPPROTO_UDP, unix.UDP_SEGMENT)
			return err
		})
	}
	s.segment.Store(on && err == nil)
	return err
}

// SetMark gives every packet that is sent a mark for routing.
func (s *Socket) SetMark(mark uint32) error {
	return s.control(func(fd int) error { return unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_MARK, int(mark)) })
}

func (s *Socket) control(f func(fd int) error) error {
	var err error
	return errors.Join(s.raw.Control(func(fd uintptr) { err = f(int(fd)) }), err)
}

// Port it is bound to.
func (s *Socket) Port() uint16 { return uint16(s.conn.LocalAddr().(*net.UDPAddr).Port) }

// Close ends Receive with net.ErrClosed.
func (s *Socket) Close() error { return s.conn.Close() }

// Local is one of our addresses; the zero value leaves the choice to the kernel.
type Local = netip.Addr

// zoneID is the number of a link.
func zoneID(zone string) (uint32, error) {
	if id, err := strconv.ParseUint(zone, 10, 32); err == nil {
		return uint32(id), nil
	}
	link, err := net.InterfaceByName(zone)
	if err != nil {
		return 0, err
	}
	return uint32(link.Index), nil
}

// SetReadDeadline ends a Receive that is still waiting then, with a timeout.
func (s *Socket) SetReadDeadline(t time.Time) error { return s.conn.SetReadDeadline(t) }
