package firewall

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"meshd.dev/pkg/datapath/internal/testns"
	"meshd.dev/pkg/mesh"
)

func TestMain(m *testing.M) { testns.Main(m) }

// We are 10.244.1.0/24 and fd00:10:244:1::/64.
func config() Config {
	p, a, ap := netip.MustParsePrefix, netip.MustParseAddr, netip.MustParseAddrPort
	return Config{
		Device: "mesh0", PodLinks: "msh",
		PodCIDRs:     []netip.Prefix{p("10.244.1.0/24"), p("fd00:10:244:1::/64")},
		MeshAddrs:    []netip.Addr{a("10.244.1.1"), a("fd00:10:244:1::1")},
		Cluster:      []netip.Prefix{p("10.244.0.0/16"), p("fd00:10:244::/48")},
		Direct:       []netip.Prefix{p("198.51.100.0/24")},
		ServiceCIDRs: []netip.Prefix{p("10.96.0.0/16")},
		Groups: groups([]Service{
			{Addr: a("10.96.0.1"), Protocol: mesh.TCP, Port: 443, Endpoints: []netip.AddrPort{ap("192.0.2.1:6443")}},
			{Addr: a("10.96.0.10"), Protocol: mesh.UDP, Port: 53, Endpoints: []netip.AddrPort{ap("10.244.1.2:5353"), ap("10.244.2.2:5353")}},
			{Addr: a("fd00:10:96::10"), Protocol: mesh.UDP, Port: 53, Endpoints: []netip.AddrPort{ap("[fd00:10:244:1::2]:5353")}},
			{Addr: a("10.96.0.11"), Protocol: mesh.SCTP, Port: 9, Sticky: true, Endpoints: []netip.AddrPort{ap("10.244.1.2:9"), ap("10.244.2.2:9")}},
			{Addr: a("0.0.0.0"), Protocol: mesh.TCP, Port: 30080, Endpoints: []netip.AddrPort{ap("10.244.1.2:80")}},
			{Addr: a("10.96.0.12"), Protocol: mesh.TCP, Port: 80},
		}, a("10.244.1.2"), a("fd00:10:244:1::2")),
	}
}

// localPodsOf this node: one of both families with host ports, and one plain.
func localPodsOf() ([]mesh.LocalPod, error) {
	a := netip.MustParseAddr
	return []mesh.LocalPod{
		{Link: "mshaaaaaaaaaaaa", Addrs: []netip.Addr{a("10.244.1.2"), a("fd00:10:244:1::2")}, HostPorts: []mesh.HostPort{
			{Protocol: mesh.TCP, HostPort: 8080, Port: 80},
			{HostIP: a("127.0.0.1"), Protocol: mesh.UDP, HostPort: 5353, Port: 53}}},
		{Link: "mshb", Addrs: []netip.Addr{a("10.244.1.3")}},
		{Link: "mshp0", Addrs: []netip.Addr{a("10.244.1.2")}}, // of tests that have one
	}, nil
}

// groups, one a service, and one for the local endpoints.
func groups(services []Service, local ...netip.Addr) []*Group {
	list := []*Group{{Local: local}}
	for _, s := range services {
		list = append(list, &Group{Services: []Service{s}})
	}
	return list
}

// apply with a Table that knows nothing, and see that a second one has
// nothing to do.
func apply(t *testing.T, cfg Config) {
	t.Helper()
	if _, err := New(nil, localPodsOf).Apply(t.Context(), cfg); err != nil {
		t.Fatal(err)
	}
	plan, err := New(nil, localPodsOf).Plan(cfg)
	if err != nil || len(plan) > 0 {
		t.Errorf("the second time there is something to do: %q, %v", plan, err)
	}
}

func list(t *testing.T) string {
	t.Helper()
	return testns.Sh(t, "nft list table inet meshd")
}

