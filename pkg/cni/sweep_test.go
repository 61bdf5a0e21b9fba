package cni

import (
	"context"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"meshd.dev/pkg/cni/rtnl"
	"meshd.dev/pkg/mesh"
)

func (l *lab) sweep(live func(Record) bool) Report {
	l.t.Helper()
	l.mustBeHost()
	report, err := Sweep(context.Background(), SweepConfig{Table: mesh.FirewallTable, DataDir: l.dataDir, Grace: 1}, live)
	if err != nil {
		l.t.Fatalf("sweep: %v", err)
	}
	return report
}

func freedIDs(r Report) []string {
	var out []string
	for _, f := range r.Freed {
		out = append(out, f.ContainerID)
	}
	slices.Sort(out)
	return out
}

func TestSweepTakesTheDeadAndLeavesTheLiving(t *testing.T) {
	l := newLab(t)
	living, dead, left := l.newPod(), l.newPod(), l.newPod()
	l.mustAdd(rt("living", living))
	l.mustAdd(rt("dead", dead))
	l.mustAdd(rt("left", left))
	l.mustDel(rt("left", left))
	// The namespace goes without a DEL; the kernel deletes the link on its own
	// time, and so the test does it.
	removePod(dead)
	if err := deleteLinkNamed(t, HostLink("dead", "eth0")); err != nil {
		t.Fatal(err)
	}

	dry, err := Sweep(context.Background(), SweepConfig{Table: mesh.FirewallTable, DataDir: l.dataDir, DryRun: true}, nil)
	if err != nil {
		t.Fatal(err)
	}
	report := l.sweep(nil)
	for _, r := range []Report{dry, report} {
		if got := freedIDs(r); !slices.Equal(got, []string{"dead"}) || r.Kept != 1 || !slices.Equal(r.Links, []string{HostLink("left", "eth0")}) {
			t.Errorf("report %+v", r)
		}
	}
	again := l.sweep(nil)
	if len(again.Freed)+len(again.Links)+len(again.Corrupt)+len(again.Unknown) != 0 || again.Kept != 1 {
		t.Errorf("the second sweep found more: %+v", again)
	}
	if err := l.check(rt("living", living)); err != nil {
		t.Errorf("the sweep hurt a living pod: %v", err)
	}
	l.mustDel(rt("living", living))
}

// deleteLinkNamed deletes a link unless the kernel was first.
func deleteLinkNamed(t *testing.T, name string) error {
	t.Helper()
	host, err := rtnl.Open()
	if err != nil {
		t.Fatal(err)
	}
	defer host.Close()
	return deleteLink(host, name)
}

func TestSweepBelievesTheLinkOverAMissingPath(t *testing.T) {
	l := newLab(t)
	pod := l.newPod()
	l.mustAdd(rt("hidden", pod))
	keeper, err := os.Open(pod) // the namespace lives on
	if err != nil {
		t.Fatal(err)
	}
	defer keeper.Close()
	removePod(pod)
	if r := l.sweep(nil); r.Kept != 1 {
		t.Errorf("without a runtime: %+v, want it kept", r)
	}
	if r := l.sweep(func(Record) bool { return true }); r.Kept != 1 {
		t.Errorf("the runtime calls it live: %+v, want it kept", r)
	}
	unknown := func(Record) bool { return false }
	if r, err := Sweep(context.Background(), SweepConfig{Table: mesh.FirewallTable, DataDir: l.dataDir}, unknown); err != nil || r.Kept != 1 {
		t.Errorf("the runtime does not know it yet: %+v, %v, want it kept", r, err)
	}
	if r := l.sweep(unknown); !slices.Equal(freedIDs(r), []string{"hidden"}) {
		t.Errorf("the runtime does not know it: %+v, want it freed", r)
	}
	l.wantClean()
}

