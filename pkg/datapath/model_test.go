package datapath

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"

	"meshd.dev/pkg/datapath/route"
	"meshd.dev/pkg/datapath/wireguard"
	"meshd.dev/pkg/mesh"
)

// A model of two nodes that change their keys while each sends to the other
// all the time. What a node decides is decided by the functions of this
// package; devices, sessions, the API and the wire are played. A round of a
// node is cut into the steps in which the world sees it, what a node knows of
// the other is as old as it may be, packets wait in front of a device for as
// long as its process likes, and meshd may die between any two steps.
//
// In every state in which a packet may be, it arrives.

// world is the state of it all; its zero values mean not there.
type modelState struct {
	n       [2]modelNode
	crashes int8 // still to come
	// patience may end so many times; without: it did, and so a packet may be
	// lost.
	patience int8
	without  bool
}

type modelNode struct {
	wants        int8 // changes still to be asked for
	wanted       bool
	current, nxt int8 // keys on disk: 1, 2, ...
	dev          [2]modelDevice
	second       bool    // routed over the second device
	queued       [2]bool // in front of the devices
	came, wish   modelWish
	pc           int8    // step of the round
	published    [2]int8 // current and next key
	knows        [2]int8 // of the other's
	heard        modelWord
	answer       modelWord // on the way to this node
	ready        bool
	left         modelLeft
	flushed      [2]bool // since the last look
	// spent: the other was waited for long enough at this stage.
	spent bool
}

type modelDevice struct {
	own, peer int8
	// receives: a session with these keys was made; alive: and is known to be
	// on both ends.
	receives, alive bool
}

// modelWish is what of a Wish matters here.
type modelWish struct {
	known                bool
	current, nxt         int8 // keys
	first, other         int8 // keys of the peer on the devices; 0: not there
	hasSecond, overOther bool
}

type modelWord struct {
	said   bool
	key    int8
	second bool
}

type modelLeft struct{ known, second, looked, empty bool }

// rules that may be left out, to see that they are needed.
type rules struct{ beginsAnyway, keepsSecond, asksNobody, leavesQueues bool }

// others is what ails the first node, to see that the second gets on.
type others int

const (
	well   others = iota
	stuck         // its change never gets on: it waits for a third node
	frozen        // its device is there, and a next key in the API; it says and does nothing
)

func modelKey(node int, k int8) mesh.Key {
	if k == 0 {
		return mesh.Key{}
	}
	return mesh.Key{byte(node + 1), byte(k)}
}

var modelNames = [2]string{"a", "b"}

func modelNodeOf(i int, keys [2]int8) mesh.Node {
	return mesh.Node{Name: modelNames[i], PublicKey: modelKey(i, keys[0]), NextKey: modelKey(i, keys[1]), NextPort: 51821,
		PodCIDRs:  []netip.Prefix{netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 244, byte(i + 1), 0}), 24)},
		Endpoints: []netip.AddrPort{netip.AddrPortFrom(netip.AddrFrom4([4]byte{192, 0, 2, byte(i + 1)}), 51820)}}
}

func (n modelNode) keys(i int) wireguard.Keys {
	return wireguard.Keys{Current: modelKey(i, n.current), Next: modelKey(i, n.nxt)}
}

var modelNow = time.Unix(1_000_000, 0)

// sessions as node i reads them.
func (s *modelState) sessions(i int) sessions {
	all := sessions{first: map[mesh.Key]wireguard.Stats{}, second: map[mesh.Key]wireguard.Stats{}}
	for d, stats := range []map[mesh.Key]wireguard.Stats{all.first, all.second} {
		dev := s.n[i].dev[d]
		if dev.own == 0 || dev.peer == 0 {
			continue
		}
		var st wireguard.Stats
		// Sessions of the first device from before it has its next key are dead
		// (sessions.firstSince).
		if dev.alive && (d == 1 || dev.own == s.n[i].current) {
			st.Handshake = modelNow.Add(-time.Second)
		}
		if s.n[i].flushed[d] {
			st.Tx = 1
		}
		stats[modelKey(1-i, dev.peer)] = st
	}
	return all
}

