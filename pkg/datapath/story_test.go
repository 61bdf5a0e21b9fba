package datapath

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"meshd.dev/pkg/datapath/internal/testns"
	"meshd.dev/pkg/mesh"
)

func tell(s mesh.State, ms ...*machine) {
	for _, m := range ms {
		m.ask(&s)
	}
}

// marker is what pods send; nobody on the underlay may see it.
const marker = "MARKER-IN-CLEAR"

// Three machines on one wire, 192.0.2.N and 2001:db8::N; their pods are
// 10.244.N.P and fd00:10:244:N::P; services are 10.96.0.S and fd00:10:96::S.
func TestStory(t *testing.T) {
	join := underlay(t)
	a, b, c := newMachine(t, "a", 1), newMachine(t, "b", 2), newMachine(t, "c", 3)
	all := []*machine{a, b, c}
	state := mesh.State{Nodes: []mesh.Node{a.node(), b.node(), c.node()}}
	tell(state, all...)
	settled(t, all...)
	for _, m := range all {
		m.pod(2)
		m.pod(3)
		m.serve(2, "tcp", ":80")
		m.serve(2, "udp", ":53")
	}
	tell(state, all...)
	settled(t, all...)
	capture := startCapture(t)
	s := &story{T: t, a: a, b: b, c: c, state: state}
	for _, tunnel := range a.ask(nil).Tunnels {
		if want := testns.Backend(t); tunnel.Backend != want {
			t.Errorf("the tunnel to %s is of the %s, want %s", tunnel.Peer, tunnel.Backend, want)
		}
	}

	for _, chapter := range []struct {
		title string
		tell  func(*testing.T)
	}{
		{"pods reach each other", s.podToPod},
		{"services", s.services},
		{"no endpoints is refused", s.noEndpoints},
		{"spoofed sources are dropped", s.spoofing},
		{"only who is admitted", s.admission},
		{"host ports", s.hostPorts},
		{"a UDP client follows the endpoints", s.udpFollows},
		{"what others break is repaired", s.repair},
		{"peers come and go alone", s.peers},
		{"a node roams", s.roams},
		{"the device dies", s.deviceDies},
		{"meshd is killed", s.meshdDies},
		{"nothing in clear on the wire", capture},
	} {
		t.Run(chapter.title, func(t *testing.T) {
			join(t)
			chapter.tell(t)
		})
	}
}

type story struct {
	*testing.T
	a, b, c *machine
	state   mesh.State
}

// asked fails unless the answer came as wanted.
func asked(t *testing.T, want, got string, err error) {
	t.Helper()
	if err != nil || got != want {
		t.Errorf("answer %q, %v; want %q", got, err, want)
	}
}

func (s *story) podToPod(t *testing.T) {
	a, b, c := s.a, s.b, s.c
	for _, to := range []string{b.podAddr(2), b.podAddr6(2), c.podAddr(2), a.podAddr(3), a.podAddr6(3)} {
		if out, err := a.in_(2, "ping", "-c1", "-W3", "-p", "4d41524b", to); err != nil {
			t.Errorf("ping %s: %v\n%s", to, err, out)
		}
	}
	out, err := a.askFrom(2, "tcp", b.podAddr(2)+":80", marker)
	asked(t, "b/p2 saw 10.244.1.2", out, err)
	out, err = a.askFrom(2, "tcp", "["+c.podAddr6(2)+"]:80", marker)
	asked(t, "c/p2 saw fd00:10:244:1::2", out, err)
	out, err = a.askFrom(0, "tcp", b.podAddr(2)+":80", marker)
	asked(t, "b/p2 saw 10.244.1.1", out, err)
	// A packet as large as the pod's link takes.
	if out, err := a.in_(2, "ping", "-c1", "-W3", "-M", "do", "-s", fmt.Sprint(1420-28), b.podAddr(2)); err != nil {
		t.Errorf("large ping: %v\n%s", err, out)
	}
	// Out of the cluster the node speaks for the pod.
	if out, err := a.in_(2, "ping", "-c1", "-W3", "192.0.2.254"); err != nil {
		t.Errorf("ping out of the cluster: %v\n%s", err, out)
	}
}

