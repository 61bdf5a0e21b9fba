package wireguard_test

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"
	"time"

	"meshd.dev/pkg/datapath/internal/testns"
	"meshd.dev/pkg/datapath/wireguard"
	"meshd.dev/pkg/mesh"
)

// Following ends where applying ends, whatever changes in a peer, and does
// nothing where nothing did.
func TestFollow(t *testing.T) {
	testns.New(t)
	d, _ := device(t, "wgf")
	if _, err := d.Follow(t.Context(), config(), nil); !errors.Is(err, wireguard.ErrNotKnown) {
		t.Fatalf("before the first look: %v", err)
	}
	apply(t, d, config())
	r, peers := rand.New(rand.NewPCG(1, 1)), map[byte]wireguard.Peer{}
	for i, p := range config().Peers {
		peers[byte(i+2)] = p
	}
	cfg := func() wireguard.Config {
		c := config()
		c.Peers = nil
		for n := byte(2); n < 7; n++ {
			if p, ok := peers[n]; ok {
				c.Peers = append(c.Peers, p)
			}
		}
		return c
	}
	prefix := func(n byte) []netip.Prefix {
		return []netip.Prefix{netip.MustParsePrefix(fmt.Sprintf("10.244.%d.0/24", n))}
	}
	for step := range 150 {
		n := byte(2 + r.IntN(5))
		p, was := peers[n]
		keys := []mesh.Key{p.Key}
		if !was {
			p = wireguard.Peer{Name: fmt.Sprintf("node%d", n), Key: key(n), AllowedIPs: prefix(n)}
			keys[0] = p.Key
		}
		what := []string{"endpoint", "key", "allowed", "moves", "keepalive", "psk", "fresh", "gone", "nothing"}[r.IntN(9)]
		other := 2 + (n-1)%5
		if _, taken := peers[other]; what == "moves" && taken {
			what = "nothing" // two with the same allowed IPs: no wish of ours
		}
		switch what {
		case "endpoint":
			p.Endpoint = netip.AddrPortFrom(netip.MustParseAddr("192.0.2.9"), uint16(1+r.IntN(3)))
		case "key":
			p.Key = mesh.Key{n, byte(r.IntN(3)), 31: 1}
			keys = append(keys, p.Key)
		case "allowed":
			p.AllowedIPs = prefix(n)[:r.IntN(2)]
		case "moves": // to another node, with the pod CIDR
			delete(peers, n)
			n, p.Name, p.Key = other, fmt.Sprintf("node%d", other), key(other)
			p.AllowedIPs = prefix(n)
			keys = append(keys, p.Key)
		case "keepalive":
			p.Keepalive = time.Duration(r.IntN(3)) * 25 * time.Second
		case "psk":
			p.PSK = wireguard.Secret{byte(r.IntN(3))}
		case "fresh":
			p.Fresh++
		}
		if peers[n] = p; what == "gone" {
			delete(peers, n)
		}
		did, err := d.Follow(t.Context(), cfg(), keys)
		if err != nil {
			t.Fatalf("step %d, %s: %v", step, what, err)
		}
		if plan, err := d.Plan(cfg()); err != nil || len(plan) > 0 {
			t.Fatalf("step %d, %s: after %q there is left: %q, %v", step, what, did, plan, err)
		}
		if what == "nothing" && was && len(did) > 0 {
			t.Fatalf("step %d: did %q for nothing", step, did)
		}
	}
	apply(t, d, cfg())
	if drift := d.Drift(); len(drift) > 0 {
		t.Errorf("what was followed is taken for somebody else's doing: %q", drift)
	}
	// Somebody else's doing is not seen by Follow, and by the next look.
	testns.Sh(t, "wg set wgf peer "+key(9).String()+" allowed-ips 10.9.0.0/24")
	if did, err := d.Follow(t.Context(), cfg(), nil); err != nil || len(did) > 0 {
		t.Errorf("did %q, %v", did, err)
	}
	if _, ops, err := d.Look(cfg()); err != nil || !slices.ContainsFunc(ops, func(s string) bool { return s == "wg set wgf peer "+key(9).String()+" remove" }) {
		t.Errorf("the look finds %q, %v", ops, err)
	}
}
