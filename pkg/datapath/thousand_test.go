package datapath

import (
	"bytes"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"testing"

	"meshd.dev/pkg/datapath/internal/testns"
	"meshd.dev/pkg/datapath/wireguard"
	"meshd.dev/pkg/mesh"
	"meshd.dev/pkg/status"
)

// nodesOf numbers from to to, at 198.18.0.0/15, with pod CIDRs out of 10/8 and
// fd00:10:244::/48.
func nodesOf(from, to int) (nodes []mesh.Node) {
	for i := from; i < to; i++ {
		nodes = append(nodes, mesh.Node{Name: fmt.Sprintf("n%04d", i), PublicKey: mesh.Key{byte(i >> 8), byte(i), 31: 1},
			PodCIDRs:  prefixesOf(fmt.Sprintf("10.%d.%d.0/24", 100+i/250, i%250), fmt.Sprintf("fd00:10:244:%x::/64", i)),
			Endpoints: endpointsOf(fmt.Sprintf("198.18.%d.%d:51820", 1+i/250, 1+i%250))})
	}
	return nodes
}

// amongMany is a Datapath that stands among a thousand nodes, the source of
// its state, and what it logs.
func amongMany(t testing.TB, set ...func(*Config)) (*Datapath, *source, *bytes.Buffer) {
	testns.New(t)
	testns.Sh(t, `
		ip link add eth0 type veth peer name eth0x; ip link set eth0x up; ip link set eth0 up
		ip address add 198.18.0.1/15 dev eth0
		ip route add default via 198.18.0.254`)
	src, dir, log := &source{}, t.TempDir(), &bytes.Buffer{}
	cfg := Config{Node: "n0000", StateDir: dir, RunDir: dir, Device: "meshm", Services: true, Source: src, Board: &status.Board{},
		PodCIDRs: prefixesOf("10.0.0.0/8", "fd00:10:244::/48"), ServiceCIDRs: prefixesOf("172.20.0.0/16"),
		SpawnUserspace: []string{exe(), "wireguard"},
		Log:            slog.New(slog.NewTextHandler(log, &slog.HandlerOptions{Level: slog.LevelDebug})),
	}
	for _, f := range set {
		f(&cfg)
	}
	d, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = testns.Exec("sh", "-c", "kill -9 $(cat "+wireguard.LockPath("meshm")+")") })
	src.Store(&mesh.State{Nodes: nodesOf(0, 1000)})
	if err := d.apply(t.Context()); err != nil {
		t.Fatal(err)
	}
	return d, src, log
}

// change the state, and do what follows from it.
func (d *Datapath) afterwards(t testing.TB, src *source, s *mesh.State) {
	t.Helper()
	src.Store(s)
	d.dirty.Store(uint32(stateDirt))
	if err := d.apply(t.Context()); err != nil {
		t.Fatal(err)
	}
}

