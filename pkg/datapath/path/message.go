package path

import (
	"encoding/binary"
	"errors"
	"net/netip"
)

// A probe is an ICMP echo through the tunnel, which the peer's kernel answers
// without anybody's help. What it carries tells the peer, if it reads it, by
// which address we see it:
//
//	0  magic
//	4  address, IPv4 as ::ffff:a.b.c.d; all zero: we do not know
//	20 port
//	22 zeros up to the size
const (
	magic      = 0x6d736870 // mshp
	messageLen = 22
)

// ICMP, RFC 792 and RFC 4443.
const (
	echoReply4, echoRequest4 = 0, 8
	echoRequest6, echoReply6 = 128, 129
	icmpLen                  = 8
)

// headerOf the IP packet around an ICMP message, without options.
func headerOf(a netip.Addr) int {
	if a.Is4() {
		return 20
	}
	return 40
}

// echo is a request or an answer, without its IP header.
type echo struct {
	reply   bool
	id, seq uint16
	// seen is the address by which the sender of the request sees its peer.
	seen netip.AddrPort
	size int // of the whole packet
}

// encodeEcho makes the request for an address of the family of to. The kernel
// fills in the checksum of ICMPv6.
func encodeEcho(e echo, to netip.Addr) []byte {
	b := make([]byte, max(e.size-headerOf(to), icmpLen+messageLen))
	b[0] = echoRequest4
	if to.Is6() {
		b[0] = echoRequest6
	}
	binary.BigEndian.PutUint16(b[4:], e.id)
	binary.BigEndian.PutUint16(b[6:], e.seq)
	m := b[icmpLen:]
	binary.BigEndian.PutUint32(m, magic)
	if e.seen.IsValid() {
		a := e.seen.Addr().As16()
		copy(m[4:], a[:])
		binary.BigEndian.PutUint16(m[20:], e.seen.Port())
	}
	if to.Is4() {
		binary.BigEndian.PutUint16(b[2:], checksum(b))
	}
	return b
}

var errNotOurs = errors.New("not one of our probes")

// decodeEcho reads what came in from an address.
func decodeEcho(b []byte, from netip.Addr) (echo, error) {
	if len(b) < icmpLen+messageLen || len(b) > 1<<16 || b[1] != 0 || binary.BigEndian.Uint32(b[icmpLen:]) != magic {
		return echo{}, errNotOurs
	}
	e := echo{id: binary.BigEndian.Uint16(b[4:]), seq: binary.BigEndian.Uint16(b[6:]), size: len(b) + headerOf(from)}
	switch {
	case from.Is4() && b[0] == echoRequest4, from.Is6() && b[0] == echoRequest6:
	case from.Is4() && b[0] == echoReply4, from.Is6() && b[0] == echoReply6:
		e.reply = true
	default:
		return echo{}, errNotOurs
	}
	m := b[icmpLen:]
	addr := netip.AddrFrom16([16]byte(m[4:20])).Unmap()
	if port := binary.BigEndian.Uint16(m[20:]); port != 0 && !addr.IsUnspecified() {
		e.seen = netip.AddrPortFrom(addr, port)
	}
	return e, nil
}

// checksum of RFC 1071.
func checksum(b []byte) uint16 {
	var sum uint32
	for i := 0; i+1 < len(b); i += 2 {
		sum += uint32(binary.BigEndian.Uint16(b[i:]))
	}
	if len(b)%2 == 1 {
		sum += uint32(b[len(b)-1]) << 8
	}
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	return ^uint16(sum)
}
