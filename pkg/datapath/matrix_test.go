package datapath

import (
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"meshd.dev/pkg/datapath/firewall"
	"meshd.dev/pkg/datapath/internal/testns"
	"meshd.dev/pkg/datapath/route"
	"meshd.dev/pkg/datapath/wireguard"
	"meshd.dev/pkg/mesh"
)

func prefixesOf(texts ...string) []netip.Prefix {
	var list []netip.Prefix
	for _, s := range texts {
		list = append(list, netip.MustParsePrefix(s))
	}
	return list
}

// families of addresses that pods or the underlay have.
type families struct{ four, six bool }

func (f families) String() string {
	return map[families]string{{true, false}: "IPv4", {false, true}: "IPv6", {true, true}: "both"}[f]
}

var everyFamily = []families{{four: true}, {six: true}, {four: true, six: true}}

// Pods with addresses of one family or both, on an underlay of one or both:
// two machines, each pod reaches each other one in each family pods have, and
// services; and nothing is left to do. On an underlay of both families one
// machine publishes only the one, the other only the other.
func TestDualStackMatrix(t *testing.T) {
	for _, pods := range everyFamily {
		for _, under := range everyFamily {
			t.Run(fmt.Sprintf("pods %s, underlay %s", pods, under), func(t *testing.T) {
				underlay(t)
				a, b := newMachine(t, "a", 1), newMachine(t, "b", 2)
				state := mesh.State{}
				for _, m := range []*machine{a, b} {
					if !under.four {
						m.sh("ip -4 address flush dev eth0")
					}
					if !under.six {
						m.sh("ip -6 address flush dev eth0 scope global")
					}
					n := m.node()
					n.PodCIDRs = slices.DeleteFunc(n.PodCIDRs, func(p netip.Prefix) bool { return p.Addr().Is4() && !pods.four || p.Addr().Is6() && !pods.six })
					v4, v6 := fmt.Sprintf("192.0.2.%d", m.n), fmt.Sprintf("2001:db8::%d", m.n)
					useSix := under.six && (!under.four || m == b)
					n.Addresses, n.Endpoints = addrs(v4), endpointsOf(v4+":51820")
					if useSix {
						n.Addresses, n.Endpoints = addrs(v6), endpointsOf("["+v6+"]:51820")
					}
					state.Nodes = append(state.Nodes, n)
				}
				s := service(1, 0)
				var to []string
				if pods.four {
					s.Endpoints = append(s.Endpoints, service(1, 0, addrs(b.podAddr(2))...).Endpoints...)
					to = append(to, b.podAddr(2)+":80", "10.96.0.1:8080")
				}
				if pods.six {
					s.Endpoints = append(s.Endpoints, service(1, 0, addrs(b.podAddr6(2))...).Endpoints...)
					to = append(to, "["+b.podAddr6(2)+"]:80", "[fd00:10:96::1]:8080")
				}
				state.Services = []*mesh.Service{s}
				for _, m := range []*machine{a, b} {
					m.pod(2)
				}
				b.serve(2, "tcp", ":80")
				tell(state, a, b)
				settled(t, a, b)
				for _, addr := range to {
					eventually(t, "ask "+addr, func() error {
						got, err := a.askFrom(2, "tcp", addr, marker)
						if err != nil || !strings.HasPrefix(got, "b/p2 saw ") {
							return fmt.Errorf("%q, %v", got, err)
						}
						return nil
					})
				}
				for _, addr := range to { // whole packets, as large as may be
					host, _, _ := net.SplitHostPort(addr)
					if strings.HasPrefix(host, "10.96.") || strings.HasPrefix(host, "fd00:10:96:") {
						continue
					}
					header := map[bool]int{true: 48, false: 28}[strings.Contains(host, ":")]
					if out, err := a.in_(2, "ping", "-c2", "-i0.2", "-W3", "-M", "do", "-s", fmt.Sprint(1420-header), host); err != nil {
						t.Errorf("large ping to %s: %v\n%s", host, err, out)
					}
				}
				settled(t, a, b)
			})
		}
	}
}

