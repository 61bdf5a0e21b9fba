package cni

import (
	"context"
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/containernetworking/cni/pkg/types"
	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
)

func TestAddMakesARoutedPod(t *testing.T) {
	l := newLab(t)
	pod := l.newPod()
	r := rt("web", pod)
	result := l.mustAdd(r)

	if got, want := addresses(result), "10.244.1.2/32 fd00:10:244:1::2/128"; got != want {
		t.Errorf("addresses %s, want %s", got, want)
	}
	link := HostLink("web", "eth0")
	mac := result.Interfaces[1].Mac
	for _, c := range []struct {
		name string
		got  []string
		want []string
	}{
		{"host routes", lines(t, "ip", "route", "show"), []string{"10.244.1.2 dev " + link + " proto 78 scope link"}},
		{"host routes 6", lines(t, "ip", "-6", "route", "show"), []string{
			"fd00:10:244:1::2 dev " + link + " proto 78 metric 1024 pref medium"}},
		{"host neighbours", lines(t, "ip", "neigh", "show", "nud", "permanent"), []string{
			"10.244.1.2 dev " + link + " lladdr " + mac + " PERMANENT",
			"fd00:10:244:1::2 dev " + link + " lladdr " + mac + " PERMANENT"}},
		{"host addresses", lines(t, "ip", "-br", "addr", "show", "dev", link), []string{link + "@if2 UP"}},
		{"pod routes", lines(t, "nsenter", inPod(pod, "ip", "route", "show")...), []string{"default via 169.254.1.1 dev eth0 onlink"}},
		{"pod routes 6", lines(t, "nsenter", inPod(pod, "ip", "-6", "route", "show", "proto", "boot")...), []string{
			"default via fe80::1 dev eth0 metric 1024 onlink pref medium"}},
		{"pod neighbours", lines(t, "nsenter", inPod(pod, "ip", "neigh", "show")...), []string{
			"169.254.1.1 dev eth0 lladdr 0a:6d:65:73:68:01 PERMANENT",
			"fe80::1 dev eth0 lladdr 0a:6d:65:73:68:01 PERMANENT"}},
	} {
		if diff := cmp.Diff(c.want, c.got); diff != "" {
			t.Errorf("%s (-want +got):\n%s", c.name, diff)
		}
	}
	if got := run(t, "nsenter", inPod(pod, "ip", "-br", "addr", "show", "dev", "eth0")...); strings.Contains(got, "tentative") ||
		!strings.Contains(got, "10.244.1.2/32") || !strings.Contains(got, "fd00:10:244:1::2/128") || !strings.Contains(got, "fe80::") {
		t.Errorf("pod addresses: %s", got)
	}
	for key, want := range map[string]string{
		"ipv6/conf/" + link + "/accept_ra": "0", "ipv6/conf/" + link + "/accept_redirects": "0",
		"ipv4/conf/" + link + "/accept_redirects": "0", "ipv4/conf/" + link + "/send_redirects": "0", "ipv4/conf/" + link + "/rp_filter": "1", "ipv4/conf/" + link + "/proxy_arp": "0",
	} {
		if got, err := os.ReadFile("/proc/sys/net/" + key); err != nil || strings.TrimSpace(string(got)) != want {
			t.Errorf("%s = %s, %v; want %s", key, got, err, want)
		}
	}
	if err := l.check(r); err != nil {
		t.Errorf("CHECK right after ADD: %v", err)
	}
	l.mustDel(r)
	removePod(pod)
	l.mustDel(r)
	l.applyFirewall() // the daemon, woken by the record's going
	l.wantClean()
}

func TestPodsReachEachOther(t *testing.T) {
	l := newLab(t)
	needRoot(t, "ping")
	a, b := l.newPod(), l.newPod()
	l.mustAdd(rt("a", a))
	l.mustAdd(rt("b", b))
	for _, dst := range []string{"10.244.1.3", "fd00:10:244:1::3"} {
		run(t, "nsenter", inPod(a, "ping", "-c", "1", "-W", "2", dst)...)
	}
}

