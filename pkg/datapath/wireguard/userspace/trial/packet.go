package trial

import (
	"encoding/binary"
	"errors"
	"net/netip"

	"github.com/tailscale/wireguard-go/tun"
	"golang.org/x/sys/unix"
)

// headroom is what precedes a packet that is written.
const headroom = 16

// A conversation makes the packets of them, behind the link, and reads ours.
type conversation struct {
	us, them netip.AddrPort
	// seq is what they send next; ack what they expect; TCP only.
	seq, ack uint32
}

const tcpSyn, tcpAck = 0x02, 0x10

// datagrams are packets of theirs.
func (c *conversation) datagrams(parts [][]byte) (packets [][]byte) {
	for _, part := range parts {
		header := make([]byte, 8)
		c.ports(header)
		binary.BigEndian.PutUint16(header[4:], uint16(8+len(part)))
		packets = append(packets, c.packet(unix.IPPROTO_UDP, 6, header, part))
	}
	return packets
}

// segment is the next packet of theirs.
func (c *conversation) segment(flags byte, part []byte) []byte {
	header := make([]byte, 20)
	c.ports(header)
	binary.BigEndian.PutUint32(header[4:], c.seq)
	binary.BigEndian.PutUint32(header[8:], c.ack)
	header[12], header[13] = 5<<4, flags
	binary.BigEndian.PutUint16(header[14:], 1<<15)
	c.seq += uint32(len(part))
	return c.packet(unix.IPPROTO_TCP, 16, header, part)
}

func (c *conversation) ports(header []byte) {
	binary.BigEndian.PutUint16(header, c.them.Port())
	binary.BigEndian.PutUint16(header[2:], c.us.Port())
}

// packet puts the IP header before it and the checksum, at that offset, in.
func (c *conversation) packet(protocol uint8, checksum int, header, part []byte) []byte {
	length := len(header) + len(part)
	src, dst := c.them.Addr().AsSlice(), c.us.Addr().AsSlice()
	b := make([]byte, headroom)
	if len(src) == 4 {
		ip := append([]byte{0x45, 0, 0, 0, 0, 1, 0x40, 0, 64, protocol, 0, 0}, append(src, dst...)...)
		binary.BigEndian.PutUint16(ip[2:], uint16(20+length))
		binary.BigEndian.PutUint16(ip[10:], ^tun.Checksum(ip, 0))
		b = append(b, ip...)
	} else {
		ip := append([]byte{0x60, 0, 0, 0, 0, 0, protocol, 64}, append(src, dst...)...)
		binary.BigEndian.PutUint16(ip[4:], uint16(length))
		b = append(b, ip...)
	}
	l4 := len(b)
	b = append(append(b, header...), part...)
	sum := ^tun.Checksum(b[l4:], tun.PseudoHeaderChecksum(protocol, src, dst, uint16(length)))
	binary.BigEndian.PutUint16(b[l4+checksum:], sum)
	return b
}

// open returns what is behind the IP header of a packet of ours; nil if it is
// no such packet or of somebody else.
func (c *conversation) open(p []byte, protocol uint8) ([]byte, error) {
	var l4 []byte
	switch {
	case c.us.Addr().Is4() && len(p) > 20 && p[0] == 0x45 && p[9] == protocol:
		l4 = p[20:]
	case c.us.Addr().Is6() && len(p) > 40 && p[0]>>4 == 6 && p[6] == protocol:
		l4 = p[40:]
	}
	if len(l4) < 8 || binary.BigEndian.Uint16(l4) != c.us.Port() || binary.BigEndian.Uint16(l4[2:]) != c.them.Port() {
		return nil, nil
	}
	pseudo := tun.PseudoHeaderChecksum(protocol, c.us.Addr().AsSlice(), c.them.Addr().AsSlice(), uint16(len(l4)))
	if tun.Checksum(l4, pseudo) != 0xffff {
		return nil, errors.New("a packet has a wrong checksum")
	}
	return l4, nil
}

func (c *conversation) payloadOfDatagram(p []byte) ([]byte, error) {
	l4, err := c.open(p, unix.IPPROTO_UDP)
	if l4 == nil {
		return nil, err
	}
	return l4[8:], nil
}

// payloadOfSegment takes segments in order.
func (c *conversation) payloadOfSegment(p []byte) ([]byte, error) {
	l4, err := c.open(p, unix.IPPROTO_TCP)
	if len(l4) < 20 || len(l4) == int(l4[12]>>4)*4 {
		return nil, err
	}
	if binary.BigEndian.Uint32(l4[4:]) != c.ack {
		return nil, errors.New("a segment is missing")
	}
	payload := l4[int(l4[12]>>4)*4:]
	c.ack += uint32(len(payload))
	return payload, nil
}

// greeted takes the answer to their first packet.
func (c *conversation) greeted(p []byte) bool {
	l4, _ := c.open(p, unix.IPPROTO_TCP)
	if len(l4) < 20 || l4[13] != tcpSyn|tcpAck {
		return false
	}
	c.ack = binary.BigEndian.Uint32(l4[4:]) + 1
	return true
}
