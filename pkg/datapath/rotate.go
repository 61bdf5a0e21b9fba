package datapath

import (
	"cmp"
	"context"
	"fmt"
	"hash/fnv"
	"maps"
	"net/netip"
	"slices"
	"sync"
	"time"

	"meshd.dev/pkg/datapath/wireguard"
	"meshd.dev/pkg/mesh"
)

// How a node changes its key without losing a packet. A WireGuard device has
// one private key, and an allowed IP belongs to one of its peers, so that no
// device takes packets under the old and the new key at once: it needs a
// second one.
//
//	Steady     one device, one key, every peer on it.
//	Leaving    The next key is made and a second device has it. When that
//	           stands the key is published; the peers make second devices of
//	           their own, with the key they have, and knock. Whoever sees a
//	           session there sends over it from then on, and goes on taking
//	           packets on both. When each peer says that it sends to the next
//	           key over the second device, and we do, the first one is idle.
//	Returning  The first device gets the next key, which is now the current
//	           one. The peers see it published and knock there; whoever sees a
//	           session sends over it. When each says so, the second device is
//	           idle and goes, here and at the peers.
//
// Each node decides alone what it sends over, by the sessions it sees; moving
// needs nobody's leave, since both ends take packets on both devices. Only
// taking something away does: it waits for the word of every peer that could
// still send there. A node gives it when it has moved and has seen, in two
// looks at the device it left, that nothing more comes out of that: on a busy
// machine packets wait in front of a userspace device. It goes back only when
// it has heard nothing for so long that no word of it counts any more. A peer
// without a live session there has nothing to lose and is not waited for.
//
// The second device of a node keeps the key it was made with for as long as it
// is there. A peer sees a session there before this node does, and sends over
// it: so a node whose peer changes its key does not begin a change of its own,
// and takes what second device there is away before.
//
// The stage is in two files (wireguard.Ring), all else is read from the
// devices and asked of the peers, so that any of the nodes may be killed at any
// moment. TestEveryOrder of the model goes through all orders of two nodes' steps.

const (
	// drain is how long all have to be moved before what they moved away from
	// is changed: packets are on the way.
	drain = time.Second
	// drainSilent is the same when a peer did not say anything: it may just
	// not have heard yet.
	drainSilent = 10 * time.Second
	// wordLife is how long the word of a peer counts from when it was asked.
	// A peer gives none while it hears nothing, and goes back after more than
	// this has passed (package path, anewAfter).
	wordLife = 2 * time.Second
	// pace is how often the sessions are looked at while a key changes: no
	// event tells of a handshake. When a change does not get on, because a
	// machine is off perhaps, it is as slow as slowPace: each look reads all
	// peers, on all nodes.
	pace, slowPace = 50 * time.Millisecond, time.Second
	// patience is how long a node is waited for at a stage of a change that a
	// person asked for, perhaps as the key is known to be lost, and patienceDue of one
	// that the schedule began: people have that long to mend what is in the way.
	// The schedule does not end for good a tunnel that is there (cutOff).
	patience, patienceDue = 10 * time.Minute, 24 * time.Hour
)

// nextLook is when to look at the sessions again, if the last look took so
// long and nothing has moved for the time still. One that moved something says
// nothing of what looking takes.
func nextLook(still, took time.Duration) time.Duration {
	if still <= 0 {
		return pace
	}
	return max(pace, min(still/20, slowPace), 4*took)
}

// Sending is where a node sends to another: to which key of it, and over the
// second device or the first.
type Sending struct {
	Key    mesh.Key `json:"key"`
	Second bool     `json:"second"`
}

// Rotation is how far the change of this node's key is.
type Rotation struct {
	wireguard.Keys
	// Wanted: it begins as soon as it may.
	Wanted bool
	// Waiting for these peers, by name, and why; until then at the longest. One
	// that has no such moment is waited for without limit.
	Waiting map[string]string
	Until   map[string]time.Time
	// Cut are those of them that have no tunnel once the change goes on without
	// them, until a preshared key is agreed for the next key.
	Cut map[string]bool
	// Due is when the schedule begins the next one; zero without a schedule.
	Due time.Time
}