func TestTable(t *testing.T) {
	testns.New(t)
	apply(t, config())
	got := list(t)
	for _, want := range []string{ // in the words of nft 1.0.6
		`type filter hook prerouting priority raw; policy accept;`,
		`iifname "msh*" jump pod`,
		`icmpv6 type nd-router-advert drop`,
		`iifname . ip saddr @pod4 return`,
		`oifname "msh*" oifname . ip6 daddr != @pod6 drop`,
		`"mshaaaaaaaaaaaa" . 10.244.1.2`,
		`"mshaaaaaaaaaaaa" . fd00:10:244:1::2`,
		`0.0.0.0 . tcp . 8080 : 10.244.1.2 . 80`,
		`127.0.0.1 . udp . 5353 : 10.244.1.2 . 53`,
		`:: . tcp . 8080 : fd00:10:244:1::2 . 80`,
		`dnat ip to ip daddr . meta l4proto . th dport map @hostport4`,
		`iifname "msh*" oifname "msh*" ip saddr . ip daddr @hairpin4 masquerade`,
		`oifname "msh*" ip saddr 127.0.0.0/8 masquerade`,
		`ip saddr @cluster4 iifname != "mesh0*" iifname != "msh*" iifname != "lo" drop`,
		`ip6 daddr @cluster6 oifname != "mesh0*" oifname != "msh*" oifname != "lo" drop`,
		`oifname "mesh0*" tcp flags syn / syn,rst tcp option maxseg size set rt mtu`,
		`ip saddr @own4 ip daddr != @cluster4 ip daddr != @direct4 oifname != "mesh0*" oifname != "msh*" oifname != "lo" masquerade fully-random`,
		`oifname "mesh0*" ip6 saddr != @own6 snat ip6 to fd00:10:244:1::1 fully-random`,
		`10.96.0.10 . udp . 53 : goto of4-2`,
		`fd00:10:96::10 . udp . 53 : goto of6-1`,
		`10.96.0.11 . sctp . 9 : goto of4-2-sticky`,
		`0.0.0.0 . tcp . 30080 : goto np4-1`,
		`elements = { 10.244.0.0/16 }`,
		`elements = { 198.51.100.0/24 }`,
		`10.244.1.2 . 10.244.1.2 : 10.244.1.1`,
		`reject with tcp reset`,
	} {
		if !strings.Contains(got, want) {
			t.Errorf("the table lacks %s\n%s", want, got)
			break
		}
	}
}

func TestPlanReadsLikeCommands(t *testing.T) {
	testns.New(t)
	apply(t, config())
	cfg := config()
	dns := cfg.Groups[2].Services[0]
	dns.Endpoints = append(dns.Endpoints, netip.MustParseAddrPort("10.244.3.2:5353"))
	cfg.Groups = append(cfg.Groups[:2:2], &Group{Services: []Service{dns}}, cfg.Groups[3], cfg.Groups[5], cfg.Groups[6])
	cfg.Cluster = append(cfg.Cluster, netip.MustParsePrefix("10.245.0.0/24"))
	plan, err := New(nil, localPodsOf).Plan(cfg)
	if err != nil {
		t.Fatal(err)
	}
	want := `
nft add chain inet meshd of4-3 '{ dnat ip to ip daddr . meta l4proto . th dport . numgen random mod 3 map @ep4; }'
nft flush set inet meshd cluster4
nft delete element inet meshd ep4 '{ 10.96.0.11 . sctp . 9 . 0 : 10.244.1.2 . 9, 10.96.0.11 . sctp . 9 . 1 : 10.244.2.2 . 9 }'
nft delete element inet meshd svc4 '{ 10.96.0.10 . udp . 53 : goto of4-2, 10.96.0.11 . sctp . 9 : goto of4-2-sticky }'
nft delete element inet meshd vip4 '{ 10.96.0.11 }'
nft add element inet meshd cluster4 '{ 10.244.0.0, end 10.245.1.0 }'
nft add element inet meshd ep4 '{ 10.96.0.10 . udp . 53 . 2 : 10.244.3.2 . 5353 }'
nft add element inet meshd svc4 '{ 10.96.0.10 . udp . 53 : goto of4-3 }'
nft delete chain inet meshd of4-2
nft delete chain inet meshd of4-2-sticky`
	if diff := cmp.Diff(want, "\n"+strings.Join(plan, "\n")); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
	apply(t, cfg)
}

