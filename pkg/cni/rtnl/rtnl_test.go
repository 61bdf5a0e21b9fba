package rtnl

import (
	"errors"
	"net/netip"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"meshd.dev/pkg/mesh"
)

// newHost puts the test into a network namespace of its own.
func newHost(t *testing.T) *Conn {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("needs root")
	}
	runtime.LockOSThread() // the thread ends with the test
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		t.Fatal(err)
	}
	c, err := Open()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

func veth(t *testing.T, name, peer string) VethAdd {
	t.Helper()
	here, err := os.Open("/proc/thread-self/ns/net")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { here.Close() })
	return VethAdd{Name: name, PeerName: peer, MAC: MAC{2, 0, 0, 0, 0, 1}, PeerMAC: MAC{2, 0, 0, 0, 0, 2}, MTU: 1400, PeerNetns: int(here.Fd())}
}

func TestWhatIsDoneIsRead(t *testing.T) {
	c := newHost(t)
	if err := c.Do(veth(t, "a", "b")); err != nil {
		t.Fatal(err)
	}
	b, err := c.Link("b")
	if err != nil {
		t.Fatal(err)
	}
	gw, all := netip.MustParseAddr("169.254.1.1"), netip.MustParsePrefix("0.0.0.0/0")
	err = c.Do(
		LinkSet{Name: "a", Up: true, Alias: "the one"}, LinkSet{Index: b.Index, Name: "b", Up: true, NoLinkLocal: true, StrictIPv4: true},
		AddrAdd{Prefix: netip.MustParsePrefix("10.0.0.2/32"), Index: b.Index, Name: "b"},
		AddrAdd{Prefix: netip.MustParsePrefix("fd00::2/128"), Index: b.Index, Name: "b"},
		NeighAdd{Addr: gw, MAC: MAC{2, 0, 0, 0, 0, 1}, Index: b.Index, Name: "b"},
		RouteAdd{Dst: all, Via: gw, Index: b.Index, Name: "b", Protocol: 3},
	)
	if err != nil {
		t.Fatal(err)
	}
	a, err := c.Link("a")
	if err != nil || a.Alias != "the one" || a.MTU != 1400 || a.Kind != "veth" || a.Peer != b.Index || !a.Up || a.MAC.String() != "02:00:00:00:00:01" {
		t.Errorf("link a: %+v, %v", a, err)
	}
	addrs, err := c.Addrs(b.Index)
	if err != nil || len(addrs) != 2 || addrs[0].String() != "10.0.0.2/32" || addrs[1].String() != "fd00::2/128" {
		t.Errorf("addresses %v, %v", addrs, err)
	}
	routes, err := c.Routes(b.Index)
	if err != nil || !slices.Contains(routes, Route{Dst: all, Via: gw, Index: b.Index, Protocol: 3}) {
		t.Errorf("routes %v, %v", routes, err)
	}
	neighs, err := c.Neighs(b.Index)
	if err != nil || !slices.Contains(neighs, Neigh{Addr: gw, MAC: MAC{2, 0, 0, 0, 0, 1}, Index: b.Index, Permanent: true}) {
		t.Errorf("neighbours %v, %v", neighs, err)
	}
	if err := c.Do(LinkDel{Name: "a"}); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Link("b"); !errors.Is(err, unix.ENODEV) {
		t.Errorf("the other end: %v", err)
	}
}

