package shortcut

import (
	"fmt"
	"io"
	"net"
	"net/netip"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"meshd.dev/pkg/datapath/firewall"
	"meshd.dev/pkg/datapath/internal/testns"
	"meshd.dev/pkg/mesh"
)

// Of what two pods say to each other everything takes the shortcut but how it
// begins.
func TestBetweenPods(t *testing.T) {
	l := newLab(t, 2, 3)
	s := l.shortcut()
	l.serve("p3", 3, 80)
	for _, network := range []string{"tcp", "udp"} {
		for _, a := range [][2]netip.Addr{{addr4(2), addr4(3)}, {addr6(2), addr6(3)}} {
			c := l.dial("p2", network, netip.AddrPortFrom(a[1], 80).String(), 0)
			c.ask(2, "hello", says("p3", a[0], "hello")) // the beginning
			if network == "udp" {
				if n := l.taken(s, func() { c.ask(5, "hello", says("p3", a[0], "hello")) }); n != 0 {
					t.Errorf("%d packets took the shortcut of what began a moment ago", n)
				}
				port := c.c.LocalAddr().(*net.UDPAddr).AddrPort().Port()
				if left, ok := remembered(t, a[0], port); !ok || left > 30 {
					t.Errorf("conntrack remembers a few questions (%t) for %d s, want 30", ok, left)
				}
				for until := time.Now().Add(20 * time.Second); time.Now().Before(until) && // it is what conntrack takes for assured
					l.taken(s, func() { c.ask(10, "hello", says("p3", a[0], "hello")) }) == 0; {
				}
			}
			n := l.taken(s, func() { c.ask(100, "hello", says("p3", a[0], "hello")) })
			if n < 200 {
				t.Errorf("%s from %s: of 100 questions and answers %d packets took the shortcut", network, a[0], n)
			}
			if network == "tcp" { // segments that are many packets in one
				line := strings.Repeat("x", 200_000)
				c.ask(5, line, says("p3", a[0], line))
			}
		}
	}
	if note := noteOf(l); !strings.HasPrefix(note, "on for 2 pods of this machine") {
		t.Errorf("the board says %q", note)
	}
}

func noteOf(l *lab) string {
	for _, c := range l.board.Checks() {
		if c.Name == check && c.Healthy {
			return c.Note
		}
	}
	return ""
}

// A pod gets its packets under the MAC that is its own: what listens there
// below IP, a bridge of a virtual machine, sees no difference.
func TestMACs(t *testing.T) {
	l := newLab(t, 2, 3)
	s := l.shortcut()
	l.serve("p3", 3, 80)
	c := l.dial("p2", "udp", "10.244.1.3:80", 0)
	c.ask(2, "hello", says("p3", addr4(2), "hello"))
	l.assure()
	var fd int
	var err error
	l.in("p3", func() { fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_RAW, int(0x0008)) }) // ETH_P_IP
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	if n := l.taken(s, func() { c.ask(1, "hello", says("p3", addr4(2), "hello")) }); n != 2 {
		t.Fatalf("%d packets took the shortcut, want 2", n)
	}
	frame := make([]byte, 2000)
	for {
		n, from, err := unix.Recvfrom(fd, frame, 0)
		if err != nil {
			t.Fatal(err)
		}
		if from.(*unix.SockaddrLinklayer).Pkttype == unix.PACKET_OUTGOING || n < 34 || frame[23] != unix.IPPROTO_UDP {
			continue
		}
		if to, by := net.HardwareAddr(frame[:6]).String(), net.HardwareAddr(frame[6:12]).String(); to != podMAC(3) || by != "0a:6d:65:73:68:01" {
			t.Errorf("to %s from %s", to, by)
		}
		return
	}
}