// rotation is the memory of node i's meshd.
func (s *modelState) rotation(i int, m *model) *rotation {
	n := s.n[i]
	r := &rotation{wanted: n.wanted, came: m.wish(i, n.came)}
	if n.ready {
		r.ready = modelNow.Add(-drainSilent)
	}
	if n.heard.said {
		r.heard = map[string]word{modelNames[1-i]: {Sending{modelKey(i, n.heard.key), n.heard.second}, modelNow}}
	}
	if n.left.known {
		l := leave{second: n.left.second, empty: n.left.empty}
		if n.left.looked {
			l.at = modelNow.Add(-pace)
		}
		r.left = map[string]leave{modelNames[1-i]: l}
	}
	if n.spent {
		r.borne = borne{n.keys(i).Stage(), map[string]time.Time{modelNames[1-i]: modelNow.Add(-patienceDue)}}
	}
	if m.leavesQueues || m.coarse {
		r.left = map[string]leave{modelNames[1-i]: {second: n.came.overOther, empty: true}}
	}
	return r
}

type model struct {
	rules
	others others
	// coarse is whether all comes to an end, and no more: nothing happens while
	// a round goes, nothing waits in front of a device, what is lost is lost.
	coarse bool
	wishes map[modelWish][2]*Wish
	made   map[[6]int8]modelWish
}

// wish made of what matters.
func (m *model) wish(i int, w modelWish) *Wish {
	if !w.known {
		return nil
	}
	both := m.wishes[w]
	if both[i] != nil {
		return both[i]
	}
	full := &Wish{}
	pods := modelNodeOf(1-i, [2]int8{}).PodCIDRs
	if w.first != 0 {
		full.WireGuard.Peers = []wireguard.Peer{{Name: modelNames[1-i], Key: modelKey(1-i, w.first), AllowedIPs: pods}}
	}
	if w.hasSecond {
		full.Second = &wireguard.Config{}
		if w.other != 0 {
			full.Second.Peers = []wireguard.Peer{{Name: modelNames[1-i], Key: modelKey(1-i, w.other), AllowedIPs: pods}}
		}
	}
	full.Route.Routes = []route.Route{{Dst: pods[0], Second: w.overOther}}
	both[i] = full
	m.wishes[w] = both
	return full
}

// compute the wish of node i, as the package does.
func (m *model) compute(i int, n modelNode, over bool) modelWish {
	at := [6]int8{int8(i), n.current, n.nxt, n.knows[0], n.knows[1], 0}
	if over {
		at[5] = 1
	}
	if w, ok := m.made[at]; ok {
		return w
	}
	state := &mesh.State{Nodes: []mesh.Node{modelNodeOf(i, [2]int8{n.current, n.nxt}), modelNodeOf(1-i, n.knows)}}
	full, err := Compute(state, modelNames[i], Options{Device: "mesh0", Second: "mesh0-next", ListenPort: 51820, Keys: n.keys(i),
		PathMTU: func(netip.Addr) int { return 1500 }, OverSecond: map[string]bool{modelNames[1-i]: over}})
	if err != nil {
		panic(err)
	}
	w := modelWish{known: true, current: n.current, nxt: n.nxt, hasSecond: full.Second != nil}
	for _, p := range full.WireGuard.Peers {
		w.first = int8(p.Key[1])
	}
	if full.Second != nil {
		for _, p := range full.Second.Peers {
			w.other = int8(p.Key[1])
		}
	}
	for _, r := range full.Route.Routes {
		w.overOther = r.Second
	}
	m.made[at] = w
	return w
}

