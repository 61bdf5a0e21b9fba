package rtnl

import (
	"encoding/binary"
	"net/netip"

	"golang.org/x/sys/unix"
)

const headerLen = 16

// header is struct nlmsghdr.
type header struct {
	len   uint32
	typ   uint16
	flags uint16
	seq   uint32
}

func readHeader(b []byte) header {
	return header{
		len:   binary.NativeEndian.Uint32(b),
		typ:   binary.NativeEndian.Uint16(b[4:]),
		flags: binary.NativeEndian.Uint16(b[6:]),
		seq:   binary.NativeEndian.Uint32(b[8:]),
	}
}

func align(n int) int { return (n + 3) &^ 3 }

// message is one request being built at the end of a buffer that may already
// hold others.
type message struct {
	b     []byte
	start int
	flags uint16
}

// begin writes the header, whose length and sequence come with finish, and the
// fixed part behind it.
func (m *message) begin(typ, flags uint16, fixed ...byte) {
	m.flags = flags
	m.b = append(m.b, 0, 0, 0, 0)
	m.b = binary.NativeEndian.AppendUint16(m.b, typ)
	m.b = append(m.b, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0)
	m.b = append(m.b, fixed...)
}

func (m *message) finish(flags uint16, seq uint32) []byte {
	h := m.b[m.start:]
	binary.NativeEndian.PutUint32(h, uint32(len(h)))
	binary.NativeEndian.PutUint16(h[6:], m.flags|flags)
	binary.NativeEndian.PutUint32(h[8:], seq)
	return m.pad()
}

func (m *message) pad() []byte {
	for len(m.b)%4 != 0 {
		m.b = append(m.b, 0)
	}
	return m.b
}

func (m *message) attr(typ uint16, value []byte) {
	m.b = binary.NativeEndian.AppendUint16(m.b, uint16(4+len(value)))
	m.b = binary.NativeEndian.AppendUint16(m.b, typ)
	m.b = append(m.b, value...)
	m.pad()
}

func (m *message) attrUint32(typ uint16, v uint32) {
	m.attr(typ, binary.NativeEndian.AppendUint32(nil, v))
}

func (m *message) attrString(typ uint16, s string) { m.attr(typ, append([]byte(s), 0)) }

func (m *message) attrAddr(typ uint16, a netip.Addr) { m.attr(typ, a.AsSlice()) }

// nest puts what inner writes into one attribute.
func (m *message) nest(typ uint16, inner func()) {
	at := len(m.b)
	m.attr(typ, nil)
	inner()
	binary.NativeEndian.PutUint16(m.b[at:], uint16(len(m.b)-at))
}

// eachAttr walks attributes and stops at the first that does not fit.
func eachAttr(b []byte, f func(typ uint16, value []byte)) {
	for len(b) >= 4 {
		n := int(binary.NativeEndian.Uint16(b))
		if n < 4 || n > len(b) {
			return
		}
		f(binary.NativeEndian.Uint16(b[2:])&^(unix.NLA_F_NESTED|unix.NLA_F_NET_BYTEORDER), b[4:n])
		b = b[min(align(n), len(b)):]
	}
}

func family(a netip.Addr) byte {
	if a.Is4() {
		return unix.AF_INET
	}
	return unix.AF_INET6
}

// ifinfomsg, ifaddrmsg, rtmsg and ndmsg are the fixed parts of the four kinds
// of request.
func ifinfomsg(index int, flags, change uint32) []byte {
	b := make([]byte, 4, 16)
	b = binary.NativeEndian.AppendUint32(b, uint32(index))
	b = binary.NativeEndian.AppendUint32(b, flags)
	return binary.NativeEndian.AppendUint32(b, change)
}

func ifaddrmsg(p netip.Prefix, flags, scope byte, index int) []byte {
	b := []byte{family(p.Addr()), byte(p.Bits()), flags, scope}
	return binary.NativeEndian.AppendUint32(b, uint32(index))
}

func rtmsg(fam, bits, table, protocol, scope, typ byte, flags uint32) []byte {
	b := []byte{fam, bits, 0, 0, table, protocol, scope, typ}
	return binary.NativeEndian.AppendUint32(b, flags)
}

func ndmsg(fam byte, index int, state uint16) []byte {
	b := []byte{fam, 0, 0, 0}
	b = binary.NativeEndian.AppendUint32(b, uint32(index))
	b = binary.NativeEndian.AppendUint16(b, state)
	return append(b, 0, 0)
}
