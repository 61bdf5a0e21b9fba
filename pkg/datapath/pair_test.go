package datapath

import (
	"testing"
	"time"

	"meshd.dev/pkg/datapath/route"
	"meshd.dev/pkg/datapath/wireguard"
	"meshd.dev/pkg/mesh"
)

// keysOf a node whose first key is 1 and whose next key is 11.
func keysOf(stage wireguard.Stage) (current, next mesh.Key) {
	switch stage {
	case wireguard.Leaving:
		return testKey(1), testKey(11)
	case wireguard.Returning:
		return testKey(11), testKey(11)
	}
	return testKey(1), mesh.Key{}
}

// TestOverSecond: who sends over which device, in every stage of either end
// and with every session there can be.
func TestOverSecond(t *testing.T) {
	const steady, leaving, returning = wireguard.Steady, wireguard.Leaving, wireguard.Returning
	now := time.Unix(1_000_000, 0)
	for _, c := range []struct {
		own, peer             wireguard.Stage
		first, second, wanted bool
	}{
		{steady, steady, true, false, false},
		{steady, steady, false, true, false}, // left over from before
		{leaving, steady, true, false, false},
		{leaving, steady, true, true, true},
		{leaving, steady, false, true, true},
		{leaving, steady, false, false, false},
		{steady, leaving, true, true, true},
		{steady, leaving, true, false, false},
		{returning, steady, true, true, false},
		{returning, steady, false, true, true},
		{returning, steady, false, false, false},
		{steady, returning, true, true, false},
		{steady, returning, false, true, true},
		{leaving, leaving, true, true, true},
		{leaving, returning, true, true, true},
		{returning, leaving, true, true, true},
		{returning, returning, true, true, false},
		{returning, returning, false, true, true},
	} {
		own, node := wireguard.Keys{}, mesh.Node{Name: "b"}
		own.Current, own.Next = keysOf(c.own)
		node.PublicKey, node.NextKey = keysOf(c.peer)
		s := sessions{first: map[mesh.Key]wireguard.Stats{}, second: map[mesh.Key]wireguard.Stats{}}
		if c.first {
			s.first[node.PublicKey] = wireguard.Stats{Handshake: now.Add(-time.Minute)}
		}
		if c.second {
			s.second[newest(node)] = wireguard.Stats{Handshake: now.Add(-time.Minute)}
		}
		if got := overSecond(own, []mesh.Node{node}, s, now)["b"]; got != c.wanted {
			t.Errorf("we %s, it %s, session on the first %v, on the second %v: over the second is %v, want %v", c.own, c.peer, c.first, c.second, got, c.wanted)
		}
	}
}

func TestAlive(t *testing.T) {
	now := time.Unix(1_000_000, 0)
	for _, c := range []struct {
		name      string
		handshake time.Time
		want      bool
	}{
		{"never", time.Time{}, false},
		{"just now", now, true},
		{"before the device had this key", now.Add(-11 * time.Second), false},
		{"too long ago", now.Add(-wireguard.SessionLife), false},
	} {
		since := now.Add(-10 * time.Second)
		if c.name == "too long ago" {
			since = time.Time{}
		}
		if got := alive(map[mesh.Key]wireguard.Stats{testKey(1): {Handshake: c.handshake}}, testKey(1), since, now); got != c.want {
			t.Errorf("%s: %v, want %v", c.name, got, c.want)
		}
	}
}

// When the clock is put forward or back, a session is as old as it was.
func TestSightings(t *testing.T) {
	begin := time.Now()
	handshake := begin.Round(0).Add(-time.Minute) // as a device tells it, by the clock on the wall
	var seen sightings
	at := func(now time.Time, told time.Time) bool {
		stats := map[mesh.Key]wireguard.Stats{testKey(1): {Handshake: told}}
		seen = seen.look(stats, now)
		return alive(stats, testKey(1), time.Time{}, now)
	}
	if !at(begin, handshake) {
		t.Error("a minute old, and dead")
	}
	if !at(begin.Add(wireguard.SessionLife-time.Minute-time.Second), handshake) {
		t.Error("dead too soon")
	}
	if at(begin.Add(wireguard.SessionLife-time.Minute), handshake) {
		t.Error("alive for ever")
	}
	// The session after it.
	if !at(begin.Add(time.Hour), begin.Round(0).Add(time.Hour)) {
		t.Error("a new one is dead")
	}
	// The clock was put back: a handshake to come is one of now.
	if !at(begin.Add(2*time.Hour), begin.Round(0).Add(9*time.Hour)) || at(begin.Add(2*time.Hour+wireguard.SessionLife), begin.Round(0).Add(9*time.Hour)) {
		t.Error("a handshake to come does not age")
	}
}