func TestErrorsSayWhatAndWhy(t *testing.T) {
	c := newHost(t)
	if err := c.Do(veth(t, "a", "b")); err != nil {
		t.Fatal(err)
	}
	err := c.Do(LinkSet{Name: "nobody", Up: true}, LinkSet{Name: "a", Up: true}, LinkDel{Name: "nobody"})
	if !errors.Is(err, unix.ENODEV) || !strings.HasPrefix(err.Error(), "ip link set dev nobody up: ") {
		t.Errorf("got %v, want the first op's error", err)
	}
	if a, err := c.Link("a"); err != nil || !a.Up {
		t.Errorf("the ops behind a refused one are done: %+v, %v", a, err)
	}
	a, _ := c.Link("a")
	err = c.Do(RouteAdd{Dst: netip.MustParsePrefix("10.0.0.0/8"), Via: netip.MustParseAddr("192.0.2.1"), Index: 4711, Name: "a"})
	if err == nil {
		t.Error("a route over a link that is not there was taken")
	}
	one := RouteAdd{Dst: netip.MustParsePrefix("10.0.0.5/32"), Index: a.Index, Name: "a", Protocol: 78}
	if err := c.Do(one); err != nil {
		t.Fatal(err)
	}
	if err := c.Do(one); !errors.Is(err, unix.EEXIST) || !strings.Contains(err.Error(), "ip route add 10.0.0.5/32 dev a proto 78 scope link") {
		t.Errorf("the same route twice: %v", err)
	}
}

func TestForgetConnections(t *testing.T) {
	newHost(t)
	for _, tool := range []string{"nft", "ip", "bash"} {
		if _, err := exec.LookPath(tool); err != nil {
			t.Skipf("needs %s", tool)
		}
	}
	for _, line := range []string{
		"ip link set lo up",
		"ip addr add 10.0.0.2/32 dev lo",
		"ip addr add 10.0.0.3/32 dev lo",
		"nft add table ip t",
		"nft add chain ip t c { type filter hook output priority 0 ; }",
		"nft add rule ip t c ct state new accept",
		"bash -c (echo>/dev/udp/10.0.0.3/9);true",
		"bash -c (echo>/dev/udp/10.0.0.2/9);true",
	} {
		args := strings.SplitN(line, " ", 2)
		rest := strings.Fields(args[1])
		if args[0] == "bash" {
			rest = strings.SplitN(args[1], " ", 2)
		}
		if out, err := exec.Command(args[0], rest...).CombinedOutput(); err != nil {
			t.Fatalf("%s: %v %s", line, err, out)
		}
	}
	before := connections(t)
	if !strings.Contains(before, "10.0.0.2") || !strings.Contains(before, "10.0.0.3") {
		t.Fatalf("no connections to forget: %q", before)
	}
	nf, err := OpenNetfilter()
	if err != nil {
		t.Fatal(err)
	}
	defer nf.Close()
	if err := nf.ForgetConnections([]netip.Addr{netip.MustParseAddr("10.0.0.2"), netip.MustParseAddr("fd00::2")}); err != nil {
		t.Fatal(err)
	}
	if after := connections(t); strings.Contains(after, "10.0.0.2") || !strings.Contains(after, "10.0.0.3") {
		t.Errorf("before:\n%s\nafter:\n%s", before, after)
	}
}

func connections(t *testing.T) string {
	t.Helper()
	b, err := os.ReadFile("/proc/thread-self/net/nf_conntrack")
	if err != nil {
		t.Skip("needs /proc/net/nf_conntrack")
	}
	return string(b)
}

// A transaction that the kernel refuses before its first change (no rights, no
// nf_tables) is answered for its beginning alone.
func TestARefusedTransactionIsAnError(t *testing.T) {
	newHost(t)
	nf, err := OpenNetfilter()
	if err != nil {
		t.Fatal(err)
	}
	defer nf.Close()
	var nothing [2]unix.CapUserData
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	if err := unix.Capset(&header, &nothing[0]); err != nil { // of this thread, which ends with the test
		t.Fatal(err)
	}
	// Else a missing answer would be waited for for ever.
	if err := unix.SetsockoptTimeval(nf.conn.fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: 5}); err != nil {
		t.Fatal(err)
	}
	err = nf.Do(ElementAdd{Table: "t", SetElement: mesh.SetElement{Set: "s", Key: "aaaa"}})
	if !errors.Is(err, unix.EPERM) {
		t.Errorf("without rights: %v, want EPERM", err)
	}
}