// turn is the first step of a round: what Datapath.turn does.
func (m *model) turn(s modelState, i int) modelState {
	n := &s.n[i]
	keys := n.keys(i)
	others := []mesh.Node{modelNodeOf(1-i, n.knows)}
	over := false
	if changes := keys.Stage() != wireguard.Steady || n.knows[1] != 0; changes || n.wanted {
		r, all := s.rotation(i, m), s.sessions(i)
		m.look(&s, i, r, all)
		m.step(&s, i, r, keys, others, all)
		keys, all = n.keys(i), s.sessions(i)
		over = overSecond(keys, others, all, modelNow)[modelNames[1-i]]
	} else {
		n.left = modelLeft{}
	}
	n.wish = m.compute(i, *n, over)
	return s
}

// impatient is the same when node i has waited for the other long enough, if
// that matters now.
func (m *model) impatient(s modelState, i int, visit func(string, modelState)) {
	if s.patience == 0 || s.n[i].spent {
		return
	}
	t := s
	t.patience--
	t.n[i].spent = true
	if t = m.turn(t, i); !t.n[i].spent && t.n[i].keys(i) == s.n[i].keys(i) || m.turn(s, i).n[i].ready == t.n[i].ready && t.n[i].spent {
		return // nobody was waited for
	}
	t.n[i].pc++
	m.finish(&t, i)
	visit(modelNames[i]+" has waited for the other long enough, and decides", t)
}

// look at the device that was left. A process that answered twice has taken
// up what was there when it first did.
func (m *model) look(s *modelState, i int, r *rotation, all sessions) {
	n := &s.n[i]
	d := 1
	if n.came.overOther {
		d = 0
	}
	if !m.leavesQueues && !m.coarse && n.left.known && n.left.looked && n.left.second == n.came.overOther && n.queued[d] && !n.left.empty {
		n.queued[d], n.flushed[d] = false, true
		all = s.sessions(i)
	}
	if !m.leavesQueues && !m.coarse {
		r.lookAtLeft(all, modelNow)
	}
	l, ok := r.left[modelNames[1-i]]
	n.left = modelLeft{ok, l.second, !l.at.IsZero(), l.empty}
	n.flushed = [2]bool{}
}

func (m *model) step(s *modelState, i int, r *rotation, keys wireguard.Keys, others []mesh.Node, all sessions) {
	n := &s.n[i]
	defer func() { n.spent = n.spent && n.keys(i).Stage() == keys.Stage() }()
	if keys.Stage() == wireguard.Steady {
		if !n.wanted {
			return
		}
		may, without := r.mayBegin(others, all, modelNow)
		if m.beginsAnyway { // as it once was
			may = !all.secondAlive(others[0], modelNow)
		}
		if len(r.borne.since) == 0 {
			n.spent = false // it is not waited for any more
		}
		if !may {
			return
		}
		s.without = s.without || len(without) > 0
		if !m.keepsSecond {
			s.lose(i, 1)
		}
		n.wanted, n.ready, n.nxt = false, false, n.current+1
		return
	}
	if m.others == stuck && i == 0 {
		return
	}
	if m.asksNobody {
		r.heard = map[string]word{others[0].Name: {Sending{keys.Next, keys.Stage() == wireguard.Leaving}, modelNow}}
	}
	goOn, without := r.mayGoOn(keys, others, all, nil, modelNow)
	n.ready = !r.ready.IsZero()
	s.without = s.without || len(without) > 0
	switch {
	case !goOn:
	case keys.Stage() == wireguard.Leaving:
		n.current = n.nxt
	default:
		n.nxt = 0
	}
}

// lose device d of node i, with what is in front of it.
func (s *modelState) lose(i, d int) {
	n := &s.n[i]
	n.dev[d] = modelDevice{}
	n.queued[d] = n.queued[d] && (!s.without || n.second == (d == 1)) // else it may be lost, and then it is
}

// device of node i is made, or made so.
func (s *modelState) device(i, d int, own, peer int8) {
	dev := &s.n[i].dev[d]
	if dev.own != own || dev.peer != peer {
		*dev = modelDevice{own: own, peer: peer}
	}
}

const rounds = 7 // steps of a round

