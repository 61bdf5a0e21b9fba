package wireguard

import (
	"net/netip"
	"strings"
	"testing"
	"time"

	"meshd.dev/pkg/mesh"
)

// Who roams and then is quiet is called back at the wished endpoint, but nobody
// has changed anything.
func TestDriftOfAPeerThatRoamed(t *testing.T) {
	wished, elsewhere := netip.MustParseAddrPort("192.0.2.2:51820"), netip.MustParseAddrPort("198.51.100.9:4000")
	key := mesh.Key{2}
	cfg := Config{ListenPort: 51820, MTU: 1420, Peers: []Peer{{Name: "node2", Key: key, Endpoint: wished}}}
	d := &Device{opts: Options{Name: "wg"}, ring: &Ring{}, wished: map[mesh.Key]netip.AddrPort{key: wished}, fresh: map[mesh.Key]begun{}}
	now := time.Now()
	for _, c := range []struct {
		name        string
		endpoint    netip.AddrPort
		handshake   time.Time
		plan, drift bool
	}{
		{"where it is wished", wished, now.Add(-time.Hour), false, false},
		{"roamed a moment ago", elsewhere, now.Add(-time.Minute), false, false},
		{"roamed, and quiet since", elsewhere, now.Add(-time.Hour), true, false},
		{"was never heard, so it cannot have roamed", elsewhere, time.Time{}, true, true},
		{"nowhere", netip.AddrPort{}, now.Add(-time.Hour), true, true},
	} {
		have := state{
			backend: Userspace, up: true, mtu: cfg.MTU, port: cfg.ListenPort, key: d.ring.secret(false),
			peers: map[mesh.Key]peer{key: {Stats: Stats{Endpoint: c.endpoint, Handshake: c.handshake}}},
		}
		for what, lines := range map[string][]string{"plan": d.plan(cfg, have), "drift": d.lost(cfg, have)} {
			want := map[string]bool{"plan": c.plan, "drift": c.drift}[what]
			if got := strings.Contains(strings.Join(lines, "\n"), "endpoint 192.0.2.2:51820"); got != want || len(lines) > 1 {
				t.Errorf("%s: %s %q, want the endpoint in it: %t", c.name, what, lines, want)
			}
		}
	}
}
