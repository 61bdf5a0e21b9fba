package link

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"

	"github.com/tailscale/wireguard-go/tun"
	"golang.org/x/sys/unix"
)

// A pkt is a packet of flow 10.0.0.1 or fd00::1, port 1000+from, to .2, port 80.
type pkt struct {
	six   bool
	udp   bool
	from  int
	seq   uint32 // TCP
	flags byte   // TCP; 0 is ACK
	size  int    // of the payload
	// options makes the TCP header 12 bytes longer; ttl 0 is 64.
	options     bool
	ttl         byte
	badChecksum bool
	fragment    bool
}

func (p pkt) bytes() []byte {
	payload := make([]byte, p.size)
	for i := range payload {
		payload[i] = byte(int(p.seq) + i*13)
	}
	var l4 []byte
	protocol, at := byte(unix.IPPROTO_TCP), 16
	if p.udp {
		protocol, at = unix.IPPROTO_UDP, 6
		l4 = make([]byte, 8, 8+p.size)
		binary.BigEndian.PutUint16(l4[4:], uint16(8+p.size))
	} else {
		l4 = make([]byte, 20, 32+p.size)
		binary.BigEndian.PutUint32(l4[4:], p.seq)
		l4[12], l4[13] = 5<<4, max(p.flags, tcpAck)
		if p.flags == tcpPush {
			l4[13] = tcpPush | tcpAck
		}
		if p.options {
			l4[12] = 8 << 4
			l4 = append(l4, 1, 1, 8, 10, 0, 0, 0, 1, 0, 0, 0, 2)
		}
	}
	binary.BigEndian.PutUint16(l4, uint16(1000+p.from))
	binary.BigEndian.PutUint16(l4[2:], 80)
	l4 = append(l4, payload...)
	ttl := max(p.ttl, 64)
	var ip []byte
	var src, dst []byte
	if p.six {
		ip = make([]byte, 40)
		ip[0], ip[6], ip[7] = 0x60, protocol, ttl
		binary.BigEndian.PutUint16(ip[4:], uint16(len(l4)))
		ip[8], ip[23], ip[24], ip[39] = 0xfd, 1, 0xfd, 2
		src, dst = ip[8:24], ip[24:40]
	} else {
		ip = []byte{0x45, 0, 0, 0, 0, 1, 0x40, 0, ttl, protocol, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2}
		binary.BigEndian.PutUint16(ip[2:], uint16(20+len(l4)))
		if p.fragment {
			ip[6] = 0x20
		}
		binary.BigEndian.PutUint16(ip[10:], ^tun.Checksum(ip, 0))
		src, dst = ip[12:16], ip[16:20]
	}
	sum := ^tun.Checksum(l4, tun.PseudoHeaderChecksum(protocol, src, dst, uint16(len(l4))))
	if p.badChecksum {
		sum++
	}
	binary.BigEndian.PutUint16(l4[at:], sum)
	return append(ip, l4...)
}

// shape is the groups as lists of packets.
func shape(packets [][]byte, may Offloads) string {
	var g groups
	g.sort(packets, may)
	var all []string
	for _, m := range g.list {
		one := []string{fmt.Sprint(m.first)}
		for i := m.first; i != m.last; {
			i = g.next[i]
			one = append(one, fmt.Sprint(i))
		}
		all = append(all, strings.Join(one, "+"))
	}
	return strings.Join(all, " ")
}

func TestGroups(t *testing.T) {
	for _, tc := range []struct {
		name string
		in   []pkt
		may  Offloads
		want string
	}{
		{"segments in a row", []pkt{{seq: 0, size: 100}, {seq: 100, size: 100}, {seq: 200, size: 50}}, TCP | UDP, "0+1+2"},
		{"of IPv6", []pkt{{six: true, size: 100}, {six: true, seq: 100, size: 100}}, TCP, "0+1"},
		{"nothing behind a short one", []pkt{{size: 100}, {seq: 100, size: 50}, {seq: 150, size: 50}}, TCP, "0+1 2"},
		{"no longer one behind it", []pkt{{size: 100}, {seq: 100, size: 101}}, TCP, "0 1"},
		{"a gap", []pkt{{size: 100}, {seq: 200, size: 100}}, TCP, "0 1"},
		{"push ends it", []pkt{{size: 100}, {seq: 100, size: 100, flags: tcpPush}, {seq: 200, size: 100}}, TCP, "0+1 2"},
		{"an acknowledgement in between", []pkt{{size: 100}, {seq: 100}, {seq: 100, size: 100}}, TCP, "0 1 2"},
		{"other header length in between", []pkt{{size: 100}, {seq: 100, size: 100, options: true}, {seq: 200, size: 100}}, TCP, "0 1 2"},
		{"same options", []pkt{{size: 100, options: true}, {seq: 100, size: 100, options: true}}, TCP, "0+1"},
		{"two connections by turns", []pkt{{size: 9}, {from: 1, size: 9}, {seq: 9, size: 9}, {from: 1, seq: 9, size: 9}}, TCP, "0+2 1+3"},
		{"other hop limit", []pkt{{size: 100}, {seq: 100, size: 100, ttl: 65}}, TCP, "0 1"},
		{"a wrong checksum in front", []pkt{{size: 9, badChecksum: true}, {seq: 9, size: 9}, {seq: 18, size: 9}}, TCP, "0 1+2"},
		{"a wrong checksum behind", []pkt{{size: 9}, {seq: 9, size: 9, badChecksum: true}, {seq: 18, size: 9}}, TCP, "0 1 2"},
		{"FIN stays alone", []pkt{{size: 9}, {seq: 9, size: 9, flags: tcpAck | 1}, {seq: 18, size: 9}}, TCP, "0 1 2"},
		{"datagrams", []pkt{{udp: true, size: 100}, {udp: true, size: 100}, {udp: true, size: 3}, {udp: true, size: 3}}, UDP, "0+1+2 3"},
		{"datagrams without the offload", []pkt{{udp: true, size: 100}, {udp: true, size: 100}}, TCP, "0 1"},
		{"segments without the offload", []pkt{{size: 100}, {seq: 100, size: 100}}, UDP, "0 1"},
		{"nothing passes a fragment", []pkt{{size: 9}, {seq: 9, size: 9, fragment: true}, {seq: 9, size: 9}}, TCP, "0 1 2"},
		{"as much as one packet can be", []pkt{{size: 30000}, {seq: 30000, size: 30000}, {seq: 60000, size: 30000}}, TCP, "0+1 2"},
	} {
		var packets [][]byte
		for _, p := range tc.in {
			packets = append(packets, p.bytes())
		}
		if got := shape(packets, tc.may); got != tc.want {
			t.Errorf("%s: %s, want %s", tc.name, got, tc.want)
		}
	}
}