// service at 10.96.0.n and fd00:10:96::n with the pods as endpoints.
func service(n int, sticky int32, pods ...netip.Addr) *mesh.Service {
	s := &mesh.Service{
		Namespace: "default", Name: fmt.Sprintf("svc%d", n), AffinityTimeout: sticky,
		ClusterIPs: []netip.Addr{netip.MustParseAddr(fmt.Sprintf("10.96.0.%d", n)), netip.MustParseAddr(fmt.Sprintf("fd00:10:96::%d", n))},
		Ports: []mesh.ServicePort{{Name: "http", Protocol: mesh.TCP, Port: 8080, NodePort: uint16(30000 + n)},
			{Name: "dns", Protocol: mesh.UDP, Port: 53}},
	}
	for _, p := range pods {
		s.Endpoints = append(s.Endpoints, mesh.Endpoint{Addr: p, Ready: true, Serving: true,
			Node:  map[bool]string{true: "a"}[strings.HasPrefix(p.String(), "10.244.1.") || strings.HasPrefix(p.String(), "fd00:10:244:1:")],
			Ports: []mesh.EndpointPort{{Name: "http", Protocol: mesh.TCP, Port: 80}, {Name: "dns", Protocol: mesh.UDP, Port: 53}}})
	}
	return s
}

func addrs(texts ...string) []netip.Addr {
	var list []netip.Addr
	for _, s := range texts {
		list = append(list, netip.MustParseAddr(s))
	}
	return list
}

func (s *story) services(t *testing.T) {
	a, b, c := s.a, s.b, s.c
	s.state.Services = []*mesh.Service{
		service(1, 0, addrs(b.podAddr(2), b.podAddr6(2))...),
		service(2, 0, addrs(a.podAddr(2), a.podAddr6(2))...),
		service(3, 0, addrs(b.podAddr(2), c.podAddr(2))...),
		service(4, 60, addrs(b.podAddr(2), c.podAddr(2))...),
		service(9, 0, addrs("192.0.2.2", "2001:db8::2")...), // on node b itself, as the API server is
	}
	b.serve(0, "tcp", ":80")
	tell(s.state, a, b, c)
	settled(t, a, b, c)
	for _, q := range []struct {
		from          int
		network, to   string
		want, because string
	}{
		{2, "tcp", "10.96.0.1:8080", "b/p2 saw 10.244.1.2", "from a pod, the pod is seen"},
		{2, "tcp", "[fd00:10:96::1]:8080", "b/p2 saw fd00:10:244:1::2", "IPv6"},
		{2, "udp", "10.96.0.1:53", "b/p2 saw 10.244.1.2", "UDP"},
		{0, "tcp", "10.96.0.1:8080", "b/p2 saw 10.244.1.1", "from the node, its mesh address is seen"},
		{0, "tcp", "[fd00:10:96::1]:8080", "b/p2 saw fd00:10:244:1::1", "the same in IPv6"},
		{0, "tcp", "10.96.0.2:8080", "a/p2 saw 10.244.1.1", "a local endpoint from the node"},
		{2, "tcp", "10.96.0.2:8080", "a/p2 saw 10.244.1.1", "a pod reaches itself as the node"},
		{2, "tcp", "[fd00:10:96::2]:8080", "a/p2 saw fd00:10:244:1::1", "the same in IPv6"},
		{3, "tcp", "10.96.0.2:8080", "a/p2 saw 10.244.1.3", "a neighbour is seen as itself"},
		{3, "tcp", "192.0.2.1:30001", "b/p2 saw 10.244.1.3", "a node port from a pod"},
		{0, "tcp", "192.0.2.1:30001", "b/p2 saw 10.244.1.1", "a node port from the node"},
		{0, "tcp", "[2001:db8::1]:30001", "b/p2 saw fd00:10:244:1::1", "the same in IPv6"},
	} {
		got, err := a.askFrom(q.from, q.network, q.to, marker)
		if err != nil || got != q.want {
			t.Errorf("%s: ask %s %s: %q, %v; want %q", q.because, q.network, q.to, got, err, q.want)
		}
	}
	for _, to := range []string{"10.96.0.9:8080", "[fd00:10:96::9]:8080"} {
		for _, from := range []int{0, 2} {
			for _, m := range []*machine{a, b} {
				// It may be read on the wire: node to node is not ours.
				if got, err := m.askFrom(from, "tcp", to, "not secret"); err != nil || !strings.HasPrefix(got, "b/p0 saw") {
					t.Errorf("ask the node's service %s from %s/p%d: %q, %v", to, m.name, from, got, err)
				}
			}
		}
	}
	// From outside of the cluster.
	exe, _ := os.Executable()
	for _, to := range []string{"192.0.2.1:30001", "[2001:db8::1]:30002"} {
		out, err := testns.Output(exe, "ask", "tcp", to, "not secret")
		if err != nil || !strings.Contains(out, "p2 saw") {
			t.Errorf("node port %s from outside: %q, %v", to, out, err)
		}
	}
	answers := func(to string) map[string]bool {
		got, err := a.askFrom(2, "udp", to, marker, "30")
		if err != nil {
			t.Errorf("ask %s 30 times: %v", to, err)
		}
		seen := map[string]bool{}
		for _, l := range strings.Split(got, "\n") {
			seen[l] = true
		}
		return seen
	}
	seen, stuck := answers("10.96.0.3:53"), answers("10.96.0.4:53")
	if len(seen) != 2 {
		t.Errorf("30 questions to two endpoints reached %v", seen)
	}
	if len(stuck) != 1 {
		t.Errorf("30 questions of a sticky client reached %v", stuck)
	}
}

