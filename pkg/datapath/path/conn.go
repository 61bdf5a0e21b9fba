package path

import (
	"errors"
	"fmt"
	"net/netip"
	"os"

	"golang.org/x/sys/unix"
)

// conn sends and receives ICMP of one family, whole packets whatever the
// kernel believes of the path's MTU.
type conn struct {
	file *os.File
	six  bool
}

func open4() (*conn, error) {
	const icmpFilter = 1 // ICMP_FILTER of linux/icmp.h
	drop := ^uint32(1<<echoReply4 | 1<<echoRequest4)
	return open(unix.AF_INET, unix.IPPROTO_ICMP, func(fd int) error {
		return errors.Join(
			unix.SetsockoptInt(fd, unix.IPPROTO_IP, unix.IP_MTU_DISCOVER, unix.IP_PMTUDISC_PROBE),
			unix.SetsockoptInt(fd, unix.SOL_RAW, icmpFilter, int(int32(drop))),
			attach(fd, []unix.SockFilter{ // behind an IP header of any length
				{Code: unix.BPF_LDX | unix.BPF_MSH | unix.BPF_B, K: 0},
				{Code: unix.BPF_LD | unix.BPF_IND | unix.BPF_W, K: icmpLen},
				{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: magic, Jt: 0, Jf: 1},
				{Code: unix.BPF_RET | unix.BPF_K, K: 1 << 16},
				{Code: unix.BPF_RET | unix.BPF_K, K: 0},
			}))
	})
}

func open6() (*conn, error) {
	filter := unix.ICMPv6Filter{}
	for i := range filter.Data {
		filter.Data[i] = 1<<32 - 1
	}
	filter.Data[echoRequest6/32] &^= 1<<(echoRequest6%32) | 1<<(echoReply6%32)
	return open(unix.AF_INET6, unix.IPPROTO_ICMPV6, func(fd int) error {
		return errors.Join(
			unix.SetsockoptInt(fd, unix.IPPROTO_IPV6, unix.IPV6_MTU_DISCOVER, unix.IPV6_PMTUDISC_PROBE),
			unix.SetsockoptInt(fd, unix.IPPROTO_IPV6, unix.IPV6_DONTFRAG, 1),
			unix.SetsockoptICMPv6Filter(fd, unix.IPPROTO_ICMPV6, 1, &filter),
			attach(fd, []unix.SockFilter{
				{Code: unix.BPF_LD | unix.BPF_ABS | unix.BPF_W, K: icmpLen},
				{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: magic, Jt: 0, Jf: 1},
				{Code: unix.BPF_RET | unix.BPF_K, K: 1 << 16},
				{Code: unix.BPF_RET | unix.BPF_K, K: 0},
			}))
	})
}

// attach has the kernel drop what does not begin with our magic.
func attach(fd int, code []unix.SockFilter) error {
	return unix.SetsockoptSockFprog(fd, unix.SOL_SOCKET, unix.SO_ATTACH_FILTER, &unix.SockFprog{Len: uint16(len(code)), Filter: &code[0]})
}

func open(family, protocol int, set func(fd int) error) (*conn, error) {
	fd, err := unix.Socket(family, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, protocol)
	if err != nil {
		return nil, fmt.Errorf("open ICMP socket: %w", err)
	}
	if err := set(fd); err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("set up ICMP socket: %w", err)
	}
	return &conn{os.NewFile(uintptr(fd), "icmp"), family == unix.AF_INET6}, nil
}

func (c *conn) close() { c.file.Close() }

// send never waits: what finds no room in the queue is lost, as on the wire.
func (c *conn) send(b []byte, to netip.Addr) error {
	var sa unix.Sockaddr
	if c.six {
		sa = &unix.SockaddrInet6{Addr: to.As16()}
	} else {
		sa = &unix.SockaddrInet4{Addr: to.As4()}
	}
	raw, err := c.file.SyscallConn()
	if err != nil {
		return err
	}
	var sent error
	if err := raw.Write(func(fd uintptr) bool { sent = unix.Sendto(int(fd), b, 0, sa); return true }); err != nil {
		return err
	}
	return sent
}

// receive hands on what is ours until the connection is closed.
func (c *conn) receive(f func(echo, netip.Addr)) {
	raw, err := c.file.SyscallConn()
	if err != nil {
		return
	}
	buf := make([]byte, 1<<16)
	for {
		var n int
		var from unix.Sockaddr
		var got error
		err := raw.Read(func(fd uintptr) bool {
			n, from, got = unix.Recvfrom(int(fd), buf, 0)
			return !errors.Is(got, unix.EAGAIN)
		})
		if err != nil {
			return // closed
		}
		if got != nil {
			continue // an error of what was sent before
		}
		b, addr := c.strip(buf[:n], from)
		if e, err := decodeEcho(b, addr); err == nil {
			f(e, addr)
		}
	}
}

// strip the IP header that comes with IPv4.
func (c *conn) strip(b []byte, from unix.Sockaddr) ([]byte, netip.Addr) {
	switch sa := from.(type) {
	case *unix.SockaddrInet6:
		return b, netip.AddrFrom16(sa.Addr)
	case *unix.SockaddrInet4:
		if len(b) < 20 || len(b) < int(b[0]&0xf)*4 {
			return nil, netip.AddrFrom4(sa.Addr)
		}
		return b[int(b[0]&0xf)*4:], netip.AddrFrom4(sa.Addr)
	}
	return nil, netip.Addr{}
}
