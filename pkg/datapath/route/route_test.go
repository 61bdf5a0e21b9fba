package route

import (
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"meshd.dev/pkg/datapath/internal/testns"
)

func TestMain(m *testing.M) { testns.Main(m) }

func table(t *testing.T) *Table {
	table := New(slog.New(slog.NewTextHandler(io.Discard, nil)))
	t.Cleanup(func() {
		if err := table.Close(); err != nil {
			t.Error(err)
		}
	})
	return table
}

// Two peers, 10.244.2.0/24 and 10.244.3.0/24; we are 10.244.1.0/24.
func config() Config {
	p, a := netip.MustParsePrefix, netip.MustParseAddr
	return Config{
		Device: "mesh0",
		Addrs:  []netip.Addr{a("10.244.1.1"), a("fd00:10:244:1::1")},
		Routes: []Route{
			{Dst: p("10.244.2.0/24"), Src: a("10.244.1.1"), MTU: 1420},
			{Dst: p("10.244.3.0/24"), Src: a("10.244.1.1"), MTU: 1300},
			{Dst: p("fd00:10:244:2::/64"), Src: a("fd00:10:244:1::1"), MTU: 1420},
		},
		Floor: []netip.Prefix{p("10.244.0.0/16"), p("10.244.1.0/24"), p("10.244.2.0/24"), p("10.244.3.0/24"), p("fd00:10:244::/48")},
	}
}

const wished = `
10.244.2.0/24 dev mesh0 scope link src 10.244.1.1 mtu 1420
10.244.3.0/24 dev mesh0 scope link src 10.244.1.1 mtu 1300
blackhole 10.244.0.0/16 metric 16777216
blackhole 10.244.1.0/24 metric 16777216
blackhole 10.244.2.0/24 metric 16777216
blackhole 10.244.3.0/24 metric 16777216
blackhole fd00:10:244::/48 dev lo metric 16777216 pref medium
fd00:10:244:2::/64 dev mesh0 src fd00:10:244:1::1 metric 1024 mtu 1420 pref medium
inet 10.244.1.1/32 scope global mesh0
inet6 fd00:10:244:1::1/128 scope global nodad`

// shown is the kernel's view of what is ours.
func shown(t *testing.T) string {
	out := testns.Sh(t, `
		ip -4 route show table all proto 77 | sort
		ip -6 route show table all proto 77 | sort
		ip address show dev mesh0 scope global | grep inet | sed 's/ valid_lft.*//'`)
	var lines []string
	for _, l := range strings.Split(out, "\n") {
		if l = strings.Join(strings.Fields(l), " "); l != "" && !strings.Contains(l, "valid_lft") {
			lines = append(lines, l)
		}
	}
	return "\n" + strings.Join(lines, "\n")
}

func fresh(t *testing.T) {
	testns.New(t)
	testns.Sh(t, `
		sysctl -qw net.ipv4.ip_forward=0 # a new namespace has what the machine has
		sysctl -qw net.ipv6.conf.all.accept_dad=0 net.ipv6.conf.default.accept_dad=0 # no address changes by itself
		sysctl -qw net.ipv6.conf.default.addr_gen_mode=1 # nor comes when the link has found its carrier
		ip link add eth0 type veth peer name eth0x; ip link set eth0x up; ip link set eth0 up
		ip address add 192.0.2.1/24 dev eth0
		ip route add default via 192.0.2.254`)
}

func apply(t *testing.T, cfg Config) {
	t.Helper()
	if _, err := table(t).Apply(cfg); err != nil {
		t.Fatal(err)
	}
	plan, err := table(t).Plan(cfg)
	if err != nil || len(plan) > 0 {
		t.Errorf("the second time there is something to do: %q, %v", plan, err)
	}
}