// rotation is what a Datapath remembers of changes of keys. Nothing of it is
// needed after a crash.
type rotation struct {
	mu      sync.Mutex
	wanted  bool
	asked   bool           // for, by a person
	applied wireguard.Keys // on the devices
	came    *Wish          // true as a whole, the last one
	heard   map[string]word
	first   sightings
	second  sightings
	left    map[string]leave
	waiting map[string]string
	cut     map[string]bool // of waiting, see cutOff
	borne   borne
	ready   time.Time // since when all are moved
	waits   time.Time // since when somebody is not
}

// borne is since when nodes are waited for at a stage.
type borne struct {
	stage wireguard.Stage
	since map[string]time.Time
}

// word of a peer.
type word struct {
	Sending
	at time.Time // when it was asked
}

// leave is the device that is not sent over to a node any more.
type leave struct {
	second bool // it is sent over the second device, so the first was left
	// sent was as much at that moment, and ever since.
	sent int64
	at   time.Time
	// empty: nothing came out of it from one look to the next, both after it
	// was left.
	empty bool
}

// RotateKey has this node change its key, as soon as no other node's change
// is in the way. Rotation tells how far it is.
func (d *Datapath) RotateKey() {
	d.rotation.mu.Lock()
	d.rotation.wanted, d.rotation.asked = true, true
	d.rotation.mu.Unlock()
	d.Kick()
}

// Rotation as it is now.
func (d *Datapath) Rotation() Rotation {
	d.rotation.mu.Lock()
	defer d.rotation.mu.Unlock()
	r := Rotation{Keys: d.device.Ring().Keys(), Wanted: d.rotation.wanted, Waiting: d.rotation.waiting, Until: map[string]time.Time{}, Cut: d.rotation.cut}
	for node := range r.Waiting {
		if !d.rotation.spared(node) {
			r.Until[node] = d.rotation.borne.since[node].Add(d.rotation.patience())
		}
	}
	if d.cfg.KeyRotation > 0 {
		r.Due = dueAt(d.cfg.Node, r.Keys, d.cfg.KeyRotation)
	}
	return r
}

// Published are the keys others may know: those the devices have. It is false
// while that is not known, because a change of the key was on when meshd
// started: what the others know already must not be taken back.
func (d *Datapath) Published() (wireguard.Keys, bool) {
	d.rotation.mu.Lock()
	defer d.rotation.mu.Unlock()
	if keys := d.device.Ring().Keys(); d.rotation.applied.Current.IsZero() {
		return keys, keys.Stage() == wireguard.Steady
	}
	return d.rotation.applied, true
}

// SecondPort is the UDP port of the second device.
func (d *Datapath) SecondPort() int { return d.cfg.ListenPort + 1 }

// SendsTo says where this node sends to another. That is its word: nothing of
// ours will come there any other way.
func (d *Datapath) SendsTo(node string) (Sending, bool) {
	return d.rotation.word(node, d.paths.Report(node).Down != "")
}

func (r *rotation) word(node string, silent bool) (Sending, bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.came == nil {
		return Sending{}, false
	}
	for _, p := range inUse(*r.came) {
		if p.Name == node {
			return Sending{Key: p.Key, Second: p.second}, r.came.Second == nil || !silent && r.leftFor(p)
		}
	}
	return Sending{}, false
}

// leftFor reports whether nothing is under way any more over the device that p
// is not on. The caller holds mu.
func (r *rotation) leftFor(p used) bool {
	l, known := r.left[p.Name]
	return known && l.second == p.second && l.empty
}

// Heard takes the word of a peer, where it sends to us, and when it was asked.
func (d *Datapath) Heard(node string, s Sending, asked time.Time) {
	d.rotation.mu.Lock()
	if d.rotation.heard == nil {
		d.rotation.heard = map[string]word{}
	}
	d.rotation.heard[node] = word{s, asked}
	d.rotation.mu.Unlock()
}

// dueAt is when the schedule changes the key: after the interval, and up to a
// tenth of it later, each node at another time.
func dueAt(node string, keys wireguard.Keys, every time.Duration) time.Time {
	h := fnv.New32a()
	fmt.Fprint(h, node, keys.Generation)
	return keys.Made.Add(every + every/10*time.Duration(h.Sum32()%1000)/1000)
}

// sessions are what the devices tell.
type sessions struct {
	first, second map[mesh.Key]wireguard.Stats
	// Sessions before these moments are dead: the device had another key.
	firstSince, secondSince time.Time
}