func TestOneFamily(t *testing.T) {
	for _, c := range []struct{ cidr, want string }{
		{"10.244.1.0/24", "10.244.1.2/32"},
		{"fd00:10:244:1::/64", "fd00:10:244:1::2/128"},
	} {
		t.Run(c.want, func(t *testing.T) {
			l := newLab(t, func(n *Network) { n.PodCIDRs = []netip.Prefix{netip.MustParsePrefix(c.cidr)} })
			r := rt("web", l.newPod())
			if got := addresses(l.mustAdd(r)); got != c.want {
				t.Errorf("addresses %s, want %s", got, c.want)
			}
			if err := l.check(r); err != nil {
				t.Error(err)
			}
		})
	}
}

func TestResultsOfEveryVersion(t *testing.T) {
	l := newLab(t)
	for version, want := range map[string]string{
		"0.3.1": `"version":"4"`,
		"0.4.0": `"version":"4"`,
		"1.0.0": `{"address":"10.244.1.2/32","gateway":"169.254.1.1","interface":1}`,
		"1.1.0": `"mtu":1420`,
	} {
		l.run(version, func(t *testing.T) {
			pod := l.newPod()
			out, err := l.verbEnv(verbEnv("ADD", "web", pod), l.stdin(version, map[string]any{"quarantineSeconds": 0}))
			if err != nil {
				t.Fatal(err)
			}
			defer l.verb("DEL", "web", pod, nil)
			got := compact(t, out)
			if !strings.Contains(got, want) && version != "1.0.0" || !strings.Contains(got, `"cniVersion":"`+version+`"`) {
				t.Errorf("result %s, want it to have %s", got, want)
			}
			if version != "1.1.0" && strings.Contains(got, `"mtu"`) {
				t.Errorf("result of %s has an mtu: %s", version, got)
			}
		})
	}
	out, code := l.raw([]string{"CNI_COMMAND=VERSION"}, `{"cniVersion":"1.1.0"}`)
	if want := `"supportedVersions":["0.3.1","0.4.0","1.0.0","1.1.0"]`; code != 0 || !strings.Contains(compact(t, out), want) {
		t.Errorf("VERSION: %s", out)
	}
}

func compact(t *testing.T, s string) string {
	t.Helper()
	var v any
	if err := json.Unmarshal([]byte(s), &v); err != nil {
		t.Fatalf("%q: %v", s, err)
	}
	b, _ := json.Marshal(v)
	return string(b)
}