func TestSweepAfterAReboot(t *testing.T) {
	l := newLab(t)
	l.mustAdd(rt("old", l.newPod()))
	run(t, "ip", "link", "del", HostLink("old", "eth0"))
	s := openStore(l.dataDir, "meshd")
	// As if the record had been written in another boot.
	n, _, err := s.find("old", "eth0")
	if err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile(s.path(n.String()))
	if err != nil {
		t.Fatal(err)
	}
	r, err := decodeRecord(n, text)
	if err != nil {
		t.Fatal(err)
	}
	r.BootID = "another"
	for path, content := range map[string]string{s.path(n.String()): string(r.encode()), s.path(bootFile): "another\n"} {
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if got := freedIDs(l.sweep(nil)); !slices.Equal(got, []string{"old"}) {
		t.Errorf("freed %v", got)
	}
	if got := addresses(l.mustAdd(rt("new", l.newPod()))); !strings.HasPrefix(got, "10.244.1.2/32") {
		t.Errorf("addresses %s, want the first ones", got)
	}
}

func TestCorruptRecordIsSetAside(t *testing.T) {
	l := newLab(t)
	pod := l.newPod()
	l.mustAdd(rt("web", pod))
	path := filepath.Join(l.dataDir, "meshd", l.records()[0])
	if err := os.Truncate(path, 100); err != nil {
		t.Fatal(err)
	}
	if _, err := Pods(l.dataDir); err == nil || !strings.Contains(err.Error(), "corrupt") {
		t.Errorf("Pods: %v, want it to say corrupt", err)
	}
	_, err := l.verb("CHECK", "web", pod, nil)
	wantCode(t, err, CodeDrift, "corrupt")
	if r := l.sweep(nil); !slices.Equal(r.Corrupt, []string{path + ".corrupt"}) || r.Kept != 1 {
		t.Errorf("report %+v", r)
	}
	if got := addresses(l.mustAdd(rt("other", l.newPod()))); strings.HasPrefix(got, "10.244.1.2/32") {
		t.Errorf("the corrupt record's address was given to another pod: %s", got)
	}
	l.mustDel(rt("web", pod))
	l.mustDel(rt("other", pod))
	if got := l.records(); len(got) != 0 {
		t.Errorf("records left: %v", got)
	}
}

func TestACorruptRecordOfADeadPodGoes(t *testing.T) {
	l := newLab(t)
	pod := l.newPod()
	l.mustAdd(rt("web", pod))
	if err := os.Truncate(filepath.Join(l.dataDir, "meshd", l.records()[0]), 0); err != nil {
		t.Fatal(err)
	}
	run(t, "ip", "link", "del", HostLink("web", "eth0")) // the kernel would, in its own time
	removePod(pod)
	if r := l.sweep(nil); !slices.Equal(freedIDs(r), []string{"web"}) {
		t.Errorf("report %+v", r)
	}
	l.wantClean()
}

func TestALostFolderDoesNotKillPods(t *testing.T) {
	l := newLab(t)
	pod := l.newPod()
	l.mustAdd(rt("web", pod))
	if err := os.RemoveAll(l.dataDir); err != nil {
		t.Fatal(err)
	}
	link := HostLink("web", "eth0")
	if r := l.sweep(nil); !slices.Equal(r.Unknown, []string{link}) || len(r.Links) != 0 {
		t.Errorf("without a runtime: %+v, want the link left alone", r)
	}
	known := func(r Record) bool { return r.ContainerID == "web" && r.Pod.Name == "web" }
	if r := l.sweep(known); !slices.Equal(r.Unknown, []string{link}) {
		t.Errorf("the runtime knows it: %+v, want the link left alone", r)
	}
	// Its address is not given away either: the route is in the way.
	if _, err := l.verb("ADD", "other", l.newPod(), nil); err == nil {
		t.Error("the address of a living pod was given to another")
	}
	if got := l.links(); !slices.Equal(got, []string{link}) {
		t.Errorf("links %v", got)
	}
	if r := l.sweep(func(Record) bool { return false }); !slices.Equal(r.Links, []string{link}) {
		t.Errorf("the runtime does not know it: %+v, want the link deleted", r)
	}
	l.wantClean()
}

// The folder is read, a record in it is not: the pod stays admitted, and so do
// those that come after it.
func TestARecordThatCannotBeReadHoldsNobodyUp(t *testing.T) {
	l := newLab(t)
	l.mustAdd(rt("web", l.newPod()))
	path := filepath.Join(l.dataDir, "meshd", l.records()[0])
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(path, 0o700); err != nil { // reading it is EISDIR, also for root
		t.Fatal(err)
	}
	l.mustAdd(rt("other", l.newPod()))
	sorted := func() []mesh.SetElement {
		return slices.SortedFunc(slices.Values(l.elements()), func(a, b mesh.SetElement) int { return strings.Compare(a.Key, b.Key) })
	}
	before := sorted()
	l.applyFirewall()
	if diff := cmp.Diff(before, sorted()); diff != "" || len(before) != 4 {
		t.Errorf("a round of the daemon changed who is admitted:\n%s", diff)
	}
}

// What was read may be somebody else's by the time it is taken away.
func TestAnElementThatIsSomebodyElsesByNowStays(t *testing.T) {
	l := newLab(t)
	r := rt("web", l.newPod())
	r.CapabilityArgs = map[string]any{"portMappings": []any{map[string]any{"hostPort": 8080, "containerPort": 80, "protocol": "tcp"}}}
	l.mustAdd(r)
	before := l.elements()
	w := sweeper{SweepConfig: SweepConfig{Table: mesh.FirewallTable}}
	for _, e := range before {
		if strings.HasPrefix(e.Set, mesh.HostPortMap) {
			e.Value = strings.Repeat("\x0a", len(e.Value)) // the pod before had the port
			if err := w.orphanElement(e); err != nil {
				t.Error(err)
			}
		}
	}
	if diff := cmp.Diff(before, l.elements()); diff != "" {
		t.Errorf("a living pod lost its port:\n%s", diff)
	}
}

func TestSweepLeavesAnAddAtWorkAlone(t *testing.T) {
	l := newLab(t)
	h, _ := mustReserve(t, openStore(l.dataDir, "meshd"), thisBoot(t, testRequest("web")))
	if r := l.sweep(func(Record) bool { return false }); r.Kept != 1 || len(r.Freed) != 0 {
		t.Errorf("report %+v", r)
	}
	h.release() // the ADD died before it made a link, and its namespace is gone
	if r := l.sweep(nil); !slices.Equal(freedIDs(r), []string{"web"}) {
		t.Errorf("report %+v", r)
	}
}

func thisBoot(t *testing.T, q request) request {
	t.Helper()
	id, err := readBootID()
	if err != nil {
		t.Fatal(err)
	}
	q.record.BootID = id
	return q
}
