package cni

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/containernetworking/cni/libcni"
	"github.com/containernetworking/cni/pkg/types"
	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"meshd.dev/pkg/mesh"
)

// changing are the system calls by which the plugin changes anything, and
// those around them.
var changing = []string{"openat", "write", "fsync", "flock", "mkdirat", "renameat", "unlinkat", "socket", "setns", "sendto", "exit_group"}

// point is one place in a run of the plugin: the nth call of its kind.
type point struct {
	call  string
	n     int
	fault string // as strace's inject takes it
}

func (p point) String() string { return fmt.Sprintf("%s:%d:%s", p.call, p.n, p.fault) }

var traceLine = regexp.MustCompile(`^(\d+)\s+([a-z0-9_]+)\(`)

// points lists the places of one run, in order.
func (l *lab) points(env []string, stdin string) []point {
	l.t.Helper()
	trace := filepath.Join(l.t.TempDir(), "trace")
	l.strace(env, stdin, "-o", trace, "-e", "trace="+strings.Join(changing, ","))
	f, err := os.Open(trace)
	if err != nil {
		l.t.Fatal(err)
	}
	defer f.Close()
	var out []point
	count := map[string]int{}
	for scan := bufio.NewScanner(f); scan.Scan(); {
		if m := traceLine.FindStringSubmatch(scan.Text()); m != nil {
			call := m[2]
			count[call]++
			out = append(out, point{call, count[call], "signal=KILL"})
			if call != "exit_group" && call != "setns" {
				out = append(out, point{call, count[call], "error=ENOSPC"}, point{call, count[call], "error=EIO"})
			}
		}
	}
	if len(out) < 10 {
		l.t.Fatalf("only %d points: %v", len(out), out)
	}
	return out
}

// strace runs the plugin under strace and says whether it succeeded.
func (l *lab) strace(env []string, stdin string, args ...string) (stdout string, ok bool) {
	l.t.Helper()
	l.mustBeHost()
	ctx, stop := bounded()
	defer stop()
	cmd := exec.CommandContext(ctx, "strace", append(append([]string{"-f", "-qq"}, args...), filepath.Join(l.binDir, PluginType))...)
	cmd.Env = append([]string{"CNI_PATH=" + l.binDir}, env...)
	cmd.Stdin = strings.NewReader(stdin)
	out, err := cmd.Output()
	return string(out), err == nil
}

func (l *lab) fault(env []string, stdin string, p point) (stdout string, ok bool) {
	return l.strace(env, stdin, "-o", "/dev/null", "-e", "trace="+p.call, "-e", fmt.Sprintf("inject=%s:%s:when=%d", p.call, p.fault, p.n))
}

// wantNoDouble: an address that is routed to a pod has a record, so that
// nobody else gets it. It holds at every moment.
func (l *lab) wantNoDouble(when string) {
	l.t.Helper()
	records := strings.Join(l.records(), "\n")
	for _, line := range lines(l.t, "ip", "route", "show", "proto", "78") {
		if addr := strings.Fields(line)[0]; !strings.Contains(records, addr+",") {
			l.t.Errorf("%s: %s is routed to a pod and free for others; records:\n%s", when, addr, records)
		}
	}
	for _, e := range l.elements() {
		if !strings.HasPrefix(e.Set, mesh.PodSet) {
			continue
		}
		link := strings.TrimRight(e.Key[:unix.IFNAMSIZ], "\x00")
		if a, _ := netip.AddrFromSlice([]byte(e.Key[unix.IFNAMSIZ:])); !strings.Contains(records, a.String()+",") && l.isUp(link) {
			l.t.Errorf("%s: %s is admitted and free for others; records:\n%s", when, a, records)
		}
	}
	seen := map[string]bool{}
	for _, file := range l.records() {
		n, ok := parseRecordName(file)
		if !ok {
			continue // half a record
		}
		for _, a := range n.addresses {
			if seen[a.String()] {
				l.t.Errorf("%s: %s is in two records:\n%s", when, a, records)
			}
			seen[a.String()] = true
		}
	}
}

// isUp says whether a link is there and up.
func (l *lab) isUp(link string) bool {
	return slices.ContainsFunc(lines(l.t, "ip", "-br", "link", "show", "up"), func(line string) bool { return strings.HasPrefix(line, link+"@") })
}

// wantOnly: nothing is left in kernel and folder but the pod other.
func (l *lab) wantOnly(when string, other string) {
	l.t.Helper()
	if got := l.links(); !slices.Equal(got, []string{HostLink(other, "eth0")}) {
		l.t.Errorf("%s: links %v", when, got)
	}
	if got := l.records(); len(got) != 1 || !strings.HasSuffix(got[0], ",eth0,"+other) {
		l.t.Errorf("%s: files %v", when, got)
	}
	if got := lines(l.t, "ip", "route", "show", "proto", "78"); len(got) != 1 {
		l.t.Errorf("%s: routes %v", when, got)
	}
	var want []mesh.SetElement
	if pods, err := Attached(l.dataDir); err != nil || len(pods) != 1 {
		l.t.Errorf("%s: attached %v, %v", when, pods, err)
	} else {
		want = pods[0].Elements()
	}
	if diff := cmp.Diff(elementLines(want), elementLines(l.elements())); diff != "" {
		l.t.Errorf("%s: elements (-want +got):\n%s", when, diff)
	}
}

