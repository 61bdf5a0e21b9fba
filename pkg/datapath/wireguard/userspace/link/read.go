package link

import (
	"encoding/binary"
	"unsafe"

	"github.com/tailscale/wireguard-go/tun"
	"golang.org/x/sys/unix"
)

// headerSize is that of struct virtio_net_hdr, which precedes each packet.
const headerSize = 10

// reader is the state of Read, which one goroutine calls at a time.
type reader struct {
	take func(fd uintptr) bool // fill, made once

	slab    []byte
	packets []tun.ReadPacket
	n       int
	err     error

	// ahead holds a packet, with its header, that did not fit any more.
	ahead    [headerSize + 1<<16]byte
	aheadLen int
}

// Read implements tun.Reader. A packet that makes no sense is left out.
func (d *Device) Read(slab []byte, packets []tun.ReadPacket) (int, error) {
	r := &d.in
	r.slab, r.packets, r.n, r.err = slab, packets[:min(len(packets), batch)], 0, nil
	err := d.raw.Read(r.take)
	r.slab, r.packets = nil, nil
	if err == nil {
		err = r.err
	}
	return r.n, d.gone(err)
}

// fill reads until there is nothing, or what there is does not fit. It returns
// false when there was nothing at all, to be called again when there is.
func (d *Device) fill(fd uintptr) bool {
	r := &d.in
	used := 0 // of slab, without the spacing behind the last packet
	for {
		if r.aheadLen == 0 {
			n, errno := read(fd, r.ahead[:])
			switch errno {
			case 0:
				r.aheadLen = n
			case unix.EINTR:
				continue
			case unix.EAGAIN:
				return r.n > 0
			default:
				if r.n == 0 { // else the next call meets it again
					r.err = errno
				}
				return true
			}
		}
		p := parse(r.ahead[:r.aheadLen])
		slab, packets := r.slab[used:], r.packets[r.n:]
		if r.n > 0 && (p.segments > len(packets) || p.size+tun.ReadPacketSpacing > len(slab)) {
			return true
		}
		// An error is of a packet that makes no sense, or too large even alone:
		// then its beginning arrives.
		n, _ := tun.GSOSplit(p.data, p.GSOOptions, slab, packets, tun.ReadPacketSpacing)
		for i := range n {
			packets[i].Offset += used
		}
		r.n, used, r.aheadLen = r.n+n, used+p.size, 0
		if r.n == len(r.packets) {
			return true
		}
	}
}

// read is read(2) of a descriptor that does not block: the scheduler need not
// know of it.
func read(fd uintptr, b []byte) (int, unix.Errno) {
	n, _, errno := unix.RawSyscall(unix.SYS_READ, fd, uintptr(unsafe.Pointer(unsafe.SliceData(b))), uintptr(len(b)))
	return int(n), errno
}

// packet is one as it was read: one that goes over the wire, or the data of
// several with headers to make theirs from.
type packet struct {
	tun.GSOOptions
	data []byte
	// segments is how many packets it becomes, size what they take of a slab:
	// themselves, and spacing before each.
	segments, size int
}

// parse reads the header. What makes no sense becomes a packet that GSOSplit
// refuses.
func parse(in []byte) packet {
	if len(in) < headerSize {
		return packet{}
	}
	header, data := in[:headerSize], in[headerSize:]
	p := packet{data: data, segments: 1, size: tun.ReadPacketSpacing + len(data)}
	p.CsumStart, p.CsumOffset = binary.NativeEndian.Uint16(header[6:]), binary.NativeEndian.Uint16(header[8:])
	p.NeedsCsum = header[0]&unix.VIRTIO_NET_HDR_F_NEEDS_CSUM != 0
	// The length of headers is not taken from the kernel: in what it forwards
	// that may be the whole first packet.
	headers := int(p.CsumStart)
	switch header[1] {
	case unix.VIRTIO_NET_HDR_GSO_NONE:
		return p
	case unix.VIRTIO_NET_HDR_GSO_TCPV4, unix.VIRTIO_NET_HDR_GSO_TCPV6:
		p.GSOType = tun.GSOTCPv4
		if header[1] == unix.VIRTIO_NET_HDR_GSO_TCPV6 {
			p.GSOType = tun.GSOTCPv6
		}
		if headers+13 <= len(data) {
			headers += int(data[headers+12]>>4) * 4
		}
	case unix.VIRTIO_NET_HDR_GSO_UDP_L4:
		p.GSOType = tun.GSOUDPL4
		headers += 8
	default:
		return packet{}
	}
	p.HdrLen, p.GSOSize = uint16(headers), binary.NativeEndian.Uint16(header[4:])
	if p.GSOSize > 0 && headers < len(data) {
		p.segments = (len(data) - headers + int(p.GSOSize) - 1) / int(p.GSOSize)
		p.size += (p.segments - 1) * (headers + tun.ReadPacketSpacing)
	}
	return p
}