func TestErrorsHaveTheSpecificationsCodes(t *testing.T) {
	l := newLab(t)
	pod := l.newPod()
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	l.mustAdd(rt("first", l.newPod()))
	own := fmt.Sprintf("/proc/%d/task/%d/ns/net", os.Getpid(), unix.Gettid())
	for _, c := range []struct {
		name    string
		env     []string
		version string
		conf    map[string]any
		code    uint
		word    string
	}{
		{"old version", verbEnv("ADD", "x", pod), "0.2.0", nil, types.ErrIncompatibleCNIVersion, "version"},
		{"no namespace", verbEnv("ADD", "x", "/nonexistent/ns"), "1.1.0", nil, types.ErrUnknownContainer, "/nonexistent/ns"},
		{"not a namespace", verbEnv("ADD", "x", file), "1.1.0", nil, types.ErrInvalidEnvironmentVariables, "CNI_NETNS"},
		{"the host's namespace", verbEnv("ADD", "x", own), "1.1.0", nil, types.ErrInvalidEnvironmentVariables, "CNI_NETNS"},
		{"bad container", verbEnv("ADD", "../x", pod), "1.1.0", nil, types.ErrInvalidEnvironmentVariables, "CNI_CONTAINERID"},
		{"long container", verbEnv("ADD", strings.Repeat("x", 129), pod), "1.1.0", nil, types.ErrInvalidEnvironmentVariables, "128"},
		{"no verb's variables", []string{"CNI_COMMAND=ADD"}, "1.1.0", nil, types.ErrInvalidEnvironmentVariables, "CNI_NETNS"},
		{"bad args", append(verbEnv("ADD", "x", pod), "CNI_ARGS=nonsense"), "1.1.0", nil, types.ErrInvalidEnvironmentVariables, "CNI_ARGS"},
		{"unknown args", append(verbEnv("ADD", "x", pod), "CNI_ARGS=FOO=1"), "1.1.0", nil, types.ErrInvalidEnvironmentVariables, "FOO"},
		{"no ranges", verbEnv("ADD", "x", pod), "1.1.0", map[string]any{"ranges": []string{}}, types.ErrInvalidNetworkConfig, "ranges"},
		{"bad range", verbEnv("ADD", "x", pod), "1.1.0", map[string]any{"ranges": []string{"10.0.0.1/8"}}, types.ErrInvalidNetworkConfig, "10.0.0.0/8"},
		{"tiny range", verbEnv("ADD", "x", pod), "1.1.0", map[string]any{"ranges": []string{"10.0.0.0/31"}}, types.ErrInvalidNetworkConfig, "/30"},
		{"ranges of a wrong type", verbEnv("ADD", "x", pod), "1.1.0", map[string]any{"ranges": 7}, types.ErrDecodingFailure, "ranges"},
		{"small mtu", verbEnv("ADD", "x", pod), "1.1.0", map[string]any{"mtu": 1279}, types.ErrInvalidNetworkConfig, "1280"},
		{"relative folder", verbEnv("ADD", "x", pod), "1.1.0", map[string]any{"dataDir": "x"}, types.ErrInvalidNetworkConfig, "absolute"},
		{"foreign address", verbEnv("ADD", "x", pod), "1.1.0", runtimeIPs("192.0.2.1"), types.ErrInvalidNetworkConfig, "none of the ranges"},
		{"the node's address", verbEnv("ADD", "x", pod), "1.1.0", runtimeIPs("10.244.1.1"), types.ErrInvalidNetworkConfig, "reserved"},
		{"taken address", verbEnv("ADD", "x", pod), "1.1.0", runtimeIPs("10.244.1.2/24"), CodeAddressTaken, "container first"},
		{"not an address", verbEnv("ADD", "x", pod), "1.1.0", runtimeIPs("ten"), types.ErrInvalidNetworkConfig, "ten"},
		{"bad mac", verbEnv("ADD", "x", pod), "1.1.0", map[string]any{"runtimeConfig": map[string]any{"mac": "01:00:00:00:00:01"}}, types.ErrInvalidNetworkConfig, "mac"},
		{"CHECK of 0.3.1", verbEnv("CHECK", "x", pod), "0.3.1", nil, types.ErrIncompatibleCNIVersion, "CHECK"},
		{"CHECK without ADD", verbEnv("CHECK", "x", pod), "1.1.0", nil, types.ErrUnknownContainer, "no record"},
		{"GC of 1.0.0", verbEnv("GC", "x", pod), "1.0.0", nil, types.ErrIncompatibleCNIVersion, "GC"},
		{"unknown verb", verbEnv("FLY", "x", pod), "1.1.0", nil, types.ErrInvalidEnvironmentVariables, "FLY"},
		{"folder is a file", verbEnv("ADD", "x", pod), "1.1.0", map[string]any{"dataDir": file}, types.ErrIOFailure, "not a directory"},
	} {
		l.run(c.name, func(t *testing.T) {
			out, err := l.verbEnv(c.env, l.stdin(c.version, c.conf))
			wantCode(t, err, c.code, c.word)
			if !strings.Contains(out, `"cniVersion"`) {
				t.Errorf("error without cniVersion: %s", out)
			}
		})
	}
	if _, err := l.verbEnv(verbEnv("ADD", "x", pod), "{"); err == nil {
		t.Error("ADD took half a configuration")
	} else {
		wantCode(t, err, types.ErrDecodingFailure, "")
	}
	if got := append(l.links(), l.records()...); len(got) != 2 {
		t.Errorf("an ADD that was refused left something: %v", got)
	}
}

func runtimeIPs(ips ...string) map[string]any {
	return map[string]any{"runtimeConfig": map[string]any{"ips": ips}}
}

