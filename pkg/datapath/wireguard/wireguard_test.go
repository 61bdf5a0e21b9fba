package wireguard_test

import (
	"bytes"
	"context"
	"encoding/hex"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net/netip"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"meshd.dev/pkg/datapath/internal/testns"
	"meshd.dev/pkg/datapath/wireguard"
	"meshd.dev/pkg/datapath/wireguard/userspace"
	"meshd.dev/pkg/mesh"
)

// TestMain also serves as the userspace process.
func TestMain(m *testing.M) {
	if len(os.Args) == 3 && os.Args[1] == "wireguard" {
		ctx, stop := signal.NotifyContext(context.Background(), unix.SIGTERM)
		defer stop()
		if err := userspace.Run(ctx, userspace.Config{Device: os.Args[2], Log: slog.New(slog.NewTextHandler(os.Stderr, nil))}); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	testns.Main(m)
}

// device in a network namespace of its own; name tells it apart from those of
// other tests, which share the folder of control sockets.
func device(t *testing.T, name string) (*wireguard.Device, string) {
	t.Helper()
	dir := t.TempDir()
	exe, _ := os.Executable()
	d, err := wireguard.New(wireguard.Options{Name: name, StateDir: dir, LogDir: dir, SpawnUserspace: []string{exe, "wireguard"}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		checkBackend(t, name)
		_ = testns.Exec("sh", "-c", "kill -9 $(cat "+wireguard.LockPath(name)+")")
		if t.Failed() {
			b, _ := os.ReadFile(filepath.Join(dir, "wireguard-"+name+".log"))
			t.Logf("log of the userspace process:\n%s", b)
		}
	})
	return d, dir
}

// checkBackend: it is the device the tests are told to meet, in the words of
// the kernel.
func checkBackend(t *testing.T, name string) {
	t.Helper()
	kind := map[string]string{"kernel": "wireguard", "userspace": "tun"}[testns.Backend(t)]
	out, err := testns.Output("ip", "-details", "-oneline", "link", "show", name)
	if err == nil && !strings.Contains(out, kind+" ") {
		t.Errorf("want a link of type %s, have %s", kind, out)
	}
}

// incarnation of a device: another one is another interface, or is served by
// another process.
func incarnation(t *testing.T, name string) string {
	t.Helper()
	return testns.Sh(t, "ip -o link show "+name+" | cut -d: -f1; cat "+wireguard.LockPath(name)+" 2>/dev/null ||:")
}

func key(n byte) mesh.Key { return mesh.Key{n, 31: 1} }

func b64(n byte) string { return key(n).String() }

// Peers 2 and 3 at 192.0.2.N with 10.244.N.0/24 and fd00:10:244:N::/64.
func config() wireguard.Config {
	cfg := wireguard.Config{ListenPort: 51820, MTU: 1420}
	for n := byte(2); n <= 3; n++ {
		cfg.Peers = append(cfg.Peers, wireguard.Peer{
			Name: fmt.Sprintf("node%d", n), Key: key(n),
			Endpoint:   netip.MustParseAddrPort(fmt.Sprintf("192.0.2.%d:51820", n)),
			AllowedIPs: []netip.Prefix{netip.MustParsePrefix(fmt.Sprintf("10.244.%d.0/24", n)), netip.MustParsePrefix(fmt.Sprintf("fd00:10:244:%d::/64", n))},
		})
	}
	return cfg
}

func apply(t *testing.T, d *wireguard.Device, cfg wireguard.Config) {
	t.Helper()
	if err := d.Apply(t.Context(), cfg); err != nil {
		t.Fatal(err)
	}
	plan, err := d.Plan(cfg)
	if err != nil || len(plan) > 0 {
		t.Errorf("the second time there is something to do: %q, %v", plan, err)
	}
}

// shown is the device as wg(8) sees it, without keys of its own and what
// counts up, in an order of our choice.
func shown(t *testing.T, name string) string {
	t.Helper()
	var lines []string
	for i, l := range strings.Split(strings.TrimSpace(testns.Sh(t, "wg show "+name+" dump")), "\n") {
		f := strings.Split(l, "\t")
		if i == 0 {
			lines = append(lines, "! port "+f[2]+" mark "+f[3])
			continue
		}
		allowed := strings.Split(f[3], ",")
		slices.Sort(allowed)
		lines = append(lines, fmt.Sprintf("peer %s psk %s endpoint %s allowed %v keepalive %s", f[0], f[1], f[2], allowed, f[7]))
	}
	slices.Sort(lines)
	return strings.Join(lines, "\n") + "\n" + testns.Sh(t, "ip -o link show "+name+` | sed 's/.*<\(.*\)> \(mtu [0-9]*\).*/\2 \1/'`)
}

func TestApply(t *testing.T) {
	testns.New(t)
	d, dir := device(t, "wga")
	plan, err := d.Plan(config())
	if err != nil {
		t.Fatal(err)
	}
	exe, _ := os.Executable()
	want := strings.NewReplacer("EXE", exe, "KEY2", b64(2), "KEY3", b64(3)).Replace(`
ip link add wga type wireguard || EXE wireguard wga &
wg set wga private-key wireguard.key listen-port 51820
ip link set wga mtu 1420
ip link set wga up
wg set wga peer KEY2 endpoint 192.0.2.2:51820 allowed-ips +10.244.2.0/24,+fd00:10:244:2::/64 # node2
wg set wga peer KEY3 endpoint 192.0.2.3:51820 allowed-ips +10.244.3.0/24,+fd00:10:244:3::/64 # node3`)
	if diff := cmp.Diff(want, "\n"+strings.Join(plan, "\n")); diff != "" {
		t.Errorf("plan: -want +got:\n%s", diff)
	}
	apply(t, d, config())
	got := testns.Sh(t, "wg show wga public-key; wg show wga listen-port; wg show wga allowed-ips | sort")
	want = d.PublicKey().String() + "\n51820\n"
	for n := byte(2); n <= 3; n++ {
		want += fmt.Sprintf("%s\t10.244.%d.0/24 fd00:10:244:%[2]d::/64\n", b64(n), n)
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}

	// Another daemon adopts what it finds.
	first := incarnation(t, "wga")
	again, err := wireguard.New(wireguard.Options{Name: "wga", StateDir: dir, SpawnUserspace: []string{"/bin/false"}})
	if err != nil {
		t.Fatal(err)
	}
	apply(t, again, config())
	if now := incarnation(t, "wga"); now != first {
		t.Errorf("the device was changed from %s to %s", first, now)
	}
	stats, backend, err := d.Stats()
	if err != nil || string(backend) != testns.Backend(t) || len(stats) != 2 || stats[key(2)].Endpoint.String() != "192.0.2.2:51820" {
		t.Errorf("stats %v of a %q device, %v", stats, backend, err)
	}
}

// What is done to peers, as commands, and what wg(8) shows of it afterwards:
// the device is then what it would be had it been made so.
// A link without an address takes no IPv4 packet whose way back is another
// link; so it has one before a peer can send.
func TestAddressesComeBeforePeers(t *testing.T) {
	testns.New(t)
	d, _ := device(t, "wga")
	cfg := config()
	cfg.Addrs = []netip.Addr{netip.MustParseAddr("10.244.1.1")}
	plan, err := d.Plan(cfg)
	if err != nil {
		t.Fatal(err)
	}
	addr := slices.Index(plan, "ip address replace 10.244.1.1/32 dev wga; ip link set wga up")
	peer := slices.IndexFunc(plan, func(line string) bool { return strings.HasPrefix(line, "wg set wga peer ") })
	if addr < 0 || peer < addr {
		t.Errorf("plan, want the address before peers:\n%s", strings.Join(plan, "\n"))
	}
	apply(t, d, cfg)
	if out := testns.Sh(t, "ip -4 -o address show dev wga"); !strings.Contains(out, "inet 10.244.1.1/32 ") {
		t.Errorf("addresses: %s", out)
	}
}

func TestPlanReadsLikeCommands(t *testing.T) {
	join := testns.New(t)
	d, _ := device(t, "wgb")
	apply(t, d, config())
	first := shown(t, "wgb")
	const two, three = "peer KEY2 psk (none) endpoint 192.0.2.2:51820 allowed [10.244.2.0/24 fd00:10:244:2::/64] keepalive off",
		"peer KEY3 psk (none) endpoint 192.0.2.3:51820 allowed [10.244.3.0/24 fd00:10:244:3::/64] keepalive off"
	for _, c := range []struct {
		name        string
		edit        func(*wireguard.Config)
		want, shows string
	}{
		{"nothing", func(*wireguard.Config) {}, "", two + "\n" + three},
		{"a peer comes", func(c *wireguard.Config) {
			c.Peers = append(c.Peers, wireguard.Peer{Name: "node4", Key: key(4), Endpoint: netip.MustParseAddrPort("192.0.2.4:51820"),
				AllowedIPs: []netip.Prefix{netip.MustParsePrefix("10.244.4.0/24")}})
		}, "wg set wgb peer KEY4 endpoint 192.0.2.4:51820 allowed-ips +10.244.4.0/24 # node4",
			two + "\n" + three + "\npeer KEY4 psk (none) endpoint 192.0.2.4:51820 allowed [10.244.4.0/24] keepalive off"},
		{"a peer goes", func(c *wireguard.Config) { c.Peers = c.Peers[:1] }, "wg set wgb peer KEY3 remove", two},
		{"a prefix moves", func(c *wireguard.Config) {
			c.Peers[0].AllowedIPs, c.Peers[1].AllowedIPs = c.Peers[1].AllowedIPs, c.Peers[0].AllowedIPs
		}, `wg set wgb peer KEY2 allowed-ips +10.244.3.0/24,+fd00:10:244:3::/64 # node2
wg set wgb peer KEY3 allowed-ips +10.244.2.0/24,+fd00:10:244:2::/64 # node3`,
			`peer KEY2 psk (none) endpoint 192.0.2.2:51820 allowed [10.244.3.0/24 fd00:10:244:3::/64] keepalive off
peer KEY3 psk (none) endpoint 192.0.2.3:51820 allowed [10.244.2.0/24 fd00:10:244:2::/64] keepalive off`},
		{"a prefix goes", func(c *wireguard.Config) { c.Peers[0].AllowedIPs = c.Peers[0].AllowedIPs[:1] },
			"wg set wgb peer $THROWAWAY allowed-ips fd00:10:244:2::/64 peer $THROWAWAY remove",
			"peer KEY2 psk (none) endpoint 192.0.2.2:51820 allowed [10.244.2.0/24] keepalive off\n" + three},
		{"a node has a new key", func(c *wireguard.Config) { c.Peers[1].Key = key(9) },
			`wg set wgb peer KEY9 endpoint 192.0.2.3:51820 allowed-ips +10.244.3.0/24,+fd00:10:244:3::/64 # node3
wg set wgb peer KEY3 remove`, two + "\n" + strings.Replace(three, "KEY3", "KEY9", 1)},
		{"an endpoint moves", func(c *wireguard.Config) { c.Peers[0].Endpoint = netip.MustParseAddrPort("[2001:db8::2]:51820") },
			"wg set wgb peer KEY2 endpoint [2001:db8::2]:51820 # node2", strings.Replace(two, "192.0.2.2", "[2001:db8::2]", 1) + "\n" + three},
		{"keepalive, port, MTU", func(c *wireguard.Config) { c.Peers[0].Keepalive, c.ListenPort, c.MTU = 25*time.Second, 51821, 8920 },
			`wg set wgb listen-port 51821
ip link set wgb mtu 8920
wg set wgb peer KEY2 persistent-keepalive 25 # node2`, strings.Replace(two, "keepalive off", "keepalive 25", 1) + "\n" + three},
	} {
		t.Run(c.name, func(t *testing.T) {
			join(t)
			keys := strings.NewReplacer("KEY2", b64(2), "KEY3", b64(3), "KEY4", b64(4), "KEY9", b64(9))
			cfg := config()
			c.edit(&cfg)
			plan, err := d.Plan(cfg)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(keys.Replace(c.want), strings.Join(plan, "\n")); diff != "" {
				t.Errorf("-want +got:\n%s", diff)
			}
			apply(t, d, cfg)
			if diff := cmp.Diff(keys.Replace(c.shows), peersOf(shown(t, "wgb"))); diff != "" {
				t.Errorf("wg show: -want +got:\n%s", diff)
			}
			apply(t, d, config())
			if diff := cmp.Diff(first, shown(t, "wgb")); diff != "" {
				t.Errorf("and back: -want +got:\n%s", diff)
			}
		})
	}
}

// peersOf what shown says.
func peersOf(shown string) string {
	lines := strings.Split(shown, "\n")
	return strings.Join(slices.DeleteFunc(lines, func(l string) bool { return !strings.HasPrefix(l, "peer ") }), "\n")
}

// A session begins beside the one there is where the device can do that, and
// in its place when that is wished.
func TestSessionsBegin(t *testing.T) {
	testns.New(t)
	d, _ := device(t, "wgf")
	apply(t, d, config())
	beside := "wg set wgf peer KEY2 endpoint 192.0.2.2:51820 # node2"
	instead := "wg set wgf peer KEY2 remove peer KEY2 endpoint 192.0.2.2:51820 allowed-ips +10.244.2.0/24,+fd00:10:244:2::/64 # node2"
	if testns.Backend(t) == "kernel" {
		beside = instead
	}
	cfg := config()
	for _, c := range []struct {
		name        string
		fresh, anew int
		want        string
	}{
		{"begin", 1, 0, beside},
		{"the same", 1, 0, ""},
		{"in place of it", 2, 1, instead},
		{"as it is", wireguard.FreshAsIs, 2, ""},
		{"as it was", 2, 1, ""},
	} {
		cfg.Peers[0].Fresh, cfg.Peers[0].Anew = c.fresh, c.anew
		plan, err := d.Plan(cfg)
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(strings.ReplaceAll(c.want, "KEY2", b64(2)), strings.Join(plan, "\n")); diff != "" {
			t.Errorf("%s: -want +got:\n%s", c.name, diff)
		}
		apply(t, d, cfg)
	}
}

// From any mess to the wish.
func TestMess(t *testing.T) {
	testns.New(t)
	d, dir := device(t, "wgc")
	apply(t, d, config())
	wished := shown(t, "wgc")
	if err := os.WriteFile(filepath.Join(dir, "psk"), []byte(b64(77)+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	lines := []string{
		"wg set wgc peer KEY2 remove",
		"wg set wgc peer KEY3 allowed-ips 10.244.2.0/24",
		"wg set wgc peer KEY4 allowed-ips 10.244.2.0/25,10.244.3.0/24 endpoint 192.0.2.9:1",
		"wg set wgc peer KEY5 allowed-ips 0.0.0.0/0,::/0",
		"wg set wgc peer KEY2 allowed-ips 10.244.2.0/24,10.99.0.0/16",
		"wg set wgc peer KEY3 allowed-ips ''",
		"wg set wgc peer KEY3 endpoint 192.0.2.77:7777",
		"wg set wgc peer KEY2 preshared-key " + filepath.Join(dir, "psk"),
		"wg set wgc peer KEY2 persistent-keepalive 5",
		"wg set wgc listen-port 4444",
		"wg set wgc private-key " + filepath.Join(dir, "psk"),
		"wg set wgc fwmark 7",
		"ip link set wgc mtu 1300",
		"ip link set wgc down",
	}
	for seed := range uint64(8) {
		r := rand.New(rand.NewPCG(seed, 5))
		r.Shuffle(len(lines), func(i, j int) { lines[i], lines[j] = lines[j], lines[i] })
		for _, l := range lines[:2+r.IntN(len(lines)-2)] {
			l = strings.NewReplacer("KEY2", b64(2), "KEY3", b64(3), "KEY4", b64(4), "KEY5", b64(5)).Replace(l)
			testns.Sh(t, l)
		}
		// One that has no memory of what it wished before.
		other, err := wireguard.New(wireguard.Options{Name: "wgc", StateDir: dir})
		if err != nil {
			t.Fatal(err)
		}
		apply(t, other, config())
		if diff := cmp.Diff(wished, shown(t, "wgc")); diff != "" {
			t.Errorf("seed %d, after %q: -want +got:\n%s", seed, lines, diff)
		}
	}
}

// The device is deleted by hand, its process dies: another takes its place.
func TestComesBack(t *testing.T) {
	testns.New(t)
	d, _ := device(t, "wgd")
	apply(t, d, config())
	before := incarnation(t, "wgd")
	if testns.Backend(t) == "kernel" {
		testns.Sh(t, "ip link del wgd")
	} else {
		testns.Sh(t, "kill -9 $(cat "+wireguard.LockPath("wgd")+")")
	}
	deadline := time.Now().Add(10 * time.Second)
	for {
		if err := d.Apply(t.Context(), config()); err == nil && incarnation(t, "wgd") != before {
			break
		} else if time.Now().After(deadline) {
			t.Fatalf("still device %s: %v", before, err)
		}
	}
	apply(t, d, config())
}

// The link of a process that is killed is the next one's, with addresses and
// routes, as often as that happens, and whoever started the process; that it has
// ended is told. A link that is deleted is not held.
func TestLinkOutlivesProcess(t *testing.T) {
	testns.New(t)
	if testns.Backend(t) != "userspace" {
		t.Skip("this kernel has WireGuard")
	}
	dir, died := t.TempDir(), make(chan bool, 9)
	exe, _ := os.Executable()
	opts := wireguard.Options{Name: "wgh", StateDir: dir, LogDir: dir, SpawnUserspace: []string{exe, "wireguard"}, Died: func() { died <- true }}
	start := func() *wireguard.Device {
		d, err := wireguard.New(opts)
		if err != nil {
			t.Fatal(err)
		}
		apply(t, d, config())
		return d
	}
	kill := func() {
		testns.Sh(t, "kill -9 $(cat "+wireguard.LockPath("wgh")+")")
		<-died
	}
	look := func() string {
		return testns.Sh(t, "ip -o link show wgh | cut -d: -f1; ip -o address show wgh; ip route show dev wgh; ip -6 route show 2001:db8:9::/64")
	}
	d := start()
	t.Cleanup(func() { _ = testns.Exec("sh", "-c", "kill -9 $(cat "+wireguard.LockPath("wgh")+")") })
	testns.Sh(t, "ip address add 10.244.1.1/32 dev wgh; ip route add 10.244.2.0/24 dev wgh; ip -6 route add 2001:db8:9::/64 dev wgh")
	before := look()
	for range 2 {
		kill()
		if now := look(); now != before {
			t.Errorf("without a process the link is\n%s\nwas\n%s", now, before)
		}
		apply(t, d, config())
	}
	d.Close() // and somebody who did not start it
	d = start()
	defer func() { d.Close() }()
	kill()
	apply(t, d, config())
	if now := look(); now != before {
		t.Errorf("at last the link is\n%s\nwas\n%s", now, before)
	}
	testns.Sh(t, "ip link del wgh")
	<-died
	apply(t, d, config())
	if now := look(); strings.Contains(now, "10.244") {
		t.Errorf("made anew the link is\n%s", now)
	}
	kill()
	apply(t, d, config())
	if err := d.Remove(t.Context()); err != nil {
		t.Fatal(err)
	}
	if out, err := testns.Output("ip", "link", "show", "wgh"); err == nil {
		t.Errorf("removed, and yet: %s", out)
	}
}

// A device made by somebody else, of either kind, is taken as it is: a kernel
// that learns WireGuard with its next module does not cost a session.
func TestAdopts(t *testing.T) {
	testns.New(t)
	exe, _ := os.Executable()
	for _, c := range []struct{ backend, made string }{
		{"kernel", "ip link add wgg type wireguard"},
		{"userspace", exe + " wireguard wgg >/dev/null 2>&1 & until wg show wgg >/dev/null 2>&1; do sleep 0.01; done"},
	} {
		if c.backend == "kernel" && testns.Backend(t) != "kernel" {
			continue // there is none
		}
		testns.Sh(t, c.made+"\nwg set wgg listen-port 4444 peer "+b64(7)+" allowed-ips 10.244.2.0/24")
		first := incarnation(t, "wgg")
		d, err := wireguard.New(wireguard.Options{Name: "wgg", StateDir: t.TempDir()})
		if err != nil {
			t.Fatal(err)
		}
		apply(t, d, config())
		if _, backend, err := d.Stats(); err != nil || string(backend) != c.backend || incarnation(t, "wgg") != first {
			t.Errorf("a %s device: now it is %q, %v", c.backend, backend, err)
		}
		testns.Sh(t, "kill -9 $(cat "+wireguard.LockPath("wgg")+") 2>/dev/null || ip link del wgg\nwhile ip link show wgg; do sleep 0.01; done 2>/dev/null")
	}
}

// A process that stands still hangs nobody who asks for its device or tells it
// something; it goes on afterwards.
func TestProcessStandsStill(t *testing.T) {
	testns.New(t)
	if testns.Backend(t) != "userspace" {
		t.Skip("this kernel has WireGuard")
	}
	d, _ := device(t, "wgi")
	apply(t, d, config())
	process := "$(cat " + wireguard.LockPath("wgi") + ")"
	// Told to one thread, it takes a moment until all stand.
	testns.Sh(t, "kill -STOP "+process+"\nwhile grep -h ^State /proc/"+process+"/task/*/status | grep -qv 'T (stopped)'; do sleep 0.01; done")
	defer testns.Sh(t, "kill -CONT "+process)
	for range 2 {
		if _, _, err := d.Stats(); err == nil || !strings.Contains(err.Error(), "does not answer") {
			t.Errorf("asked: %v", err)
		}
		if err := d.Apply(t.Context(), config()); err == nil || !strings.Contains(err.Error(), "does not answer") {
			t.Errorf("told: %v", err)
		}
	}
	testns.Sh(t, "kill -CONT "+process)
	for deadline := time.Now().Add(10 * time.Second); ; {
		stats, _, err := d.Stats()
		if err == nil && len(stats) == 2 {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("it does not go on: %v, %v", stats, err)
		}
		time.Sleep(10 * time.Millisecond)
	}
}

// One process a device; without its socket it ends, and another one serves.
func TestUserspaceProcess(t *testing.T) {
	testns.New(t)
	if testns.Backend(t) != "userspace" {
		t.Skip("this kernel has WireGuard")
	}
	d, _ := device(t, "wgh")
	apply(t, d, config())
	exe, _ := os.Executable()
	if out, err := testns.Output(exe, "wireguard", "wgh"); err == nil || !strings.Contains(out, "another process serves it") {
		t.Errorf("a second process: %v\n%s", err, out)
	}
	testns.Sh(t, "rm /run/wireguard/wgh.sock")
	deadline := time.Now().Add(10 * time.Second)
	for {
		err := d.Apply(t.Context(), config())
		if err == nil {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("after the socket was deleted: %v", err)
		}
		time.Sleep(50 * time.Millisecond)
	}
}

// What is missing is said.
// A device that is removed leaves no process, not even a dead one.
func TestRemove(t *testing.T) {
	if testns.Backend(t) == "kernel" {
		t.Skip("the kernel's device has no process")
	}
	testns.New(t)
	d, _ := device(t, "wgr")
	apply(t, d, config())
	pid := strings.TrimSpace(testns.Sh(t, "cat "+wireguard.LockPath("wgr")))
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(5 * time.Millisecond) {
		if err := d.Remove(t.Context()); err != nil { // in each round
			t.Fatal(err)
		}
		stat, err := os.ReadFile("/proc/" + pid + "/stat")
		if err != nil {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("process %s is still there: %s", pid, stat)
		}
	}
	if plan, err := d.PlanRemove(); err != nil || len(plan) > 0 {
		t.Errorf("still to remove: %q, %v", plan, err)
	}
}

func TestWithoutAnyWireGuard(t *testing.T) {
	testns.New(t)
	if testns.Backend(t) == "kernel" {
		t.Skip("this kernel has WireGuard")
	}
	for name, opts := range map[string]wireguard.Options{
		"no command":      {},
		"somebody else's": {Served: true, SpawnUserspace: []string{"/nowhere", "wireguard"}},
	} {
		opts.Name, opts.StateDir = "wge", t.TempDir()
		d, err := wireguard.New(opts)
		if err != nil {
			t.Fatal(err)
		}
		err = d.Apply(t.Context(), config())
		if err == nil || !strings.Contains(err.Error(), "this kernel has no WireGuard, and nothing serves wge yet") {
			t.Errorf("%s: error %v", name, err)
		}
		if err := d.Second("wge-next").Apply(t.Context(), config()); name == "somebody else's" && (err == nil || !strings.Contains(err.Error(), "nothing serves wge, and so nobody wge-next")) {
			t.Errorf("the second device, without a first: error %v", err)
		}
	}
}

func TestKey(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "wireguard.key")
	open := func() *wireguard.Device {
		t.Helper()
		d, err := wireguard.New(wireguard.Options{Name: "wgf", StateDir: dir})
		if err != nil {
			t.Fatal(err)
		}
		return d
	}
	first := open()
	if info, err := os.Stat(path); err != nil || info.Mode() != 0o600 {
		t.Errorf("key file %v, %v; want mode 0600", info, err)
	}
	if again := open(); again.PublicKey() != first.PublicKey() || again.CorruptKey() != "" {
		t.Errorf("second start: key %s, want %s", again.PublicKey(), first.PublicKey())
	}
	if out, err := testns.Output("sh", "-c", "wg pubkey < "+path); err != nil || strings.TrimSpace(out) != first.PublicKey().String() {
		t.Errorf("wg pubkey says %q, %v; want %s", out, err, first.PublicKey())
	}
	for _, corrupt := range []string{"", "\x00\x00\x00\x00", "bm90IGEga2V5", strings.Repeat("A", 43) + "=", strings.Repeat("x", 5000)} {
		if err := os.WriteFile(path, []byte(corrupt), 0o600); err != nil {
			t.Fatal(err)
		}
		d := open()
		if d.PublicKey() == first.PublicKey() || d.CorruptKey() == "" {
			t.Errorf("%.20q: key %s, set aside as %q", corrupt, d.PublicKey(), d.CorruptKey())
		}
		if b, err := os.ReadFile(d.CorruptKey()); err != nil || !bytes.Equal(b, []byte(corrupt)) {
			t.Errorf("%.20q was set aside as %q, %v", corrupt, hex.EncodeToString(b), err)
		}
		os.Remove(d.CorruptKey())
	}
	left, _ := filepath.Glob(filepath.Join(dir, "*"))
	if len(left) != 1 {
		t.Errorf("files left: %q", left)
	}
}
