package datapath

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"meshd.dev/pkg/datapath/wireguard"
	"meshd.dev/pkg/mesh"
	"meshd.dev/pkg/status"
)

// firstHandshake is how long a tunnel may try before it is called down when
// it never was up.
const firstHandshake = 20 * time.Second

// tunnels remembers who the peers are, and when each began to send without
// an answer.
type tunnels struct {
	mu    sync.Mutex
	peers []wireguard.Peer
	mtus  map[mesh.Key]int
	// problems by node, from Compute.
	problems []Problem
	trying   map[mesh.Key]attempt
	// skip counts the endpoints of a node given up so far, the last one when.
	skip  map[string]int
	moved map[string]time.Time
}

// skips is what Compute needs to know of endpoints that did not answer.
func (t *tunnels) skips() map[string]int {
	t.mu.Lock()
	defer t.mu.Unlock()
	return maps.Clone(t.skip)
}

// giveUp has the next endpoint of a node tried, unless the present one has
// not had its time yet. With a single endpoint that changes nothing.
func (t *tunnels) giveUp(node string, now time.Time) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	if now.Sub(t.moved[node]) < firstHandshake {
		return false
	}
	if t.skip == nil {
		t.skip, t.moved = map[string]int{}, map[string]time.Time{}
	}
	t.skip[node]++
	t.moved[node] = now
	return true
}

// attempt: the peer's counters when it last was fine, and since when it is
// not.
type attempt struct {
	tx    int64
	since time.Time
}

// set takes the peers of a new wish.
func (t *tunnels) set(w Wish) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.peers, t.problems = w.WireGuard.Peers, w.Problems
	t.mtus = map[mesh.Key]int{}
	for _, p := range w.WireGuard.Peers {
		for _, r := range w.Route.Routes {
			if slices.Contains(p.AllowedIPs, r.Dst) {
				t.mtus[p.Key] = max(t.mtus[p.Key], r.MTU)
			}
		}
	}
}

// list is the tunnels as the device counts them, sorted by name. A tunnel
// that sends and has no session is down; one that has nothing to send is up.
func (t *tunnels) list(stats map[mesh.Key]wireguard.Stats, backend wireguard.Backend, now time.Time) []status.Tunnel {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.trying == nil {
		t.trying = map[mesh.Key]attempt{}
	}
	var list []status.Tunnel
	for _, p := range t.peers {
		s := stats[p.Key]
		line := status.Tunnel{Peer: p.Name, Handshake: s.Handshake, RxBytes: s.Rx, TxBytes: s.Tx,
			MTU: t.mtus[p.Key], Backend: string(backend), Up: true}
		if s.Endpoint.IsValid() {
			line.Endpoint = s.Endpoint.String()
		}
		if why := t.silent(p.Key, s, now); why != "" {
			line.Up, line.Reason = false, why
		}
		list = append(list, line)
	}
	for _, p := range t.problems {
		i := slices.IndexFunc(list, func(l status.Tunnel) bool { return l.Peer == p.Node })
		if i < 0 {
			list = append(list, status.Tunnel{Peer: p.Node, Backend: string(backend), Reason: p.Reason})
		} else if !list[i].Up || list[i].Handshake.IsZero() {
			list[i].Up, list[i].Reason = false, p.Reason
		}
	}
	slices.SortFunc(list, func(a, b status.Tunnel) int { return strings.Compare(a.Peer, b.Peer) })
	return list
}

// silent says why a peer counts as down, or nothing.
func (t *tunnels) silent(key mesh.Key, s wireguard.Stats, now time.Time) string {
	fresh := !s.Handshake.IsZero() && now.Sub(s.Handshake) <= wireguard.SessionLife
	a, known := t.trying[key]
	if fresh || !known || s.Tx < a.tx { // fine, new, or the device began anew
		t.trying[key] = attempt{tx: s.Tx, since: now}
		if fresh || s.Tx == 0 {
			return ""
		}
		a = t.trying[key]
	}
	switch {
	case s.Tx == a.tx: // nothing to say
		t.trying[key] = attempt{tx: s.Tx, since: now}
		return ""
	case s.Handshake.IsZero() && now.Sub(a.since) > firstHandshake:
		return fmt.Sprintf("sent %d bytes and never got an answer", s.Tx)
	case !s.Handshake.IsZero():
		return fmt.Sprintf("no handshake for %s, though %d bytes were sent since", now.Sub(s.Handshake).Round(time.Second), s.Tx-a.tx)
	}
	return ""
}

// Tunnels as they are now, a line a peer, sorted by name.
func (d *Datapath) Tunnels() []status.Tunnel {
	stats, backend, err := d.device.Stats()
	list := d.tunnels.list(stats, backend, time.Now())
	if err != nil {
		for i := range list {
			list[i].Up, list[i].Reason = false, err.Error()
		}
	}
	return list
}

// report puts a check for every tunnel on the board, and takes away those of
// nodes that are no more.
func (d *Datapath) report(w Wish) {
	d.tunnels.set(w)
	next := map[string]string{}
	for _, p := range w.Problems {
		next[p.Node] = p.Next
	}
	seen := map[string]bool{}
	for _, t := range d.Tunnels() {
		name := "tunnel/" + t.Peer
		seen[name] = true
		if t.Up {
			d.cfg.Board.OK(name)
			continue
		}
		step, ok := next[t.Peer]
		if !ok && d.tunnels.giveUp(t.Peer, time.Now()) {
			d.loop.Kick()
		}
		if !ok {
			step = fmt.Sprintf("on %s: does meshd run, is UDP port %d open, does its clock go right? then `meshctl plan` on both sides", t.Peer, d.cfg.ListenPort)
		}
		d.cfg.Board.Fail(name, t.Reason, step)
	}
	for name := range d.checks {
		if !seen[name] {
			d.cfg.Board.Clear(name)
		}
	}
	d.checks = seen
}
