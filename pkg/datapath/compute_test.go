package datapath

import (
	"flag"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"meshd.dev/pkg/datapath/firewall"
	"meshd.dev/pkg/datapath/path"
	"meshd.dev/pkg/datapath/wireguard"
	"meshd.dev/pkg/mesh"
)

var update = flag.Bool("update", false, "write the golden files anew")

func testKey(n byte) mesh.Key { return mesh.Key{n} }

func testNode(name string, n int) mesh.Node {
	return mesh.Node{
		Name: name, PublicKey: testKey(byte(n)),
		Addresses: addrs(fmt.Sprintf("192.0.2.%d", n)),
		PodCIDRs:  []netip.Prefix{netip.MustParsePrefix(fmt.Sprintf("10.244.%d.0/24", n)), netip.MustParsePrefix(fmt.Sprintf("fd00:10:244:%d::/64", n))},
		Endpoints: []netip.AddrPort{netip.MustParseAddrPort(fmt.Sprintf("192.0.2.%d:51820", n))},
	}
}

// text is a wish as a person reads it.
func (w Wish) text() string {
	var b strings.Builder
	line := func(format string, args ...any) { fmt.Fprintf(&b, strings.TrimRight(format, " ")+"\n", args...) }
	line("pod CIDRs %v", w.PodCIDRs)
	line("device listen %d mtu %d", w.WireGuard.ListenPort, w.WireGuard.MTU)
	peers := slices.Clone(w.WireGuard.Peers)
	if w.Second != nil {
		line("second device listen %d mtu %d", w.Second.ListenPort, w.Second.MTU)
		peers = append(peers, w.Second.Peers...)
	}
	for i, p := range peers {
		endpoint := "none"
		if p.Endpoint.IsValid() {
			endpoint = p.Endpoint.String()
		}
		extra := ""
		if p.Keepalive > 0 {
			extra += fmt.Sprintf(" keepalive %s", p.Keepalive)
		}
		if !p.PSK.IsZero() {
			extra += fmt.Sprintf(" psk %d", p.PSK[0])
		}
		if w.Second != nil {
			extra += fmt.Sprintf(" key %d", p.Key[0])
		}
		if i >= len(w.WireGuard.Peers) {
			extra += " second"
		}
		if p.Fresh > 0 {
			extra += fmt.Sprintf(" session %d", p.Fresh)
		}
		line("peer %s endpoint %s allowed %v%s", p.Name, endpoint, p.AllowedIPs, extra)
	}
	line("addresses %v", w.Route.Addrs)
	for _, r := range w.Route.Routes {
		dev := w.Route.Device
		if r.Second {
			dev = w.Route.Second
		}
		line("route %s dev %s src %s mtu %d", r.Dst, dev, r.Src, r.MTU)
	}
	for _, t := range w.Targets {
		line("probe %s at %s, endpoints %v", t.Node, t.Remote, t.Endpoints)
	}
	line("floor %v", w.Route.Floor)
	line("cluster %v", w.Firewall.Cluster)
	for _, g := range w.Firewall.Groups {
		for _, s := range g.Services {
			sticky := ""
			if s.Sticky {
				sticky = "sticky "
			}
			line("service %s %s %d %s-> %v", s.Addr, s.Protocol, s.Port, sticky, s.Endpoints)
		}
		if len(g.Local) > 0 {
			line("local %v", g.Local)
		}
	}
	for _, p := range w.Problems {
		line("problem %s: %s", p.Node, p.Reason)
		line("   next: %s", p.Next)
	}
	return b.String()
}

