package shortcut

import (
	"encoding/binary"
	"net"
	"net/netip"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"meshd.dev/pkg/datapath/internal/testns"
)

// packet is an Ethernet frame from a pod to its gateway.
type packet struct {
	src, dst     netip.Addr
	proto        byte
	sport, dport uint16
	flags        byte // of TCP
	payload      string
	hops         byte
	// spoil the frame, before the checksum of IPv4's header.
	spoil func(frame []byte) []byte
}

func (p packet) bytes() []byte {
	l4 := make([]byte, 8, 2000)
	if p.proto == unix.IPPROTO_TCP {
		l4 = append(l4, make([]byte, 12)...)
		l4[12], l4[13] = 5<<4, p.flags
	}
	binary.BigEndian.PutUint16(l4, p.sport)
	binary.BigEndian.PutUint16(l4[2:], p.dport)
	if p.proto == unix.IPPROTO_UDP {
		binary.BigEndian.PutUint16(l4[4:], uint16(len(l4)+len(p.payload)))
	}
	l4 = append(l4, p.payload...)
	sum := 6
	if p.proto == unix.IPPROTO_TCP {
		sum = 16
	}
	src, dst := p.src.AsSlice(), p.dst.AsSlice()
	pseudo := append(append(append([]byte{}, src...), dst...), 0, p.proto, byte(len(l4)>>8), byte(len(l4)))
	binary.BigEndian.PutUint16(l4[sum:], checksum(append(pseudo, l4...)))
	frame := append([]byte{0x0a, 'm', 'e', 's', 'h', 1}, 0x0a, 0x58, 0, 0, 0, 1)
	if p.src.Is4() {
		frame = append(frame, 8, 0, 0x45, 0, 0, 0, 0, 7, 0x40, 0, p.hops, p.proto, 0, 0)
		binary.BigEndian.PutUint16(frame[16:], uint16(20+len(l4)))
	} else {
		frame = append(frame, 0x86, 0xdd, 0x60, 0, 0, 0, byte(len(l4)>>8), byte(len(l4)), p.proto, p.hops)
	}
	frame = append(append(append(frame, src...), dst...), l4...)
	if p.spoil != nil {
		frame = p.spoil(frame)
	}
	if frame[12] == 8 && frame[13] == 0 {
		header := frame[14 : 14+4*(frame[14]&15)]
		binary.BigEndian.PutUint16(header[10:], checksum(header))
	}
	return frame
}

func checksum(b []byte) uint16 {
	n := uint32(0)
	for i, c := range b {
		n += uint32(c) << (8 * (1 - i%2))
	}
	for n > 0xffff {
		n = n>>16 + n&0xffff
	}
	return ^uint16(n)
}

// wire is a socket below IP in a pod.
func (l *lab) wire(pod string) func(packet) {
	l.Helper()
	var fd int
	var eth *net.Interface
	var err, err2 error
	l.in(pod, func() {
		fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_RAW, 0)
		eth, err2 = net.InterfaceByName("eth0")
	})
	if err != nil || err2 != nil {
		l.Fatal(err, err2)
	}
	l.Cleanup(func() { unix.Close(fd) })
	return func(p packet) {
		l.Helper()
		if err := unix.Sendto(fd, p.bytes(), 0, &unix.SockaddrLinklayer{Ifindex: eth.Index, Halen: 6}); err != nil {
			l.Fatal(err)
		}
	}
}