// Whatever conntrack translates needs the way back through conntrack.
func TestTranslatedTakesTheStack(t *testing.T) {
	l := newLab(t, 2, 3)
	l.cfg.Groups = []*firewall.Group{{
		Services: []firewall.Service{
			{Addr: netip.MustParseAddr("10.96.0.1"), Protocol: mesh.TCP, Port: 8080, Endpoints: []netip.AddrPort{netip.AddrPortFrom(addr4(3), 80)}},
			{Addr: netip.MustParseAddr("10.96.0.1"), Protocol: mesh.UDP, Port: 8080, Endpoints: []netip.AddrPort{netip.AddrPortFrom(addr4(3), 80)}},
			{Addr: netip.MustParseAddr("fd00:10:96::1"), Protocol: mesh.TCP, Port: 8080, Endpoints: []netip.AddrPort{netip.AddrPortFrom(addr6(3), 80)}},
			{Addr: netip.MustParseAddr("fd00:10:96::1"), Protocol: mesh.UDP, Port: 8080, Endpoints: []netip.AddrPort{netip.AddrPortFrom(addr6(3), 80)}},
		},
		Local: []netip.Addr{addr4(3), addr6(3)},
	}}
	l.pods[1].HostPorts = []mesh.HostPort{{Protocol: mesh.TCP, HostPort: 9090, Port: 80}, {Protocol: mesh.UDP, HostPort: 9090, Port: 80}}
	testns.Sh(t, "ip address add 192.0.2.1/24 dev other; ip address add 2001:db8::1/64 dev other nodad")
	l.protect()
	s := l.shortcut()
	l.serve("p3", 3, 80)
	for _, c := range []struct {
		name, pod, to string
		saw           netip.Addr
	}{
		{"service", "p2", "10.96.0.1:8080", addr4(2)},
		{"service", "p2", "[fd00:10:96::1]:8080", addr6(2)},
		{"to itself through a service", "p3", "10.96.0.1:8080", netip.MustParseAddr("10.244.1.1")},
		{"to itself through a service", "p3", "[fd00:10:96::1]:8080", netip.MustParseAddr("fd00:10:244:1::1")},
		{"host port", "p2", "192.0.2.1:9090", addr4(2)},
		{"host port", "p2", "[2001:db8::1]:9090", addr6(2)},
	} {
		for _, network := range []string{"tcp", "udp"} {
			conn := l.dial(c.pod, network, c.to, 0)
			conn.ask(2, "hello", says("p3", c.saw, "hello"))
			if network == "udp" {
				l.assure()
			}
			if n := l.taken(s, func() { conn.ask(50, "hello", says("p3", c.saw, "hello")) }); n != 0 {
				t.Errorf("%s over %s to %s: %d packets took the shortcut", c.name, network, c.to, n)
			}
		}
	}
}

// One socket may talk to a pod and, from the same port, to a service with that
// pod behind it. Only because conntrack knows both does the pod see two.
func TestSamePortToPodAndService(t *testing.T) {
	for _, network := range []string{"tcp", "udp"} {
		for _, first := range []string{"pod", "service"} {
			t.Run(network+", the "+first+" first", func(t *testing.T) {
				l := newLab(t, 2, 3)
				l.cfg.Groups = []*firewall.Group{{Services: []firewall.Service{
					{Addr: netip.MustParseAddr("10.96.0.1"), Protocol: mesh.TCP, Port: 8080, Endpoints: []netip.AddrPort{netip.AddrPortFrom(addr4(3), 80)}},
					{Addr: netip.MustParseAddr("10.96.0.1"), Protocol: mesh.UDP, Port: 8080, Endpoints: []netip.AddrPort{netip.AddrPortFrom(addr4(3), 80)}}}}}
				l.protect()
				s := l.shortcut()
				l.serve("p3", 3, 80)
				to := []string{"10.244.1.3:80", "10.96.0.1:8080"}
				if first == "service" {
					to[0], to[1] = to[1], to[0]
				}
				a := l.dial("p2", network, to[0], 4000)
				a.ask(50, "a", says("p3", addr4(2), "a"))
				b := l.dial("p2", network, to[1], 4000)
				b.ask(50, "b", says("p3", addr4(2), "b"))
				if network == "udp" {
					l.assure()
				}
				n := l.taken(s, func() {
					for range 20 {
						a.ask(1, "a", says("p3", addr4(2), "a"))
						b.ask(1, "b", says("p3", addr4(2), "b"))
					}
				})
				if first == "pod" && n == 0 {
					t.Error("nothing took the shortcut: the test says nothing")
				}
			})
		}
	}
}