func (s *story) noEndpoints(t *testing.T) {
	s.state.Services = append(s.state.Services, service(5, 0))
	tell(s.state, s.a)
	settled(t, s.a)
	for _, to := range []string{"10.96.0.5:8080", "[fd00:10:96::5]:8080", "10.96.0.1:9999", "10.96.7.7:80"} {
		for _, from := range []int{0, 2} {
			out, err := s.a.askFrom(from, "tcp", to, marker)
			if err == nil || !strings.Contains(out, "refused") {
				t.Errorf("ask %s from %d: %q, %v; want connection refused", to, from, out, err)
			}
		}
	}
	// What goes back out of the link it came by would have Linux redirect the
	// pod, and be silent to it for a second.
	out, err := s.a.askFrom(2, "tcp", "10.96.0.2:8080", marker)
	asked(t, "a/p2 saw 10.244.1.1", out, err)
	out, err = s.a.askFrom(2, "udp", "10.96.0.5:53", marker)
	if err == nil || !strings.Contains(out, "refused") {
		t.Errorf("ask UDP without endpoints: %q, %v; want connection refused", out, err)
	}
}

// spoofing: what arrives at b/p2 is watched, for a spoofer gets no answer in
// any case.
func (s *story) spoofing(t *testing.T) {
	file := filepath.Join(t.TempDir(), "arrived.pcap")
	cmd := exec.Command("nsenter", "-t", s.b.ns, "-n", "-m", "ip", "netns", "exec", "p2", "tcpdump", "-i", "eth0", "-U", "-Z", "root", "-w", file, "icmp or icmp6")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = cmd.Process.Kill(); _ = cmd.Wait() }()
	eventually(t, "tcpdump listens", func() error { _, err := os.Stat(file); return err })
	arrived := func() string {
		out, _ := testns.Output("tcpdump", "-nr", file) // the last packet may be cut
		return out
	}
	// a/p3 takes the address of a/p2, of a pod on another node, of the nodes.
	for _, addr := range append(addrs(s.a.podAddr(2), s.b.podAddr(3), "192.0.2.1", "192.0.2.77", "10.244.1.1"),
		addrs(s.a.podAddr6(2), s.b.podAddr6(3), "2001:db8::77", "fd00:10:244:1::1")...) {
		to, nodad := s.b.podAddr(2), ""
		if addr.Is6() {
			to, nodad = s.b.podAddr6(2), "nodad"
		}
		s.a.sh(fmt.Sprintf("ip netns exec p3 ip address add %s/%d dev eth0 %s", addr, addr.BitLen(), nodad))
		if out, err := s.a.in_(3, "ping", "-c1", "-W0.3", "-I", addr.String(), to); err == nil {
			t.Errorf("ping as %s was answered:\n%s", addr, out)
		}
		s.a.sh(fmt.Sprintf("ip netns exec p3 ip address del %s/%d dev eth0", addr, addr.BitLen()))
	}
	for _, to := range []string{s.b.podAddr(2), s.b.podAddr6(2)} {
		if out, err := s.a.in_(3, "ping", "-c1", "-W3", to); err != nil {
			t.Errorf("ping as itself: %v\n%s", err, out)
		}
	}
	eventually(t, "the honest pings are seen", func() error {
		if out := arrived(); !strings.Contains(out, s.a.podAddr(3)+" > ") || !strings.Contains(out, s.a.podAddr6(3)+" > ") {
			return fmt.Errorf("arrived:\n%s", out)
		}
		return nil
	})
	for _, line := range strings.Split(arrived(), "\n") {
		if strings.Contains(line, "echo request") && !strings.Contains(line, s.a.podAddr(3)+" > ") && !strings.Contains(line, s.a.podAddr6(3)+" > ") {
			t.Errorf("a spoofed packet arrived: %s", line)
		}
	}
	// A machine on the underlay claims to be a pod.
	testns.Sh(t, `ip address add 10.244.2.99/32 dev br0; ip route add 10.244.1.2/32 via 192.0.2.1 src 10.244.2.99`)
	if out, err := testns.Output("ping", "-c1", "-W0.3", "10.244.1.2"); err == nil {
		t.Errorf("ping from the underlay as a pod was answered:\n%s", out)
	}
	testns.Sh(t, `ip route del 10.244.1.2/32; ip address del 10.244.2.99/32 dev br0`)
}