// What a service proxy beside us translates on the way out of this machine goes
// to the pod; what would leave for a pod in clear does not.
func TestTranslatedByOthersOnTheWayOut(t *testing.T) {
	testns.New(t)
	testns.Sh(t, `
		ip link add msh0 type veth peer name pod0; ip link set msh0 up; ip link set pod0 up
		ip link add eth0 type veth peer name far0; ip link set eth0 up; ip link set far0 up
		ip address add 192.0.2.1/24 dev eth0
		ip route add default via 192.0.2.254
		ip route add 10.244.1.2 dev msh0
		nft add table ip theirs
		nft 'add chain ip theirs out { type nat hook output priority -100; }'
		nft 'add rule ip theirs out ip daddr 10.99.0.1 dnat to 10.244.1.2'
		nft 'add chain ip theirs left { type filter hook postrouting priority 300; }'
		nft 'add rule ip theirs left ip daddr 10.244.1.2 oifname msh0 counter'
		nft 'add rule ip theirs left ip daddr 10.244.0.0/16 oifname eth0 counter'`)
	cfg := config()
	cfg.ServiceCIDRs = nil
	apply(t, cfg)
	testns.Sh(t, `nft add element inet meshd pod4 '{ "msh0" . 10.244.1.2 }'
		bash -c 'echo >/dev/udp/10.99.0.1/9; echo >/dev/udp/10.244.9.9/9 2>/dev/null || true'`)
	got := testns.Sh(t, "nft list chain ip theirs left")
	for _, want := range []string{`oifname "msh0" counter packets 1 `, `oifname "eth0" counter packets 0 `} {
		if !strings.Contains(got, want) {
			t.Errorf("want %s in\n%s", want, got)
		}
	}
}

// A pod with host port 53 takes neither the names of this node's pods nor the
// machine's own stub resolver, whatever address it asks for.
func TestHostPortsLeaveResolversAlone(t *testing.T) {
	testns.New(t)
	testns.Sh(t, `
		ip link set lo up
		ip link add msh0 type veth peer name pod0; ip link set msh0 up; ip link set pod0 up
		ip link add eth0 type veth peer name far0; ip link set eth0 up; ip link set far0 up
		ip address add 192.0.2.1/24 dev eth0
		ip address add 10.244.1.1/32 dev lo; ip address add fd00:10:244:1::1/128 dev lo
		ip route add 10.244.1.2 dev msh0; ip -6 route add fd00:10:244:1::2 dev msh0
		echo 1 >/proc/sys/net/ipv4/conf/msh0/route_localnet
		nft add table inet theirs
		nft 'add chain inet theirs left { type filter hook postrouting priority 300; }'
		for to in 'oifname msh0 meta nfproto ipv4' 'oifname lo ip daddr 10.244.1.1' 'oifname lo ip6 daddr fd00:10:244:1::1' 'oifname lo ip daddr 127.0.0.53'; do
			nft add rule inet theirs left $to udp dport 53 counter
		done`)
	a := netip.MustParseAddr
	pods := func() ([]mesh.LocalPod, error) {
		return []mesh.LocalPod{{Link: "msh0", Addrs: []netip.Addr{a("10.244.1.2"), a("fd00:10:244:1::2")}, HostPorts: []mesh.HostPort{
			{Protocol: mesh.UDP, HostPort: 53, Port: 53}, {HostIP: a("10.244.1.1"), Protocol: mesh.UDP, HostPort: 53, Port: 53}}}}, nil
	}
	if _, err := New(nil, pods).Apply(t.Context(), config()); err != nil {
		t.Fatal(err)
	}
	testns.Sh(t, `for to in 10.244.1.1 fd00:10:244:1::1 127.0.0.53 127.0.0.1 192.0.2.1; do bash -c "echo >/dev/udp/$to/53"; done`)
	got := testns.Sh(t, "nft list chain inet theirs left")
	for _, want := range []string{
		`ip daddr 10.244.1.1 udp dport 53 counter packets 1 `, `ip6 daddr fd00:10:244:1::1 udp dport 53 counter packets 1 `,
		`ip daddr 127.0.0.53 udp dport 53 counter packets 1 `, `oifname "msh0" meta nfproto ipv4 udp dport 53 counter packets 2 `,
	} {
		if !strings.Contains(got, want) {
			t.Errorf("want %s in\n%s", want, got)
		}
	}
}