// A connection lives through every change of way, even where a firewall drops
// what conntrack calls invalid: with the shortcut, without, with a program of
// another meshd.
func TestConnectionsSurvive(t *testing.T) {
	for _, network := range []string{"tcp", "udp"} {
		t.Run(network, func(t *testing.T) {
			l := newLab(t, 2, 3)
			testns.Sh(t, `nft add table inet strict; nft add chain inet strict forward '{ type filter hook forward priority 10; }'
				nft add rule inet strict forward ct state invalid counter drop`)
			l.serve("p3", 3, 80)
			var all []*client
			ask := func() {
				for _, c := range all {
					saw := c.c.LocalAddr().(interface{ AddrPort() netip.AddrPort }).AddrPort().Addr().Unmap()
					for _, size := range []int{1, 30_000, 1} {
						if network == "udp" {
							size = min(size, 1000)
						}
						line := strings.Repeat("x", size)
						c.ask(10, line, says("p3", saw, line))
					}
				}
			}
			open := func() {
				for _, a := range []netip.Addr{addr4(3), addr6(3)} {
					all = append(all, l.dial("p2", network, netip.AddrPortFrom(a, 80).String(), 0))
				}
				ask()
				if network == "udp" {
					l.assure()
				}
			}
			open() // before there is one
			s := l.shortcut()
			short := func(s *Shortcut) {
				t.Helper()
				if n := l.taken(s, ask); n == 0 {
					t.Fatal("nothing took the shortcut")
				}
				open()
			}
			long := func() {
				t.Helper()
				ask()
				open()
			}
			short(s)
			off := New(Config{Off: true, Pods: l.list, Board: l.board}) // another meshd, that shall not have it
			off.begun.Store(true)
			l.round(off)
			if n := l.taken(s, long); n != 0 {
				t.Errorf("%d packets took a shortcut that is off", n)
			}
			if note := noteOf(l); note != "off: --shortcut=off" {
				t.Errorf("the board says %q", note)
			}
			l.round(s)
			short(s)
			s.program.die()
			short(s)
			next := l.shortcut()
			short(next)
			testns.Sh(t, "tc qdisc add dev mshp3 root tbf rate 100mbit burst 1mb latency 50ms")
			l.round(next)
			if n := l.taken(next, long); n != 0 {
				t.Errorf("%d packets went around the queue", n)
			}
			testns.Sh(t, "tc qdisc del dev mshp3 root")
			l.round(next)
			short(next)
		})
	}
}

// After every single step by which links enter the shortcut, and leave it, both
// directions of a connection go the same way: conntrack calls no packet invalid.
func TestEachStepIsForBothDirections(t *testing.T) {
	l := newLab(t, 2, 3)
	testns.Sh(t, `nft add table inet strict; nft add chain inet strict forward '{ type filter hook forward priority 10; }'
		nft add rule inet strict forward ct state invalid counter`)
	l.serve("p3", 3, 80)
	c, c6 := l.dial("p2", "tcp", "10.244.1.3:80", 0), l.dial("p2", "tcp", "[fd00:10:244:1::3]:80", 0)
	line := strings.Repeat("x", 200_000)
	ask := func() {
		for range 10 {
			c.ask(1, line, says("p3", addr4(2), line))
			c6.ask(1, line, says("p3", addr6(2), line))
		}
	}
	steps := func(s *Shortcut) {
		t.Helper()
		s.ready()
		have, err := s.look()
		if err != nil {
			t.Fatal(err)
		}
		for _, o := range diff(have) {
			if err := s.do(o); err != nil {
				t.Fatal(err)
			}
			ask()
			if counted := testns.Sh(t, "nft list chain inet strict forward"); !strings.Contains(counted, "packets 0 ") {
				t.Fatalf("after %s: %s", o, counted)
			}
		}
		l.round(s)
	}
	ask()
	s := New(Config{Pods: l.list, Board: l.board})
	s.begun.Store(true)
	steps(s)
	defer s.program.close()
	if l.taken(s, ask) == 0 {
		t.Error("nothing took the shortcut")
	}
	next := New(Config{Pods: l.list, Board: l.board})
	next.begun.Store(true)
	steps(next)
	defer next.program.close()
	off := New(Config{Off: true, Pods: l.list, Board: l.board})
	off.begun.Store(true)
	steps(off)
}

// die as a process does: the links keep the program, and the program its maps.
// What it counts can still be read.
func (l *loaded) die() {
	_ = l.program.Close()
	_ = l.pods4.Close()
	_ = l.pods6.Close()
}