// Nobody takes the shortcut of another: not with the very packets of a
// connection that is on it.
func TestForgedPacketsAreNotDelivered(t *testing.T) {
	l := newLab(t, 2, 3, 4)
	s := l.shortcut()
	l.serve("p3", 3, 80)
	l.serve("p4", 4, 80)
	forge := l.wire("p4")
	for _, family := range []struct{ victim, server, own netip.Addr }{{addr4(2), addr4(3), addr4(4)}, {addr6(2), addr6(3), addr6(4)}} {
		c := l.dial("p2", "udp", netip.AddrPortFrom(family.server, 80).String(), 4000)
		ask := func() { c.ask(10, "good", says("p3", family.victim, "good")) }
		ask()
		l.assure()
		genuine := packet{src: family.victim, dst: family.server, proto: unix.IPPROTO_UDP, sport: 4000, dport: 80, payload: "evil\n", hops: 64}
		for name, change := range map[string]func(*packet){
			"another pod's address":   func(*packet) {},
			"the server's own":        func(p *packet) { p.src = family.server },
			"the way back":            func(p *packet) { p.src, p.dst, p.sport, p.dport = p.dst, p.src, 80, 4000 },
			"the machine's":           func(p *packet) { p.src = addr4(1); fitFamily(p, addr6(1)) },
			"a pod that is not there": func(p *packet) { p.src = addr4(9); fitFamily(p, addr6(9)) },
			"a service": func(p *packet) {
				p.src = netip.MustParseAddr("10.96.0.1")
				fitFamily(p, netip.MustParseAddr("fd00:10:96::1"))
			},
			"another pod's address, over TCP": func(p *packet) { p.proto, p.flags = unix.IPPROTO_TCP, 0x10 },
		} {
			p := genuine
			change(&p)
			if n := l.taken(s, func() {
				for range 5 {
					forge(p)
				}
			}); n != 0 {
				t.Errorf("from %s: %d forged packets took the shortcut", name, n)
			}
			ask() // what was delivered would be answered, and the answers mixed up
		}
		// The same socket, not forged, gets through: so the test can fail.
		own := packet{src: family.own, dst: family.server, proto: unix.IPPROTO_UDP, sport: 4000, dport: 80, payload: "own\n", hops: 64}
		peer := l.dial("p4", "udp", netip.AddrPortFrom(family.server, 80).String(), 4000)
		peer.ask(3, "hello", says("p3", family.own, "hello"))
		l.assure()
		if n := l.taken(s, func() { forge(own) }); n == 0 {
			t.Error("a packet that is not forged did not take the shortcut")
		}
	}
}

// fitFamily makes src of a packet IPv6's, where the packet is.
func fitFamily(p *packet, six netip.Addr) {
	if p.dst.Is6() {
		p.src = six
	}
}

// What is odd about a packet is the stack's to judge.
func TestOddPacketsTakeTheStack(t *testing.T) {
	l := newLab(t, 2)
	l.attach(3, "p3", 1400)
	s := l.shortcut()
	l.serve("p3", 3, 80)
	send := l.wire("p2")
	for _, family := range []struct{ src, dst netip.Addr }{{addr4(2), addr4(3)}, {addr6(2), addr6(3)}} {
		to := netip.AddrPortFrom(family.dst, 80).String()
		l.dial("p2", "udp", to, 4000).ask(3, "hello", says("p3", family.src, "hello"))
		l.assure()
		l.dial("p2", "tcp", to, 4000).ask(3, "hello", says("p3", family.src, "hello"))
		l.mute(s, "mshp3") // answers shall not count
		udp := packet{src: family.src, dst: family.dst, proto: unix.IPPROTO_UDP, sport: 4000, dport: 80, payload: "x", hops: 64}
		tcp := udp
		tcp.proto, tcp.flags = unix.IPPROTO_TCP, 0x10
		four, six := family.src.Is4(), family.src.Is6()
		fits := 1400 - 8 - 40
		if four {
			fits += 20
		}
		for _, c := range []struct {
			name string
			only bool // in this family
			from packet
			odd  func(*packet)
			want uint64
		}{
			{"plain UDP", true, udp, func(*packet) {}, 1},
			{"plain TCP", true, tcp, func(*packet) {}, 1},
			{"as large as the pod's link", true, udp, func(p *packet) { p.payload = strings.Repeat("x", fits) }, 1},
			{"larger than that", true, udp, func(p *packet) { p.payload = strings.Repeat("x", fits+1) }, 0},
			{"two hops left", true, udp, func(p *packet) { p.hops = 2 }, 1},
			{"one hop left", true, udp, func(p *packet) { p.hops = 1 }, 0},
			{"another port", true, udp, func(p *packet) { p.dport = 81 }, 0},
			{"another port of the sender", true, tcp, func(p *packet) { p.sport = 4001 }, 0},
			{"SYN", true, tcp, func(p *packet) { p.flags = 0x02 }, 0},
			{"SYN of an answer", true, tcp, func(p *packet) { p.flags = 0x12 }, 0},
			{"to itself", true, udp, func(p *packet) { p.dst = p.src }, 0},
			{"to the machine", true, udp, func(p *packet) {
				p.dst = addr4(1)
				if six {
					p.dst = addr6(1)
				}
			}, 0},
			{"cut off", true, udp, func(p *packet) { p.spoil = func(f []byte) []byte { return f[:len(f)-5] } }, 0},
			{"cut off TCP", true, tcp, func(p *packet) { p.spoil = func(f []byte) []byte { return f[:len(f)-8] } }, 0},
			{"SCTP", true, udp, func(p *packet) { p.proto = unix.IPPROTO_SCTP }, 0},
			{"ICMP", true, udp, func(p *packet) { p.proto = unix.IPPROTO_ICMP }, 0},
			{"with a VLAN", true, udp, func(p *packet) {
				p.spoil = func(f []byte) []byte { return append(append(append([]byte{}, f[:12]...), 0x81, 0, 0, 5), f[12:]...) }
			}, 0},
			{"options", four, udp, func(p *packet) { p.spoil = withOptions }, 0},
			{"first fragment", four, udp, func(p *packet) { p.spoil = func(f []byte) []byte { f[20] = 0x20; return f } }, 0},
			{"last fragment", four, udp, func(p *packet) { p.spoil = func(f []byte) []byte { f[20], f[21] = 0, 9; return f } }, 0},
			{"a fragment in the middle", four, udp, func(p *packet) { p.spoil = func(f []byte) []byte { f[20], f[21] = 0x21, 9; return f } }, 0},
			{"may be split", four, udp, func(p *packet) { p.spoil = func(f []byte) []byte { f[20] = 0; return f } }, 1},
			{"extension header", six, udp, func(p *packet) { p.spoil = withExtension }, 0},
		} {
			if !c.only {
				continue
			}
			c.odd(&c.from)
			n := l.taken(s, func() { send(c.from) })
			for try := 0; n != c.want && try < 3; try++ { // a late acknowledgement of the connection came in between
				n = l.taken(s, func() { send(c.from) })
			}
			if n != c.want {
				t.Errorf("%s from %s: %d took the shortcut, want %d", c.name, family.src, n, c.want)
			}
		}
		l.round(s)
	}
}