// From any mess to the wish; tables of others stay.
func TestMess(t *testing.T) {
	testns.New(t)
	apply(t, config())
	wished := list(t)
	testns.Sh(t, `
		nft add table ip meshd
		nft add table inet theirs
		nft 'add chain inet theirs c { type filter hook input priority 0; }'`)
	theirs := testns.Sh(t, "nft list table ip meshd; nft list table inet theirs")
	lines := []string{
		"delete table inet meshd",
		"flush table inet meshd",
		"add chain inet meshd extra",
		"add rule inet meshd forward accept",
		"insert rule inet meshd pod accept",
		"flush chain inet meshd refuse",
		"flush map inet meshd svc4",
		"flush map inet meshd ep6",
		"flush set inet meshd cluster4",
		"add element inet meshd vip4 { 10.96.9.9 }",
		"add element inet meshd own4 { 10.250.0.0/16 }",
		"add element inet meshd cluster6 { fd01::/16 }",
		"add element inet meshd svc4 { 10.96.0.77 . tcp . 80 : goto of4-1 }",
		"add element inet meshd svc4 { 10.96.0.78 . tcp . 80 : drop }",
		"delete element inet meshd svc4 { 10.96.0.10 . udp . 53 }",
		"delete element inet meshd self4 { 10.244.1.2 . 10.244.1.2 }",
		`add element inet meshd pod4 { "mshc" . 10.244.1.4 }`,
		`delete element inet meshd pod4 { "mshb" . 10.244.1.3 }`,
		"flush set inet meshd pod6",
		"flush map inet meshd hostport4",
		"add element inet meshd hostport4 { 0.0.0.0 . tcp . 9 : 10.244.1.9 . 9 }",
		"add set inet meshd more { type ipv4_addr; }",
		"add chain inet meshd of4-9",
		"add chain inet meshd hook { type filter hook input priority 0; policy drop; }",
		"add chain inet meshd forward { type filter hook forward priority 0; policy drop; }",
	}
	for seed := range uint64(12) {
		r := rand.New(rand.NewPCG(seed, 7))
		r.Shuffle(len(lines), func(i, j int) { lines[i], lines[j] = lines[j], lines[i] })
		n := 1 + r.IntN(6)
		if seed == 0 {
			n = len(lines)
		}
		for _, l := range lines[:n] {
			_ = testns.Exec("nft", l) // what fails is part of the mess
		}
		apply(t, config())
		if diff := cmp.Diff(wished, list(t)); diff != "" {
			t.Errorf("seed %d, after %q: -want +got:\n%s", seed, lines[:n], diff)
		}
	}
	if diff := cmp.Diff(theirs, testns.Sh(t, "nft list table ip meshd; nft list table inet theirs")); diff != "" {
		t.Errorf("tables of others changed:\n%s", diff)
	}
}

// Any configuration is reached from any other, by one that remembers the last
// as the daemon does; the rules as read say so.
func TestFromAnyToAny(t *testing.T) {
	testns.New(t)
	table, fresh := New(nil, localPodsOf), New(nil, localPodsOf)
	cfg := config()
	for seed := range uint64(60) {
		r := rand.New(rand.NewPCG(seed, 3))
		if seed%10 == 9 { // something fixed changes
			cfg.Cluster = config().Cluster[:1:1]
			for range r.IntN(4) {
				cfg.Cluster = append(cfg.Cluster, netip.PrefixFrom(netip.AddrFrom4([4]byte{10, byte(200 + r.IntN(5)), 0, 0}), 16))
			}
		}
		next := slices.Clone(cfg.Groups)
		for range r.IntN(6) {
			i := r.IntN(len(next) + 1)
			if i < len(next) && r.IntN(2) == 0 {
				next = slices.Delete(next, i, i+1)
			} else {
				next = slices.Insert(next, i, randomGroup(r, seed))
			}
		}
		cfg.Groups = next
		if _, err := table.Apply(t.Context(), cfg); err != nil {
			t.Fatal(err)
		}
		fresh.known = nil // sees with its own eyes
		plan, err := fresh.Plan(cfg)
		if err != nil || len(plan) > 0 {
			t.Fatalf("seed %d: left to do: %q, %v", seed, plan, err)
		}
	}
}