// While meshd is dead a pod goes and another comes by its address. What is for
// the address reaches the new one, and the old one's links are dead.
func TestAddressMovesWhileMeshdIsDead(t *testing.T) {
	for _, gone := range []string{"its link is down", "its link is gone"} {
		t.Run(gone, func(t *testing.T) {
			l := newLab(t, 2, 3)
			s := l.shortcut()
			l.serve("p3", 3, 80)
			c := l.dial("p2", "udp", "10.244.1.3:80", 4000)
			c6 := l.dial("p2", "udp", "[fd00:10:244:1::3]:80", 4000)
			both := func() {
				c.ask(50, "hello", says("p3", addr4(2), "hello"))
				c6.ask(50, "hello", says("p3", addr6(2), "hello"))
			}
			both()
			l.assure()
			if l.taken(s, both) == 0 {
				t.Fatal("nothing took the shortcut")
			}
			s.program.die()
			l.detach("p3")
			if gone == "its link is gone" {
				testns.Sh(t, "ip link delete mshp3")
			}
			l.attach(3, "new", 1500)
			l.serve("new", 3, 80)
			if n := l.taken(s, func() {
				c.ask(50, "hello", says("new", addr4(2), "hello"))
				c6.ask(50, "hello", says("new", addr6(2), "hello"))
				l.dial("p2", "tcp", "10.244.1.3:80", 0).ask(50, "hello", says("new", addr4(2), "hello"))
			}); n != 0 {
				t.Errorf("%d packets took the shortcut to a pod nobody has put there", n)
			}
			next := l.shortcut()
			if l.taken(next, func() { c.ask(50, "hello", says("new", addr4(2), "hello")) }) == 0 {
				t.Error("nothing takes the shortcut to the new pod")
			}
		})
	}
}

// A pod with the limit of its bandwidth, or with filters, has its packets go
// through those.
func TestQueuesAreNotGoneAround(t *testing.T) {
	for _, queue := range []string{"root tbf rate 100mbit burst 1mb latency 50ms", "ingress", "clsact", "root pfifo"} {
		t.Run(queue, func(t *testing.T) {
			l := newLab(t, 2, 3)
			testns.Sh(t, "tc qdisc add dev mshp3 "+queue)
			s := l.shortcut()
			l.serve("p3", 3, 80)
			c := l.dial("p2", "udp", "10.244.1.3:80", 0)
			c.ask(2, "hello", says("p3", addr4(2), "hello"))
			l.assure()
			if n := l.taken(s, func() { c.ask(50, "hello", says("p3", addr4(2), "hello")) }); n != 0 {
				t.Errorf("%d packets went around it", n)
			}
			if note := noteOf(l); !strings.Contains(note, "on for 1 pods") || !strings.Contains(note, "not for 1, as mshp3: it has a queue ("+strings.Fields(strings.TrimPrefix(queue, "root "))[0]+")") {
				t.Errorf("the board says %q", note)
			}
		})
	}
}

// What conntrack knows of a connection is as if it had seen its packets: one
// that is used is kept, one that was closed is not.
func TestConntrackIsKeptUpToDate(t *testing.T) {
	l := newLab(t, 2, 3)
	sysctl := func(tcp, udp string) {
		testns.Sh(t, "sysctl -qw net.netfilter.nf_conntrack_tcp_timeout_established="+tcp+" net.netfilter.nf_conntrack_udp_timeout_stream="+udp)
	}
	sysctl("500000", "700")
	s := l.shortcut() // which gives what was set when it came
	sysctl("400000", "120")
	l.serve("p3", 3, 80)
	for _, c := range []struct {
		network  string
		from, to netip.Addr
		at, most uint32
		closed   bool
	}{
		{"tcp", addr4(2), addr4(3), 450_000, 500_000, false},
		{"tcp", addr6(2), addr6(3), 450_000, 500_000, false},
		{"udp", addr4(2), addr4(3), 600, 700, false},
		{"udp", addr6(2), addr6(3), 600, 700, false},
		{"tcp", addr4(2), addr4(3), 0, 10, true},
		{"tcp", addr6(2), addr6(3), 0, 10, true},
	} {
		conn := l.dial("p2", c.network, netip.AddrPortFrom(c.to, 80).String(), 0)
		conn.ask(5, "hello", says("p3", c.from, "hello"))
		if c.network == "udp" {
			l.assure()
		}
		if l.taken(s, func() { conn.ask(5, "hello", says("p3", c.from, "hello")) }) == 0 {
			t.Errorf("%v: nothing took the shortcut", c)
		}
		if c.closed {
			if err := conn.c.(*net.TCPConn).CloseWrite(); err != nil {
				t.Fatal(err)
			}
			if _, err := conn.in.ReadByte(); err == nil { // until the other has closed as well
				t.Error("something came behind the end")
			}
		}
		port := conn.c.LocalAddr().(interface{ AddrPort() netip.AddrPort }).AddrPort().Port()
		if got, ok := remembered(t, c.from, port); !ok || got < c.at || got > c.most {
			t.Errorf("%s from %s, closed %t: conntrack remembers it (%t) for %d s, want %d to %d", c.network, c.from, c.closed, ok, got, c.at, c.most)
		}
	}
}