// sessions are read only when there is something to decide.
func (d *Datapath) sessions(keys wireguard.Keys) sessions {
	s := sessions{firstSince: d.device.Keyed(), secondSince: d.second.Keyed()}
	if keys.Stage() == wireguard.Returning && keys.Since.After(s.firstSince) {
		s.firstSince = keys.Since
	}
	s.first, _, _ = d.device.Stats()
	s.second, _, _ = d.second.Stats()
	now := time.Now()
	if s.firstSince.After(now) {
		s.firstSince = d.device.Keyed() // the clock was put back since the key was written
	}
	d.rotation.mu.Lock()
	defer d.rotation.mu.Unlock()
	d.rotation.first = d.rotation.first.look(s.first, now)
	d.rotation.second = d.rotation.second.look(s.second, now)
	return s
}

// lookAtLeft compares what has come out of the devices that were left with what
// had when they were looked at before.
func (r *rotation) lookAtLeft(s sessions, now time.Time) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.came == nil || r.came.Second == nil {
		r.left = nil
		return
	}
	was := r.left
	r.left = map[string]leave{}
	for _, p := range inUse(*r.came) {
		other, stats := r.came.WireGuard.Peers, s.first
		if !p.second {
			other, stats = r.came.Second.Peers, s.second
		}
		l, before := leave{second: p.second}, was[p.Name]
		i := slices.IndexFunc(other, func(o wireguard.Peer) bool { return o.Name == p.Name })
		if i < 0 {
			l.empty = true // nothing of it was left there
		} else if have, ok := stats[other[i].Key]; ok {
			l.sent, l.at = have.Tx, now
			if before.second == l.second && !before.at.IsZero() && (before.empty || before.sent == l.sent) {
				l.at, l.empty = before.at, before.empty || now.Sub(before.at) >= pace
			}
		} else {
			continue // not to be seen
		}
		r.left[p.Name] = l
	}
}

// sightings of handshakes, by peer: when each was seen first, and when it was
// made. The clock of the machine is believed then and not again, for a session
// does not age when the clock is put forward.
type sightings map[mesh.Key]sighting

type sighting struct{ told, made time.Time }

// look puts in place of the handshakes that a device tells of those that were
// made so long ago as has passed since.
func (old sightings) look(stats map[mesh.Key]wireguard.Stats, now time.Time) sightings {
	seen := make(sightings, len(stats))
	for k, s := range stats {
		if s.Handshake.IsZero() {
			continue
		}
		e := old[k]
		if !e.told.Equal(s.Handshake) { // a new one; by now's clock, which goes on steadily
			e = sighting{s.Handshake, now.Add(-max(0, now.Sub(s.Handshake)))}
		}
		seen[k] = e
		s.Handshake = e.made
		stats[k] = s
	}
	return seen
}

func alive(stats map[mesh.Key]wireguard.Stats, key mesh.Key, since, now time.Time) bool {
	h := stats[key].Handshake
	return h.After(since) && now.Sub(h) < wireguard.SessionLife
}

func (s sessions) firstAlive(n mesh.Node, now time.Time) bool {
	return alive(s.first, n.PublicKey, s.firstSince, now)
}

func (s sessions) secondAlive(n mesh.Node, now time.Time) bool {
	return alive(s.second, newest(n), s.secondSince, now)
}

// overSecond decides what to send over: while one of the two leaves its key
// over the second device, else over the first, and over the other one as long
// as there is no session on that.
func overSecond(own wireguard.Keys, nodes []mesh.Node, s sessions, now time.Time) map[string]bool {
	over := map[string]bool{}
	for _, n := range nodes {
		if !hasSecond(own, n) || !s.secondAlive(n, now) {
			continue
		}
		leaving := own.Stage() == wireguard.Leaving || wireguard.StageOf(n.PublicKey, n.NextKey) == wireguard.Leaving
		over[n.Name] = leaving || !s.firstAlive(n, now)
	}
	return over
}

