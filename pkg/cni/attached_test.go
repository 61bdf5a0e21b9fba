package cni

import (
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containernetworking/cni/pkg/types"
)

// A node whose addresses are all taken says so, and says so no more when one
// is given back.
func TestExhaustionIsSeen(t *testing.T) {
	n := Network{DataDir: t.TempDir(), PodCIDRs: []netip.Prefix{netip.MustParsePrefix("10.244.1.0/29"), netip.MustParsePrefix("fd00:10:244:1::/64")}}
	s := openStore(n.DataDir, "meshd")
	q := testRequest("")
	q.ranges = spans(n.PodCIDRs)
	var held []*held
	for _, id := range []string{"a", "b", "c", "d", "e"} {
		usage, err := Addresses(n)
		if err != nil || Exhausted(usage) != nil {
			t.Errorf("before %s: %+v, %v", id, usage, err)
		}
		q.record.ContainerID, q.record.HostLink = id, HostLink(id, "eth0")
		h, _, err := s.mustReserveFast(q)
		if err != nil {
			t.Fatal(err)
		}
		defer h.release()
		held = append(held, h)
	}
	usage, err := Addresses(n)
	if err != nil || len(usage) != 2 || usage[0].Held != 5 || usage[0].Free != 0 || usage[1].Free != countTo {
		t.Errorf("usage %+v, %v", usage, err)
	}
	if err := Exhausted(usage); err == nil || err.Error() != "all 5 addresses of [10.244.1.0/29] are taken" {
		t.Errorf("said: %v", err)
	}
	if err := held[0].free(); err != nil {
		t.Fatal(err)
	}
	if usage, err = Addresses(n); err != nil || usage[0].Resting != 1 || Exhausted(usage) != nil {
		t.Errorf("after one was given back: %+v, %v", usage, err)
	}
}

// A corrupt record keeps its pod in the firewall; one of another boot, or of
// another plugin, is not there.
func TestAttached(t *testing.T) {
	dir := t.TempDir()
	s := openStore(dir, "meshd")
	for _, id := range []string{"first", "second", "broken"} {
		h, _ := mustReserve(t, s, thisBoot(t, testRequest(id)))
		h.release()
	}
	names := mustNames(t, s)
	for _, n := range names {
		if n.containerID == "broken" {
			if err := os.Truncate(s.path(n.String()), 20); err != nil {
				t.Fatal(err)
			}
		}
	}
	pods, err := Attached(dir)
	if err != nil || len(pods) != 3 {
		t.Fatalf("attached %+v, %v", pods, err)
	}
	if pods[1].Link != HostLink("first", "eth0") || pods[2].Link != HostLink("second", "eth0") || pods[0].Link != HostLink("broken", "eth0") || len(pods[0].Addrs) != 2 {
		t.Errorf("in order of time: %+v", pods)
	}
	for _, n := range names {
		if n.containerID == "first" {
			rewrite(t, s, n, func(r *Record) { r.BootID = "another" })
		}
	}
	if pods, err := Attached(dir); err != nil || len(pods) != 2 {
		t.Errorf("with one of another boot: %+v, %v", pods, err)
	}
	if pods, err := Attached(filepath.Join(dir, "nowhere")); err != nil || len(pods) != 0 {
		t.Errorf("without a folder: %+v, %v", pods, err)
	}
	if err := os.WriteFile(filepath.Join(t.TempDir(), "x"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if pods, err := Attached(file); err == nil {
		t.Errorf("a folder that cannot be read has %v, and no error", pods)
	}
}

// Nothing is decided by the clock on the wall: it may say anything.
func TestTheClockGoesBack(t *testing.T) {
	l := newLab(t)
	conf := map[string]any{"ranges": []string{"10.244.1.0/29"}}
	var pods []string
	for _, id := range []string{"a", "b", "c", "d", "e"} {
		pods = append(pods, l.newPod())
		if _, err := l.verb("ADD", id, pods[len(pods)-1], conf); err != nil {
			t.Fatal(err)
		}
	}
	s := openStore(l.dataDir, "meshd")
	for i, n := range mustNames(t, s) { // made in the future, and long ago
		rewrite(t, s, n, func(r *Record) { r.Since = r.Since.Add(time.Duration(i-2) * 24 * 365 * time.Hour) })
		past := time.Unix(int64(i)*1e9, 0)
		if err := os.Chtimes(s.path(n.String()), past, past); err != nil {
			t.Fatal(err)
		}
	}
	if r := l.sweep(func(Record) bool { return false }); len(r.Freed) != 0 || r.Kept != 5 {
		t.Errorf("sweep: %+v", r)
	}
	l.applyFirewall()
	if _, err := l.verb("CHECK", "c", pods[2], conf); err != nil {
		t.Error(err)
	}
	if _, err := l.verb("DEL", "c", pods[2], conf); err != nil {
		t.Error(err)
	}
	_, err := l.verb("ADD", "f", l.newPod(), conf)
	wantCode(t, err, types.ErrTryAgainLater, "can be used again in")
	// Given back at a time that has not come, as no clock of this boot can say.
	files := mustFreed(t, l)
	if len(files) != 1 {
		t.Fatalf("freed %v", files)
	}
	_, rest, _ := strings.Cut(filepath.Base(files[0]), ",")
	if err := os.Rename(files[0], filepath.Join(filepath.Dir(files[0]), "09000000000000000000,"+rest)); err != nil {
		t.Fatal(err)
	}
	if _, err := l.verb("ADD", "f", l.newPod(), conf); err != nil {
		t.Errorf("a time that has not come keeps an address for ever: %v", err)
	}
}