// What comes behind an end does not bring a connection back to life for days,
// nor does it end one that goes on in the other direction.
func TestWhatIsLeftOfAConnection(t *testing.T) {
	l := newLab(t, 2, 3)
	s := l.shortcut()
	l.serve("p3", 3, 80)
	send := l.wire("p2")
	const ack, fin, rst, psh = 0x10, 0x01, 0x04, 0x08
	for _, family := range []struct{ src, dst netip.Addr }{{addr4(2), addr4(3)}, {addr6(2), addr6(3)}} {
		for i, c := range []struct {
			name  string
			flags []byte
			least uint32
			most  uint32
		}{
			{"data", []byte{ack | psh}, 400_000, 432_000},
			{"an end", []byte{ack | fin}, 50, 60},
			{"an end, and data go on", []byte{ack | fin, ack, ack | psh}, 50, 60},
			{"both ends", []byte{ack | fin, ack, ack | fin, ack}, 1, 10},
			{"both ends, and a segment again", []byte{ack | fin, ack | fin, ack | psh}, 50, 60},
			{"that, and its end again", []byte{ack | fin, ack | fin, ack | psh, ack | fin}, 1, 10},
			{"a reset", []byte{ack | rst}, 1, 10},
			{"a reset and data", []byte{rst, ack | psh, ack | psh}, 50, 60},
			{"a reset behind an end", []byte{ack | fin, rst}, 1, 10},
		} {
			port := uint16(4000 + i)
			l.dial("p2", "tcp", netip.AddrPortFrom(family.dst, 80).String(), int(port)).ask(5, "hello", says("p3", family.src, "hello"))
			for _, flags := range c.flags {
				// Its sequence number is a foreign one: the pod itself answers with no
				// more than an acknowledgement.
				p := packet{src: family.src, dst: family.dst, proto: unix.IPPROTO_TCP, sport: port, dport: 80, hops: 64, flags: flags}
				if flags&psh != 0 {
					p.payload = "x"
				}
				if n := l.taken(s, func() { send(p) }); n == 0 {
					t.Fatalf("%s: %#x did not take the shortcut", c.name, flags)
				}
			}
			if left, ok := remembered(t, family.src, port); !ok || left < c.least || left > c.most {
				t.Errorf("%s from %s: conntrack remembers it (%t) for %d s, want %d to %d", c.name, family.src, ok, left, c.least, c.most)
			}
		}
	}
}

// A connection that conntrack saw being closed is followed by it to its end.
func TestClosingConnectionsTakeTheStack(t *testing.T) {
	l := newLab(t, 2, 3)
	var at *net.TCPListener
	var err error
	l.in("p3", func() { at, err = net.ListenTCP("tcp4", &net.TCPAddr{Port: 80}) })
	if err != nil {
		t.Fatal(err)
	}
	defer at.Close()
	c := l.dial("p2", "tcp", "10.244.1.3:80", 0)
	server, err := at.AcceptTCP()
	if err != nil {
		t.Fatal(err)
	}
	defer server.Close()
	for _, write := range []*net.TCPConn{c.c.(*net.TCPConn), server} {
		if _, err := write.Write([]byte("hello\n")); err != nil {
			t.Fatal(err)
		}
	}
	if err := c.c.(*net.TCPConn).CloseWrite(); err != nil {
		t.Fatal(err)
	}
	if got, err := io.ReadAll(server); err != nil || string(got) != "hello\n" {
		t.Fatalf("the server got %q, %v", got, err)
	}
	s := l.shortcut()
	if n := l.taken(s, func() {
		for range 10 {
			if _, err := server.Write([]byte("hello\n")); err != nil {
				t.Fatal(err)
			}
			if got, err := c.in.ReadString('\n'); err != nil || got != "hello\n" {
				t.Fatalf("the client got %q, %v", got, err)
			}
		}
	}); n != 0 {
		t.Errorf("%d packets took the shortcut", n)
	}
}