// turn takes the change of the key one step further when it is time, and says
// over what to send.
func (d *Datapath) turn(ctx context.Context, state *mesh.State, now time.Time) (wireguard.Keys, map[string]bool, error) {
	ring := d.device.Ring()
	keys := ring.Keys()
	me, _ := state.Node(d.cfg.Node)
	wanted := d.wantsRotation(keys, me.LeaveKey, now)
	others, changing := d.others(state, keys)
	if !changing && !wanted {
		d.rotation.set(nil)
		return keys, nil, nil
	}
	s := d.sessions(keys)
	d.rotation.lookAtLeft(s, now)
	if step := d.step(ctx, keys, others, s, wanted, now); step != nil {
		if err := step(); err != nil {
			return keys, nil, err
		}
		keys = ring.Keys()
		s = d.sessions(keys)
		d.cfg.Log.Info("key", "stage", keys.Stage(), "key", newestOwn(keys), "generation", keys.Generation)
	}
	return keys, overSecond(keys, others, s, now), nil
}

// others are the other nodes; changing is true when we or one of them change
// a key.
func (d *Datapath) others(state *mesh.State, keys wireguard.Keys) (nodes []mesh.Node, changing bool) {
	changing = !keys.Next.IsZero()
	for _, n := range state.Nodes {
		if n.Name != d.cfg.Node {
			nodes = append(nodes, n)
			changing = changing || !n.NextKey.IsZero()
		}
	}
	return nodes, changing
}

func newestOwn(k wireguard.Keys) mesh.Key {
	if k.Next.IsZero() {
		return k.Current
	}
	return k.Next
}

// wantsRotation: somebody said so here, or on the Node object, or it is time.
func (d *Datapath) wantsRotation(keys wireguard.Keys, leave mesh.Key, now time.Time) bool {
	d.rotation.mu.Lock()
	defer d.rotation.mu.Unlock()
	asked := leave == keys.Current
	d.rotation.asked = d.rotation.asked || asked
	if keys.Stage() != wireguard.Steady {
		return d.rotation.wanted
	}
	d.rotation.wanted = d.rotation.wanted || asked
	if d.cfg.KeyRotation > 0 && !now.Before(dueAt(d.cfg.Node, keys, d.cfg.KeyRotation)) {
		d.rotation.wanted = true
	}
	d.rotation.asked = d.rotation.asked && d.rotation.wanted
	return d.rotation.wanted
}

// step is the next one to do, or nil.
func (d *Datapath) step(ctx context.Context, keys wireguard.Keys, nodes []mesh.Node, s sessions, wanted bool, now time.Time) func() error {
	ring := d.device.Ring()
	if keys.Stage() == wireguard.Steady {
		if !wanted {
			d.rotation.set(nil)
			return nil
		}
		may, without := d.rotation.mayBegin(nodes, s, now)
		if !may {
			return nil
		}
		return func() error {
			d.tellWithout(keys, without)
			if err := d.second.Remove(ctx); err != nil { // of nodes that are away
				return err
			}
			d.rotation.begun()
			return ring.Begin()
		}
	}
	may, without := d.rotation.mayGoOn(keys, nodes, s, d.cfg.PSK, now)
	if !may {
		return nil
	}
	d.tellWithout(keys, without)
	if keys.Stage() == wireguard.Leaving {
		return ring.Adopt
	}
	return ring.Finish
}

func (d *Datapath) tellWithout(keys wireguard.Keys, nodes []string) {
	if len(nodes) > 0 {
		d.cfg.Log.Warn("the change of the key goes on without nodes that were waited for long enough", "stage", keys.Stage(), "nodes", nodes)
	}
}

// mayBegin reports whether nobody's change is in the way; without names those
// whose is, and who were waited for long enough.
func (r *rotation) mayBegin(nodes []mesh.Node, s sessions, now time.Time) (may bool, without []string) {
	busy := changing(nodes, s, now)
	without = r.bear(wireguard.Steady, busy, nil, now)
	r.set(busy)
	return len(busy) == 0, without
}

// mayGoOn reports whether nobody sends any more to what is changed next.
func (r *rotation) mayGoOn(keys wireguard.Keys, nodes []mesh.Node, s sessions, psk pskOf, now time.Time) (may bool, without []string) {
	waiting, silent := r.unmoved(keys, nodes, s, now)
	cut := map[string]bool{}
	for _, n := range nodes { // without mu: who has the preshared keys asks for the Rotation under a lock of its own
		if waiting[n.Name] != "" && cutOff(keys.Next, n, psk) {
			cut[n.Name] = true
		}
	}
	without = r.bear(keys.Stage(), waiting, cut, now)
	return r.drained(waiting, silent || len(without) > 0, now), without
}