// In a cluster of a thousand nodes a change of one is told to the kernel as
// that one: a peer, its routes and their floor.
func TestOneOfAThousand(t *testing.T) {
	testns.New(t)
	testns.Sh(t, `
		ip link add eth0 type veth peer name eth0x; ip link set eth0x up; ip link set eth0 up
		ip address add 198.18.0.1/15 dev eth0
		ip route add default via 198.18.0.254`)
	nodeOf := func(i int) mesh.Node {
		return mesh.Node{Name: fmt.Sprintf("n%04d", i), PublicKey: mesh.Key{byte(i >> 8), byte(i), 31: 1},
			PodCIDRs:  prefixesOf(fmt.Sprintf("10.%d.%d.0/24", 100+i/250, i%250), fmt.Sprintf("fd00:10:244:%x::/64", i)),
			Endpoints: endpointsOf(fmt.Sprintf("198.18.%d.%d:51820", 1+i/250, 1+i%250))}
	}
	var nodes []mesh.Node
	for i := range 1000 {
		nodes = append(nodes, nodeOf(i))
	}
	opts := Options{Device: "mesht", ListenPort: 51820, Services: true, LinkMTU: 1500, PathMTU: route.NewUnderlay("mesht").PathMTU,
		PodCIDRs: prefixesOf("10.0.0.0/8", "fd00:10:244::/48")}
	device, err := wireguard.New(wireguard.Options{Name: "mesht", StateDir: t.TempDir(), SpawnUserspace: []string{exe(), "wireguard"}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = testns.Exec("sh", "-c", "kill -9 $(cat "+wireguard.LockPath("mesht")+")") })
	table, routes := firewall.New(nil, nil), route.New(nil)
	t.Cleanup(func() { table.Close(); _ = routes.Close() })
	wish := func(nodes []mesh.Node) Wish {
		t.Helper()
		w, err := Compute(&mesh.State{Nodes: nodes}, "n0000", opts)
		if err != nil || len(w.Problems) > 0 {
			t.Fatal(err, w.Problems)
		}
		return w
	}
	apply := func(w Wish) {
		t.Helper()
		if _, err := table.Apply(t.Context(), w.Firewall); err != nil {
			t.Fatal(err)
		}
		if err := device.Apply(t.Context(), w.WireGuard); err != nil {
			t.Fatal(err)
		}
		if _, err := routes.Apply(w.Route); err != nil {
			t.Fatal(err)
		}
	}
	plan := func(w Wish) []string {
		t.Helper()
		fw, err1 := table.Plan(w.Firewall)
		wg, err2 := device.Plan(w.WireGuard)
		rt, err3 := routes.Plan(w.Route)
		if err1 != nil || err2 != nil || err3 != nil {
			t.Fatal(err1, err2, err3)
		}
		return slices.Concat(fw, wg, rt)
	}
	begin := time.Now()
	apply(wish(nodes))
	t.Logf("1,000 nodes from nothing: %d ms", time.Since(begin).Milliseconds())
	if left := plan(wish(nodes)); len(left) > 0 {
		t.Errorf("a second time there is something to do: %q", left[:min(len(left), 5)])
	}
	joins := append(slices.Clone(nodes), nodeOf(1000))
	moves := slices.Clone(nodes)
	moves[500].Endpoints = endpointsOf("198.18.200.1:51820")
	leaves := slices.Delete(slices.Clone(nodes), 500, 501)
	rekeys := slices.Clone(nodes)
	rekeys[500].PublicKey = mesh.Key{9, 9, 9}
	for _, c := range []struct {
		name  string
		nodes []mesh.Node
		want  []string // what the commands begin with
	}{
		{"one joins", joins, []string{"wg set mesht peer", "ip route add 10.104.0.0/24 dev mesht", "ip route add blackhole 10.104.0.0/24", "ip route add fd00:10:244:3e8::/64 dev mesht", "ip route add blackhole fd00:10:244:3e8::/64"}},
		{"one moves", moves, []string{"wg set mesht peer"}},
		{"one leaves", leaves, []string{"wg set mesht peer", "ip route del 10.102.0.0/24 dev mesht", "ip route del blackhole 10.102.0.0/24", "ip route del fd00:10:244:1f4::/64 dev mesht", "ip route del blackhole fd00:10:244:1f4::/64"}},
		{"one has another key", rekeys, []string{"wg set mesht peer", "wg set mesht peer"}},
	} {
		w := wish(c.nodes)
		got := plan(w)
		ok := len(got) == len(c.want)
		for _, want := range c.want {
			ok = ok && slices.ContainsFunc(got, func(s string) bool { return strings.HasPrefix(s, want) })
		}
		if !ok {
			t.Errorf("%s: %d operations\n%s\nwant\n%s", c.name, len(got), strings.Join(got[:min(len(got), 12)], "\n"), strings.Join(c.want, "\n"))
		}
		begin := time.Now()
		apply(w)
		t.Logf("%s: %d operations, %.1f ms with looking at all of it", c.name, len(got), time.Since(begin).Seconds()*1e3)
		apply(wish(nodes))
	}
}