func TestApply(t *testing.T) {
	fresh(t)
	testns.Sh(t, "ip link add mesh0 type veth peer name mesh0x; ip link set mesh0x up; ip link set mesh0 up")
	apply(t, config())
	if diff := cmp.Diff(wished, shown(t)); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
	got := testns.Sh(t, "sysctl -n net.ipv4.ip_forward net.ipv6.conf.all.forwarding net.ipv4.conf.mesh0.rp_filter net.ipv6.conf.mesh0.accept_ra")
	if got != "1\n1\n2\n0\n" {
		t.Errorf("sysctls %q", got)
	}
}

func TestPlanReadsLikeCommands(t *testing.T) {
	fresh(t)
	testns.Sh(t, "ip link add mesh0 type veth peer name mesh0x; ip link set mesh0x up; ip link set mesh0 up; ip route add 10.9.0.0/16 dev mesh0 proto 77; ip address add 10.244.9.1/24 dev mesh0")
	plan, err := table(t).Plan(Config{
		Device: "mesh0", Addrs: config().Addrs[:1], Routes: config().Routes[:1], Floor: config().Floor[:1]})
	if err != nil {
		t.Fatal(err)
	}
	want := `
sysctl -w net.ipv4.ip_forward=1
sysctl -w net.ipv4.conf.mesh0.rp_filter=2
sysctl -w net.ipv4.conf.all.send_redirects=0
sysctl -w net.ipv4.conf.mesh0.send_redirects=0
sysctl -w net.ipv6.conf.mesh0.accept_ra=0
ip address add 10.244.1.1/32 dev mesh0
ip route add blackhole 10.244.0.0/16 metric 16777216 proto 77
ip route add 10.244.2.0/24 dev mesh0 src 10.244.1.1 mtu 1420 proto 77
ip route del 10.9.0.0/16 dev mesh0 proto 77
ip address del 10.244.9.1/24 dev mesh0`
	if diff := cmp.Diff(want, "\n"+strings.Join(plan, "\n")); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
}

func TestFloorComesBeforeTheDevice(t *testing.T) {
	fresh(t)
	if _, err := table(t).Apply(config()); !errors.Is(err, ErrNoDevice) {
		t.Errorf("without device: %v, want %v", err, ErrNoDevice)
	}
	out := testns.Sh(t, "ip route show proto 77; ip route get 10.244.2.9 2>&1 || true")
	if strings.Count(out, "blackhole") != 4 || !strings.Contains(out, "Invalid argument") {
		t.Errorf("routes without device:\n%s", out)
	}
}

// From any mess to the wish, and what is not ours stays.
func TestMess(t *testing.T) {
	for seed := range uint64(5) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			fresh(t)
			testns.Sh(t, `
				ip link add mesh0 type veth peer name mesh0x; ip link set mesh0x up; ip link set mesh0 up
				ip link add mshp1 type veth peer name mshp1x; ip link set mshp1x up; ip link set mshp1 up
				ip route add 10.244.1.2/32 dev mshp1 proto 78
				ip route add 198.51.100.0/24 via 192.0.2.254 proto static
				ip route add 10.244.9.0/24 dev eth0 proto static
				ip -6 route add fd00:99::/64 dev eth0 proto static`)
			theirs := func() string {
				return testns.Sh(t, "ip route show table main; ip -6 route show table main; ip address show dev eth0")
			}
			strip := func(s string) string {
				var keep []string
				for _, l := range strings.Split(s, "\n") {
					if !strings.Contains(l, "proto 77") && !strings.Contains(l, "dev mesh0 proto kernel") {
						keep = append(keep, l)
					}
				}
				return strings.Join(keep, "\n")
			}
			before := strip(theirs())
			mess(t, rand.New(rand.NewPCG(seed, 1)))
			apply(t, config())
			if diff := cmp.Diff(wished, shown(t)); diff != "" {
				t.Errorf("-want +got:\n%s", diff)
			}
			if diff := cmp.Diff(before, strip(theirs())); diff != "" {
				t.Errorf("what is not ours changed:\n%s", diff)
			}
			apply(t, Config{Device: "mesh0"})
			if got := shown(t); got != "\n" {
				t.Errorf("left behind:%s", got)
			}
		})
	}
}

