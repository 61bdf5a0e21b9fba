package link

import (
	"bytes"
	"encoding/binary"

	"github.com/tailscale/wireguard-go/tun"
	"golang.org/x/sys/unix"
)

// A group is packets of one flow that are written as one, in order.
type group struct {
	offload Offloads // that it needs, and may use
	first   int      // packet
	last    int
	count   int
	size    int // of it all, as one packet
	open    bool
	checked bool // the first packet's checksum
	flow    flow
	headers int    // length, IP and what follows
	segment int    // payload of the first packet, the most of any
	seq     uint32 // that follows; TCP only
}

// flow is what packets of one connection have in common.
type flow struct {
	src, dst [16]byte
	ports    [4]byte
	protocol uint8
	l3       uint8 // length of the IP header
}

// groups of one batch of packets, in the order of their first packets.
type groups struct {
	packets [][]byte
	list    []group
	// next packet of the same group, by packet.
	next [batch]int
}

// sort puts packets into groups. Packets of one flow keep their order: what
// does not join its flow's last group ends that one.
func (g *groups) sort(packets [][]byte, may Offloads) {
	g.packets, g.list = packets, g.list[:0]
	for i, p := range packets {
		f, headers, known := flowOf(p)
		if !known { // a fragment of anything
			for j := range g.list {
				g.list[j].open = false
			}
			g.list = append(g.list, group{first: i, last: i, count: 1})
			continue
		}
		if last := g.find(f); last == nil || !g.join(last, i, headers) {
			g.list = append(g.list, begin(i, p, f, headers, may))
		}
	}
}

// find the last group of a flow.
func (g *groups) find(f flow) *group {
	for i := len(g.list) - 1; i >= 0; i-- {
		if last := &g.list[i]; last.flow.ports == f.ports && last.flow == f {
			return last
		}
	}
	return nil
}

// begin a group with one packet.
func begin(i int, p []byte, f flow, headers int, may Offloads) group {
	payload := len(p) - headers
	g := group{first: i, last: i, count: 1, size: len(p), flow: f, headers: headers, segment: payload}
	switch l4 := p[f.l3:]; f.protocol {
	case unix.IPPROTO_TCP:
		g.offload = TCP
		g.open = payload > 0 && l4[13] == tcpAck
		g.seq = binary.BigEndian.Uint32(l4[4:]) + uint32(payload)
	case unix.IPPROTO_UDP:
		g.offload = UDP
		g.open = payload > 0
	}
	g.open = g.open && may&g.offload != 0
	return g
}

const (
	tcpAck  = 0x10
	tcpPush = 0x08
)

// join adds packet i to the group of its flow if the kernel would cut the sum
// into the same packets again.
func (g *groups) join(last *group, i, headers int) bool {
	p, head, f := g.packets[i], g.packets[last.first], last.flow
	payload := len(p) - headers
	if !last.open || headers != last.headers || payload == 0 || payload > last.segment || last.size+payload > 1<<16-1 ||
		!sameIP(head, p) || f.protocol == unix.IPPROTO_TCP && !follows(last, head[f.l3:], p[f.l3:headers]) {
		last.open = false
		return false
	}
	// The kernel makes checksums for what is written as one: none may have
	// been wrong before.
	if !last.checked && !checksumOK(head, f) || !checksumOK(p, f) {
		last.open = false
		return false
	}
	last.checked = true
	g.next[last.last], last.last = i, i
	last.count++
	last.size += payload
	last.seq += uint32(payload)
	if payload < last.segment { // only the last may be shorter
		last.open = false
	}
	if f.protocol == unix.IPPROTO_TCP && p[f.l3+13]&tcpPush != 0 {
		last.open = false
	}
	return true
}

// sameIP says whether the fields of two IP headers are the same that would be
// copied.
func sameIP(a, b []byte) bool {
	if a[0]>>4 == 4 {
		return a[1] == b[1] && a[6] == b[6] && a[8] == b[8] // TOS, DF, TTL
	}
	return bytes.Equal(a[:4], b[:4]) && a[7] == b[7] // class and label, hops
}

// follows says whether a TCP segment is the next one of its group and has the
// same header.
func follows(last *group, head, p []byte) bool {
	return binary.BigEndian.Uint32(p[4:]) == last.seq && p[13]&^tcpPush == tcpAck &&
		bytes.Equal(p[8:13], head[8:13]) && bytes.Equal(p[14:16], head[14:16]) && // acknowledged, window
		bytes.Equal(p[20:], head[20:len(p)]) // options
}