// pskOf two keys, see Options.PSK.
type pskOf = func(n mesh.Node, own, peer mesh.Key) PSK

// cutOff reports whether there is no tunnel to n any more when we have our
// next key: the preshared key it needs is not agreed, on either device, and never
// is while our TCP ports do not reach each other.
func cutOff(next mesh.Key, n mesh.Node, psk pskOf) bool {
	return psk != nil && !slices.ContainsFunc([]mesh.Key{n.PublicKey, newest(n)}, func(theirs mesh.Key) bool {
		a := psk(n, next, theirs)
		return a.Wait == "" || !a.Firm
	})
}

// spared is a node that a change of the schedule waits for without limit. The
// caller holds mu.
func (r *rotation) spared(node string) bool { return r.cut[node] && !r.asked }

func (r *rotation) patience() time.Duration {
	if r.asked {
		return patience
	}
	return patienceDue
}

// bear takes those out of waiting that were waited for long enough at this
// stage. Once a change has begun they cannot make that longer by being ready
// for a moment. For those who are spared it begins when they are not any more.
func (r *rotation) bear(stage wireguard.Stage, waiting map[string]string, cut map[string]bool, now time.Time) (without []string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.cut = cut
	if r.borne.stage != stage || r.borne.since == nil {
		r.borne = borne{stage, map[string]time.Time{}}
	}
	if stage == wireguard.Steady {
		maps.DeleteFunc(r.borne.since, func(node string, _ time.Time) bool { return waiting[node] == "" })
	}
	for _, node := range slices.Sorted(maps.Keys(waiting)) {
		since, before := r.borne.since[node]
		if !before || r.spared(node) {
			r.borne.since[node] = now
		} else if now.Sub(since) >= r.patience() {
			delete(waiting, node)
			without = append(without, node)
		}
	}
	return without
}

// changing are the nodes that change their keys and are there, and so the
// reason for not beginning.
func changing(nodes []mesh.Node, s sessions, now time.Time) map[string]string {
	busy := map[string]string{}
	for _, n := range nodes {
		if !n.NextKey.IsZero() && (s.firstAlive(n, now) || s.secondAlive(n, now)) {
			busy[n.Name] = "it changes its own key, and ours is next"
		}
	}
	return busy
}

// unmoved peers, and why; silent is true when one without a session was left
// out.
func (r *rotation) unmoved(keys wireguard.Keys, nodes []mesh.Node, s sessions, now time.Time) (waiting map[string]string, silent bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	waiting = map[string]string{}
	second, empty := map[string]bool{}, map[string]bool{}
	if r.came != nil {
		for _, p := range inUse(*r.came) {
			second[p.Name], empty[p.Name] = p.second, r.leftFor(p)
		}
	}
	want := Sending{Key: keys.Next, Second: keys.Stage() == wireguard.Leaving}
	for _, n := range nodes {
		if len(n.PodCIDRs) == 0 || n.PublicKey.IsZero() {
			continue // no peer
		}
		moved, heard := second[n.Name] == want.Second, r.heard[n.Name]
		fresh := now.Sub(heard.at) < wordLife
		switch {
		case moved && empty[n.Name] && fresh && heard.Sending == want:
		case !s.firstAlive(n, now) && !s.secondAlive(n, now):
			silent = true
		case !moved:
			waiting[n.Name] = "there is no session with it on the other device yet"
		case !empty[n.Name]:
			waiting[n.Name] = "what was sent to it may not have left this machine yet"
		case !fresh:
			waiting[n.Name] = "it does not say which key it sends to"
		default:
			waiting[n.Name] = "it still sends to the other key"
		}
	}
	return waiting, silent
}

// drained reports whether nobody was waited for long enough.
func (r *rotation) drained(waiting map[string]string, silent bool, now time.Time) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.waiting = waiting
	if len(waiting) > 0 {
		r.ready = time.Time{}
		return false
	}
	if r.ready.IsZero() {
		r.ready = now
	}
	wait := drain
	if silent {
		wait = drainSilent
	}
	if now.Sub(r.ready) < wait {
		return false
	}
	r.ready = time.Time{}
	return true
}

func (r *rotation) set(waiting map[string]string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.waiting = waiting
}