func TestAskedAddressAndMAC(t *testing.T) {
	l := newLab(t)
	r := rt("web", l.newPod())
	r.CapabilityArgs = map[string]any{"ips": []string{"10.244.1.77/24"}, "mac": "0e:00:00:00:00:77"}
	result := l.mustAdd(r)
	if got, want := addresses(result), "10.244.1.77/32 fd00:10:244:1::2/128"; got != want {
		t.Errorf("addresses %s, want %s", got, want)
	}
	if got := result.Interfaces[1].Mac; got != "0e:00:00:00:00:77" {
		t.Errorf("mac %s", got)
	}
	if err := l.check(r); err != nil {
		t.Error(err)
	}
	l.mustDel(r)
	other := l.newPod()
	_, err := l.verb("ADD", "tenant", other, map[string]any{"runtimeConfig": map[string]any{
		"io.kubernetes.cri.pod-annotations": map[string]string{"meshd.dev/ips": "10.244.1.77"}}})
	wantCode(t, err, types.ErrTryAgainLater, "can be used again in")
	out, err := l.verbEnv(append(verbEnv("ADD", "again", other), "CNI_ARGS=IP=10.244.1.77"), l.stdin("1.1.0", nil))
	if err != nil || !strings.Contains(out, "10.244.1.77/32") {
		t.Errorf("a fixed address was not given again at once: %v %s", err, out)
	}
}

func TestDelOfAnythingIsSuccess(t *testing.T) {
	l := newLab(t)
	del := func(name, id, netns string, conf map[string]any) {
		t.Helper()
		if out, err := l.verb("DEL", id, netns, conf); err != nil || out != "" {
			t.Errorf("DEL %s: %v %s", name, err, out)
		}
	}
	pod := l.newPod()
	del("before anything", "web", pod, nil)
	l.mustAdd(rt("web", pod))
	del("once", "web", pod, nil)
	if got := append(l.records(), lines(t, "ip", "route")...); len(got) != 0 {
		t.Errorf("after DEL: %v", got)
	}
	del("twice", "web", pod, nil)
	l.mustAdd(rt("web", pod)) // in the same namespace, where the old link still is
	del("without a namespace", "web", "", nil)
	l.wantClean()
	l.mustAdd(rt("web", pod))
	removePod(pod)
	del("with the namespace deleted first", "web", pod, nil)
	l.wantClean()
	gone := l.newPod()
	l.mustAdd(rt("web", gone))
	del("with a configuration gone bad", "web", "", map[string]any{"ranges": []string{"nonsense"}, "mtu": 1})
	l.wantClean()
	if err := os.RemoveAll(l.dataDir); err != nil {
		t.Fatal(err)
	}
	del("without the folder", "web", pod, nil)
}

func TestADelayedUnlinkIsNeverInTheWay(t *testing.T) {
	l := newLab(t)
	pod := l.newPod()
	l.mustAdd(rt("one", pod))
	l.mustDel(rt("one", pod))
	if got := l.links(); len(got) != 1 {
		t.Fatalf("links after DEL: %v, want the one that dies with the namespace", got)
	}
	if got := run(t, "ip", "-br", "link", "show", "dev", l.links()[0]); !strings.Contains(got, "DOWN") {
		t.Errorf("the link is not down: %s", got)
	}
	l.mustAdd(rt("two", pod))
	if got, want := l.links(), []string{HostLink("two", "eth0")}; !slices.Equal(got, want) {
		t.Errorf("links %v, want %v", got, want)
	}
	if err := l.check(rt("two", pod)); err != nil {
		t.Error(err)
	}
}

func TestAddTwice(t *testing.T) {
	l := newLab(t)
	pod := l.newPod()
	first := l.mustAdd(rt("web", pod))
	_, err := l.verb("ADD", "web", pod, nil)
	wantCode(t, err, CodeAttached, "DEL first")
	if err := l.check(rt("web", pod)); err != nil {
		t.Errorf("the second ADD hurt the first: %v", err)
	}
	// An ADD that died half way is done again.
	run(t, "ip", "link", "del", HostLink("web", "eth0"))
	again := l.mustAdd(rt("web", pod))
	if addresses(first) != addresses(again) || len(l.records()) != 1 {
		t.Errorf("after a broken ADD: %s, records %v", addresses(again), l.records())
	}
	// Another container cannot have the interface's name.
	_, err = l.verb("ADD", "other", pod, nil)
	wantCode(t, err, CodeAttached, "exists")
	if len(l.records()) != 1 || len(l.links()) != 1 {
		t.Errorf("records %v, links %v; want one of each", l.records(), l.links())
	}
}