// mess does some of the things an administrator or an older version may have
// done; commands that fail are part of it.
func mess(t *testing.T, r *rand.Rand) {
	lines := []string{
		"ip route add 10.244.2.0/24 dev mesh0 proto 77",
		"ip route append 10.244.2.0/24 dev mesh0 proto 77 mtu 1000",
		"ip route append 10.244.2.0/24 dev eth0 proto 77",
		"ip route add 10.244.2.0/24 via 192.0.2.9 proto 77 metric 7",
		"ip route add 10.244.3.0/24 dev mesh0 proto 77 tos 0x10",
		"ip route add 10.244.3.0/24 via 192.0.2.254 proto 77",
		"ip route add blackhole 10.244.0.0/16 proto 77 metric 16777216",
		"ip route add unreachable 10.244.1.0/24 proto 77 metric 16777216",
		"ip route add prohibit 10.77.0.0/16 proto 77",
		"ip route add 10.244.2.0/24 dev mesh0 proto 77 table 100",
		"ip route add 10.88.0.0/16 proto 77 nexthop via 192.0.2.7 nexthop via 192.0.2.8",
		"ip route add default dev mesh0 proto 77 metric 900",
		"ip address add 10.244.1.1/32 dev mesh0",
		"ip address add 10.244.1.1/24 dev mesh0",
		"ip address add 10.244.7.1/24 dev mesh0",
		"ip address add fd00:10:244:1::1/64 dev mesh0 nodad",
		"ip address add fd00:10:244:7::1/64 dev mesh0 nodad",
		"ip -6 route add fd00:10:244:2::/64 dev mesh0 proto 77",
		"ip -6 route append fd00:10:244:2::/64 dev eth0 proto 77",
		"ip -6 route add fd00:10:244:2::/64 dev mesh0 proto 77 metric 5 mtu 1300",
		"ip -6 route add blackhole fd00:10:244::/48 proto 77 metric 16777216",
		"ip -6 route add unreachable fd00:10:244::/48 proto 77 metric 99",
		"ip -6 route add default dev mesh0 proto 77",
		"sysctl -qw net.ipv4.conf.mesh0.rp_filter=1",
		"sysctl -qw net.ipv6.conf.mesh0.accept_ra=2",
	}
	r.Shuffle(len(lines), func(i, j int) { lines[i], lines[j] = lines[j], lines[i] })
	var batch, others []string
	for _, l := range lines[:5+r.IntN(len(lines)-5)] {
		if ip, ok := strings.CutPrefix(l, "ip "); ok {
			batch = append(batch, strings.TrimPrefix(ip, "-6 "))
		} else {
			others = append(others, l)
		}
	}
	testns.Sh(t, "ip -force -batch - 2>/dev/null <<end ||:\n"+strings.Join(batch, "\n")+"\nend\n"+strings.Join(others, "\n"))
}

func TestAForeignRouteInOurPlaceIsReportedNotReplaced(t *testing.T) {
	fresh(t)
	testns.Sh(t, "ip link add mesh0 type veth peer name mesh0x; ip link set mesh0x up; ip link set mesh0 up; ip route add 10.244.2.0/24 dev eth0 proto static")
	_, err := table(t).Apply(config())
	if err == nil || !strings.Contains(err.Error(), "somebody else has a route there") {
		t.Errorf("error %v", err)
	}
	if out := testns.Sh(t, "ip route show 10.244.2.0/24"); !strings.Contains(out, "proto static") {
		t.Errorf("the route of somebody else is gone:\n%s", out)
	}
}