func elementLines(all []mesh.SetElement) (lines []string) {
	for _, e := range all {
		lines = append(lines, fmt.Sprintf("%s %x %x", e.Set, e.Key, e.Value))
	}
	slices.Sort(lines)
	return lines
}

// everything a runtime can ask for that ADD makes something of.
func everything(port int) map[string]any {
	return map[string]any{
		"portMappings": []any{map[string]any{"hostPort": port, "containerPort": 80, "protocol": "tcp"}, map[string]any{"hostPort": port, "containerPort": 53, "protocol": "udp"}},
		"bandwidth":    map[string]any{"ingressRate": 8000000, "egressRate": 8000000},
	}
}

// TestWhateverDies kills the plugin at each of its system calls, and makes
// each fail, then does what a runtime does next, and compares kernel and disk
// with the wish. It takes a sample; CNI_CRASH_POINTS=all takes all.
func TestWhateverDies(t *testing.T) {
	needRoot(t, "strace", "ip", "nsenter")
	l := newLab(t)
	bystander := rt("other", l.newPod())
	bystander.CapabilityArgs = everything(9000)
	l.mustAdd(bystander)
	web := func(pod string) *libcni.RuntimeConf {
		r := rt("web", pod)
		r.CapabilityArgs = everything(8000)
		return r
	}
	valid := map[string]any{"cni.dev/valid-attachments": []types.GCAttachment{{ContainerID: "other", IfName: "eth0"}}, "quarantineSeconds": 0, "runtimeConfig": everything(8000)}
	stdin := l.stdin("1.1.0", valid)
	total, faulty := 0, 0
	for _, verb := range []string{"ADD", "DEL", "GC"} {
		pod := l.newPod()
		if verb != "ADD" {
			l.mustAdd(web(pod))
		}
		points := l.points(verbEnv(verb, "web", pod), stdin)
		l.recover("DEL", pod, stdin)
		removePod(pod)
		step := 1
		if os.Getenv("CNI_CRASH_POINTS") != "all" {
			step = len(points)/10 | 1
			if step%3 == 0 { // a call has three faults
				step += 2
			}
		}
		for i := 0; i < len(points); i += step {
			p := points[i]
			next := []string{"DEL", "ADD", "GC", "sweep"}[total%4]
			when := fmt.Sprintf("%s with %s, then %s", verb, p, next)
			pod := l.newPod()
			if verb != "ADD" {
				l.mustAdd(web(pod))
			}
			_, ok := l.fault(verbEnv(verb, "web", pod), stdin, p)
			l.wantNoDouble(when)
			if !ok {
				faulty++
			}
			if verb == "ADD" && ok {
				if _, err := l.verbEnv(verbEnv("CHECK", "web", pod), stdin); err != nil {
					t.Errorf("%s: ADD says that all went well, but: %v", when, err)
				}
			}
			l.recover(next, pod, stdin)
			l.wantNoDouble(when + " (after)")
			removePod(pod)
			if _, err := Sweep(context.Background(), SweepConfig{Table: mesh.FirewallTable, DataDir: l.dataDir}, nil); err != nil {
				t.Errorf("%s: sweep: %v", when, err)
			}
			l.wantOnly(when, "other")
			total++
			if t.Failed() {
				t.FailNow()
			}
		}
	}
	if err := l.check(bystander); err != nil {
		t.Errorf("a bystander was hurt: %v", err)
	}
	t.Logf("%d points (%d of them failed the verb): 0 leaks, 0 doubles", total, faulty)
}

// recover is what comes after a failure.
func (l *lab) recover(next, pod, stdin string) {
	l.t.Helper()
	switch next {
	case "ADD": // a retry, which works, or says that it had worked already
		out, err := l.verbEnv(verbEnv("ADD", "web", pod), stdin)
		if err != nil {
			wantCode(l.t, err, CodeAttached, "")
		} else if !json.Valid([]byte(out)) {
			l.t.Errorf("result %q", out)
		}
		if _, err := l.verbEnv(verbEnv("CHECK", "web", pod), stdin); err != nil {
			l.t.Errorf("after a retry: %v", err)
		}
		l.recover("DEL", pod, stdin)
	case "sweep": // the runtime died too, and the namespace went
		removePod(pod)
		if _, err := Sweep(context.Background(), SweepConfig{Table: mesh.FirewallTable, DataDir: l.dataDir, Grace: 1}, func(r Record) bool { return r.ContainerID == "other" }); err != nil {
			l.t.Errorf("sweep: %v", err)
		}
	default:
		if out, err := l.verbEnv(verbEnv(next, "web", pod), stdin); err != nil {
			l.t.Errorf("%s after a failure: %v %s", next, err, out)
		}
	}
}