// next states, and what leads there.
func (m *model) next(s modelState, visit func(what string, t modelState)) {
	for i := range 2 {
		n := s.n[i]
		if n.wants > 0 && !n.wanted {
			t := s
			t.n[i].wants--
			t.n[i].wanted = true
			visit(modelNames[i]+" shall change its key", t)
		}
		if n.knows != s.n[1-i].published && (m.others != frozen || i != 0) {
			t := s
			t.n[i].knows = s.n[1-i].published
			visit(modelNames[i]+" learns what the other has published", t)
		}
		if m.others != frozen || i != 0 {
			m.round(s, i, visit)
			m.talk(s, i, visit)
		}
		for d := range 2 {
			if n.queued[d] && (d == 1) != n.second && s.arrives(i, d) && !m.coarse {
				t := s
				t.n[i].queued[d], t.n[i].flushed[d] = false, true
				visit(fmt.Sprintf("%s: what waits at device %d goes", modelNames[i], d+1), t)
			}
			m.shake(s, i, d, visit)
		}
		if s.crashes > 0 {
			t := s
			t.crashes--
			c := &t.n[i]
			c.pc, c.came, c.wish, c.heard, c.answer, c.ready, c.left, c.flushed, c.wanted, c.spent = 0, modelWish{}, modelWish{}, modelWord{}, modelWord{}, false, modelLeft{}, [2]bool{}, false, false
			visit(modelNames[i]+" dies and starts", t)
		}
	}
}

// round of node i goes on by one step.
func (m *model) round(s modelState, i int, visit func(string, modelState)) {
	if s.n[i].pc == 0 {
		m.impatient(s, i, visit)
	}
	what := m.advance(&s, i)
	m.finish(&s, i)
	visit(modelNames[i]+": "+what, s)
}

// finish the round that node i has begun, if nothing happens meanwhile.
func (m *model) finish(s *modelState, i int) {
	if !m.coarse {
		return
	}
	n := &s.n[i]
	for n.pc != 0 {
		m.advance(s, i)
	}
	n.queued, n.flushed = [2]bool{!n.second, n.second}, [2]bool{}
}

// advance is the next step of a round, in the order of applyLinks.
func (m *model) advance(s *modelState, i int) (what string) {
	if s.n[i].pc == 0 {
		*s = m.turn(*s, i)
		s.n[i].pc++
		return "looks and decides"
	}
	n := &s.n[i]
	w := n.wish
	switch n.pc {
	case 1, 4: // routes
		if to := w.overOther; !to || n.dev[1].own != 0 {
			n.second = to
			n.queued[map[bool]int{true: 1}[to]] = true
		}
		what = "routes"
	case 2:
		s.device(i, 0, w.current, w.first)
		what = "first device"
	case 3:
		if w.hasSecond {
			own := w.nxt
			if own == 0 {
				own = w.current
			}
			s.device(i, 1, own, w.other)
		}
		what = "second device"
	case 5:
		if !w.hasSecond {
			s.lose(i, 1)
		}
		what = "takes the second device away"
	case 6:
		if n.came = w; n.published != [2]int8{w.current, w.nxt} {
			n.published = [2]int8{w.current, w.nxt}
		}
		what = "publishes"
	}
	if n.pc = (n.pc + 1) % rounds; n.pc == 0 {
		n.wish = modelWish{}
	}
	return what
}

// talk: node i asks the other, and hears.
func (m *model) talk(s modelState, i int, visit func(string, modelState)) {
	n := s.n[i]
	if n.nxt != 0 && (m.others != frozen || i == 0) {
		said, ok := s.rotation(1-i, m).word(modelNames[i], false)
		a := modelWord{ok, int8(said.Key[1]), said.Second}
		if !ok {
			a = modelWord{}
		}
		if a.said && a != n.answer {
			t := s
			t.n[i].answer = a
			visit(fmt.Sprintf("%s asks, and the other says %d %v", modelNames[i], a.key, a.second), t)
		}
	}
	if n.answer.said && n.answer != n.heard {
		t := s
		t.n[i].heard, t.n[i].answer = n.answer, modelWord{}
		visit(modelNames[i]+" hears that", t)
	}
}