// admission: who has no record has no network.
func (s *story) admission(t *testing.T) {
	s.a.pod(4)
	path := filepath.Join(s.a.dir, podsFile)
	with, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	pods, err := podsIn(s.a.dir)
	if err != nil {
		t.Fatal(err)
	}
	without, _ := json.Marshal(pods[:len(pods)-1])
	ping := func(want bool) {
		t.Helper()
		for _, to := range []string{s.a.podAddr(4), s.a.podAddr6(4)} { // from a pod, and from the machine itself
			_, err := s.a.in_(2, "ping", "-c1", "-W0.5", to)
			if _, err2 := testns.Output("nsenter", "-t", s.a.ns, "-n", "ping", "-c1", "-W0.5", to); (err == nil) != want || (err2 == nil) != want {
				t.Errorf("ping %s: from a pod %v, from the machine %v; want an answer: %v", to, err, err2, want)
			}
		}
		for _, to := range []string{s.b.podAddr(2), s.b.podAddr6(2)} {
			if out, err := s.a.in_(4, "ping", "-c1", "-W0.5", to); (err == nil) != want {
				t.Errorf("ping from it to %s: %v; want an answer: %v\n%s", to, err, want, out)
			}
		}
	}
	for _, c := range []struct {
		records  []byte
		admitted bool
	}{{with, true}, {without, false}, {with, true}} {
		if err := os.WriteFile(path, c.records, 0o600); err != nil {
			t.Fatal(err)
		}
		tell(s.state, s.a)
		settled(t, s.a)
		ping(c.admitted)
	}
}