func TestCompute(t *testing.T) {
	prefix := netip.MustParsePrefix
	port := func(n uint16) []mesh.EndpointPort {
		return []mesh.EndpointPort{{Name: "http", Protocol: mesh.TCP, Port: n}}
	}
	ports := []mesh.ServicePort{{Name: "http", Protocol: mesh.TCP, Port: 80, NodePort: 30080}}
	for _, c := range []struct {
		name string
		edit func(*mesh.State, *Options)
	}{
		{"two nodes", func(s *mesh.State, o *Options) { s.Nodes = s.Nodes[:2] }},
		{"alone", func(s *mesh.State, o *Options) { s.Nodes = s.Nodes[:1] }},
		{"not a node yet", func(s *mesh.State, o *Options) { s.Nodes = s.Nodes[1:] }},
		{"no key, no pod CIDR, no endpoint", func(s *mesh.State, o *Options) {
			s.Nodes[1].PublicKey = mesh.Key{}
			s.Nodes[2].PodCIDRs = nil
			s.Nodes[3].Endpoints = nil
		}},
		{"pod CIDRs overlap, keys are twins", func(s *mesh.State, o *Options) {
			s.Nodes[2].PodCIDRs = []netip.Prefix{prefix("10.244.2.128/25")}
			s.Nodes[3].PublicKey = testKey(1)
		}},
		{"pod CIDRs of others inside the services, around a machine", func(s *mesh.State, o *Options) {
			o.ServiceCIDRs = []netip.Prefix{prefix("10.96.0.0/16")}
			s.Nodes[1].PodCIDRs = []netip.Prefix{prefix("10.96.1.0/24")}
			s.Nodes[2].PodCIDRs = []netip.Prefix{prefix("192.0.2.0/30")}
			s.Nodes[3].PodCIDRs = []netip.Prefix{prefix("192.0.2.4/30")}
		}},
		{"endpoints that cannot be", func(s *mesh.State, o *Options) {
			s.Nodes[1].Endpoints = []netip.AddrPort{netip.MustParseAddrPort("10.244.9.9:51820"), netip.MustParseAddrPort("192.0.2.2:51820")}
			s.Nodes[2].Endpoints = []netip.AddrPort{netip.MustParseAddrPort("[2001:db8::3]:51820")}
			o.PodCIDRs = []netip.Prefix{prefix("10.244.0.0/16")}
		}},
		{"paths that were chosen", func(s *mesh.State, o *Options) {
			for i := range s.Nodes {
				s.Nodes[i].Endpoints = append(s.Nodes[i].Endpoints, netip.MustParseAddrPort(fmt.Sprintf("198.51.100.%d:51820", i+1)))
			}
			o.PodCIDRs = []netip.Prefix{prefix("10.244.0.0/16")}
			o.Paths = map[string]path.Choice{
				"b": {Endpoint: netip.MustParseAddrPort("198.51.100.2:51820"), MTU: 1296, Fresh: 3},
				"c": {Endpoint: netip.MustParseAddrPort("203.0.113.7:4444"), Keepalive: path.On}, // where it called from
				"d": {Endpoint: netip.MustParseAddrPort("10.244.9.9:51820")},
			}
		}},
		{"jumbo frames, but not to d; IPv6 never below 1280", func(s *mesh.State, o *Options) {
			o.PathMTU = func(a netip.Addr) int {
				if a == netip.MustParseAddr("192.0.2.4") {
					return 1300
				}
				return 9000
			}
		}},
		{"we leave our key, and send to b over the second device", func(s *mesh.State, o *Options) {
			o.Keys = wireguard.Keys{Current: testKey(1), Next: testKey(11)}
			o.OverSecond = map[string]bool{"b": true}
		}},
		{"b leaves its key, c returns to its first device", func(s *mesh.State, o *Options) {
			s.Nodes[1].NextKey, s.Nodes[1].NextPort = testKey(12), 51821
			s.Nodes[2].NextKey, s.Nodes[2].NextPort = testKey(3), 4444
			o.OverSecond = map[string]bool{"b": true, "d": true} // there is none to d
		}},
		{"a next key that another has", func(s *mesh.State, o *Options) {
			s.Nodes[1].NextKey, s.Nodes[1].NextPort = testKey(1), 51821
			s.Nodes[2].NextKey, s.Nodes[2].NextPort = testKey(4), 51821
		}},
		{"preshared keys", func(s *mesh.State, o *Options) {
			s.Nodes[1].NextKey, s.Nodes[1].NextPort = testKey(12), 51821
			o.OnDevice = func(k mesh.Key) bool { return k == testKey(3) || k == testKey(4) }
			o.PSK = func(n mesh.Node, own, peer mesh.Key) PSK {
				switch peer {
				case testKey(2):
					return PSK{Secret: wireguard.Secret{own[0] + 10*peer[0]}}
				case testKey(12):
					return PSK{Wait: "not agreed yet", Firm: true}
				case testKey(3): // it is there without one, and goes on
					return PSK{Wait: "its preshared key is being agreed"}
				}
				return PSK{Wait: "it had one", Firm: true}
			}
		}},
		{"services", func(s *mesh.State, o *Options) {
			s.Nodes = s.Nodes[:2]
			o.ServiceCIDRs = []netip.Prefix{prefix("10.96.0.0/16")}
			ready := func(addr, node string) mesh.Endpoint {
				return mesh.Endpoint{Addr: netip.MustParseAddr(addr), Node: node, Ready: true, Serving: true, Ports: port(8080)}
			}
			leaving := ready("10.244.2.9", "b")
			leaving.Ready, leaving.Terminating = false, true
			gone := leaving
			gone.Serving = false
			s.Services = []*mesh.Service{
				{Name: "both", ClusterIPs: addrs("10.96.0.1", "fd00:10:96::1"), Ports: ports,
					Endpoints: []mesh.Endpoint{ready("10.244.2.2", "b"), ready("10.244.1.2", "a"), ready("fd00:10:244:1::2", "a"), leaving, gone}},
				{Name: "leaving", ClusterIPs: addrs("10.96.0.2"), Ports: ports[:1], Endpoints: []mesh.Endpoint{leaving, gone}},
				{Name: "local", ClusterIPs: addrs("10.96.0.3"), Ports: ports, LocalOnly: true, AffinityTimeout: 60,
					Endpoints: []mesh.Endpoint{ready("10.244.2.2", "b"), ready("10.244.1.2", "a")}},
				{Name: "local elsewhere", ClusterIPs: addrs("10.96.0.4"), Ports: ports, LocalOnly: true, Endpoints: []mesh.Endpoint{ready("10.244.2.2", "b")}},
				{Name: "headless", Headless: true, Ports: ports, Endpoints: []mesh.Endpoint{ready("10.244.2.2", "b")}},
			}
		}},
		{"services are somebody else's", func(s *mesh.State, o *Options) {
			s.Nodes = s.Nodes[:2]
			o.Services = false
			o.ServiceCIDRs = []netip.Prefix{prefix("10.96.0.0/16")}
			s.Services = []*mesh.Service{{Name: "x", ClusterIPs: addrs("10.96.0.1"), Ports: ports}}
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			state := &mesh.State{Nodes: []mesh.Node{testNode("a", 1), testNode("b", 2), testNode("c", 3), testNode("d", 4)}}
			opts := Options{Device: "mesh0", Second: "mesh0-next", Keys: wireguard.Keys{Current: testKey(1)}, ListenPort: 51820, Services: true, LinkMTU: 1500, PathMTU: func(a netip.Addr) int {
				if a.Is6() {
					return 0
				}
				return 1500
			}}
			c.edit(state, &opts)
			w, err := Compute(state, "a", opts)
			if err != nil {
				t.Fatal(err)
			}
			golden(t, c.name, w.text())
		})
	}
}

