package datapath

import (
	"context"
	"errors"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"time"

	"meshd.dev/pkg/datapath/path"
	"meshd.dev/pkg/datapath/route"
	"meshd.dev/pkg/datapath/wireguard"
	"meshd.dev/pkg/mesh"
)

// A cluster of a thousand nodes changes all the time, a node or a service at
// once. Computing everything and reading everything back for each takes a
// hundred times as long as the change itself. So a wish can be made out of the
// one before (followed.next), with what differs, and that alone is done: it
// has to be the wish Compute would have made. What this cannot do, it leaves to
// Compute, and what the kernel has besides is the business of whole rounds:
// they come with every event that is not our own, when something went wrong,
// and every resync.

// follow does what differs from the last round, if that came true and this is
// enough; done is false when a whole round has to be. paired are the nodes with
// which the preshared key is another one.
func (d *Datapath) follow(ctx context.Context, state *mesh.State, what dirt, paired map[string]bool) (done bool, err error) {
	began, last, keys := time.Now(), d.last, d.device.Ring().Keys()
	if last == nil || keys != last.opts.Keys || d.wantsRotation(keys, last.me.LeaveKey, began) {
		return false, nil
	}
	var paths map[string]path.Choice
	if what&pathsDirt != 0 {
		paths = d.paths.Choices()
	}
	last.opts.OnDevice = d.stillOnDevice() // not what was on it in the last whole round
	next, ch, ok := last.next(state, paths, paired)
	if !ok || ch.services && !slices.Equal(d.clusterDNS(state), last.opts.ClusterDNS) {
		return false, nil
	}
	d.true.Store(false) // until the device and the wish agree again
	did, err := d.followThrough(ctx, next.wish, ch, ch.services || what&podsDirt != 0)
	if errors.Is(err, wireguard.ErrNotKnown) {
		return false, nil
	}
	d.told(state, "followed", began, did)
	if err != nil {
		d.last = nil
		return true, err
	}
	next.finish(ch)
	d.last = next
	if did > 0 {
		d.moved = began
	}
	if len(ch.keys) > 0 || len(ch.gone.Floor)+len(ch.added.Floor) > 0 || len(last.wish.Problems)+len(next.wish.Problems) > 0 {
		d.became(next.wish)
	} else {
		d.wished.Store(&next.wish)
	}
	d.cameTrue(keys, &next.wish)
	return true, nil
}

// followThrough makes the change in the kernel; the firewall first, as always.
func (d *Datapath) followThrough(ctx context.Context, wish Wish, ch change, firewall bool) (did int, err error) {
	if firewall {
		if err := d.applyFirewall(ctx, wish); err != nil {
			return 0, err
		}
	}
	if len(ch.keys) > 0 {
		ops, err := d.device.Follow(ctx, wish.WireGuard, ch.keys)
		if err != nil {
			return 0, err
		}
		did += len(ops)
	}
	ops, err := d.routes.Follow(wish.Route, ch.gone, ch.added)
	return did + len(ops), err
}

// told says to who looks closely how a round went, and of a State when it is
// dealt with for the first time how long it took since the event.
func (d *Datapath) told(state *mesh.State, how string, began time.Time, did int) {
	attrs := []any{"how", how, "took", time.Since(began), "did", did}
	if state != d.dealt && !state.Heard.IsZero() {
		attrs = append(attrs, "heard", state.Heard, "since", time.Since(state.Heard))
	}
	d.dealt = state
	d.cfg.Log.Debug("round", attrs...)
}

// followed is a wish that came true and what it was made of.
type followed struct {
	state *mesh.State
	computation
}

// change is what differs between two wishes.
type change struct {
	// keys of the peers that differ, and the routes of their nodes.
	keys        []mesh.Key
	gone, added route.Part
	services    bool
	// names of these nodes, and what they want now.
	names map[string]bool
	part  computation
}