// TestUnmoved: whom a change of the key waits for.
func TestUnmoved(t *testing.T) {
	now := time.Unix(1_000_000, 0)
	node := mesh.Node{Name: "b", PublicKey: testKey(2), PodCIDRs: testNode("b", 2).PodCIDRs}
	session := map[mesh.Key]wireguard.Stats{testKey(2): {Handshake: now.Add(-time.Second)}}
	want := Sending{Key: testKey(11), Second: true}
	for _, c := range []struct {
		name   string
		second bool // we send over the second device
		empty  bool // and nothing waits before the first
		heard  word
		alive  bool
		waits  string
		silent bool
	}{
		{"both moved", true, true, word{want, now}, true, "", false},
		{"we have not", false, true, word{want, now}, true, "there is no session with it on the other device yet", false},
		{"it has not", true, true, word{Sending{testKey(1), false}, now}, true, "it still sends to the other key", false},
		{"it said so long ago", true, true, word{want, now.Add(-wordLife)}, true, "it does not say which key it sends to", false},
		{"packets wait", true, false, word{want, now}, true, "what was sent to it may not have left this machine yet", false},
		{"it is away", false, true, word{}, false, "", true},
	} {
		peers := []wireguard.Peer{{Name: "b", Key: testKey(2), AllowedIPs: node.PodCIDRs}}
		w := Wish{WireGuard: wireguard.Config{Peers: peers}, Second: &wireguard.Config{Peers: peers}}
		for _, p := range node.PodCIDRs {
			w.Route.Routes = append(w.Route.Routes, route.Route{Dst: p, Second: c.second})
		}
		r := &rotation{came: &w, heard: map[string]word{"b": c.heard}, left: map[string]leave{"b": {second: c.second, empty: c.empty}}}
		s := sessions{}
		if c.alive {
			s.first = session
		}
		waiting, silent := r.unmoved(wireguard.Keys{Current: testKey(1), Next: testKey(11)}, []mesh.Node{node, {Name: "no peer"}}, s, now)
		if waiting["b"] != c.waits || silent != c.silent || len(waiting) > 1 {
			t.Errorf("%s: waits %v, silent %v; want %q, %v", c.name, waiting, silent, c.waits, c.silent)
		}
	}
}

// TestDrained: all have to be moved for a while, longer when one was not heard.
func TestDrained(t *testing.T) {
	r, now := &rotation{}, time.Unix(1_000_000, 0)
	at := func(d time.Duration, waits string, silent, want bool) {
		t.Helper()
		waiting := map[string]string{}
		if waits != "" {
			waiting["b"] = waits
		}
		if got := r.drained(waiting, silent, now.Add(d)); got != want {
			t.Errorf("after %s: %v, want %v", d, got, want)
		}
	}
	at(0, "", false, false)
	at(drain-1, "", false, false)
	at(drain-1, "not yet", false, false)
	at(drain, "", false, false)
	at(2*drain-1, "", false, false)
	at(2*drain, "", false, true)
	at(3*drain, "", true, false)
	at(3*drain+drainSilent, "", true, true)
}

func TestDue(t *testing.T) {
	keys := wireguard.Keys{Generation: 3, Made: time.Unix(1_000_000, 0)}
	seen := map[time.Time]bool{}
	for _, node := range []string{"a", "b", "c", "d"} {
		at := dueAt(node, keys, time.Hour)
		if d := at.Sub(keys.Made); d < time.Hour || d > time.Hour+6*time.Minute {
			t.Errorf("%s: after %s", node, d)
		}
		seen[at] = true
	}
	if len(seen) < 2 {
		t.Error("all at the same moment")
	}
}
