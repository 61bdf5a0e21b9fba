package datapath

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"meshd.dev/pkg/datapath/internal/testns"
	"meshd.dev/pkg/mesh"
	"meshd.dev/pkg/status"
)

// reaches waits until a pod of m gets an answer from an address, pinging all
// the while.
func (m *machine) reaches(t *testing.T, what, to string) time.Duration {
	t.Helper()
	begin := time.Now()
	eventually(t, what, func() error {
		if out, err := m.in_(2, "ping", "-c1", "-W0.2", to); err != nil {
			return fmt.Errorf("%v %s", err, out)
		}
		return nil
	})
	return time.Since(begin)
}

// says waits until status of m speaks of a repair.
func (m *machine) says(t *testing.T, part, what string) {
	t.Helper()
	eventually(t, m.name+" names the repair of "+part, func() error {
		repairs := m.ask(nil).Repairs
		if !slices.ContainsFunc(repairs, func(r status.Repair) bool { return r.Part == part && strings.Contains(r.What, what) }) {
			return fmt.Errorf("repairs %+v, want one of %s with %q", repairs, part, what)
		}
		return nil
	})
}

func endpointsOf(texts ...string) []netip.AddrPort {
	var list []netip.AddrPort
	for _, s := range texts {
		list = append(list, netip.MustParseAddrPort(s))
	}
	return list
}

// Two machines, a at 192.0.2.1 and b at 192.0.2.2 and 2001:db8::2; what breaks
// between them is repaired and named.
func TestPathsAreRepaired(t *testing.T) {
	join := underlay(t)
	a, b := newMachine(t, "a", 1), newMachine(t, "b", 2)
	nodeB := b.node()
	// Nobody is at the first; the second is an address of a pod.
	nodeB.Endpoints = endpointsOf("192.0.2.99:51820", "10.244.9.9:51820", "192.0.2.2:51820", "[2001:db8::2]:51820")
	state := mesh.State{Nodes: []mesh.Node{a.node(), nodeB}}
	tell(state, a)
	a.pod(2)
	alone := state
	alone.Nodes = []mesh.Node{nodeB}
	tell(alone, b) // so that it cannot call a
	b.pod(2)
	at := func(m, of *machine) string {
		return strings.TrimSpace(m.sh("wg show mesh0 endpoints | grep '" + of.key.String() + "' | cut -f2"))
	}
	t.Run("the endpoint that answers is used", func(t *testing.T) {
		join(t)
		eventually(t, "a has tried the next endpoint", func() error {
			if got := at(a, b); got != "192.0.2.2:51820" {
				return fmt.Errorf("it is at %s", got)
			}
			return nil
		})
		tell(state, b)
		a.reaches(t, "pod to pod", b.podAddr(2))
		// They talk for a while: who was never heard to answer a probe is given
		// 15 s before it is called silent.
		if out, err := a.in_(2, "ping", "-c8", "-i0.25", "-W3", b.podAddr(2)); err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
		settled(t, a, b)
	})
	for _, c := range []struct{ name, on, breakage, part, named string }{
		{"the other side forgets the session", "b", "wg set mesh0 peer $A remove", "tunnel/b", "began a new session"},
		{"the endpoint is changed by hand", "a", "wg set mesh0 peer $B endpoint 192.0.2.250:1", "tunnel/b", "began a new session"},
		{"the peer is removed by hand", "a", "wg set mesh0 peer $B remove", "datapath/device", "peer $B preshared-key (hidden) endpoint"},
		{"its allowed IPs are taken away", "a", "wg set mesh0 peer $B allowed-ips ''", "datapath/device", "allowed-ips +10.244.2.0/24"},
		{"the port is changed", "a", "wg set mesh0 listen-port 4444", "datapath/device", "listen-port 51820"},
		{"the link is set down", "a", "ip link set mesh0 down", "datapath/device", "ip link set mesh0 up"},
		{"the link is deleted", "a", "ip link del mesh0", "datapath/device", "ip link add mesh0"},
		{"routes are flushed", "a", "ip route flush proto 77", "datapath/routes", "ip route add"},
		{"forwarding is switched off", "a", "sysctl -qw net.ipv4.ip_forward=0", "datapath/routes", "net.ipv4.ip_forward=1"},
		{"redirects are switched on", "a", "sysctl -qw net.ipv4.conf.all.send_redirects=1", "datapath/routes", "send_redirects=0"},
		{"rules are flushed", "a", "nft flush ruleset", "datapath/firewall", "changes to table inet meshd"},
	} {
		t.Run(c.name, func(t *testing.T) {
			join(t)
			named := strings.NewReplacer("$A", a.key.String(), "$B", b.key.String())
			on := map[string]*machine{"a": a, "b": b}[c.on]
			on.sh(named.Replace(c.breakage))
			took := a.reaches(t, "pod to pod again", b.podAddr(2))
			if c.part == "tunnel/b" {
				a.says(t, c.part, named.Replace(c.named))
			} else {
				on.says(t, c.part, named.Replace(c.named))
			}
			settled(t, a, b)
			t.Logf("%s: a pod reached the other again %d ms later", c.name, took.Milliseconds())
		})
	}
	t.Run("a peer that is off is called down", func(t *testing.T) {
		join(t)
		testns.Sh(t, "ip link set under2 down")
		eventually(t, "the tunnel is down in words", func() error {
			_, _ = a.in_(2, "ping", "-c1", "-W0.1", b.podAddr(2))
			for _, c := range a.ask(nil).Checks {
				if c.Name == "tunnel/b" && strings.Contains(c.Reason, "sends and hears nothing") {
					return nil
				}
			}
			return fmt.Errorf("%+v", a.ask(nil).Checks)
		})
		testns.Sh(t, "ip link set under2 up")
		a.reaches(t, "it came back", b.podAddr(2))
		settled(t, a, b)
	})
}