// remembered is for how long conntrack still knows the connection that came
// from an address and port.
func remembered(t *testing.T, from netip.Addr, port uint16) (seconds uint32, ok bool) {
	t.Helper()
	family := netlink.InetFamily(unix.AF_INET)
	if from.Is6() {
		family = unix.AF_INET6
	}
	flows, err := netlink.ConntrackTableList(netlink.ConntrackTable, family)
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range flows {
		if src, _ := netip.AddrFromSlice(f.Forward.SrcIP); src.Unmap() == from && f.Forward.SrcPort == port {
			return f.TimeOut, true
		}
	}
	return 0, false
}

// Where conntrack takes up no connection from the middle any more, the program
// goes, in the order in which a link loses it, and comes back when it may.
func TestWithoutLooseConnections(t *testing.T) {
	l := newLab(t, 2, 3)
	s := l.shortcut()
	l.serve("p3", 3, 80)
	c := l.dial("p2", "tcp", "10.244.1.3:80", 0)
	c.ask(5, "hello", says("p3", addr4(2), "hello"))
	var verbs []string
	s.hand.do = func(o op) error {
		if len(verbs) == 0 || verbs[len(verbs)-1] != o.verb {
			verbs = append(verbs, o.verb)
		}
		return s.do(o)
	}
	testns.Sh(t, "sysctl -qw net.netfilter.nf_conntrack_tcp_loose=0")
	l.round(s)
	if got := strings.Join(verbs, " "); got != "unmap forget detach" {
		t.Errorf("it went by %s", got)
	}
	if note := noteOf(l); s.program != nil || !strings.Contains(note, "nf_conntrack_tcp_loose is 0") {
		t.Errorf("there is a program: %v; the board says %q", s.program != nil, note)
	}
	verbs = nil
	testns.Sh(t, "sysctl -qw net.netfilter.nf_conntrack_tcp_loose=1")
	l.round(s)
	if got := strings.Join(verbs, " "); got != "attach map" {
		t.Errorf("it came back by %s", got)
	}
	c.ask(5, "hello", says("p3", addr4(2), "hello"))
}

// Of a table of many connections those are forgotten that leave the shortcut,
// and of these the translated ones are left alone.
func TestForgetsThoseAlone(t *testing.T) {
	testns.New(t)
	testns.Sh(t, `nft add table inet t; nft add chain inet t c '{ type filter hook forward priority 0; ct state new accept; }'
		add() { conntrack -I -p "$1" -s "$2" -d "$3" --sport "$4" --dport 80 -t 600 $6 -r "$5" -q "$2" --reply-port-src 80 --reply-port-dst "$4" >/dev/null 2>&1; }
		tcp="--state ESTABLISHED"
		for i in $(seq 1000 1200); do add tcp 10.0.0.1 10.0.0.2 $i 10.0.0.2 "$tcp"; add tcp 192.0.2.1 192.0.2.2 $i 192.0.2.2 "$tcp"; done
		add tcp 10.0.0.1 10.0.0.3 1 10.0.0.3 "$tcp"
		add tcp 10.0.0.2 10.0.0.3 2 10.0.0.3 "$tcp"
		add udp 10.0.0.1 10.0.0.2 3 10.0.0.2 ""
		add tcp 10.0.0.1 10.0.0.9 4 10.0.0.2 "$tcp"
		add tcp fd00::1 fd00::2 5 fd00::2 "$tcp"
		add tcp fd00::2 fd00::3 6 fd00::3 "$tcp"`)
	ports := func() string {
		return strings.TrimSpace(testns.Sh(t, `(conntrack -L 2>/dev/null; conntrack -L -f ipv6 2>/dev/null) | sed 's/.*src=\([^ ]*\) dst=\([^ ]*\) sport=\([0-9]*\) .*src=.*/\1 \3/' | grep -v ^192 | sort -u | awk '$2 < 1000' | tr '\n' ';'`))
	}
	count := func() string { return strings.TrimSpace(testns.Sh(t, "conntrack -C")) }
	if got := count(); got != "408" {
		t.Fatalf("%s connections, want 408: %s", got, ports())
	}
	set := func(list ...string) map[netip.Addr]bool {
		all := map[netip.Addr]bool{}
		for _, a := range list {
			all[netip.MustParseAddr(a)] = true
		}
		return all
	}
	if err := forget(set("10.0.0.1", "fd00::1"), set("10.0.0.1", "10.0.0.2", "10.0.0.3", "fd00::1", "fd00::2", "fd00::3")); err != nil {
		t.Fatal(err)
	}
	if got, want := ports(), "10.0.0.1 3;10.0.0.1 4;10.0.0.2 2;fd00::2 6;"; got != want {
		t.Errorf("left are %s, want %s", got, want)
	}
	if got := count(); got != "205" {
		t.Errorf("%s connections are left, want 205", got)
	}
}