// flowOf reads the headers of a packet, and how long they are. It is not known
// for packets that are parts or hide what they carry.
func flowOf(p []byte) (f flow, headers int, known bool) {
	switch {
	case len(p) >= 20 && p[0] == 0x45:
		if int(binary.BigEndian.Uint16(p[2:])) != len(p) || binary.BigEndian.Uint16(p[6:])&0x3fff != 0 {
			return f, 0, false
		}
		copy(f.src[:], p[12:16])
		copy(f.dst[:], p[16:20])
		f.protocol, f.l3 = p[9], 20
	case len(p) >= 40 && p[0]>>4 == 6:
		if int(binary.BigEndian.Uint16(p[4:]))+40 != len(p) {
			return f, 0, false
		}
		copy(f.src[:], p[8:24])
		copy(f.dst[:], p[24:40])
		f.protocol, f.l3 = p[6], 40
	default:
		return f, 0, false
	}
	l4 := p[f.l3:]
	size := 0
	switch f.protocol {
	case unix.IPPROTO_TCP:
		if len(l4) < 20 {
			return f, 0, false
		}
		size = int(l4[12]>>4) * 4
		if size < 20 || size > len(l4) {
			return f, 0, false
		}
		copy(f.ports[:], l4)
	case unix.IPPROTO_UDP:
		if len(l4) < 8 || int(binary.BigEndian.Uint16(l4[4:])) != len(l4) {
			return f, 0, false
		}
		size = 8
		copy(f.ports[:], l4)
	case unix.IPPROTO_ICMP, unix.IPPROTO_ICMPV6: // begin never opens a group for them
	default:
		return f, 0, false
	}
	return f, int(f.l3) + size, true
}

// sum is the checksum over addresses, protocol and length that TCP and UDP
// begin with.
func (f flow) sum(p []byte, length int) uint16 {
	if f.l3 == 20 {
		return tun.PseudoHeaderChecksum(f.protocol, p[12:16], p[16:20], uint16(length))
	}
	return tun.PseudoHeaderChecksum(f.protocol, p[8:24], p[24:40], uint16(length))
}

func checksumOK(p []byte, f flow) bool {
	if f.protocol == unix.IPPROTO_UDP && p[f.l3+6] == 0 && p[f.l3+7] == 0 { // it has none
		return false
	}
	return tun.Checksum(p[f.l3:], f.sum(p, len(p)-int(f.l3))) == 0xffff
}

// merge turns the first packet of a group into the head of the whole: lengths,
// a checksum for the kernel to go on with, and the header before it all.
func (g *groups) merge(m group, header []byte) {
	head := g.packets[m.first]
	l4 := head[m.flow.l3:]
	length := m.size - int(m.flow.l3)
	kind, offset := unix.VIRTIO_NET_HDR_GSO_UDP_L4, 6
	if m.flow.protocol == unix.IPPROTO_TCP {
		kind, offset = unix.VIRTIO_NET_HDR_GSO_TCPV4, 16
		if m.flow.l3 == 40 {
			kind = unix.VIRTIO_NET_HDR_GSO_TCPV6
		}
		l4[13] |= g.packets[m.last][m.flow.l3+13] & tcpPush
	} else {
		binary.BigEndian.PutUint16(l4[4:], uint16(length))
	}
	if m.flow.l3 == 20 {
		binary.BigEndian.PutUint16(head[2:], uint16(m.size))
		head[10], head[11] = 0, 0
		binary.BigEndian.PutUint16(head[10:], ^tun.Checksum(head[:20], 0))
	} else {
		binary.BigEndian.PutUint16(head[4:], uint16(length))
	}
	binary.BigEndian.PutUint16(l4[offset:], tun.Checksum(nil, m.flow.sum(head, length)))
	header[0], header[1] = unix.VIRTIO_NET_HDR_F_NEEDS_CSUM, byte(kind)
	for i, v := range []uint16{uint16(m.headers), uint16(m.segment), uint16(m.flow.l3), uint16(offset)} {
		binary.NativeEndian.PutUint16(header[2+2*i:], v)
	}
}