// c, at 10.7.0.3, is behind a router that translates addresses and lets
// nobody in by himself; a and b are outside at 192.0.2.N. Only c's tunnels are
// kept awake.
func TestBehindAddressTranslator(t *testing.T) {
	underlay(t)
	a, b, c := newMachine(t, "a", 1), newMachine(t, "b", 2), newMachine(t, "c", 3)
	testns.Sh(t, fmt.Sprintf(`
		ip link add inside type bridge
		ip link set inside up
		ip address add 10.7.0.254/24 dev inside
		ip link set under3 master inside
		nsenter -t %s -n sh -ec '
			ip address flush dev eth0 scope global
			ip address add 10.7.0.3/24 dev eth0
			ip route replace default via 10.7.0.254'
		sysctl -qw net.ipv4.ip_forward=1
		nft add table ip nat
		nft add chain ip nat post '{ type nat hook postrouting priority srcnat; }'
		nft add rule ip nat post ip saddr 10.7.0.0/24 oifname br0 udp sport 1-65535 masquerade to :20000-30000 random
		nft add chain ip nat in '{ type filter hook forward priority filter; }'
		nft add rule ip nat in iifname br0 oifname inside ct state new drop`, c.ns))
	nodeC := c.node()
	nodeC.Addresses, nodeC.Endpoints = addrs("10.7.0.3"), endpointsOf("10.7.0.3:51820")
	state := mesh.State{Nodes: []mesh.Node{a.node(), b.node(), nodeC}}
	all := []*machine{a, b, c}
	tell(state, all...)
	for _, m := range all {
		m.pod(2)
	}
	for _, m := range []*machine{a, b} {
		m.reaches(t, m.name+" reaches the one inside", c.podAddr(2))
		c.reaches(t, "the one inside reaches "+m.name, m.podAddr(2))
	}
	a.reaches(t, "outside one another", b.podAddr(2))
	keepalive := func(m, of *machine) string {
		return strings.TrimSpace(m.sh("wg show mesh0 persistent-keepalive | grep '" + of.key.String() + "' | cut -f2"))
	}
	for _, q := range []struct {
		on, to *machine
		want   string
	}{{c, a, "25"}, {c, b, "25"}, {a, c, "25"}, {a, b, "off"}, {b, a, "off"}} {
		eventually(t, fmt.Sprintf("keepalive of %s to %s", q.on.name, q.to.name), func() error {
			if got := keepalive(q.on, q.to); got != q.want {
				return fmt.Errorf("%q, want %q", got, q.want)
			}
			return nil
		})
	}
	for _, q := range []struct {
		on   *machine
		want string
	}{{a, "it is behind an address translator, at 192.0.2.254:2"}, {c, "we are behind an address translator, at 192.0.2.254:2"}} {
		eventually(t, q.on.name+" says so", func() error {
			for _, tunnel := range q.on.ask(nil).Tunnels {
				if strings.Contains(tunnel.Note, q.want) {
					return nil
				}
			}
			return fmt.Errorf("%+v", q.on.ask(nil).Tunnels)
		})
	}
	settled(t, all...)
	// The router forgets all it knew, and the next packet from inside gets
	// another port. Whoever is inside is heard at once; nobody outside can
	// call, so until then it takes what keeps the way open.
	at := func() string {
		return strings.TrimSpace(a.sh("wg show mesh0 endpoints | grep '" + c.key.String() + "' | cut -f2"))
	}
	for _, q := range []struct {
		name     string
		from, to *machine
	}{{"inside speaks", c, a}, {"only outside speaks", a, c}} {
		before, begin := at(), time.Now()
		testns.Sh(t, "conntrack -F")
		for { // a keepalive, and a moment
			if out, err := q.from.in_(2, "ping", "-c1", "-W0.2", q.to.podAddr(2)); err == nil {
				break
			} else if time.Since(begin) > 40*time.Second {
				t.Fatalf("forgotten, and %s: nothing after %s: %s", q.name, time.Since(begin), out)
			}
		}
		t.Logf("forgotten, and %s: an answer %d ms later", q.name, time.Since(begin).Milliseconds())
		if now := at(); now == before || !strings.HasPrefix(now, "192.0.2.254:2") {
			t.Errorf("forgotten, and %s: c is at %s, before at %s", q.name, now, before)
		}
		for _, m := range []*machine{a, b} {
			// Who did not speak yet is opened a way from inside: alone it would
			// wait for the next keepalive, up to 25 s.
			c.reaches(t, "the one inside reaches "+m.name+" again", m.podAddr(2))
			m.reaches(t, m.name+" reaches the one inside again", c.podAddr(2))
		}
	}
	settled(t, all...)
}