// hostPorts of a/p3, which serves on 80 and 53.
func (s *story) hostPorts(t *testing.T) {
	a, b := s.a, s.b
	a.serve(3, "tcp", ":80")
	a.serve(3, "udp", ":53")
	a.record(3,
		mesh.HostPort{Protocol: mesh.TCP, HostPort: 8080, Port: 80},
		mesh.HostPort{Protocol: mesh.UDP, HostPort: 5353, Port: 53},
		mesh.HostPort{HostIP: netip.MustParseAddr("192.0.2.1"), Protocol: mesh.TCP, HostPort: 8081, Port: 80},
		mesh.HostPort{HostIP: netip.MustParseAddr("127.0.0.1"), Protocol: mesh.TCP, HostPort: 8082, Port: 80})
	a.sh("sysctl -qw net.ipv4.conf.mshp3.route_localnet=1") // as the plugin does
	tell(s.state, a)
	settled(t, a)
	exe, _ := os.Executable()
	outside := func(network, to string) (string, error) {
		out, err := testns.Output(exe, "ask", network, to, "not secret")
		return strings.TrimSpace(out), err
	}
	from := func(m *machine, pod int) func(network, to string) (string, error) {
		return func(network, to string) (string, error) { return m.askFrom(pod, network, to, "not secret") }
	}
	for _, q := range []struct {
		why         string
		ask         func(network, to string) (string, error)
		network, to string
		want        string // how the answer begins; "" for none
	}{
		{"from outside", outside, "tcp", "192.0.2.1:8080", "a/p3 saw 192.0.2.254"},
		{"from outside, IPv6", outside, "tcp", "[2001:db8::1]:8080", "a/p3 saw 2001:db8::fe"},
		{"from outside, UDP", outside, "udp", "192.0.2.1:5353", "a/p3 saw 192.0.2.254"},
		{"from outside, UDP, IPv6", outside, "udp", "[2001:db8::1]:5353", "a/p3 saw 2001:db8::fe"},
		{"from another machine", from(b, 0), "tcp", "192.0.2.1:8080", "a/p3 saw 192.0.2.2"},
		{"from a pod elsewhere", from(b, 2), "tcp", "192.0.2.1:8080", "a/p3 saw 192.0.2.2"},
		{"from a pod elsewhere to the mesh address", from(b, 2), "tcp", "10.244.1.1:8080", "a/p3 saw 10.244.2.2"},
		{"from a neighbour", from(a, 2), "tcp", "192.0.2.1:8080", "a/p3 saw 10.244.1.2"},
		{"from a neighbour, IPv6", from(a, 2), "tcp", "[2001:db8::1]:8080", "a/p3 saw fd00:10:244:1::2"},
		{"from itself", from(a, 3), "tcp", "192.0.2.1:8080", "a/p3 saw "},
		{"from itself, IPv6", from(a, 3), "tcp", "[2001:db8::1]:8080", "a/p3 saw "},
		{"from itself, UDP", from(a, 3), "udp", "192.0.2.1:5353", "a/p3 saw "},
		{"from the machine", from(a, 0), "tcp", "192.0.2.1:8080", "a/p3 saw 192.0.2.1"},
		{"from the machine by loopback", from(a, 0), "tcp", "127.0.0.1:8080", "a/p3 saw "},
		{"from the machine by loopback, UDP", from(a, 0), "udp", "127.0.0.1:5353", "a/p3 saw "},
		{"on one address alone", outside, "tcp", "192.0.2.1:8081", "a/p3 saw 192.0.2.254"},
		{"not on another", from(a, 0), "tcp", "127.0.0.1:8081", ""},
		{"not on another", from(b, 2), "tcp", "10.244.1.1:8081", ""},
		{"on loopback alone", from(a, 0), "tcp", "127.0.0.1:8082", "a/p3 saw "},
		{"not from outside", outside, "tcp", "192.0.2.1:8082", ""},
		{"a service is still there", from(a, 2), "tcp", "10.96.0.1:8080", "b/p2 saw 10.244.1.2"},
		{"a node port as well", outside, "tcp", "192.0.2.1:30001", "b/p2 saw "},
	} {
		got, err := q.ask(q.network, q.to)
		if q.want == "" && err == nil || q.want != "" && (err != nil || !strings.HasPrefix(got, q.want)) {
			t.Errorf("%s: ask %s %s: %q, %v; want %q", q.why, q.network, q.to, got, err, q.want)
		}
	}
	// route_localnet opens the machine's loopback to the pod, but for a rule.
	a.serve(0, "tcp", "127.0.0.1:7777")
	a.sh(`ip netns exec p3 sh -ec "
		sysctl -qw net.ipv4.conf.all.route_localnet=1
		ip route add 127.0.0.1 via 169.254.1.1 dev eth0 table 9
		ip rule add pref 0 to 127.0.0.1 lookup 9; ip rule add pref 1 lookup local; ip rule del pref 0 lookup local"`)
	if out, err := a.askFrom(3, "tcp", "127.0.0.1:7777", "not secret"); err == nil {
		t.Errorf("a pod reached the machine's loopback: %s", out)
	}
	a.record(3)
	tell(s.state, a)
	settled(t, a)
	if got, err := outside("tcp", "192.0.2.1:8080"); err == nil {
		t.Errorf("the host port is gone, and yet: %s", got)
	}
}