// Bytes that are none are none, and break nothing.
func FuzzFlow(f *testing.F) {
	f.Add([]byte{})
	f.Add([]byte{8, 0, 1, 128, 4, 0, 1, 128})
	f.Add([]byte{20, 0, 1, 128, 16, 0, 1, 128, 5, 0, 1, 0, 10, 0, 0, 0, 4, 0, 2, 0})
	f.Fuzz(func(t *testing.T, b []byte) {
		if flow, err := parseFlow(b); err == nil {
			between{}.match(flow)
		}
	})
}

// What goes wrong while the program is made is said, and everything is as
// before.
func TestLoadThatFails(t *testing.T) {
	newLab(t)
	var was unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &was); err != nil {
		t.Fatal(err)
	}
	defer unix.Setrlimit(unix.RLIMIT_NOFILE, &was)
	free, err := unix.Dup(0) // the next descriptor would have this number
	if err != nil {
		t.Fatal(err)
	}
	unix.Close(free)
	for more := range 8 { // enough of them for one step more each time
		limit := unix.Rlimit{Cur: uint64(free + more), Max: was.Max}
		if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
			t.Fatal(err)
		}
		l, err := load()
		if err == nil {
			l.close()
			if more == 0 {
				t.Error("without a descriptor left a program was loaded")
			}
			return
		}
	}
	t.Error("eight descriptors are not enough")
}

// Pods' links are brought from any mess to one program each, and what others
// have there stays.
func TestMess(t *testing.T) {
	l := newLab(t, 2, 3)
	var old []*loaded
	for range 2 {
		p, err := load()
		if err != nil {
			t.Fatal(err)
		}
		defer p.close()
		old = append(old, p)
	}
	foreign := others(t, ebpf.AttachTCXIngress)
	defer foreign.Close()
	put := func(p *ebpf.Program, links ...string) {
		for _, name := range links {
			if err := link.RawAttachProgram(link.RawAttachProgramOptions{Target: linkIndex(t, name), Program: p, Attach: ebpf.AttachTCXIngress}); err != nil {
				t.Fatal(err)
			}
		}
	}
	testns.Sh(t, "ip link add mshlost type veth peer name eth1; ip link set mshlost up") // nobody's
	put(old[0].program, "mshp2", "mshlost")
	put(old[1].program, "mshp2")
	put(foreign, "mshlost")
	s := l.shortcut()
	for name, want := range map[string]int{"mshp2": 1, "mshp3": 1, "mshlost": 0} {
		have, err := link.QueryPrograms(link.QueryOptions{Target: linkIndex(t, name), Attach: ebpf.AttachTCXIngress})
		if err != nil {
			t.Fatal(err)
		}
		var ids []ebpf.ProgramID
		for _, p := range have.Programs {
			ids = append(ids, p.ID)
		}
		if slices.Contains(ids, s.program.id) != (want == 1) || slices.Contains(ids, idOf(t, foreign)) != (want == 0) || len(ids) != 1 {
			t.Errorf("%s has %v: want one, ours, %d, or where nobody is the foreign one, %d", name, ids, s.program.id, idOf(t, foreign))
		}
	}
	// Pods that are gone, and a link that somebody cleared.
	l.detach("p3")
	testns.Sh(t, "ip link delete mshp3")
	l.mute(s, "mshp2")
	l.round(s)
	have, err := read(l.pods, s.program, nil)
	if err != nil || len(have.addrs) != 2 || have.addrs[addr4(2)] != linkIndex(t, "mshp2") {
		t.Errorf("the maps hold %v, %v", have.addrs, err)
	}
}

