package udp

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"sync"
	"unsafe"

	"golang.org/x/sys/unix"
)

// batch is how many datagrams leave with one system call.
const batch = 128

// mmsghdr is what sendmmsg(2) takes.
type mmsghdr struct {
	header unix.Msghdr
	sent   uint32
	_      [4]byte
}

// sending is the state of one Send.
type sending struct {
	put func(fd uintptr) bool // flush, made once

	messages [batch]mmsghdr
	pieces   [batch]unix.Iovec
	// datagrams is how many each message has.
	datagrams [batch]int
	controls  [batch][64]byte
	name      unix.RawSockaddrInet6
	nameLen   uint32
	local     [40]byte // control message with our address
	localLen  int

	// n messages, of which done have been sent.
	n, done int
	errno   unix.Errno
}

var sendings = sync.Pool{New: func() any {
	x := &sending{}
	x.put = x.flush
	return x
}}

// Send sends datagrams, which begin at offset in each of bufs, to an address,
// in order. They are sent too when from is not an address of ours any more;
// refused says so.
func (s *Socket) Send(bufs [][]byte, offset int, to netip.AddrPort, from Local) (refused bool, err error) {
	x := sendings.Get().(*sending)
	defer sendings.Put(x)
	if err := x.address(to, from, s.six); err != nil {
		return false, err
	}
	for len(bufs) > 0 && err == nil {
		n := min(len(bufs), batch)
		err = s.send(x, bufs[:n], offset)
		bufs = bufs[n:]
	}
	return from.IsValid() && x.localLen == 0, err
}

// send tries messages of many datagrams, and sends each by itself where that
// does not work.
func (s *Socket) send(x *sending, bufs [][]byte, offset int) error {
	many := s.segment.Load()
	for {
		x.pack(bufs, offset, many)
		err := s.raw.Write(x.put)
		failed, sent := 0, 0
		if x.done < x.n {
			failed = x.datagrams[x.done]
		}
		for _, n := range x.datagrams[:x.done] {
			sent += n
		}
		errno := x.errno
		x.clear(len(bufs))
		switch {
		case err != nil:
			return err
		case errno == 0:
			return nil
		case failed > 1 && (errno == unix.EIO || errno == unix.EINVAL || errno == unix.EMSGSIZE):
			// EIO: the device makes no checksums, and never will.
			// The others: larger than its MTU, which singly is no matter.
			if many = false; errno == unix.EIO {
				s.segment.Store(false)
			}
		case x.localLen > 0 && (errno == unix.EINVAL || errno == unix.EADDRNOTAVAIL || errno == unix.ENETUNREACH):
			x.localLen = 0
		default:
			return fmt.Errorf("send: %w", errno)
		}
		bufs = bufs[sent:]
	}
}

// pack makes messages of datagrams.
func (x *sending) pack(bufs [][]byte, offset int, many bool) {
	x.n, x.done, x.errno = 0, 0, 0
	size, total, last := 0, 0, true // of the message being made
	for i, b := range bufs {
		b = b[offset:]
		x.pieces[i] = unix.Iovec{Base: unsafe.SliceData(b), Len: uint64(len(b))}
		if m := x.n - 1; many && !last && len(b) <= size && total+len(b) <= maxPayload && x.datagrams[m] < maxSegments {
			x.messages[m].header.Iovlen++
			x.datagrams[m]++
			total += len(b)
			last = len(b) < size // only the last may be shorter
			continue
		}
		h := &x.messages[x.n].header
		*h = unix.Msghdr{Name: (*byte)(unsafe.Pointer(&x.name)), Namelen: x.nameLen, Iov: &x.pieces[i], Iovlen: 1}
		x.datagrams[x.n] = 1
		x.n++
		size, total, last = len(b), len(b), false
	}
	for i := range x.n {
		h, control := &x.messages[i].header, &x.controls[i]
		used := copy(control[:], x.local[:x.localLen])
		if x.datagrams[i] > 1 {
			used += controlMessage(control[used:], unix.IPPROTO_UDP, unix.UDP_SEGMENT, 2)
			binary.NativeEndian.PutUint16(control[used-8:], uint16(x.messages[i].header.Iov.Len))
		}
		if used > 0 {
			h.Control, h.Controllen = &control[0], uint64(used)
		}
	}
}

// maxPayload of one message: the kernel sees one packet of up to 65535 bytes.
const maxPayload = 1<<16 - 1 - 40 - 8

// clear lets go of what was sent.
func (x *sending) clear(datagrams int) {
	for i := range x.n {
		x.messages[i].header.Iov = nil
	}
	clear(x.pieces[:datagrams])
}

// flush is sendmmsg(2) of a descriptor that does not block: the scheduler need
// not know of it.
func (x *sending) flush(fd uintptr) bool {
	for x.done < x.n {
		n, _, errno := unix.RawSyscall6(unix.SYS_SENDMMSG, fd, uintptr(unsafe.Pointer(&x.messages[x.done])), uintptr(x.n-x.done), 0, 0, 0)
		switch errno {
		case 0:
			x.done += int(n)
		case unix.EINTR:
		case unix.EAGAIN:
			return false
		default:
			x.errno = errno
			return true
		}
	}
	return true
}

// address writes where to, and from which of our addresses.
func (x *sending) address(to netip.AddrPort, from Local, six bool) error {
	if to.Addr().Is4() == six {
		return fmt.Errorf("send to %s: %w", to, unix.EAFNOSUPPORT)
	}
	x.localLen = 0
	if !six {
		name := (*unix.RawSockaddrInet4)(unsafe.Pointer(&x.name))
		*name = unix.RawSockaddrInet4{Family: unix.AF_INET, Addr: to.Addr().As4()}
		binary.BigEndian.PutUint16((*[2]byte)(unsafe.Pointer(&name.Port))[:], to.Port())
		x.nameLen = unix.SizeofSockaddrInet4
		if from.Is4() {
			x.localLen = controlMessage(x.local[:], unix.IPPROTO_IP, unix.IP_PKTINFO, unix.SizeofInet4Pktinfo)
			*(*[4]byte)(x.local[unix.SizeofCmsghdr+4:]) = from.As4()
		}
		return nil
	}
	x.name = unix.RawSockaddrInet6{Family: unix.AF_INET6, Addr: to.Addr().As16()}
	binary.BigEndian.PutUint16((*[2]byte)(unsafe.Pointer(&x.name.Port))[:], to.Port())
	if zone := to.Addr().Zone(); zone != "" {
		id, err := zoneID(zone)
		if err != nil {
			return fmt.Errorf("send to %s: %w", to, err)
		}
		x.name.Scope_id = id
	}
	x.nameLen = unix.SizeofSockaddrInet6
	if from.Is6() {
		x.localLen = controlMessage(x.local[:], unix.IPPROTO_IPV6, unix.IPV6_PKTINFO, unix.SizeofInet6Pktinfo)
		*(*[16]byte)(x.local[unix.SizeofCmsghdr:]) = from.As16()
	}
	return nil
}

// controlMessage writes the header of one with size bytes behind it, which are
// zero, and returns how long it all is.
func controlMessage(b []byte, level, kind, size int) int {
	space := unix.CmsgSpace(size)
	clear(b[:space])
	h := (*unix.Cmsghdr)(unsafe.Pointer(&b[0]))
	h.Level, h.Type = int32(level), int32(kind)
	h.SetLen(unix.CmsgLen(size))
	return space
}
