package cni

import (
	"context"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/containernetworking/cni/pkg/types"
)

// flannel's folder as host-local leaves it.
func hostLocalFolder(t *testing.T, files map[string]string) string {
	t.Helper()
	dir := t.TempDir()
	for name, content := range files {
		path := filepath.Join(dir, "cbr0", name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

var flannels = map[string]string{
	"10.244.1.2":         "3f2a\r\neth0",
	"fd00:10:244:1::2":   "3f2a\r\neth0",
	"10.244.1.3":         "",             // cut off by a power cut
	"10.244.1.4":         "0old0",        // as host-local before 0.8 wrote it
	"10.99.0.7":          "9999\r\neth0", // of another range
	"last_reserved_ip.0": "10.244.1.4",
	"lock":               "",
}

func TestHostLocalIsTakenOver(t *testing.T) {
	l := newLab(t)
	dir := hostLocalFolder(t, flannels)
	if err := os.WriteFile(filepath.Join(dir, "README"), nil, 0o600); err != nil { // not a network
		t.Fatal(err)
	}
	conf := map[string]any{"hostLocalDir": dir}
	add := func(id string) string {
		t.Helper()
		out, err := l.verb("ADD", id, l.newPod(), conf)
		if err != nil {
			t.Fatalf("ADD %s: %v", id, err)
		}
		return out
	}
	// Before the daemon was there at all: what has a file is nobody else's,
	// last_reserved_ip says nothing.
	if out := add("first"); !strings.Contains(out, "10.244.1.5/32") || !strings.Contains(out, "fd00:10:244:1::3/128") {
		t.Errorf("the first pod got %s", out)
	}
	asked := map[string]any{"hostLocalDir": dir, "runtimeConfig": map[string]any{"ips": []string{"10.244.1.2"}}}
	_, err := l.verb("ADD", "greedy", l.newPod(), asked)
	wantCode(t, err, CodeAddressTaken, "host-local")

	sweep := func(live func(Record) bool) Report {
		t.Helper()
		r, err := Sweep(context.Background(), SweepConfig{DataDir: l.dataDir, Table: l.network.Table, Import: &l.network, Grace: 1, hostLocal: dir}, live)
		if err != nil {
			t.Fatal(err)
		}
		return r
	}
	for i, want := range []int{3, 0} {
		r := sweep(nil)
		if len(r.Imported) != want || !slices.Equal(r.Corrupt, []string{filepath.Join(dir, "cbr0", "10.244.1.3")}) || len(r.Freed) != 0 {
			t.Errorf("sweep %d: %+v; want %d imported and one file reported", i, r, want)
		}
	}
	pods, err := Pods(l.dataDir)
	if err != nil || len(pods) != 4 {
		t.Errorf("pods %+v, %v; want ours and three records taken over", pods, err)
	}
	if pods, err := Attached(l.dataDir); err != nil || len(pods) != 1 {
		t.Errorf("the firewall is told of %+v, %v; want ours alone", pods, err)
	}
	_, err = l.verb("CHECK", "3f2a", l.newPod(), conf)
	wantCode(t, err, CodeDrift, "another plugin")
	_, err = l.verb("ADD", "3f2a", l.newPod(), conf)
	wantCode(t, err, CodeAttached, "DEL first")

	// The runtime calls us to give back what the other plugin attached.
	if _, err := l.verb("DEL", "3f2a", "", conf); err != nil {
		t.Fatal(err)
	}
	for _, f := range []string{"10.244.1.2", "fd00:10:244:1::2"} {
		if _, err := os.Stat(filepath.Join(dir, "cbr0", f)); !os.IsNotExist(err) {
			t.Errorf("after DEL %s is still there: %v", f, err)
		}
	}
	asked["quarantineSeconds"] = 0
	if _, err := l.verb("ADD", "greedy", l.newPod(), asked); err != nil {
		t.Errorf("an address given back is not to be had: %v", err)
	}
	// The other plugin itself gives one back.
	if err := os.Remove(filepath.Join(dir, "cbr0", "10.244.1.4")); err != nil {
		t.Fatal(err)
	}
	if r := sweep(nil); len(r.Freed) != 1 || r.Freed[0].ContainerID != "0old0" || !strings.Contains(r.Lines()[0], "host-local gave it back") {
		t.Errorf("%+v", r)
	}
}

// DEL before the daemon has seen the folder, as on the day of the change.
func TestHostLocalDelWithoutARecord(t *testing.T) {
	l := newLab(t)
	dir := hostLocalFolder(t, flannels)
	for range 2 {
		if _, err := l.verb("DEL", "3f2a", "", map[string]any{"hostLocalDir": dir}); err != nil {
			t.Fatal(err)
		}
	}
	s := openStore(l.dataDir, "meshd")
	s.hostLocal = dir
	files, err := s.hostLocalFiles()
	if err != nil || len(files) != 3 {
		t.Errorf("left %v, %v; want those of others", files, err)
	}
}

// GC without the daemon, a runtime that knows better, and the next boot.
func TestHostLocalIsGivenBack(t *testing.T) {
	l := newLab(t)
	use := func() string {
		return hostLocalFolder(t, map[string]string{"10.244.1.2": "keep\r\neth0", "10.244.1.3": "lose\r\neth0"})
	}
	left := func(dir string) (files []string) {
		entries, err := os.ReadDir(filepath.Join(dir, "cbr0"))
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range entries {
			files = append(files, e.Name())
		}
		return files
	}
	dir := use()
	valid := map[string]any{"hostLocalDir": dir, "cni.dev/valid-attachments": []types.GCAttachment{{ContainerID: "keep", IfName: "eth0"}}}
	if _, err := l.verb("GC", "", "", valid); err != nil {
		t.Fatal(err)
	}
	if got := left(dir); !slices.Equal(got, []string{"10.244.1.2"}) {
		t.Errorf("after GC: %v", got)
	}
	if _, err := l.verb("DEL", "keep", "", map[string]any{"hostLocalDir": dir}); err != nil {
		t.Fatal(err)
	}

	dir = use()
	cfg := SweepConfig{DataDir: l.dataDir, Import: &l.network, Grace: 1, hostLocal: dir}
	r, err := Sweep(context.Background(), cfg, func(r Record) bool { return r.ContainerID == "keep" })
	if err != nil || len(r.Imported) != 2 || len(r.Freed) != 1 || r.Freed[0].ContainerID != "lose" {
		t.Errorf("a runtime that knows one: %+v, %v", r, err)
	}
	if got := left(dir); !slices.Equal(got, []string{"10.244.1.2"}) {
		t.Errorf("after the sweep: %v", got)
	}
	// As if all of it had been another boot.
	s := openStore(l.dataDir, "meshd")
	if err := os.WriteFile(s.path(bootFile), []byte("another\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, n := range mustNames(t, s) {
		rewrite(t, s, n, func(r *Record) { r.BootID = "another" })
	}
	if r, err = Sweep(context.Background(), cfg, nil); err != nil || len(r.Freed) != 1 || len(r.Imported) != 0 {
		t.Errorf("after a reboot: %+v, %v", r, err)
	}
	if got := left(dir); len(got) != 0 {
		t.Errorf("after a reboot: %v", got)
	}
}

func mustNames(t *testing.T, s store) []recordName {
	t.Helper()
	names, _, err := s.names()
	if err != nil {
		t.Fatal(err)
	}
	return names
}

// rewrite changes a record behind everybody's back.
func rewrite(t *testing.T, s store, n recordName, edit func(*Record)) {
	t.Helper()
	text, err := os.ReadFile(s.path(n.String()))
	if err != nil {
		t.Fatal(err)
	}
	r, err := decodeRecord(n, text)
	if err != nil {
		t.Fatal(err)
	}
	edit(&r)
	if err := os.WriteFile(s.path(n.String()), r.encode(), 0o600); err != nil {
		t.Fatal(err)
	}
}

func FuzzHostLocal(f *testing.F) {
	for _, s := range []string{"3f2a\r\neth0", "3f2a", "", "\r\n", "a/b\r\neth0", "a,b\neth0", "x.corrupt\r\neth0", strings.Repeat("x", 2000)} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, text []byte) {
		id, ifName, err := parseHostLocal(text)
		if err != nil {
			return
		}
		n := recordName{addresses: []netip.Addr{netip.MustParseAddr("10.0.0.1")}, ifName: ifName, containerID: id}
		if again, ok := parseRecordName(n.String()); !ok || !again.is(id, ifName) || again.corrupt {
			t.Errorf("%q became record %q, which is read as %+v", text, n, again)
		}
	})
}
