package datapath

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"reflect"
	"slices"
	"strings"
	"testing"

	"meshd.dev/pkg/datapath/path"
	"meshd.dev/pkg/datapath/route"
	"meshd.dev/pkg/datapath/wireguard"
	"meshd.dev/pkg/mesh"
)

// A wish that was made out of the one before is the one Compute makes, and
// what differs is what the change says. Nodes come, go and change in every
// way, clash with each other and change their keys; services do as well.
func TestFollowed(t *testing.T) {
	stepped, whole := 0, 0
	for seed := range uint64(30) {
		r, psks := rand.New(rand.NewPCG(seed, 7)), map[string]byte{}
		opts := Options{Device: "mesh0", ListenPort: 51820, Services: true, LinkMTU: 1500, Second: "mesh0-next",
			PodCIDRs: prefixesOf("10.244.0.0/16", "fd00:10:244::/48"), ServiceCIDRs: prefixesOf("10.96.0.0/16"),
			Keys: wireguard.Keys{Current: mesh.Key{200}}, Paths: map[string]path.Choice{},
			PathMTU: func(a netip.Addr) int { return []int{1500, 1500, 1500, 1400, 0}[a.As4()[3]%5] },
			PSK: func(n mesh.Node, own, peer mesh.Key) PSK {
				return PSK{Secret: wireguard.Secret{peer[0], psks[n.Name]}, Wait: map[bool]string{true: "not yet"}[peer[0] == 4]}
			},
		}
		state := &mesh.State{Nodes: []mesh.Node{{Name: "m", PublicKey: mesh.Key{200}, PodCIDRs: prefixesOf("10.244.100.0/24", "fd00:10:244:100::/64"), Endpoints: endpointsOf("192.0.2.100:51820")}}}
		c, err := compute(state, "m", opts)
		if err != nil {
			t.Fatal(err)
		}
		last := &followed{state, c}
		for step := range 60 {
			state = vary(r, state, seed%3 == 0)
			if paths := vary2(r, opts.Paths); paths != nil {
				opts.Paths = paths
			}
			paired := map[string]bool{}
			if name := fmt.Sprintf("n%d", 1+r.IntN(9)); r.IntN(3) == 0 {
				psks[name]++
				paired[name] = true
			}
			c, err := compute(state, "m", opts)
			if err != nil {
				t.Fatal(err)
			}
			next, ch, ok := last.next(state, opts.Paths, paired)
			if !ok {
				whole++
				last = &followed{state, c}
				continue
			}
			stepped++
			before := last.wish
			next.finish(ch)
			want, got := c.wish, next.wish
			if got.text() != want.text() || !reflect.DeepEqual(got.Route, want.Route) || !reflect.DeepEqual(got.WireGuard, want.WireGuard) ||
				!slices.Equal(got.Problems, want.Problems) || !reflect.DeepEqual(next.mtus, c.mtus) || next.widest() != c.widest() {
				t.Fatalf("seed %d, step %d: followed\n%s\ncomputed\n%s", seed, step, got.text(), want.text())
			}
			if err := ch.explains(before, got); err != nil {
				t.Fatalf("seed %d, step %d: %v", seed, step, err)
			}
			last = next
		}
	}
	if stepped < whole/2 || whole == 0 {
		t.Errorf("%d followed, %d computed as a whole: the test tests little", stepped, whole)
	}
}

