package datapath

import (
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"sync"

	"meshd.dev/pkg/datapath/path"
	"meshd.dev/pkg/datapath/wireguard"
	"meshd.dev/pkg/mesh"
	"meshd.dev/pkg/status"
)

// tunnels remembers who the peers are.
type tunnels struct {
	mu    sync.Mutex
	peers []used
	// first are the keys of the first device, by node, while there is a
	// second.
	first map[string]mesh.Key
	mtus  map[mesh.Key]int
	// problems by node, from Compute.
	problems []Problem
	checks   map[string]bool // on the board
}

// set takes the peers of a new wish.
func (t *tunnels) set(w Wish) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.peers, t.problems = inUse(w), w.Problems
	t.first = map[string]mesh.Key{}
	if w.Second != nil {
		for _, p := range w.WireGuard.Peers {
			t.first[p.Name] = p.Key
		}
	}
	byPrefix := make(map[netip.Prefix]int, len(w.Route.Routes))
	for _, r := range w.Route.Routes {
		byPrefix[r.Dst] = r.MTU
	}
	t.mtus = make(map[mesh.Key]int, len(t.peers))
	for _, p := range t.peers {
		for _, a := range p.AllowedIPs {
			t.mtus[p.Key] = max(t.mtus[p.Key], byPrefix[a])
		}
	}
}

// list is the tunnels as the device counts them, sorted by name. A tunnel
// that sends and hears nothing is down; one that has nothing to send is up.
func (t *tunnels) list(stats map[mesh.Key]wireguard.Stats, backend wireguard.Backend, report func(node string) path.Report) []status.Tunnel {
	t.mu.Lock()
	defer t.mu.Unlock()
	var list []status.Tunnel
	at := map[string]int{}
	for _, p := range t.peers {
		s, r := stats[p.Key], report(p.Name)
		line := status.Tunnel{Peer: p.Name, Handshake: s.Handshake, RxBytes: s.Rx, TxBytes: s.Tx,
			MTU: t.mtus[p.Key], Backend: string(backend), Up: r.Down == "", Reason: r.Down, Note: r.Note}
		if s.Endpoint.IsValid() {
			line.Endpoint = s.Endpoint.String()
		}
		at[p.Name] = len(list)
		list = append(list, line)
	}
	for _, p := range t.problems {
		i, ok := at[p.Node]
		if !ok {
			list = append(list, status.Tunnel{Peer: p.Node, Backend: string(backend), Reason: p.Reason})
		} else if !list[i].Up || list[i].Handshake.IsZero() {
			list[i].Up, list[i].Reason = false, p.Reason
		}
	}
	slices.SortFunc(list, func(a, b status.Tunnel) int { return strings.Compare(a.Peer, b.Peer) })
	return list
}

// nexts are the steps a person can take about problems, by node.
func (t *tunnels) nexts() map[string]string {
	t.mu.Lock()
	defer t.mu.Unlock()
	next := map[string]string{}
	for _, p := range t.problems {
		next[p.Node] = p.Next
	}
	return next
}

// stats of the peers that are sent to, whichever device they are on.
func (d *Datapath) stats() (map[mesh.Key]wireguard.Stats, wireguard.Backend, error) {
	stats, backend, err := d.device.Stats()
	if err != nil {
		return stats, backend, err
	}
	stats, _, err = d.merge(stats)
	return stats, backend, err
}

// merge into the counters of the first device those of the peers that are sent
// to over the second, for people and for the paths: what is told of a path is
// the endpoint on the first device, which is the one that is published.
func (d *Datapath) merge(first map[mesh.Key]wireguard.Stats) (stats, watched map[mesh.Key]wireguard.Stats, err error) {
	d.tunnels.mu.Lock()
	moved := slices.DeleteFunc(slices.Clone(d.tunnels.peers), func(p used) bool { return !p.second })
	keys := d.tunnels.first
	d.tunnels.mu.Unlock()
	if len(moved) == 0 {
		return first, first, nil
	}
	second, _, err := d.second.Stats()
	stats, watched = maps.Clone(first), maps.Clone(first)
	for _, p := range moved {
		s := second[p.Key]
		stats[p.Key] = s
		s.Endpoint = first[keys[p.Name]].Endpoint
		watched[p.Key] = s
	}
	return stats, watched, err
}

// Tunnels as they are now, a line a peer, sorted by name.
func (d *Datapath) Tunnels() []status.Tunnel {
	stats, backend, err := d.stats()
	list := d.tunnels.list(stats, backend, d.paths.Report)
	if err != nil {
		for i := range list {
			list[i].Up, list[i].Reason = false, err.Error()
		}
	}
	return list
}

// report puts a check for every tunnel on the board, and takes away those of
// nodes that are no more.
func (d *Datapath) report(tunnels []status.Tunnel) {
	next := d.tunnels.nexts()
	seen := map[string]bool{}
	for _, t := range tunnels {
		name := "tunnel/" + t.Peer
		seen[name] = true
		if t.Up {
			d.cfg.Board.OK(name)
			continue
		}
		step, ok := next[t.Peer]
		if !ok {
			step = fmt.Sprintf("on %s: does meshd run, is UDP port %d open, does its clock go right? then `meshctl plan` on both sides", t.Peer, d.cfg.ListenPort)
		}
		d.cfg.Board.Fail(name, t.Reason, step)
	}
	d.tunnels.mu.Lock()
	defer d.tunnels.mu.Unlock()
	for name := range d.tunnels.checks {
		if !seen[name] {
			d.cfg.Board.Clear(name)
		}
	}
	d.tunnels.checks = seen
}