func (s *story) udpFollows(t *testing.T) {
	exe, _ := os.Executable()
	cmd := exec.Command("nsenter", "-t", s.a.ns, "-n", "-m", "ip", "netns", "exec", "p3", exe, "send", "10.96.0.6:53")
	in, _ := cmd.StdinPipe()
	out, _ := cmd.StdoutPipe()
	said := make([]byte, 200)
	ask := func() string {
		fmt.Fprintln(in, marker)
		n, _ := out.Read(said)
		return strings.TrimSpace(string(said[:n]))
	}
	for i, to := range []*machine{s.b, s.c} {
		s.state.Services = append(s.state.Services[:6:6], service(6, 0, addrs(to.podAddr(2))...))
		tell(s.state, s.a)
		settled(t, s.a)
		if i == 0 {
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
		}
		eventually(t, "flow moves to "+to.name, func() error {
			if got, want := ask(), to.name+"/p2 saw 10.244.1.3"; got != want {
				return fmt.Errorf("answer %q, want %q", got, want)
			}
			return nil
		})
	}
	in.Close()
	_ = cmd.Wait()
}

// repair: somebody takes away what is ours, and adds to it; what is theirs
// stays.
func (s *story) repair(t *testing.T) {
	s.a.sh(`
		ip route add 198.51.100.0/24 via 192.0.2.254 proto static
		nft add table inet theirs`)
	for _, breakage := range []string{
		"nft delete table inet meshd",
		"nft flush chain inet meshd forward",
		"nft flush map inet meshd svc4",
		"nft add chain inet meshd extra",
		"ip address flush dev mesh0",
		"ip route flush proto 77",
		"ip -6 route flush proto 77",
		"ip link set mesh0 down",
		"ip link set mesh0 mtu 1300",
		"ip route add 10.250.0.0/16 dev mesh0 proto 77",
		"sysctl -qw net.ipv4.ip_forward=0",
		"wg set mesh0 listen-port 4444",
	} {
		s.a.sh(breakage)
		settled(t, s.a)
		if out, err := s.a.in_(2, "ping", "-c1", "-W3", s.b.podAddr(2)); err != nil {
			t.Errorf("after %s: %v\n%s", breakage, err, out)
		}
	}
	s.a.sh(`
		ip route show 198.51.100.0/24 | grep -q proto.static
		nft list table inet theirs
		ip route del 198.51.100.0/24
		nft delete table inet theirs`)
}

// peers: while c is removed and comes back, the session with b goes on.
func (s *story) peers(t *testing.T) {
	handshake := func() string { return s.a.sh("wg show mesh0 latest-handshakes | grep '" + s.b.key.String() + "'") }
	before := handshake()
	without := s.state
	without.Nodes = s.state.Nodes[:2]
	tell(without, s.a)
	settled(t, s.a)
	if out, err := s.a.in_(2, "ping", "-c1", "-W0.3", s.c.podAddr(2)); err == nil {
		t.Errorf("ping to a removed node was answered:\n%s", out)
	}
	if out := s.a.sh("wg show mesh0 peers"); strings.Contains(out, s.c.key.String()) {
		t.Errorf("the removed node is still a peer:\n%s", out)
	}
	tell(s.state, s.a)
	settled(t, s.a)
	if out, err := s.a.in_(2, "ping", "-c2", "-W5", s.c.podAddr(2)); err != nil {
		t.Errorf("ping to a node that came back: %v\n%s", err, out)
	}
	if after := handshake(); after != before {
		t.Errorf("the session with b did not survive: handshake %s, then %s", before, after)
	}
}

// roams: a node calls from another address than it has announced; the others
// follow it, and leave it at that.
func (s *story) roams(t *testing.T) {
	// It may know a by the one family or the other.
	s.c.sh("wg set mesh0 peer '" + s.a.key.String() + "' endpoint '[2001:db8::1]:51820'")
	s.c.sh("ip address add 2001:db8::33/64 dev eth0 nodad; ip address del 2001:db8::3/64 dev eth0")
	if out, err := s.c.in_(2, "ping", "-c3", "-i0.3", "-W3", s.a.podAddr(2)); err != nil {
		t.Errorf("ping from the new address: %v\n%s", err, out)
	}
	endpoint := s.a.sh("wg show mesh0 endpoints | grep '" + s.c.key.String() + "'")
	if !strings.Contains(endpoint, "[2001:db8::33]:51820") {
		t.Errorf("the roaming node is at %s", endpoint)
	}
	if plan := s.a.ask(&s.state).Plan; len(plan) > 0 {
		t.Errorf("a wants to change %q", plan)
	}
	if out, err := s.a.in_(2, "ping", "-c3", "-i0.3", "-W3", s.c.podAddr(2)); err != nil {
		t.Errorf("ping to the new address: %v\n%s", err, out)
	}
	s.c.sh("ip address add 2001:db8::3/64 dev eth0 nodad; ip address del 2001:db8::33/64 dev eth0")
	if out, err := s.c.in_(2, "ping", "-c3", "-i0.3", "-W3", s.a.podAddr(2)); err != nil {
		t.Errorf("ping from the old address: %v\n%s", err, out)
	}
}