// shake hands on device d, begun by node i: it has the session when it is
// answered, the other when it hears from it.
func (m *model) shake(s modelState, i, d int, visit func(string, modelState)) {
	a, b := s.n[i].dev[d], s.n[1-i].dev[d]
	if a.own == 0 || b.own == 0 || a.peer != b.own || b.peer != a.own {
		return
	}
	if !a.receives || !b.receives {
		t := s
		t.n[i].dev[d].receives, t.n[i].dev[d].alive = true, true
		t.n[1-i].dev[d].receives, t.n[1-i].dev[d].alive = true, false
		visit(fmt.Sprintf("%s shakes hands on device %d", modelNames[i], d+1), t)
		return
	}
	if a.alive && !b.alive {
		t := s
		t.n[1-i].dev[d].alive = true
		visit(fmt.Sprintf("%s is heard on device %d", modelNames[i], d+1), t)
	}
}

// arrives: what node i sends over device d is read by the other.
func (s *modelState) arrives(i, d int) bool {
	a, b := s.n[i].dev[d], s.n[1-i].dev[d]
	return a.own != 0 && a.alive && a.peer == b.own && b.peer == a.own && b.receives
}

// lost packet there may be.
func (s *modelState) lost() string {
	for i := range 2 {
		for d := range 2 {
			if s.n[i].queued[d] && !s.arrives(i, d) {
				return fmt.Sprintf("what %s sends over device %d is lost", modelNames[i], d+1)
			}
		}
	}
	return ""
}

// over: all changes are, and packets arrive. Of a node that ails nothing is
// expected.
func (m *model) over(s *modelState) bool {
	for i, n := range s.n {
		switch {
		case m.others != well && i == 0:
		case n.wants > 0 || n.wanted || n.nxt != 0 || n.published[1] != 0:
			return false
		case m.others == well && (n.dev[1].own != 0 || n.knows[1] != 0):
			return false
		}
	}
	return m.others == frozen || s.lost() == ""
}

// begin of the world: a session on the first devices.
func begin(wants [2]int8, crashes int8) modelState {
	s := modelState{crashes: crashes}
	for i := range 2 {
		w := modelWish{known: true, current: 1, first: 1}
		s.n[i] = modelNode{wants: wants[i], current: 1, published: [2]int8{1, 0}, knows: [2]int8{1, 0}, came: w, queued: [2]bool{true, false}}
		s.n[i].dev[0] = modelDevice{own: 1, peer: 1, receives: true, alive: true}
	}
	return s
}

// ailing is the same with the first node in a change that it does not end.
func ailing(patience int8) modelState {
	s := begin([2]int8{0, 1}, 0)
	s.patience = patience
	a, b := &s.n[0], &s.n[1]
	a.nxt, a.published, b.knows = 2, [2]int8{1, 2}, [2]int8{1, 2}
	a.came.nxt, a.came.hasSecond, a.came.other = 2, true, 1
	a.dev[1] = modelDevice{own: 2, peer: 1}
	return s
}

// explore all states; it returns how the first loss comes about, or why some
// state never comes to an end.
func (m *model) explore(from modelState, limit int) (states int, bad string) {
	type edge struct {
		from int32
		what string
	}
	m.wishes, m.made = map[modelWish][2]*Wish{}, map[[6]int8]modelWish{}
	number := map[modelState]int32{from: 0}
	all, came := []modelState{from}, []edge{{-1, "begin"}}
	var back [][]int32
	story := func(k int32, end string) string {
		lines := []string{end}
		for ; k > 0; k = came[k].from {
			lines = append(lines, came[k].what)
		}
		var b strings.Builder
		for i := len(lines) - 1; i >= 0; i-- {
			b.WriteString(lines[i] + "\n")
		}
		return b.String()
	}
	back = append(back, nil)
	for k := 0; k < len(all); k++ {
		if len(all) > limit {
			return len(all), "more states than expected"
		}
		lost := ""
		m.next(all[k], func(what string, t modelState) {
			j, known := number[t]
			if !known {
				j = int32(len(all))
				number[t] = j
				all, came, back = append(all, t), append(came, edge{int32(k), what}), append(back, nil)
				if l := t.lost(); l != "" && lost == "" && !t.without && !m.coarse {
					lost = story(j, l)
				}
			}
			back[j] = append(back[j], int32(k))
		})
		if lost != "" {
			return len(all), lost
		}
	}
	reach := make([]bool, len(all))
	var todo []int32
	for k := range all {
		if m.over(&all[k]) {
			reach[k], todo = true, append(todo, int32(k))
		}
	}
	for len(todo) > 0 {
		k := todo[len(todo)-1]
		todo = todo[:len(todo)-1]
		for _, j := range back[k] {
			if !reach[j] {
				reach[j], todo = true, append(todo, j)
			}
		}
	}
	for k, ok := range reach {
		if !ok {
			return len(all), story(int32(k), fmt.Sprintf("from here it never ends: %+v", all[k]))
		}
	}
	return len(all), ""
}