func TestPathMTU(t *testing.T) {
	fresh(t)
	testns.Sh(t, `
		ip link set eth0 mtu 9000
		ip link add mesh0 type veth peer name mesh0x; ip link set mesh0x up; ip link set mesh0 up mtu 1420
		ip route add 10.1.0.0/16 via 192.0.2.254 mtu 1400
		ip route add 10.244.2.0/24 dev mesh0
		ip route add blackhole 10.3.0.0/16`)
	pathMTU := NewUnderlay("mesh0").PathMTU
	for addr, want := range map[string]int{
		"192.0.2.7":    9000, // on the link
		"203.0.113.1":  9000, // by the default route
		"10.1.2.3":     1400, // the route knows better
		"10.244.2.3":   0,    // a tunnel in the tunnel
		"10.3.0.1":     0,
		"192.0.2.1":    0, // ourselves
		"2001:db8::99": 0, // no route
	} {
		if got := pathMTU(netip.MustParseAddr(addr)); got != want {
			t.Errorf("PathMTU(%s) = %d, want %d", addr, got, want)
		}
	}
	if got := NewUnderlay("mesh0").DefaultMTU(); got != 9000 {
		t.Errorf("DefaultMTU = %d, want 9000", got)
	}
}

// What anybody says about the MTU of a path changes nothing: whether packets
// pass is found out with packets.
func TestPathMTUBelievesNoICMP(t *testing.T) {
	testns.New(t)
	testns.Sh(t, `
		ip link add eth0 type veth peer name wire; ip link set wire up; ip link set eth0 up
		ip address add 192.0.2.1/24 dev eth0; ip route add default via 192.0.2.254`)
	far := netip.MustParseAddr("203.0.113.1")
	testns.Lie(t, "eth0", "wire", netip.MustParseAddr("192.0.2.1"), far)
	if got := NewUnderlay("mesh0").PathMTU(far); got != 1500 {
		t.Errorf("PathMTU = %d after a lie, want 1500", got)
	}
}

// Of several ways any may be taken.
func TestPathMTUOfManyWays(t *testing.T) {
	fresh(t)
	testns.Sh(t, `
		ip link set eth0 mtu 9000
		ip link add eth1 type veth peer name eth1x; ip link set eth1x up; ip link set eth1 up mtu 1400
		ip address add 198.51.100.1/24 dev eth1
		ip route add 10.5.0.0/16 nexthop via 192.0.2.254 nexthop via 198.51.100.254
		ip route add 10.6.0.0/16 mtu 1300 nexthop via 192.0.2.254 nexthop via 198.51.100.254`)
	pathMTU := NewUnderlay("mesh0").PathMTU
	for addr, want := range map[string]int{"10.5.0.1": 1400, "10.6.0.1": 1300} {
		if got := pathMTU(netip.MustParseAddr(addr)); got != want {
			t.Errorf("PathMTU(%s) = %d, want %d", addr, got, want)
		}
	}
}

// The floor alone, as at boot: added once, nothing else touched, and adopted by
// what comes later.
func TestLayFloor(t *testing.T) {
	fresh(t)
	testns.Sh(t, "ip route add blackhole 10.9.0.0/16 proto 77 metric 16777216; ip route add 10.8.0.0/16 via 192.0.2.254")
	for i, want := range []int{2, 0} {
		did, err := LayFloor([]netip.Prefix{netip.MustParsePrefix("10.244.0.0/16"), netip.MustParsePrefix("fd00:10:244::/48")})
		if err != nil || len(did) != want {
			t.Errorf("time %d: did %q, %v; want %d routes", i+1, did, err, want)
		}
	}
	out := testns.Sh(t, "ip route get 10.244.2.9 2>&1 || true; ip route get fd00:10:244:2::9 2>&1 || true; ip route show proto 77; ip route get 10.8.0.1")
	if strings.Count(out, "Invalid argument") != 2 || !strings.Contains(out, "blackhole 10.9.0.0/16") || !strings.Contains(out, "via 192.0.2.254") {
		t.Errorf("routes:\n%s", out)
	}
}

// A route the kernel tells twice is one route: it stays.
func TestRouteToldTwice(t *testing.T) {
	cfg := Config{Device: "mesh0", Routes: []Route{{Dst: netip.MustParsePrefix("fd00:10:244:1::/64"), MTU: 1420}}}
	have := state{link: 7}
	have.routes = wanted(cfg, have)
	if ops := diff(cfg, have); len(ops) > 0 {
		t.Fatalf("told once: %v", ops)
	}
	have.routes = slices.Concat(have.routes, have.routes)
	if ops := diff(cfg, have); len(ops) > 0 {
		t.Errorf("told twice: %v", ops)
	}
}

