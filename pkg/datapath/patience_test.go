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
		r.mayGoOn(own, []mesh.Node{x}, alive(start), nil, start)
		r.heard = map[string]word{"x": {want, start.Add(time.Second)}}
		r.mayGoOn(own, []mesh.Node{x}, alive(start.Add(time.Second)), nil, start.Add(time.Second))
		r.mayGoOn(own, []mesh.Node{x}, alive(now), nil, now)
		now = now.Add(drainSilent)
		if may, without := r.mayGoOn(own, []mesh.Node{x}, alive(now), nil, now); c.may && (!may || !slices.Equal(without, []string{"x"})) {
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

// A change by the schedule never leaves out a peer that has a session and whose
// tunnel would not come back without a preshared key that is not agreed.
func TestCutOff(t *testing.T) {
	x := mesh.Node{Name: "x", PublicKey: mesh.Key{1}, PodCIDRs: []netip.Prefix{netip.MustParsePrefix("10.244.2.0/24")}}
	both := x
	both.NextKey = mesh.Key{2}
	start := time.Unix(1_000_000, 0)
	agreed, demanded, never := PSK{Secret: wireguard.Secret{1}}, PSK{Wait: "not agreed yet", Firm: true}, PSK{Wait: "being agreed"}
	of := func(first, next PSK) pskOf {
		return func(_ mesh.Node, own, peer mesh.Key) PSK {
			if own != (mesh.Key{9}) {
				t.Errorf("asked for the preshared key of key %d", own[0])
			}
			return map[bool]PSK{true: first, false: next}[peer == x.PublicKey]
		}
	}
	type look struct {
		after time.Duration
		asked bool
		psk   pskOf
		alive bool
		may   bool
	}
	const day, month = patienceDue, 30 * patienceDue
	for _, c := range []struct {
		name  string
		node  mesh.Node
		looks []look
	}{
		{"the schedule, for ever", x, []look{{month, false, of(demanded, demanded), true, false}}},
		{"a person asked", x, []look{{patience - time.Second, true, of(demanded, demanded), true, false}, {patience, true, of(demanded, demanded), true, true}}},
		{"a person asks while it waits", x, []look{
			{month, false, of(demanded, demanded), true, false}, {month + patience - time.Second, true, of(demanded, demanded), true, false},
			{month + patience, true, of(demanded, demanded), true, true}}},
		{"it is agreed after all, and then there is time for the rest", x, []look{
			{month, false, of(demanded, demanded), true, false}, {month + day - time.Second, false, of(agreed, agreed), true, false},
			{month + day, false, of(agreed, agreed), true, true}}},
		{"it is agreed", x, []look{{day, false, of(agreed, agreed), true, true}}},
		{"it may do without", x, []look{{day, false, of(never, never), true, true}}},
		{"both change, and neither key of it", both, []look{{month, false, of(demanded, demanded), true, false}}},
		{"both change, agreed for its key", both, []look{{day, false, of(agreed, demanded), true, true}}},
		{"both change, agreed for its next key", both, []look{{day, false, of(demanded, agreed), true, true}}},
		{"its session ended", x, []look{{day, false, of(demanded, demanded), true, false}, {day + drainSilent, false, of(demanded, demanded), false, true}}},
	} {
		for _, own := range []wireguard.Keys{{Current: mesh.Key{8}, Next: mesh.Key{9}}, {Current: mesh.Key{9}, Next: mesh.Key{9}}} {
			r := &rotation{asked: c.looks[0].asked}
			at := func(l look, now time.Time) (bool, []string) {
				r.asked = l.asked
				s := sessions{first: map[mesh.Key]wireguard.Stats{}}
				if l.alive {
					s.first[x.PublicKey] = wireguard.Stats{Handshake: now.Add(-time.Second)}
				}
				return r.mayGoOn(own, []mesh.Node{c.node}, s, l.psk, now)
			}
			at(c.looks[0], start)
			for _, l := range c.looks {
				now := start.Add(l.after)
				may, without := at(l, now)
				if l.may { // what is under way is waited for
					may, without = at(l, now.Add(drainSilent))
				}
				if left := slices.Equal(without, []string{"x"}); may != l.may || l.alive && left != l.may || (r.waiting["x"] == "") != l.may {
					t.Errorf("%s, %s, after %v: goes on: %v, without %v, waiting %v", own.Stage(), c.name, l.after, may, without, r.waiting)
				}
			}
		}
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
	if got := d.unhold(r); !strings.HasPrefix(got, "between this machine and x UDP ports 51820 and 51821") || !strings.HasSuffix(got, "are lost until that has heard of the key") {
		t.Errorf("what to do: %s", got)
	}
	r.Cut = map[string]bool{"x": true}
	if got := d.unhold(r); !strings.Contains(got, "At 1970-01-01T00:00:00Z it goes on without x, and there is no tunnel between the two until TCP port 51820 works") {
		t.Errorf("what to do when a person asked: %s", got)
	}
	r.Until = nil
	if got := d.unhold(r); strings.Contains(got, "goes on without x") || !strings.Contains(got, "It waits for x without limit") || !strings.Contains(got, "`meshctl keys rotate` has it go on 10 minutes later") {
		t.Errorf("what to do when the schedule began it: %s", got)
	}
}