// What is merged and cut again is the same packets, in the same order within
// each flow.
func TestMergedIsCutBack(t *testing.T) {
	for seed := range uint64(300) {
		random := rand.New(rand.NewPCG(seed, 0))
		seqs := map[pkt]uint32{}
		var packets [][]byte
		for range 1 + random.IntN(batch) {
			key := pkt{six: random.IntN(2) == 0, udp: random.IntN(3) == 0, from: random.IntN(3)}
			p := key
			p.size = []int{0, 1, 100, 100, 100, 100, 1380}[random.IntN(7)]
			p.options, p.fragment = random.IntN(20) == 0, !p.six && random.IntN(40) == 0
			p.badChecksum = random.IntN(40) == 0
			p.seq = seqs[key]
			if random.IntN(10) > 0 { // else it is sent again
				seqs[key] += uint32(p.size)
			}
			packets = append(packets, p.bytes())
		}
		before := flowsOf(packets)
		var after [][]byte
		var g groups
		g.sort(packets, TCP|UDP)
		for _, m := range g.list {
			if m.count == 1 {
				after = append(after, packets[m.first])
				continue
			}
			header := make([]byte, headerSize)
			g.merge(m, header)
			whole := append(header, packets[m.first]...)
			for i := m.first; i != m.last; {
				i = g.next[i]
				whole = append(whole, packets[i][m.headers:]...)
			}
			after = append(after, cut(t, whole)...)
		}
		if got := flowsOf(after); got != before {
			t.Fatalf("seed %d: %d packets became others:\n%s\nwere\n%s", seed, len(packets), got, before)
		}
	}
}

func cut(t *testing.T, in []byte) (packets [][]byte) {
	t.Helper()
	p := parse(in)
	slab, list := make([]byte, 2<<16), make([]tun.ReadPacket, batch)
	n, err := tun.GSOSplit(p.data, p.GSOOptions, slab, list, tun.ReadPacketSpacing)
	if err != nil || n != p.segments || list[n-1].Offset+list[n-1].Size != p.size {
		t.Fatalf("cut into %d (%v), want %d that end at %d", n, err, p.segments, p.size)
	}
	for _, q := range list[:n] {
		packets = append(packets, bytes.Clone(slab[q.Offset:q.Offset+q.Size]))
	}
	return packets
}

// flowsOf lists packets by flow. The identification of IPv4 is the kernel's.
func flowsOf(packets [][]byte) string {
	flows := map[string]string{}
	for _, p := range packets {
		p := bytes.Clone(p)
		if p[0] == 0x45 {
			p[4], p[5], p[10], p[11] = 0, 0, 0, 0
		}
		f, _, _ := flowOf(p)
		key := fmt.Sprint(f)
		flows[key] += fmt.Sprintf("%x\n", p)
	}
	return fmt.Sprint(flows)
}

// Whatever comes out of the tunnel or the kernel does no harm.
func FuzzPackets(f *testing.F) {
	f.Add(pkt{size: 10}.bytes(), pkt{seq: 10, size: 10}.bytes())
	f.Add(pkt{six: true, udp: true, size: 10}.bytes(), pkt{six: true, udp: true, size: 5}.bytes())
	f.Add([]byte{0x45}, []byte{0x60})
	f.Add([]byte{1, 1, 40, 0, 10, 0, 20, 0, 16, 0, 0x45, 0}, []byte{})
	f.Fuzz(func(t *testing.T, a, b []byte) {
		var g groups
		g.sort([][]byte{a, b}, TCP|UDP)
		for _, m := range g.list {
			if m.count > 1 {
				g.merge(m, make([]byte, headerSize))
			}
		}
		p := parse(a)
		slab, list := make([]byte, 2<<16), make([]tun.ReadPacket, batch)
		if n, _ := tun.GSOSplit(p.data, p.GSOOptions, slab, list, tun.ReadPacketSpacing); n > p.segments {
			t.Errorf("%d packets, announced were %d", n, p.segments)
		}
	})
}