func (r *rotation) begun() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.wanted, r.ready = false, time.Time{}
}

// done remembers what the kernel has now; it reports whether that is news for
// the others.
func (r *rotation) done(keys wireguard.Keys, w Wish) (news bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	news = r.applied.Current != keys.Current || r.applied.Next != keys.Next
	r.applied, r.came = keys, &w
	return news
}

// used is a peer that is sent to.
type used struct {
	wireguard.Peer
	second bool
}

// inUse are the peers by which nodes are sent to, one a node.
func inUse(w Wish) []used {
	if w.Second == nil {
		list := make([]used, len(w.WireGuard.Peers))
		for i, p := range w.WireGuard.Peers {
			list[i].Peer = p
		}
		return list
	}
	over := map[netip.Prefix]bool{}
	for _, r := range w.Route.Routes {
		if r.Second {
			over[r.Dst] = true
		}
	}
	var list []used
	take := func(cfg wireguard.Config, second bool) {
		for _, p := range cfg.Peers {
			if moved := slices.ContainsFunc(p.AllowedIPs, func(a netip.Prefix) bool { return over[a] }); moved == second {
				list = append(list, used{p, second})
			}
		}
	}
	take(w.WireGuard, false)
	take(*w.Second, true)
	slices.SortFunc(list, func(a, b used) int { return cmp.Compare(a.Name, b.Name) })
	return list
}

// slow is how long a change of the key may take before it is called a
// problem.
const slow = 2 * time.Minute

// reportKeys says on the board when a change of the key does not get on.
func (d *Datapath) reportKeys(err error) {
	r := d.Rotation()
	stuck := d.rotation.stuck(len(r.Waiting) > 0, time.Now())
	switch {
	case err != nil:
		d.cfg.Board.Report("datapath/rotation", err, "free space on the disk, or mend the permissions of the state folder; the old key goes on")
	case stuck:
		d.cfg.Board.Fail("datapath/rotation", r.held(), d.unhold(r))
	default:
		d.cfg.Board.OK("datapath/rotation")
	}
}

// first of those that are waited for.
func (r Rotation) first() string { return slices.Min(slices.Collect(maps.Keys(r.Waiting))) }

// held says who holds the change up.
func (r Rotation) held() string {
	what := fmt.Sprintf("the change of the key (%s)", r.Stage())
	if r.Stage() == wireguard.Steady {
		what = "the change of this node's key has not begun: it"
	}
	return fmt.Sprintf("%s waits for %d nodes: %s: %s", what, len(r.Waiting), r.first(), r.Waiting[r.first()])
}

// unhold says what to do about it.
func (d *Datapath) unhold(r Rotation) string {
	node := r.first()
	until := "; nothing is lost meanwhile. " + d.until(r, node)
	if r.Stage() == wireguard.Steady {
		return fmt.Sprintf("on %s see `meshctl status` and `meshctl keys`: what does its own change wait for? A node that is not to be trusted, or will not come back, is to be deleted: kubectl delete node %[1]s", node) + until
	}
	return fmt.Sprintf("between this machine and %s UDP ports %d and %d and TCP port %d have to be open, and meshd has to run there", node, d.cfg.ListenPort, d.SecondPort(), d.cfg.ListenPort) + until
}

// until when node is waited for, and what it loses then.
func (d *Datapath) until(r Rotation, node string) string {
	cut := fmt.Sprintf("there is no tunnel between the two until TCP port %d works between them: a preshared key has to be agreed for the new key", d.cfg.ListenPort)
	at, limited := r.Until[node]
	switch {
	case !limited:
		return fmt.Sprintf("It waits for %s without limit, as otherwise %s. If this machine's key is known to be lost, `meshctl keys rotate` has it go on %.0f minutes later all the same", node, cut, patience.Minutes())
	case !r.Cut[node]:
		cut = "packets between the two are lost until that has heard of the key"
	}
	return fmt.Sprintf("At %s it goes on without %s, and %s", at.Format(time.RFC3339), node, cut)
}

// stuck reports whether somebody has been waited for for too long.
func (r *rotation) stuck(waits bool, now time.Time) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if !waits {
		r.waits = time.Time{}
		return false
	}
	if r.waits.IsZero() {
		r.waits = now
	}
	return now.Sub(r.waits) > slow
}
