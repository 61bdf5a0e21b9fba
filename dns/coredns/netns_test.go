package coredns

import (
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/miekg/dns"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"meshd.dev/pkg/status"
)

// The plan, in a network namespace of its own: mesh0 (a bridge, as good as any
// device) has 10.244.7.1 and fd00:10:244:7::1, later 10.244.8.1; the upstream
// listens on 10.53.0.1, on lo.

// inNamespace runs the rest of a test in a process with a network of its own.
// It returns false in the process that only waits for that one.
func inNamespace(t *testing.T) bool {
	t.Helper()
	if os.Getenv("MESHD_TEST_NETNS") == t.Name() {
		lo, err := netlink.LinkByName("lo")
		must(t, err)
		must(t, netlink.LinkSetUp(lo))
		return true
	}
	if os.Getuid() != 0 {
		t.Skip("needs root")
	}
	if _, err := exec.LookPath("unshare"); err != nil {
		t.Skip("needs unshare")
	}
	cmd := exec.Command("unshare", "-n", os.Args[0], "-test.run=^"+t.Name()+"$", "-test.v")
	cmd.Env = append(os.Environ(), "MESHD_TEST_NETNS="+t.Name())
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	return false
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func addMesh0(t *testing.T, addrs ...string) netlink.Link {
	t.Helper()
	attrs := netlink.NewLinkAttrs()
	attrs.Name = "mesh0"
	must(t, netlink.LinkAdd(&netlink.Bridge{LinkAttrs: attrs}))
	link, err := netlink.LinkByName("mesh0")
	must(t, err)
	must(t, netlink.LinkSetUp(link))
	for _, a := range addrs {
		addAddr(t, link, a)
	}
	return link
}

func addAddr(t *testing.T, link netlink.Link, prefix string) {
	t.Helper()
	a, err := netlink.ParseAddr(prefix)
	must(t, err)
	a.Flags = unix.IFA_F_NODAD
	must(t, netlink.AddrAdd(link, a))
}

func TestAddressesComeAndGo(t *testing.T) {
	if !inNamespace(t) {
		return
	}
	four, six, other := addr("10.244.7.1"), addr("fd00:10:244:7::1"), addr("10.244.8.1")
	s := start(t, Config{Port: 53, Listen: []netip.Addr{four, six}, ResolvConf: []string{filepath.Join(t.TempDir(), "none")}})
	answers := func(step string, addrs ...netip.Addr) {
		t.Helper()
		for _, a := range addrs {
			for _, network := range []string{"udp", "tcp"} {
				m := new(dns.Msg)
				m.SetQuestion("web.shop.svc.cluster.local.", dns.TypeA)
				// The kernel drops what comes for an IPv6 address it was only
				// just given; resolvers ask again, and so does this.
				var r *dns.Msg
				var err error
				for range 20 {
					c := &dns.Client{Net: network, Timeout: time.Second}
					if r, _, err = c.Exchange(m, s.at(a)); err == nil {
						break
					}
				}
				if err != nil || len(r.Answer) != 1 {
					t.Errorf("%s: %s over %s: %v %v", step, a, network, r, err)
				}
			}
		}
	}
	link := addMesh0(t, "10.244.7.1/32", "fd00:10:244:7::1/128")
	answers("device made after the server", four, six)
	must(t, netlink.LinkDel(link))
	link = addMesh0(t, "10.244.7.1/32", "fd00:10:244:7::1/128")
	answers("device made anew", four, six)

	addAddr(t, link, "10.244.8.1/32")
	s.SetListen([]netip.Addr{six, other})
	waitUntil(t, func() bool { return canConnect(s.at(other)) && !canConnect(s.at(four)) })
	answers("another pod CIDR", six, other)
}

func canConnect(at string) bool {
	c, err := net.Dial("tcp", at)
	if err != nil {
		return false
	}
	c.Close()
	return true
}

func TestPortInUseIsReportedUntilItIsFree(t *testing.T) {
	if !inNamespace(t) {
		return
	}
	other, err := net.ListenPacket("udp", "127.0.0.1:53")
	must(t, err)
	board := &status.Board{}
	s := start(t, Config{Port: 53, Board: board, ResolvConf: []string{filepath.Join(t.TempDir(), "none")}})
	s.SetListen([]netip.Addr{addr("127.0.0.1")})
	waitUntil(t, func() bool {
		s.loop.Kick()
		for _, c := range board.Checks() {
			if c.Name == checkListening && c.Reason == "answer dns on 127.0.0.1:53: listen udp 127.0.0.1:53: bind: address already in use" {
				return c.Next != ""
			}
		}
		return false
	})
	other.Close()
	s.loop.Kick()
	waitFor(t, board, checkListening, true)
	if m := ask(t, s, "udp", "web.shop.svc.cluster.local.", dns.TypeA); len(m.Answer) != 1 {
		t.Error(m)
	}
}

func TestUpstreamsFollowResolvConf(t *testing.T) {
	if !inNamespace(t) {
		return
	}
	lo, err := netlink.LinkByName("lo")
	must(t, err)
	addAddr(t, lo, "10.53.0.1/32")
	serveUpstream(t, "10.53.0.1:53")
	board := &status.Board{}
	dir := t.TempDir()
	first, second := filepath.Join(dir, "resolved.conf"), filepath.Join(dir, "resolv.conf")
	s := start(t, Config{Port: 53, Board: board, Listen: []netip.Addr{addr("127.0.0.1")}, ResolvConf: []string{first, second}})
	foreign := func() string { return summary(ask(t, s, "udp", "www.example.com.", dns.TypeA)) }
	write := func(path, text string) {
		t.Helper()
		must(t, os.WriteFile(path, []byte(text), 0o644))
		s.loop.Kick()
	}

	if got := foreign(); got != "SERVFAIL" {
		t.Errorf("no file: %s", got)
	}
	waitFor(t, board, checkUpstream, false)
	write(second, "search example.org\nnameserver 127.0.0.1 # ourselves\nnameserver 10.53.0.1\noptions ndots:2\n")
	waitFor(t, board, checkUpstream, true)
	if got := foreign(); got != "NOERROR 192.0.2.80" {
		t.Errorf("second file: %s", got)
	}
	write(first, "nameserver 127.0.0.1\n")
	write(second, "nameserver 127.0.0.1\n")
	if c := waitFor(t, board, checkUpstream, false); c.Next == "" {
		t.Errorf("no next step: %+v", c)
	}
	if got := foreign(); got != "SERVFAIL" {
		t.Errorf("only ourselves: %s", got)
	}
	if got := summary(ask(t, s, "udp", "web.shop.svc.cluster.local.", dns.TypeA)); got != "NOERROR 10.96.0.20" {
		t.Errorf("name of the cluster without upstream: %s", got)
	}
	write(first, "nameserver 10.53.0.1\n")
	waitFor(t, board, checkUpstream, true)
	if got := foreign(); got != "NOERROR 192.0.2.80" {
		t.Errorf("first file: %s", got)
	}
}