func TestTwoInterfaces(t *testing.T) {
	l := newLab(t)
	pod := l.newPod()
	eth0, net1 := rt("web", pod), rt("web", pod)
	net1.IfName = "net1"
	l.mustAdd(eth0)
	second := l.mustAdd(net1)
	if len(second.Routes) != 0 {
		t.Errorf("the second interface took the default route: %v", second.Routes)
	}
	for _, r := range []struct {
		name string
		err  error
	}{{"eth0", l.check(eth0)}, {"net1", l.check(net1)}} {
		if r.err != nil {
			t.Errorf("CHECK %s: %v", r.name, r.err)
		}
	}
	l.mustDel(net1)
	if err := l.check(eth0); err != nil {
		t.Errorf("DEL of net1 hurt eth0: %v", err)
	}
}

func TestCheckSaysWhichPieceIsWrong(t *testing.T) {
	link := HostLink("web", "eth0")
	for _, c := range []struct {
		name   string
		break_ []string // run on the host, or in the pod after "pod"
		want   string
	}{
		{"host route", []string{"ip", "route", "del", "10.244.1.2"}, "route 10.244.1.2/32 dev " + link + " proto 78 (on the host)"},
		{"host route 6", []string{"ip", "-6", "route", "del", "fd00:10:244:1::2"}, "route fd00:10:244:1::2/128"},
		{"host neighbour", []string{"ip", "neigh", "del", "10.244.1.2", "dev", link}, "neigh 10.244.1.2"},
		{"host link down", []string{"ip", "link", "set", link, "down"}, "link " + link + " up (on the host; it is down)"},
		{"host link gone", []string{"ip", "link", "del", link}, "link eth0 up (in the pod)"},
		{"mtu", []string{"pod", "ip", "link", "set", "eth0", "mtu", "1300"}, "link eth0 mtu 1420 (in the pod; it is 1300)"},
		{"mac", []string{"pod", "ip", "link", "set", "eth0", "address", "0e:00:00:00:00:01"}, "link eth0 address"},
		{"address", []string{"pod", "ip", "addr", "del", "10.244.1.2/32", "dev", "eth0"}, "addr 10.244.1.2/32 dev eth0 (in the pod)"},
		{"default route", []string{"pod", "ip", "route", "del", "default"}, "route 0.0.0.0/0 via 169.254.1.1"},
		{"loopback", []string{"pod", "ip", "link", "set", "lo", "down"}, "link lo up (in the pod; it is down)"},
		{"link-local address", []string{"pod", "ip", "-6", "addr", "flush", "dev", "eth0", "scope", "link"}, "addr fe80::"},
		{"limit to the pod", []string{"tc", "qdisc", "replace", "dev", link, "root", "tbf", "rate", "8mbit", "burst", "3000b", "limit", "9999b"}, "qdisc tbf dev " + link + " limit 125000b (on the host; it is 9999b)"},
		{"limit from the pod", []string{"pod", "tc", "qdisc", "del", "dev", "eth0", "root"}, "qdisc tbf dev eth0 rate 8000000bit"},
		{"pod neighbour", []string{"pod", "ip", "neigh", "del", "fe80::1", "dev", "eth0"}, "neigh fe80::1"},
	} {
		t.Run(c.name, func(t *testing.T) {
			l := newLab(t)
			pod := l.newPod()
			r := rt("web", pod)
			r.CapabilityArgs = everything(8000)
			l.mustAdd(r)
			if c.break_[0] == "pod" {
				run(t, "nsenter", inPod(pod, c.break_[1:]...)...)
			} else {
				run(t, c.break_[0], c.break_[1:]...)
			}
			wantCode(t, l.check(r), CodeDrift, c.want)
		})
	}
}

func TestChained(t *testing.T) {
	l := newLab(t)
	pod := l.newPod()
	prev := map[string]any{"prevResult": map[string]any{
		"cniVersion": "1.1.0",
		"interfaces": []any{map[string]any{"name": "net7", "sandbox": pod}},
		"ips":        []any{map[string]any{"address": "192.0.2.7/24", "interface": 0}},
		"dns":        map[string]any{"nameservers": []string{"192.0.2.53"}},
	}}
	out, err := l.verb("ADD", "web", pod, prev)
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{`"name":"net7"`, `{"address":"192.0.2.7/24","interface":0}`,
		`{"address":"10.244.1.2/32","gateway":"169.254.1.1","interface":2}`, `"nameservers":["192.0.2.53"]`} {
		if !strings.Contains(compact(t, out), want) {
			t.Errorf("result %s, want it to have %s", out, want)
		}
	}
	var result map[string]any
	if err := json.Unmarshal([]byte(out), &result); err != nil {
		t.Fatal(err)
	}
	if _, err := l.verb("CHECK", "web", pod, map[string]any{"prevResult": result}); err != nil {
		t.Errorf("CHECK with the chain's result: %v", err)
	}
	if _, err := l.verb("DEL", "web", pod, map[string]any{"prevResult": result}); err != nil {
		t.Errorf("DEL with the chain's result: %v", err)
	}
}