func TestEveryOrder(t *testing.T) {
	patient := func(s modelState, patience int8) modelState { s.patience = patience; return s }
	for _, c := range []struct {
		name  string
		begin modelState
		model model
	}{
		{"one changes its key", begin([2]int8{1, 0}, 0), model{}},
		{"one, and meshd dies once on either", begin([2]int8{1, 0}, 1), model{}},
		{"one, twice", begin([2]int8{2, 0}, 0), model{}},
		{"both", begin([2]int8{1, 1}, 0), model{}},
		// What is lost then comes to an end, and so do the changes.
		{"one, that waits for the other no longer, once", patient(begin([2]int8{1, 0}, 0), 1), model{coarse: true}},
		{"one, that does not wait for the end of the other's change", ailing(1), model{coarse: true}},
		{"one, while the other's change does not end", ailing(3), model{others: stuck, coarse: true}},
		{"one, while the other only seems to change its key", ailing(2), model{others: frozen}},
	} {
		m := c.model
		began := time.Now()
		states, bad := m.explore(c.begin, 8_000_000)
		if bad != "" {
			t.Errorf("%s: in %d states:\n%s", c.name, states, bad)
		}
		t.Logf("%s: %d states, %v", c.name, states, time.Since(began))
	}
}

// Each rule is needed: without it there is an order in which a packet is lost.
func TestEveryRuleIsNeeded(t *testing.T) {
	for _, c := range []struct {
		name  string
		rules rules
		wants [2]int8
	}{
		{"a node begins while its peer changes its key", rules{beginsAnyway: true}, [2]int8{1, 1}},
		{"so it does, and keeps its second device", rules{beginsAnyway: true, keepsSecond: true}, [2]int8{1, 1}},
		{"a node does not wait for the word of its peer", rules{asksNobody: true}, [2]int8{1, 0}},
		{"a node does not wait for what is in its queues", rules{leavesQueues: true}, [2]int8{1, 0}},
	} {
		m := model{rules: c.rules}
		if states, bad := m.explore(begin(c.wants, 0), 8_000_000); !strings.Contains(bad, "is lost") {
			t.Errorf("%s: nothing is lost in %d states: %s", c.name, states, bad)
		} else {
			t.Logf("%s: lost after %d steps", c.name, strings.Count(bad, "\n"))
		}
	}
}

// A node whose patience does not end is kept from changing its key by one whose
// change does not.
func TestPatienceHasToEnd(t *testing.T) {
	for _, c := range []struct {
		name     string
		others   others
		patience int8
	}{
		{"the other's change does not end", stuck, 0},
		{"the other only seems to change its key", frozen, 0},
		{"it begins, and waits for the other to move for ever", frozen, 1},
		{"it begins, and waits for the other to move back for ever", stuck, 1},
	} {
		m := model{others: c.others, coarse: true}
		if states, bad := m.explore(ailing(c.patience), 8_000_000); !strings.Contains(bad, "never ends") {
			t.Errorf("%s: it ends in %d states: %s", c.name, states, bad)
		}
	}
}