// Following ends where applying ends, does what differs and nothing else, and
// tells its own doings from those of others.
func TestFollow(t *testing.T) {
	fresh(t)
	testns.Sh(t, "ip link add mesh0 type veth peer name mesh0x; ip link set mesh0x up; ip link set mesh0 up")
	events, err := netlink.Dial(unix.NETLINK_ROUTE, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer events.Close()
	for _, g := range []uint32{unix.RTNLGRP_IPV4_ROUTE, unix.RTNLGRP_IPV6_ROUTE} {
		if err := events.JoinGroup(g); err != nil {
			t.Fatal(err)
		}
	}
	follower, r := table(t), rand.New(rand.NewPCG(1, 1))
	node := func(i, mtu int) Part {
		p4, p6 := netip.MustParsePrefix(fmt.Sprintf("10.244.%d.0/24", i)), netip.MustParsePrefix(fmt.Sprintf("fd00:10:244:%d::/64", i))
		return Part{Floor: []netip.Prefix{p4, p6}, Routes: []Route{
			{Dst: p4, Src: config().Addrs[0], MTU: mtu}, {Dst: p6, Src: config().Addrs[1], MTU: mtu}}}
	}
	mtus := map[int]int{} // of the nodes there are
	whole := func() Config {
		cfg := Config{Device: "mesh0", Addrs: config().Addrs}
		for i, mtu := range mtus {
			cfg.Routes, cfg.Floor = append(cfg.Routes, node(i, mtu).Routes...), append(cfg.Floor, node(i, mtu).Floor...)
		}
		return cfg
	}
	apply := func() {
		if _, err := follower.Apply(whole()); err != nil {
			t.Fatal(err)
		}
	}
	apply()
	for range 60 {
		var gone, added Part
		i, want := 2+r.IntN(5), 4
		old, was := mtus[i]
		if was {
			gone = node(i, old)
		}
		if mtu := []int{0, 1300, 1420}[r.IntN(3)]; mtu > 0 {
			added, mtus[i] = node(i, mtu), mtu
			if was && mtu == old {
				want = 0
			} else if was {
				want = 2 // of two routes the MTU
			}
		} else if delete(mtus, i); !was {
			want = 0
		}
		did, err := follower.Follow(whole(), gone, added)
		if err != nil || len(did) != want {
			t.Fatalf("did %q, %v; want %d", did, err, want)
		}
		if plan, err := follower.Plan(whole()); err != nil || len(plan) > 0 {
			t.Fatalf("after %q there is left: %q, %v", did, plan, err)
		}
	}
	// A node that somebody else has put a route in place of, and one whose
	// routes are gone already.
	clear(mtus)
	apply()
	testns.Sh(t, "ip route add 10.244.2.0/24 dev eth0 proto static")
	if _, err := follower.Follow(whole(), Part{}, node(2, 1420)); err == nil || !strings.Contains(err.Error(), "somebody else has a route there") {
		t.Errorf("error %v", err)
	}
	if did, err := follower.Follow(whole(), node(3, 1420), Part{}); err != nil || len(did) != 4 {
		t.Errorf("what is gone already: did %q, %v", did, err)
	}
	testns.Sh(t, "ip route add 203.0.113.0/24 dev eth0 proto 77")
	foreign, echoes := 0, 0
	if err := events.SetReadDeadline(time.Now().Add(20 * time.Second)); err != nil {
		t.Fatal(err)
	}
	for foreign < 2 {
		msgs, err := events.Receive()
		if err != nil {
			t.Fatal(err)
		}
		for _, m := range msgs {
			if follower.Echo(m.Header.PID) {
				echoes++
			} else if m.Data[5] != unix.RTPROT_KERNEL && m.Data[5] != unix.RTPROT_BOOT {
				foreign++
			}
		}
	}
	if echoes < 60 {
		t.Errorf("%d echoes", echoes)
	}
}