// What somebody else has at a pod's link may be a filter: it is not gone
// around, on whichever side it is, and stays.
func TestForeignPrograms(t *testing.T) {
	for _, hook := range []ebpf.AttachType{ebpf.AttachTCXIngress, ebpf.AttachTCXEgress} {
		t.Run(hook.String(), func(t *testing.T) {
			l := newLab(t, 2, 3)
			testns.Sh(t, `nft add table inet strict; nft add chain inet strict forward '{ type filter hook forward priority 10; }'
				nft add rule inet strict forward ct state invalid counter drop`)
			s := l.shortcut()
			l.serve("p3", 3, 80)
			c := l.dial("p2", "tcp", "10.244.1.3:80", 0)
			ask := func() { c.ask(50, "hello", says("p3", addr4(2), "hello")) }
			ask()
			if l.taken(s, ask) == 0 {
				t.Fatal("nothing took the shortcut")
			}
			foreign := others(t, hook)
			defer foreign.Close()
			at := linkIndex(t, "mshp3")
			if err := link.RawAttachProgram(link.RawAttachProgramOptions{Target: at, Program: foreign, Attach: hook}); err != nil {
				t.Fatal(err)
			}
			l.round(s)
			if n := l.taken(s, ask); n != 0 {
				t.Errorf("%d packets went around a program of somebody else", n)
			}
			if note := noteOf(l); !strings.Contains(note, "on for 1 pods") || !strings.Contains(note, fmt.Sprintf("not for 1, as mshp3: it has a program of somebody else (id %d)", idOf(t, foreign))) {
				t.Errorf("the board says %q", note)
			}
			if have, err := programs(at, hook); err != nil || len(have.Programs) != 1 || have.Programs[0].ID != idOf(t, foreign) {
				t.Errorf("at the hook are %v, %v: want the foreign one alone", have, err)
			}
			if err := link.RawDetachProgram(link.RawDetachProgramOptions{Target: at, Program: foreign, Attach: hook}); err != nil {
				t.Fatal(err)
			}
			l.round(s)
			ask()
			if l.taken(s, ask) == 0 {
				t.Error("nothing takes the shortcut again")
			}
		})
	}
}

// A process that may not look at programs cannot tell whether the one at a link
// is ours. It says so, and the other links are as they have to be.
func TestMayNotLookAtPrograms(t *testing.T) {
	l := newLab(t, 2, 3, 4)
	old, err := load()
	if err != nil {
		t.Fatal(err)
	}
	defer old.close()
	if err := old.attach(op{link: podLink{index: linkIndex(t, "mshp3")}}); err != nil {
		t.Fatal(err)
	}
	may := func(f func()) { // without CAP_SYS_ADMIN
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
		var was [2]unix.CapUserData
		if err := unix.Capget(&header, &was[0]); err != nil {
			t.Fatal(err)
		}
		less := was
		less[0].Effective &^= 1 << unix.CAP_SYS_ADMIN
		if err := unix.Capset(&header, &less[0]); err != nil {
			t.Fatal(err)
		}
		defer func() {
			if err := unix.Capset(&header, &was[0]); err != nil {
				t.Error(err)
			}
		}()
		f()
	}
	var s *Shortcut
	may(func() {
		s = l.shortcut()
		l.round(s)
	})
	if note := noteOf(l); !strings.Contains(note, "on for 2 pods") || !strings.Contains(note, "not for 1, as mshp3: it has a program that cannot be looked at (id ") {
		t.Errorf("the board says %q", note)
	}
	off := New(Config{Off: true, Pods: l.list, Board: l.board})
	off.begun.Store(true)
	may(func() { l.round(off) })
	if note := noteOf(l); !strings.HasPrefix(note, "off: --shortcut=off; but mshp") || !strings.Contains(note, "bpftool net detach tcx_ingress name meshd_shortcut dev mshp") {
		t.Errorf("the board says %q", note)
	}
	l.round(off)
	if note := noteOf(l); note != "off: --shortcut=off" {
		t.Errorf("the board says %q", note)
	}
	for _, name := range []string{"mshp2", "mshp3", "mshp4"} {
		if have, err := programs(linkIndex(t, name), ebpf.AttachTCXIngress); err != nil || len(have.Programs) > 0 {
			t.Errorf("%s has %v, %v", name, have, err)
		}
	}
}

// others is a program of somebody else's, which lets everything be.
func others(t *testing.T, hook ebpf.AttachType) *ebpf.Program {
	t.Helper()
	p, err := ebpf.NewProgram(&ebpf.ProgramSpec{Name: "others", Type: ebpf.SchedCLS, AttachType: hook, License: "GPL",
		Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, next), asm.Return()}})
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func idOf(t *testing.T, p *ebpf.Program) ebpf.ProgramID {
	t.Helper()
	info, err := p.Info()
	if err != nil {
		t.Fatal(err)
	}
	id, _ := info.ID()
	return id
}