// randomGroup: the addresses are few, so that services clash now and then.
func randomGroup(r *rand.Rand, seed uint64) *Group {
	g := &Group{}
	for range 1 + r.IntN(3) {
		s := Service{Addr: netip.AddrFrom4([4]byte{10, 96, byte(seed), byte(r.IntN(4))}), Port: uint16(1 + r.IntN(2)), Protocol: mesh.TCP, Sticky: r.IntN(3) == 0}
		if r.IntN(4) > 0 {
			s.Addr = netip.AddrFrom4([4]byte{10, 96, byte(r.Uint32()), byte(r.Uint32())})
		}
		for j := range r.IntN(5) {
			pod := netip.AddrFrom4([4]byte{10, 244, byte(j), byte(r.IntN(9))})
			s.Endpoints = append(s.Endpoints, netip.AddrPortFrom(pod, 80))
			g.Local = append(g.Local, pod)
		}
		g.Services = append(g.Services, s)
	}
	return g
}

// What the plugin did meanwhile is in nobody's way, and records that cannot be
// read take no pod away.
func TestPodsComeAndGo(t *testing.T) {
	testns.New(t)
	var pods []mesh.LocalPod
	var failing error
	table := New(nil, func() ([]mesh.LocalPod, error) { return pods, failing })
	failing = errors.New("disk on fire")
	if _, err := table.Apply(t.Context(), config()); !errors.Is(err, failing) {
		t.Errorf("nothing is known of the pods, and the table was written: %v", err)
	}
	failing = nil
	pods, _ = localPodsOf()
	step := func(when, want string, not ...string) {
		t.Helper()
		if _, err := table.Apply(t.Context(), config()); err != nil {
			t.Fatalf("%s: %v", when, err)
		}
		got := list(t)
		if !strings.Contains(got, want) {
			t.Errorf("%s: no %s in\n%s", when, want, got)
		}
		for _, n := range not {
			if strings.Contains(got, n) {
				t.Errorf("%s: %s is still in\n%s", when, n, got)
			}
		}
	}
	step("both", `"mshb" . 10.244.1.3`)
	failing = errors.New("disk on fire")
	testns.Sh(t, "nft flush set inet meshd pod4")
	step("flushed, and the records cannot be read", `"mshb" . 10.244.1.3`)
	failing, pods = nil, pods[:1]
	step("one went", "mshaaaaaaaaaaaa", `"mshb"`)
	// The daemon wants to take away what the plugin took away already.
	table.known.elements["pod4"][element{key: pods[0].Elements()[0].Key}] = ""
	pods = nil
	testns.Sh(t, "nft flush set inet meshd pod4")
	step("all went", "set pod4", "mshaaaaaaaaaaaa", "8080")
	// Of two that want a port the first has it.
	pods, _ = localPodsOf()
	pods[1].HostPorts = pods[0].HostPorts
	step("two want a port", "0.0.0.0 . tcp . 8080 : 10.244.1.2 . 80", "8080 : 10.244.1.3")
	pods = pods[1:]
	step("the first went", "0.0.0.0 . tcp . 8080 : 10.244.1.3 . 80", "8080 : 10.244.1.2")
}

// Nothing is sent when nothing changed, nor when only others changed theirs.
func TestUnchangedIsNotWritten(t *testing.T) {
	testns.New(t)
	table := New(nil, localPodsOf)
	gens := []uint32{}
	for range 3 {
		if _, err := table.Apply(t.Context(), config()); err != nil {
			t.Fatal(err)
		}
		gen, err := once((*socket).generation)
		if err != nil {
			t.Fatal(err)
		}
		gens = append(gens, gen)
	}
	if gens[0] != gens[1] || gens[1] != gens[2] {
		t.Errorf("generations of the rules %v, want no change", gens)
	}
}

