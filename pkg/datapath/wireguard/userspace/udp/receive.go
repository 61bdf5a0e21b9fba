package udp

import (
	"encoding/binary"
	"net/netip"
	"strconv"
	"unsafe"

	"golang.org/x/sys/unix"
)

const (
	maxDatagram = 1<<16 - 1
	// maxSegments is how many datagrams the kernel puts into one message.
	maxSegments = 64
)

// Message is what the kernel received as one: datagrams of one sender, all
// Segment long but for the last.
type Message struct {
	// Offset and Size in the slab.
	Offset, Size int
	// Segment is not 0.
	Segment int
	From    netip.AddrPort
	To      Local
}

// receiver is the state of Receive.
type receiver struct {
	take func(fd uintptr) bool // fill, made once

	slab     []byte
	messages []Message
	n, used  int
	left     int // datagrams that may come yet
	err      error

	header  unix.Msghdr
	piece   unix.Iovec
	name    unix.RawSockaddrInet6
	control [64]byte
}

func (r *receiver) init(s *Socket) {
	r.take = s.fill
	r.header.Name = (*byte)(unsafe.Pointer(&r.name))
	r.header.Iov, r.header.Iovlen = &r.piece, 1
	r.header.Control = &r.control[0]
}

// Receive waits for datagrams and puts them into slab, which has room for at
// least one message of the largest size, without gaps. It takes what there is
// while there is room for it, but no more than datagrams.
func (s *Socket) Receive(slab []byte, messages []Message, datagrams int) (int, error) {
	r := &s.in
	r.slab, r.messages, r.n, r.used, r.left, r.err = slab, messages, 0, 0, datagrams, nil
	err := s.raw.Read(r.take)
	r.slab, r.messages, r.piece.Base = nil, nil, nil
	if err == nil {
		err = r.err
	}
	return r.n, err
}

// fill receives until there is nothing, or no room. It returns false when
// there was nothing at all, to be called again when there is.
func (s *Socket) fill(fd uintptr) bool {
	r := &s.in
	for r.n == 0 || r.n < len(r.messages) && r.left >= maxSegments && len(r.slab)-r.used >= maxDatagram {
		room := r.slab[r.used:]
		r.piece = unix.Iovec{Base: &room[0], Len: uint64(min(len(room), maxDatagram))}
		r.header.Namelen, r.header.Controllen, r.header.Flags = unix.SizeofSockaddrInet6, uint64(len(r.control)), 0
		n, _, errno := unix.RawSyscall(unix.SYS_RECVMSG, fd, uintptr(unsafe.Pointer(&r.header)), 0)
		switch errno {
		case 0:
			r.add(int(n))
		case unix.EINTR:
		case unix.EAGAIN:
			return r.n > 0
		default:
			if r.n == 0 { // else the next call meets it again
				r.err = errno
			}
			return true
		}
	}
	return true
}

// add notes a message that was received.
func (r *receiver) add(size int) {
	if size == 0 || r.header.Flags&unix.MSG_TRUNC != 0 {
		return // nothing anybody of ours sends
	}
	m := Message{Offset: r.used, Size: size, Segment: size, From: r.from()}
	for rest := r.control[:r.header.Controllen]; len(rest) >= unix.SizeofCmsghdr; {
		h, data, more, err := unix.ParseOneSocketControlMessage(rest)
		if err != nil {
			break
		}
		rest = more
		switch {
		case h.Level == unix.IPPROTO_UDP && h.Type == unix.UDP_GRO && len(data) >= 4:
			if n := int(binary.NativeEndian.Uint32(data)); n > 0 {
				m.Segment = n
			}
		case h.Level == unix.IPPROTO_IP && h.Type == unix.IP_PKTINFO && len(data) >= unix.SizeofInet4Pktinfo:
			m.To = netip.AddrFrom4([4]byte(data[4:8])) // ipi_spec_dst
		case h.Level == unix.IPPROTO_IPV6 && h.Type == unix.IPV6_PKTINFO && len(data) >= unix.SizeofInet6Pktinfo:
			m.To = netip.AddrFrom16([16]byte(data[:16]))
		}
	}
	r.messages[r.n] = m
	r.n++
	r.used += size
	r.left -= (size + m.Segment - 1) / m.Segment
}

// from reads the address the kernel wrote.
func (r *receiver) from() netip.AddrPort {
	port := binary.BigEndian.Uint16((*[2]byte)(unsafe.Pointer(&r.name.Port))[:])
	if r.name.Family == unix.AF_INET {
		four := (*unix.RawSockaddrInet4)(unsafe.Pointer(&r.name))
		return netip.AddrPortFrom(netip.AddrFrom4(four.Addr), port)
	}
	a := netip.AddrFrom16(r.name.Addr)
	if r.name.Scope_id != 0 {
		a = a.WithZone(strconv.Itoa(int(r.name.Scope_id)))
	}
	return netip.AddrPortFrom(a, port)
}