func TestGC(t *testing.T) {
	l := newLab(t)
	keep, lose := l.newPod(), l.newPod()
	l.mustAdd(rt("keep", keep))
	l.mustAdd(rt("lose", lose))
	left := l.newPod()
	l.mustAdd(rt("left", left))
	l.mustDel(rt("left", left))                                                        // its link waits for its namespace
	for _, key := range []string{"cni.dev/valid-attachments", "cni.dev/attachments"} { // the second in texts before 1.1.0 was final
		valid := map[string]any{key: []types.GCAttachment{{ContainerID: "keep", IfName: "eth0"}}}
		if _, err := l.verb("GC", "", "", valid); err != nil {
			t.Fatal(err)
		}
		if got, want := l.links(), []string{HostLink("keep", "eth0")}; !slices.Equal(got, want) {
			t.Errorf("links %v, want %v", got, want)
		}
		if got := l.records(); len(got) != 1 || !strings.HasSuffix(got[0], ",keep") {
			t.Errorf("records %v", got)
		}
	}
	if err := l.check(rt("keep", keep)); err != nil {
		t.Errorf("GC hurt a valid attachment: %v", err)
	}
	_, err := l.verb("GC", "", "", map[string]any{"cni.dev/valid-attachments": "keep"})
	wantCode(t, err, types.ErrDecodingFailure, "valid-attachments")
	if got := l.records(); len(got) != 1 {
		t.Errorf("records %v after a GC with a list that is none", got)
	}
	if err := l.cni.GCNetworkList(context.Background(), l.list, nil); err != nil {
		t.Errorf("GC of libcni: %v", err)
	}
	l.wantClean()
}

func TestStatus(t *testing.T) {
	ready := filepath.Join(t.TempDir(), "ready")
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	l := newLab(t)
	for _, c := range []struct {
		name   string
		conf   map[string]any
		before func() error
		want   string // "" is ready
	}{
		{"conflist alone", nil, nil, ""},
		{"no ranges", map[string]any{"ranges": nil}, nil, "ranges"},
		{"folder cannot be made", map[string]any{"dataDir": file}, nil, "not a directory"},
		{"daemon silent", map[string]any{"readyFile": ready}, nil, "is it running?"},
		{"daemon not ready", map[string]any{"readyFile": ready}, func() error { return os.WriteFile(ready, []byte("no peer answers\n"), 0o600) }, "no peer answers"},
		{"the daemon explains", map[string]any{"readyFile": ready + "-not", "reasonFile": ready}, nil, "Z: no peer answers"},
		{"daemon ready", map[string]any{"readyFile": ready}, func() error { return os.WriteFile(ready, []byte("ready\n"), 0o600) }, ""},
		{"what the daemon says decides nothing", map[string]any{"reasonFile": ready}, nil, ""},
	} {
		l.run(c.name, func(t *testing.T) {
			if c.before != nil {
				if err := c.before(); err != nil {
					t.Fatal(err)
				}
			}
			_, err := l.verb("STATUS", "", "", c.conf)
			if c.want == "" {
				if err != nil {
					t.Error(err)
				}
				return
			}
			wantCode(t, err, types.ErrPluginNotAvailable, c.want)
		})
	}
	if err := l.cni.GetStatusNetworkList(context.Background(), l.list); err != nil {
		t.Errorf("STATUS of libcni: %v", err)
	}
}