// deviceDies: the process that serves it, or the device of the kernel.
func (s *story) deviceDies(t *testing.T) {
	if testns.Backend(t) == "kernel" {
		s.a.sh("ip link del mesh0")
	} else {
		pid := strings.TrimSpace(s.a.sh("cat /run/wireguard/mesh0.lock"))
		s.a.sh("kill -9 " + pid)
		eventually(t, "another process serves the device", func() error {
			out, err := testns.Output("nsenter", "-t", s.a.ns, "-n", "-m", "cat", "/run/wireguard/mesh0.lock")
			if err != nil || strings.TrimSpace(out) == pid {
				return fmt.Errorf("%q %v", out, err)
			}
			return nil
		})
	}
	settled(t, s.a)
	// The other side speaks first: our handshake told it of the new session.
	eventually(t, "b reaches a", func() error {
		out, err := s.b.in_(2, "ping", "-c1", "-W0.3", s.a.podAddr(2))
		if err != nil {
			return fmt.Errorf("%v %s", err, out)
		}
		return nil
	})
}

// meshdDies: packets flow without it; a new one finds all as it must be.
func (s *story) meshdDies(t *testing.T) {
	look := func() string {
		return s.a.sh("cat /run/wireguard/mesh0.lock ||:; wg show mesh0 latest-handshakes | sort; ip -o link show mesh0; ip route show proto 77; nft -s -a list table inet meshd")
	}
	before := look()
	if err := s.a.cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	s.a.stop()
	out, err := s.a.askFrom(2, "tcp", "10.96.0.1:8080", marker)
	asked(t, "b/p2 saw 10.244.1.2", out, err)
	s.a.start()
	if plan := s.a.ask(&s.state).Plan; len(plan) > 0 {
		t.Errorf("a new meshd finds something to do: %q", plan)
	}
	settled(t, s.a)
	if after := look(); after != before {
		t.Errorf("a restart changed something: before\n%s\nafter\n%s", before, after)
	}
}

func startCapture(t *testing.T) func(*testing.T) {
	file := filepath.Join(t.TempDir(), "wire.pcap")
	cmd := exec.Command("tcpdump", "-i", "br0", "-U", "-Z", "root", "-w", file)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = cmd.Process.Kill(); _ = cmd.Wait() })
	eventually(t, "tcpdump listens", func() error {
		_, err := os.Stat(file)
		return err
	})
	return func(t *testing.T) {
		_ = cmd.Process.Signal(os.Interrupt)
		_ = cmd.Wait()
		b, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		if bytes.Contains(b, []byte(marker)) || bytes.Contains(b, []byte("MARKMARKMARK")) {
			t.Error("what a pod said can be read on the wire")
		}
		out, err := testns.Output("tcpdump", "-nr", file, "(net 10.244.0.0/16 or net fd00:10:244::/48 or net 10.96.0.0/16 or net fd00:10:96::/112) and not arp")
		if err != nil {
			t.Fatal(err)
		}
		for _, line := range strings.Split(strings.TrimSpace(out), "\n") {
			if line != "" && !strings.HasPrefix(line, "reading from") && !strings.Contains(line, "10.244.2.99") {
				t.Errorf("pod addresses on the wire: %s", line)
			}
		}
		out, err = testns.Output("tcpdump", "-nr", file, "udp port 51820")
		if err != nil || strings.Count(out, "\n") < 20 {
			t.Errorf("the tunnels were hardly used: %v\n%s", err, out)
		}
	}
}
