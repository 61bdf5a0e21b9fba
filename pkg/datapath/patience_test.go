package datapath

import (
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"meshd.dev/pkg/datapath/wireguard"
	"meshd.dev/pkg/mesh"
)

// Whoever holds a change of the key up does it for ten minutes when a person
// asked for it, for a day when the schedule did, and is named meanwhile.
func TestPatience(t *testing.T) {
	x := mesh.Node{Name: "x", PublicKey: mesh.Key{1}, NextKey: mesh.Key{2}, PodCIDRs: []netip.Prefix{netip.MustParsePrefix("10.244.2.0/24")}}
	start := time.Unix(1_000_000, 0)
	alive := func(now time.Time) sessions {
		return sessions{first: map[mesh.Key]wireguard.Stats{x.PublicKey: {Handshake: now.Add(-time.Second)}}}
	}
	own := wireguard.Keys{Current: mesh.Key{8}, Next: mesh.Key{9}}
	for _, c := range []struct {
		name  string
		asked bool
		after time.Duration
		may   bool
	}{
		{"a person asked", true, patience - time.Second, false},
		{"a person asked, long ago", true, patience, true},
		{"the schedule", false, patienceDue - time.Second, false},
		{"the schedule, long ago", false, patienceDue, true},
	} {
		r := &rotation{wanted: true, asked: c.asked}
		r.mayBegin([]mesh.Node{x}, alive(start), start)
		now := start.Add(c.after)
		if may, without := r.mayBegin([]mesh.Node{x}, alive(now), now); may != c.may || slices.Equal(without, []string{"x"}) != c.may {
			t.Errorf("%s: begins: %v, without %v", c.name, may, without)
		}

		// To go on, it does not help x to be ready for a moment.
		r = &rotation{asked: c.asked}
		want := Sending{Key: own.Next, Second: true}
		r.came = &Wish{Second: &wireguard.Config{Peers: []wireguard.Peer{{Name: "x", Key: x.NextKey}}}}
		r.left = map[string]leave{"x": {second: false, empty: true}}
		r.mayGoOn(own, []mesh.Node{x}, alive(start), start)
		r.heard = map[string]word{"x": {want, start.Add(time.Second)}}
		r.mayGoOn(own, []mesh.Node{x}, alive(start.Add(time.Second)), start.Add(time.Second))
		r.mayGoOn(own, []mesh.Node{x}, alive(now), now)
		now = now.Add(drainSilent)
		if may, without := r.mayGoOn(own, []mesh.Node{x}, alive(now), now); c.may && (!may || !slices.Equal(without, []string{"x"})) {
			t.Errorf("%s: goes on: %v, without %v", c.name, may, without)
		}
	}

	// One that began another change meanwhile is waited for anew.
	r := &rotation{wanted: true, asked: true}
	r.mayBegin([]mesh.Node{x}, alive(start), start)
	still := x
	still.NextKey = mesh.Key{}
	r.mayBegin([]mesh.Node{still}, alive(start), start)
	later := start.Add(patience)
	if may, _ := r.mayBegin([]mesh.Node{x}, alive(later), later); may {
		t.Error("a node that begins now is not waited for")
	}
}

// The board names who is in the way, and what to do about it there.
func TestHeldUp(t *testing.T) {
	d := &Datapath{cfg: Config{ListenPort: 51820}}
	until := map[string]time.Time{"x": time.Unix(0, 0).UTC()}
	r := Rotation{Keys: wireguard.Keys{Current: mesh.Key{8}}, Waiting: map[string]string{"x": "it changes its own key, and ours is next"}, Until: until}
	if got, want := r.held(), "the change of this node's key has not begun: it waits for 1 nodes: x: it changes its own key, and ours is next"; got != want {
		t.Errorf("held: %s", got)
	}
	if got := d.unhold(r); !strings.HasPrefix(got, "on x see `meshctl status`") || !strings.Contains(got, "kubectl delete node x") || !strings.Contains(got, "At 1970-01-01T00:00:00Z it goes on without x") {
		t.Errorf("what to do: %s", got)
	}
	r.Next = mesh.Key{9}
	if got := d.unhold(r); !strings.HasPrefix(got, "between this machine and x UDP ports 51820 and 51821") {
		t.Errorf("what to do: %s", got)
	}
}