// In a cluster of a thousand nodes a change is done without reading and
// computing everything: it is as many operations as there are changes, and
// afterwards nothing is left to do. What somebody else did meanwhile is put
// right by the next whole round, which follows its event.
func TestFollowAmongMany(t *testing.T) {
	secret := byte(0)
	d, src, log := amongMany(t, func(c *Config) {
		c.PSK = func(n mesh.Node, _, _ mesh.Key) PSK {
			if n.Name != "n0500" {
				return PSK{}
			}
			return PSK{Secret: wireguard.Secret{secret, 1}}
		}
	})
	nodes := nodesOf(0, 1000)
	with := func(edit func(n *mesh.Node)) []mesh.Node {
		all := slices.Clone(nodes)
		edit(&all[500])
		return all
	}
	web := &mesh.Service{Namespace: "a", Name: "web", ClusterIPs: addrs("172.20.0.7"), Ports: []mesh.ServicePort{{Protocol: mesh.TCP, Port: 80}}}
	for _, c := range []struct {
		name  string
		state mesh.State
		how   string
	}{
		{"one joins", mesh.State{Nodes: nodesOf(0, 1001)}, "how=followed did=5"},
		{"and leaves", mesh.State{Nodes: nodes}, "how=followed did=5"},
		{"one moves", mesh.State{Nodes: with(func(n *mesh.Node) { n.Endpoints = endpointsOf("198.18.200.1:51820") })}, "how=followed did=1"},
		{"and back", mesh.State{Nodes: nodes}, "how=followed did=1"},
		{"one has another key", mesh.State{Nodes: with(func(n *mesh.Node) { n.PublicKey = mesh.Key{9, 9, 9} })}, "how=followed did=2"},
		{"one is not ready", mesh.State{Nodes: with(func(n *mesh.Node) { n.PublicKey, n.Ready = mesh.Key{9, 9, 9}, true })}, "how=followed did=0"},
		{"and has its own again", mesh.State{Nodes: nodes}, "how=followed did=2"},
		{"a service comes", mesh.State{Nodes: nodes, Services: []*mesh.Service{web}}, "how=followed did=0"}, // of the firewall's the log says more
		{"and goes", mesh.State{Nodes: nodes}, "how=followed did=0"},
		{"a hundred leave", mesh.State{Nodes: nodes[:900]}, "how=followed did=500"},
		{"and come back", mesh.State{Nodes: nodes}, "how=followed did=500"},
		{"half of them leave", mesh.State{Nodes: nodes[:500]}, "how=whole"},
		{"and come back", mesh.State{Nodes: nodes}, "how=whole"},
	} {
		log.Reset()
		d.afterwards(t, src, &c.state)
		how := ""
		for line := range strings.Lines(log.String()) {
			if strings.Contains(line, "msg=round") {
				how = strings.TrimSpace(line[strings.Index(line, "how="):]) + " "
			}
		}
		want := strings.Fields(c.how)
		if !strings.HasPrefix(how, want[0]+" ") || len(want) > 1 && !strings.Contains(how, " "+want[1]+" ") {
			t.Errorf("%s: %q, want %s", c.name, how, c.how)
		}
		if plan, err := d.Plan(); err != nil || len(plan) > 0 {
			t.Errorf("%s: left to do: %q, %v", c.name, plan[:min(len(plan), 5)], err)
		}
	}

	log.Reset()
	secret = 7
	d.PSKChanged("n0500")
	d.dirty.Store(uint32(pskDirt)) // the paths have their say with the next round
	if err := d.apply(t.Context()); err != nil {
		t.Fatal(err)
	}
	if got := log.String(); !strings.Contains(got, "how=followed") || !strings.Contains(got, " did=1\n") {
		t.Errorf("another preshared key: %s, want one operation", got)
	}
	if plan, err := d.Plan(); err != nil || len(plan) > 0 {
		t.Errorf("another preshared key: left to do: %q, %v", plan[:min(len(plan), 5)], err)
	}

	testns.Sh(t, "ip route del 10.100.7.0/24 proto 77 dev meshm; nft flush chain inet meshd pod-out 2>/dev/null || nft flush table inet meshd")
	d.afterwards(t, src, &mesh.State{Nodes: nodesOf(0, 1001)})
	d.kickAll() // as the event has it
	if err := d.apply(t.Context()); err != nil {
		t.Fatal(err)
	}
	if plan, err := d.Plan(); err != nil || len(plan) > 0 {
		t.Errorf("after somebody else's change left to do: %q, %v", plan, err)
	}
}

// What is on the device is known without reading it, whatever was followed.
func TestKnownToBeOnTheDevice(t *testing.T) {
	d, src, _ := amongMany(t)
	all := nodesOf(0, 1001)
	last := all[1000].PublicKey
	for _, n := range []int{1001, 1000, 1001} {
		d.afterwards(t, src, &mesh.State{Nodes: all[:n]})
		if has, known := d.device.Has(last); !known || has != (n == 1001) {
			t.Errorf("of %d nodes: the last is there %v, known %v", n, has, known)
		}
	}
}

func BenchmarkWholeRound(b *testing.B) {
	d, _, _ := amongMany(b)
	for b.Loop() {
		if err := d.apply(b.Context()); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkEndpointChanges(b *testing.B) {
	d, src, log := amongMany(b)
	for i := 0; b.Loop(); i++ {
		nodes := slices.Clone(src.Load().Nodes)
		nodes[500].Endpoints = endpointsOf(fmt.Sprintf("198.18.200.%d:51820", 1+i%250))
		d.afterwards(b, src, &mesh.State{Nodes: nodes})
		log.Reset()
	}
}

func BenchmarkNodeJoinsOrLeaves(b *testing.B) {
	d, src, log := amongMany(b)
	all := nodesOf(0, 1001)
	for i := 0; b.Loop(); i++ {
		d.afterwards(b, src, &mesh.State{Nodes: all[:1001-i%2]})
		log.Reset()
	}
}