// withOptions that could be taken for the ports.
func withOptions(f []byte) []byte {
	f[14] = 0x46
	binary.BigEndian.PutUint16(f[16:], binary.BigEndian.Uint16(f[16:])+4)
	return append(append(append([]byte{}, f[:34]...), f[34:38]...), f[34:]...)
}

func withExtension(f []byte) []byte {
	binary.BigEndian.PutUint16(f[18:], binary.BigEndian.Uint16(f[18:])+8)
	next := f[20]
	f[20] = unix.IPPROTO_DSTOPTS
	return append(append(append([]byte{}, f[:54]...), next, 0, 1, 4, 0, 0, 0, 0), f[54:]...)
}

// Pods that were made before and after a change of the MTU talk to each other,
// both ways, whatever way the packets take.
func TestDifferentMTUs(t *testing.T) {
	l := newLab(t)
	l.attach(2, "p2", 1500)
	l.attach(3, "p3", 1400)
	s := l.shortcut()
	l.serve("p2", 2, 80)
	l.serve("p3", 3, 80)
	line := strings.Repeat("x", 300_000)
	for _, c := range []struct {
		from, to string
		src, dst netip.Addr
	}{
		{"p2", "p3", addr4(2), addr4(3)}, {"p2", "p3", addr6(2), addr6(3)},
		{"p3", "p2", addr4(3), addr4(2)}, {"p3", "p2", addr6(3), addr6(2)},
	} {
		conn := l.dial(c.from, "tcp", netip.AddrPortFrom(c.dst, 80).String(), 0)
		if n := l.taken(s, func() { conn.ask(5, line, says(c.to, c.src, line)) }); n == 0 {
			t.Errorf("from %s nothing took the shortcut", c.src)
		}
	}
	// Of what has no room the sender is told.
	conn := l.dial("p2", "udp", "10.244.1.3:80", 0)
	conn.ask(3, "hello", says("p3", addr4(2), "hello"))
	if _, err := conn.c.Write(make([]byte, 1450)); err != nil {
		t.Fatal(err)
	}
	if got := testns.Sh(t, "ip netns exec p2 ip route get 10.244.1.3"); !strings.Contains(got, "mtu 1400") {
		t.Errorf("p2 was not told that only 1400 fit: %s", got)
	}
}

// mute takes the program off a link, until the next round.
func (l *lab) mute(s *Shortcut, name string) {
	l.Helper()
	if err := detach(linkIndex(l, name), s.program.program); err != nil {
		l.Fatal(err)
	}
}