// next wish, for a state, for paths, which are nil where they are as they were,
// and for nodes with which the preshared key is another one. ok is false when it
// has to be computed as a whole.
func (f *followed) next(state *mesh.State, paths map[string]path.Choice, paired map[string]bool) (next *followed, ch change, ok bool) {
	next = &followed{state: state, computation: f.computation}
	if f.refused || f.wish.Second != nil || !slices.Equal(f.state.ServiceCIDRs, state.ServiceCIDRs) {
		return nil, ch, false
	}
	if ch.services = !slices.Equal(f.state.Services, state.Services); ch.services {
		next.addFirewall(state)
	}
	if paths != nil {
		next.opts.Paths = paths
	}
	gone, added := differing(f.state.Nodes, state.Nodes)
	gone, added = f.touched(state, gone, added, func(t path.Target) bool {
		return paired[t.Node] || paths != nil && f.opts.Paths[t.Node] != paths[t.Node]
	})
	if len(gone)+len(added) == 0 {
		return next, ch, true
	}
	if len(gone)+len(added) > max(16, len(state.Nodes)/8) || !f.canFollow(state, gone, added) {
		return nil, ch, false
	}
	return next, ch, next.replace(&f.wish, gone, added, &ch)
}

// differing nodes of two lists that are sorted by name: one that changed is in
// both.
func differing(old, now []mesh.Node) (gone, added []mesh.Node) {
	for len(old) > 0 || len(now) > 0 {
		order := 1
		if len(now) == 0 {
			order = -1
		} else if len(old) > 0 {
			order = strings.Compare(old[0].Name, now[0].Name)
		}
		switch {
		case order < 0:
			gone, old = append(gone, old[0]), old[1:]
		case order > 0:
			added, now = append(added, now[0]), now[1:]
		default:
			if !old[0].Equal(now[0]) {
				gone, added = append(gone, old[0]), append(added, now[0])
			}
			old, now = old[1:], now[1:]
		}
	}
	return gone, added
}

// touched adds to the nodes that differ those that are as they were, but what
// is wished of them is not: their path is another one, or the preshared key.
func (f *followed) touched(state *mesh.State, gone, added []mesh.Node, differs func(path.Target) bool) (_, _ []mesh.Node) {
	for _, t := range f.wish.Targets {
		if !differs(t) || slices.ContainsFunc(gone, func(n mesh.Node) bool { return n.Name == t.Node }) {
			continue
		}
		if n, there := state.Node(t.Node); there {
			gone, added = append(gone, n), append(added, n)
		}
	}
	byName := func(a, b mesh.Node) int { return strings.Compare(a.Name, b.Name) }
	slices.SortFunc(gone, byName)
	slices.SortFunc(added, byName)
	return gone, added
}

// canFollow reports whether the nodes have to do with nothing but themselves.
func (f *followed) canFollow(state *mesh.State, gone, added []mesh.Node) bool {
	for _, n := range slices.Concat(gone, added) {
		if n.Name == f.self || !n.NextKey.IsZero() {
			return false
		}
		for _, p := range n.PodCIDRs { // else the ranges of the cluster change
			if !slices.ContainsFunc(f.opts.PodCIDRs, func(c netip.Prefix) bool { return c.Bits() < p.Bits() && c.Overlaps(p) }) {
				return false
			}
		}
	}
	for _, n := range added {
		if f.clashes(state, n) {
			return false
		}
		for _, p := range n.PodCIDRs {
			if f.misplaced(p, n.Addresses, "")+f.misplaced(p, f.me.Addresses, "") != "" {
				return false
			}
		}
	}
	return true
}

// clashes reports whether another node has the key or a pod CIDR of n.
func (f *followed) clashes(state *mesh.State, n mesh.Node) bool {
	keyed := !n.PublicKey.IsZero()
	if keyed && (n.PublicKey == f.me.PublicKey || n.PublicKey == f.opts.Keys.Current || n.PublicKey == f.opts.Keys.Next) {
		return true
	}
	for i := range state.Nodes {
		o := &state.Nodes[i]
		if o.Name == n.Name {
			continue
		}
		if keyed && (o.PublicKey == n.PublicKey || o.NextKey == n.PublicKey) {
			return true
		}
		for _, p := range n.PodCIDRs {
			for _, q := range o.PodCIDRs {
				if p.Overlaps(q) {
					return true
				}
			}
		}
	}
	return false
}

