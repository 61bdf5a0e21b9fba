package cni

import (
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
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
		"ipv4/conf/" + link + "/accept_redirects": "0", "ipv4/conf/" + link + "/rp_filter": "1", "ipv4/conf/" + link + "/proxy_arp": "0",
	} {
		if got, err := os.ReadFile("/proc/sys/net/" + key); err != nil || strings.TrimSpace(string(got)) != want {
			t.Errorf("%s = %s, %v; want %s", key, got, err, want)
		}
	}
	if err := l.check(r); err != nil {
		t.Errorf("CHECK right after ADD: %v", err)
	}
	if got := lines(t, "nsenter", inPod(pod, "ip", "-br", "link")...); len(got) != 2 || !slices.ContainsFunc(got, func(s string) bool { return strings.HasPrefix(s, "eth0@") }) {
		t.Errorf("pod links: %v", got)
	}
	l.mustDel(r)
	l.wantClean()
}

func TestPodsReachEachOther(t *testing.T) {
	l := newLab(t)
	needRoot(t, "ping")
	a, b := l.newPod(), l.newPod()
	l.mustAdd(rt("a", a))
	l.mustAdd(rt("b", b))
	for _, dst := range []string{"10.244.1.3", "fd00:10:244:1::3"} {
		run(t, "nsenter", inPod(a, "ping", "-c", "1", "-W", "2", "-i", "0.2", dst)...)
	}
}