// vary changes one or a few things; wild, so that nodes clash as well.
func vary(r *rand.Rand, old *mesh.State, wild bool) *mesh.State {
	s := *old
	s.Nodes = slices.Clone(s.Nodes)
	for range 1 + r.IntN(3) {
		i := 1 + r.IntN(9)
		name := fmt.Sprintf("n%d", i)
		at, there := slices.BinarySearchFunc(s.Nodes, name, func(n mesh.Node, name string) int { return strings.Compare(n.Name, name) })
		if !there {
			s.Nodes = slices.Insert(s.Nodes, at, mesh.Node{Name: name, PublicKey: mesh.Key{byte(i)}, PodCIDRs: prefixesOf(fmt.Sprintf("10.244.%d.0/24", i), fmt.Sprintf("fd00:10:244:%d::/64", i)),
				Endpoints: endpointsOf(fmt.Sprintf("192.0.2.%d:51820", 10*i))})
			continue
		}
		n := &s.Nodes[at]
		kinds := 7
		if wild {
			kinds = 12
		}
		switch r.IntN(kinds) {
		case 0, 1:
			s.Nodes = slices.Delete(s.Nodes, at, at+1)
		case 2, 3:
			n.Endpoints = endpointsOf(fmt.Sprintf("192.0.2.%d:51820", 10*i+r.IntN(5)), fmt.Sprintf("192.0.2.%d:51820", 100+r.IntN(5)))
		case 4:
			n.PublicKey = mesh.Key{byte(i + 10*r.IntN(3))}
		case 7:
			n.PublicKey = mesh.Key{byte(1 + r.IntN(9))} // perhaps another's
		case 6:
			n.PublicKey = mesh.Key{}
		case 5:
			n.PodCIDRs = n.PodCIDRs[:r.IntN(len(n.PodCIDRs)+1)]
		case 8:
			n.PodCIDRs = prefixesOf(fmt.Sprintf("10.244.%d.0/24", r.IntN(12)))
		case 9:
			n.Ready = !n.Ready
		case 10:
			n.NextKey = mesh.Key{byte(r.IntN(2) * (100 + i))}
		case 11:
			n.PodCIDRs = prefixesOf([]string{"10.0.0.0/24", "10.244.0.0/16", "10.244.7.128/25"}[r.IntN(3)])
		}
	}
	if r.IntN(4) == 0 {
		s.Services = append(slices.Clone(s.Services[:r.IntN(len(s.Services)+1)]), &mesh.Service{Namespace: "n", Name: fmt.Sprint(len(s.Services)),
			ClusterIPs: []netip.Addr{netip.AddrFrom4([4]byte{10, 96, 0, byte(r.IntN(200))})}, Ports: []mesh.ServicePort{{Protocol: mesh.TCP, Port: 80}}})
	}
	return &s
}

// vary2 chooses another path for one node, now and then.
func vary2(r *rand.Rand, old map[string]path.Choice) map[string]path.Choice {
	if r.IntN(3) > 0 {
		return nil
	}
	now := map[string]path.Choice{fmt.Sprintf("n%d", 1+r.IntN(9)): {MTU: 1200 + 16*r.IntN(4), Fresh: r.IntN(2), Endpoint: netip.AddrPort{}}}
	for n, c := range old {
		if _, set := now[n]; !set {
			now[n] = c
		}
	}
	return now
}

// explains: without what is gone and with what was added the old wish is the
// new one, and no peer differs that is not named.
func (ch change) explains(old, now Wish) error {
	routes := func(w Wish) map[string]bool {
		m := map[string]bool{}
		for _, r := range w.Route.Routes {
			m[fmt.Sprint(r)] = true
		}
		for _, p := range w.Route.Floor {
			m[p.String()] = true
		}
		return m
	}
	have := routes(old)
	part := func(p route.Part) map[string]bool {
		return routes(Wish{Route: route.Config{Routes: p.Routes, Floor: p.Floor}})
	}
	for r := range part(ch.gone) {
		if !have[r] {
			return fmt.Errorf("%s shall go and was not there", r)
		}
		delete(have, r)
	}
	for r := range part(ch.added) {
		have[r] = true
	}
	if want := routes(now); !reflect.DeepEqual(have, want) {
		return fmt.Errorf("routes %v, want %v", have, want)
	}
	peers := func(w Wish) map[mesh.Key]wireguard.Peer {
		m := map[mesh.Key]wireguard.Peer{}
		for _, p := range w.WireGuard.Peers {
			if !slices.Contains(ch.keys, p.Key) {
				m[p.Key] = p
			}
		}
		return m
	}
	if !reflect.DeepEqual(peers(old), peers(now)) {
		return fmt.Errorf("a peer differs that is none of %v", ch.keys)
	}
	return nil
}