// replace, of what the nodes that are gone have in the wish, the peers by those
// that the added ones want; finish does the rest.
func (f *followed) replace(old *Wish, gone, added []mesh.Node, ch *change) bool {
	part := f.computation
	part.wish, part.links, part.mtus, part.widths = Wish{}, nil, map[string]int{}, map[int]int{}
	part.opts.Paths = map[string]path.Choice{}
	for _, n := range added {
		part.opts.Paths[n.Name] = stillGood(f.opts.Paths[n.Name], old.Targets, n)
		part.addPeer(n)
	}
	widest := f.widest()
	f.widths = maps.Clone(f.widths)
	for mtu, links := range part.widths {
		f.widths[mtu] += links
	}
	ch.names = map[string]bool{}
	for _, n := range gone {
		ch.names[n.Name] = true
		ch.gone.Floor = append(ch.gone.Floor, n.PodCIDRs...)
		if mtu, linked := f.mtus[n.Name]; linked {
			f.widths[mtu]--
		}
	}
	for _, n := range added {
		ch.names[n.Name] = true
	}
	if f.widest() != widest {
		return false // the device's MTU, and with it every route's
	}
	part.settleMTU(widest)
	ch.part = part
	ch.added = route.Part{Routes: part.wish.Route.Routes, Floor: part.wish.Route.Floor}
	for i := range old.Route.Routes {
		if r := &old.Route.Routes[i]; r.Node != "" && ch.names[r.Node] {
			ch.gone.Routes = append(ch.gone.Routes, *r)
		}
	}
	var peers []wireguard.Peer
	f.wish.WireGuard.Peers, peers = spliced(old.WireGuard.Peers, part.wish.WireGuard.Peers, ch.names, func(x *wireguard.Peer) string { return x.Name })
	for _, x := range slices.Concat(peers, part.wish.WireGuard.Peers) {
		ch.keys = append(ch.keys, x.Key)
	}
	return true
}

// stillGood is what is left of a choice when a node is another: an endpoint
// that it does not name any more, and did before, is not where it called from.
// The paths will say so themselves, a round later.
func stillGood(c path.Choice, targets []path.Target, n mesh.Node) path.Choice {
	i, there := slices.BinarySearchFunc(targets, n.Name, func(t path.Target, name string) int { return strings.Compare(t.Node, name) })
	if there && slices.Contains(targets[i].Published, c.Endpoint) && !slices.Contains(n.Endpoints, c.Endpoint) {
		c.Endpoint = netip.AddrPort{}
	}
	return c
}

// finish what replace began: the part of the wish that the kernel did not wait
// for.
func (f *followed) finish(ch change) {
	if ch.names == nil {
		return
	}
	w, p := &f.wish, &ch.part.wish
	w.Route.Routes, _ = spliced(w.Route.Routes, p.Route.Routes, ch.names, func(x *route.Route) string { return x.Node })
	w.Targets, _ = spliced(w.Targets, p.Targets, ch.names, func(x *path.Target) string { return x.Node })
	w.Problems, _ = spliced(w.Problems, p.Problems, ch.names, func(x *Problem) string { return x.Node })
	w.Route.Floor = floorOf(w.Route.Floor, ch.gone.Floor, ch.added.Floor)
	for name := range ch.names {
		delete(f.mtus, name) // the last one's map as well: that one is done with
	}
	maps.Copy(f.mtus, ch.part.mtus)
}

// spliced is old without what belongs to the nodes named, which comes back as
// gone, and with added; both lists are sorted by node, what belongs to none
// comes last.
func spliced[T any](old, added []T, names map[string]bool, node func(*T) string) (now, gone []T) {
	now = make([]T, 0, len(old)+len(added))
	for i := range old {
		name := node(&old[i])
		if name != "" && names[name] {
			gone = append(gone, old[i])
			continue
		}
		for len(added) > 0 && (name == "" || node(&added[0]) < name) {
			now, added = append(now, added[0]), added[1:]
		}
		now = append(now, old[i])
	}
	now = append(now, added...)
	if len(now) == 0 {
		now = nil
	}
	return now, gone
}

func floorOf(old, gone, added []netip.Prefix) []netip.Prefix {
	now := make([]netip.Prefix, 0, len(old)+len(added))
	for _, p := range old {
		if !slices.Contains(gone, p) {
			now = append(now, p)
		}
	}
	for _, p := range added {
		if i, there := slices.BinarySearchFunc(now, p, comparePrefix); !there {
			now = slices.Insert(now, i, p)
		}
	}
	return now
}