func TestServicesThatDidNotChangeKeepTheirGroup(t *testing.T) {
	var m memo
	a, b, c, d := &mesh.Service{Name: "a"}, &mesh.Service{Name: "b"}, &mesh.Service{Name: "c"}, &mesh.Service{Name: "d"}
	made := map[*mesh.Service]*firewall.Group{}
	for _, list := range [][]*mesh.Service{{}, {a, b, c}, {a, b, c}, {b, c}, {a, b, c, d}, {a, d}, {d, a, b}, {c, b, a}, {}} {
		got := m.groups(list, func(*mesh.Service) *firewall.Group { return &firewall.Group{} })
		for i, s := range list {
			if old, ok := made[s]; ok && old != got[i] {
				t.Errorf("%v: service %s has another group", list, s.Name)
			}
		}
		clear(made)
		for i, s := range list {
			made[s] = got[i]
		}
	}
}

func golden(t *testing.T, name, got string) {
	t.Helper()
	file := filepath.Join("testdata", strings.NewReplacer(" ", "-", ",", "", ";", "", "'", "").Replace(name)+".txt")
	if *update {
		if err := os.WriteFile(file, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(want), got); diff != "" {
		t.Errorf("%s: -want +got:\n%s", file, diff)
	}
}

func TestComputeRefusesAPodRangeAroundTheNodeItself(t *testing.T) {
	state := &mesh.State{Nodes: []mesh.Node{testNode("a", 1)}}
	_, err := Compute(state, "a", Options{PodCIDRs: []netip.Prefix{netip.MustParsePrefix("192.0.0.0/16")}, PathMTU: func(netip.Addr) int { return 0 }})
	if err == nil || !strings.Contains(err.Error(), "192.0.0.0/16 contains 192.0.2.1") {
		t.Errorf("error %v", err)
	}
	_, err = Compute(state, "a", Options{ServiceCIDRs: []netip.Prefix{netip.MustParsePrefix("10.244.0.0/16")}, PathMTU: func(netip.Addr) int { return 0 }})
	if err == nil || !strings.Contains(err.Error(), "pod CIDR 10.244.1.0/24 and service CIDR 10.244.0.0/16 overlap") {
		t.Errorf("error %v", err)
	}
}

// A change of a key that gets on is looked at often, one that hangs is not:
// every node looks, at every peer, for as long as it takes.
func TestNextLook(t *testing.T) {
	for _, c := range []struct{ still, took, want time.Duration }{
		{0, 2 * time.Millisecond, 50 * time.Millisecond},
		{time.Second, 2 * time.Millisecond, 50 * time.Millisecond},
		{10 * time.Second, 2 * time.Millisecond, 500 * time.Millisecond},
		{time.Hour, 2 * time.Millisecond, time.Second},
		{0, 600 * time.Millisecond, 50 * time.Millisecond},
		{time.Second, 600 * time.Millisecond, 2400 * time.Millisecond},
	} {
		if got := nextLook(c.still, c.took); got != c.want {
			t.Errorf("nothing moved for %s, a look takes %s: again after %s, want %s", c.still, c.took, got, c.want)
		}
	}
}