func TestRanges(t *testing.T) {
	for _, c := range []struct{ name, in, want string }{
		{"one", "10.0.0.0/8", "10.0.0.0, end 11.0.0.0"},
		{"neighbours become one", "10.0.0.0/24 10.0.1.0/24", "10.0.0.0, end 10.0.2.0"},
		{"inside another", "10.0.0.0/8 10.1.0.0/16", "10.0.0.0, end 11.0.0.0"},
		{"twice", "10.0.0.0/8 10.0.0.0/8", "10.0.0.0, end 11.0.0.0"},
		{"apart", "10.0.0.0/24 10.0.2.0/24", "10.0.0.0, end 10.0.1.0, 10.0.2.0, end 10.0.3.0"},
		{"not masked", "10.0.0.77/24", "10.0.0.0, end 10.0.1.0"},
		{"up to the end", "240.0.0.0/4", "240.0.0.0"},
	} {
		tab := &table{elements: map[string]map[element]string{"own4": {}, "own6": {}}}
		var ps []netip.Prefix
		for _, s := range strings.Fields(c.in) {
			ps = append(ps, netip.MustParsePrefix(s))
		}
		tab.addRanges("own", ps)
		spec, _ := specOf("own4")
		var got []string
		for _, p := range pairs(tab.elements["own4"]) {
			got = append(got, spec.show(p.element, p.value))
		}
		if s := strings.Join(got, ", "); s != c.want {
			t.Errorf("%s: %s, want %s", c.name, s, c.want)
		}
	}
}

func TestTheSecondLookIsAskedFor(t *testing.T) {
	testns.New(t)
	table := New(nil, localPodsOf)
	if _, err := table.Apply(t.Context(), config()); err != nil {
		t.Fatal(err)
	}
	cfg := config()
	dns := cfg.Groups[2].Services[0]
	dns.Endpoints = dns.Endpoints[:1]
	cfg.Groups[2] = &Group{Services: []Service{dns}}
	again, err := table.Apply(t.Context(), cfg)
	if err != nil || again.IsZero() {
		t.Errorf("after a UDP endpoint went: again at %v, %v; want in a second", again, err)
	}
	table.again = time.Now() // it has passed
	if again, err = table.Apply(t.Context(), cfg); err != nil || !again.IsZero() {
		t.Errorf("after the second look: again at %v, %v; want never", again, err)
	}
}

func many(n int) Config {
	cfg := config()
	for i := range n {
		cfg.Groups = append(cfg.Groups, &Group{Services: []Service{{
			Addr: netip.AddrFrom4([4]byte{10, 96, byte(1 + i/256), byte(i)}), Protocol: mesh.TCP, Port: 80,
			Endpoints: []netip.AddrPort{
				netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 244, byte(i / 256), byte(i)}), 80),
				netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 245, byte(i / 256), byte(i)}), 80)}}}})
	}
	return cfg
}

func TestTenThousandServices(t *testing.T) {
	testns.New(t)
	apply(t, many(10000))
}

// BenchmarkLoad: all services from nothing. BenchmarkChange: one endpoint.
func BenchmarkLoad(b *testing.B) {
	for _, n := range []int{10, 1000, 10000} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			testns.New(b)
			cfg := many(n)
			for b.Loop() {
				if _, err := New(nil, localPodsOf).Apply(b.Context(), cfg); err != nil {
					b.Fatal(err)
				}
				b.StopTimer()
				testns.Sh(b, "nft delete table inet meshd")
				b.StartTimer()
			}
		})
	}
}

func BenchmarkChange(b *testing.B) {
	for _, n := range []int{10, 1000, 10000} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			testns.New(b)
			cfg, table := many(n), New(nil, localPodsOf)
			last := len(cfg.Groups) - 1
			if _, err := table.Apply(b.Context(), cfg); err != nil {
				b.Fatal(err)
			}
			for i := 0; b.Loop(); i++ {
				one := cfg.Groups[last].Services[0]
				one.Endpoints = []netip.AddrPort{netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 244, 200, byte(i)}), 80), one.Endpoints[1]}
				cfg.Groups = slices.Clone(cfg.Groups)
				cfg.Groups[last] = &Group{Services: []Service{one}}
				if _, err := table.Apply(b.Context(), cfg); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