func TestExhaustionAndQuarantine(t *testing.T) {
	l := newLab(t)
	// .2 and .3 are for pods: .0 is the network, .1 the node, .6 reserved …
	conf := map[string]any{"ranges": []string{"10.244.1.0/29"}, "reserved": []string{"10.244.1.4", "10.244.1.5", "10.244.1.6"}}
	a, b, c := l.newPod(), l.newPod(), l.newPod()
	for id, pod := range map[string]string{"a": a, "b": b} {
		if _, err := l.verb("ADD", id, pod, conf); err != nil {
			t.Fatal(err)
		}
	}
	_, err := l.verb("ADD", "c", c, conf)
	wantCode(t, err, CodeExhausted, "no free address")
	_, err = l.verb("STATUS", "", "", conf)
	wantCode(t, err, types.ErrPluginNotAvailable, "no free address")
	if _, err := l.verb("DEL", "a", a, conf); err != nil {
		t.Fatal(err)
	}
	_, err = l.verb("ADD", "c", c, conf)
	wantCode(t, err, types.ErrTryAgainLater, "can be used again in")
	conf["quarantineSeconds"] = 0
	if _, err = l.verb("ADD", "c", c, conf); err != nil {
		t.Error(err)
	}
	if len(l.records()) != 2 {
		t.Errorf("records %v, want two", l.records())
	}
}

// inHost runs f on a thread of its own in the host's namespace.
func (l *lab) inHost(f func()) {
	runtime.LockOSThread() // the thread ends with the goroutine
	if err := unix.Setns(int(l.host.Fd()), unix.CLONE_NEWNET); err != nil {
		l.t.Error(err)
		return
	}
	f()
}

func TestHundredAddsAtOnce(t *testing.T) {
	l := newLab(t)
	const n = 100
	var pods []string
	for range n {
		pods = append(pods, l.newPod())
	}
	all := func(f func(i int)) {
		var wg sync.WaitGroup
		for i := range n {
			wg.Go(func() { l.inHost(func() { f(i) }) })
		}
		wg.Wait()
	}
	var mu sync.Mutex
	owner := map[string]int{}
	all(func(i int) {
		result, err := l.add(rt(fmt.Sprintf("pod%d", i), pods[i]))
		if err != nil {
			t.Errorf("ADD %d: %v", i, err)
			return
		}
		mu.Lock()
		defer mu.Unlock()
		for _, ip := range result.IPs {
			a := ip.Address.String()
			if other, twice := owner[a]; twice {
				t.Errorf("%s belongs to pods %d and %d", a, other, i)
			}
			owner[a] = i
		}
	})
	if len(owner) != 2*n || len(l.records()) != n {
		t.Errorf("%d addresses and %d records, want %d and %d", len(owner), len(l.records()), 2*n, n)
	}
	all(func(i int) {
		if err := l.del(rt(fmt.Sprintf("pod%d", i), pods[i])); err != nil {
			t.Errorf("DEL %d: %v", i, err)
		}
	})
	if len(l.records()) != 0 {
		t.Errorf("records left: %v", l.records())
	}
}

func TestTwoAddsOfOneContainerAtOnce(t *testing.T) {
	l := newLab(t)
	pod := l.newPod()
	errs := make(chan error, 2)
	var wg sync.WaitGroup
	for range 2 {
		wg.Go(func() {
			l.inHost(func() {
				_, err := l.verb("ADD", "web", pod, nil)
				errs <- err
			})
		})
	}
	wg.Wait()
	close(errs)
	won := 0
	for err := range errs {
		if err == nil {
			won++
		}
	}
	if won != 1 || len(l.records()) != 1 || len(l.links()) != 1 {
		t.Errorf("%d ADDs won, records %v, links %v; want one of each", won, l.records(), l.links())
	}
	if _, err := l.verb("CHECK", "web", pod, nil); err != nil {
		t.Error(err)
	}
}

// A pod's name may have 253 bytes and its namespace 63, which is more than an
// interface's alias holds.
func TestLongNames(t *testing.T) {
	l := newLab(t)
	r := rt(strings.Repeat("c", 64), l.newPod())
	r.Args = [][2]string{{"IgnoreUnknown", "1"}, {"K8S_POD_NAMESPACE", strings.Repeat("n", 63)}, {"K8S_POD_NAME", strings.Repeat("p", 253)}}
	l.mustAdd(r)
	pods, err := Pods(l.dataDir)
	if err != nil || len(pods) != 1 || len(pods[0].Pod.Name) != 253 {
		t.Errorf("recorded %+v, %v", pods, err)
	}
	if err := l.check(r); err != nil {
		t.Error(err)
	}
	l.mustDel(r)
}
