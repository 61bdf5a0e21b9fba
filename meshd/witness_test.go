package main

import (
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"strings"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes/fake"

	"meshd.dev/pkg/kube"
	"meshd.dev/pkg/mesh"
	"meshd.dev/pkg/status"
)

func testWitness(t *testing.T) *witness {
	t.Helper()
	n := &node{board: &status.Board{}, api: fake.NewClientset(), log: slog.New(slog.DiscardHandler)}
	n.cfg.NodeName, n.cfg.RunDir = "m1", t.TempDir()
	n.window = kube.New(kube.Config{Client: n.api})
	return newWitness(n)
}

// says are the events about pods, a line each.
func eventLines(events []kube.Event) string {
	var lines []string
	for _, e := range events {
		lines = append(lines, fmt.Sprintf("%s %s: %s", e.About.Name, e.Reason, e.Message))
	}
	return strings.Join(lines, "\n")
}

func TestPodsOfAnotherNetworkAreNamed(t *testing.T) {
	ours := func(p kube.Pod) bool { return p.Name == "ours" }
	a := []netip.Addr{netip.MustParseAddr("10.88.0.2")}
	pods := []kube.Pod{{Namespace: "demo", Name: "ours", UID: "1", Addrs: a, Running: true}, {Namespace: "demo", Name: "foreign", UID: "2", Addrs: a, Running: true},
		{Namespace: "demo", Name: "waits", UID: "3", Waiting: true}, {Namespace: "demo", Name: "ends", UID: "4", Addrs: a}}
	start := time.Now()
	const ending = "this pod has 10.88.0.2 from another network, so meshd carries nothing between it and other nodes; "
	for _, c := range []struct {
		name, other string
		why         []string
		after       time.Duration
		pods        []kube.Pod
		events      string
		board       string // part of the next step; empty: fine
	}{
		{"at first it may be between two states", "", nil, 0, pods, "", ""},
		{"it stays", "", nil, lasting, pods, "foreign NotAttachedByMeshd: " + ending + "have the pod made anew", "have each made anew"},
		{"while the runtime prefers another configuration", "/etc/cni/net.d/05-x.conf", nil, lasting, pods,
			"foreign NotAttachedByMeshd: " + ending + "switch that network off and remove /etc/cni/net.d/05-x.conf on the node, then have the pod made anew", "remove /etc/cni/net.d/05-x.conf"},
		{"while something is wrong", "", []string{"datapath/firewall: no nf_tables (load it)"}, lasting, pods[2:3],
			"waits MeshdIsNotUp: meshd on node m1: datapath/firewall: no nf_tables (load it)", ""},
		{"made anew", "", nil, 2 * lasting, pods[:1], "", ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			w := testWitness(t)
			w.pods(c.pods, ours, c.other, c.why, start)
			if got := eventLines(w.pods(c.pods, ours, c.other, c.why, start.Add(c.after))); got != c.events {
				t.Errorf("events\n%s\nwant\n%s", got, c.events)
			}
			check := w.node.board.Checks()[0]
			if check.Healthy != (c.board == "") || !strings.Contains(check.Next, c.board) || !check.Healthy && !strings.Contains(check.Reason, "demo/foreign (10.88.0.2)") {
				t.Errorf("board %+v", check)
			}
			if why := hindrances(w.node.board.Checks()); len(why) > 0 {
				t.Errorf("pods of another network make meshd unready: %v", why)
			}
		})
	}
	t.Run("another pod of that name begins anew", func(t *testing.T) {
		w := testWitness(t)
		w.pods(pods[1:2], ours, "", nil, start)
		again := pods[1]
		again.UID = "5"
		if got := eventLines(w.pods([]kube.Pod{again}, ours, "", nil, start.Add(lasting))); got != "" || len(w.foreign) != 1 {
			t.Errorf("events %s, remembered %v", got, w.foreign)
		}
	})
	t.Run("many are counted", func(t *testing.T) {
		if got := foreignPods(make([]kube.Pod, 12)); !strings.HasSuffix(got, ", 7 more") {
			t.Error(got)
		}
	})
}

func TestUnenforcedPolicies(t *testing.T) {
	policy := func(ns, selector string) kube.Policy {
		s, err := labels.Parse(selector)
		if err != nil {
			t.Fatal(err)
		}
		return kube.Policy{Namespace: ns, Selector: s}
	}
	pods := []kube.Pod{{Namespace: "a", Labels: labels.Set{"app": "web"}}, {Namespace: "a", Labels: labels.Set{"app": "db"}}, {Namespace: "b"}}
	for _, c := range []struct {
		name     string
		policies []kube.Policy
		want     string
	}{
		{"none", nil, ""},
		{"of nobody here", []kube.Policy{policy("c", "")}, "1 NetworkPolicies, of which 0 select pods of this node (0 pods)"},
		{"two of the same pods", []kube.Policy{policy("a", ""), policy("a", "app=web"), policy("b", "app=web")}, "3 NetworkPolicies, of which 2 select pods of this node (2 pods)"},
	} {
		if got := unenforced(c.policies, pods); (got == "") != (c.want == "") || !strings.HasPrefix(got, c.want) {
			t.Errorf("%s: %s, want %s", c.name, got, c.want)
		}
	}
	state := &mesh.State{Nodes: []mesh.Node{{Name: "a", Ready: true}, {Name: "b", PublicKey: mesh.Key{1}}, {Name: "c", Ready: true, PublicKey: mesh.Key{1}}}}
	if got := spokesman(state); got != "c" {
		t.Errorf("%q speaks, want c: ready, with meshd", got)
	}
}

// Each is told once, again after its time, and other words after a pause.
func TestSaysEachOnce(t *testing.T) {
	w := testWitness(t)
	start := time.Now()
	of := func(uid, message string, again time.Duration) kube.Event {
		return kube.Event{About: kube.Pod{Namespace: "demo", Name: "p" + uid, UID: types.UID(uid)}.Reference(), Reason: "R", Message: message, Again: again}
	}
	said := func() int {
		list, err := w.node.api.CoreV1().Events("").List(t.Context(), metav1.ListOptions{})
		if err != nil {
			t.Fatal(err)
		}
		return len(list.Items)
	}
	var many []kube.Event
	for i := range maxSaid + 5 {
		many = append(many, of(fmt.Sprint("many", i), "x", 0))
	}
	for _, c := range []struct {
		name   string
		after  time.Duration
		events []kube.Event
		want   int // in all
	}{
		{"at once", 0, []kube.Event{of("1", "x", time.Hour)}, 1},
		{"the same again", lasting, []kube.Event{of("1", "x", time.Hour)}, 1},
		{"other words too soon", lasting, []kube.Event{of("1", "y", time.Hour)}, 1},
		{"other words", pauseBetween, []kube.Event{of("1", "y", time.Hour)}, 2},
		{"many at once are spread", pauseBetween, many, 2 + maxSaid},
		{"the others follow", pauseBetween + lasting, many, 2 + maxSaid + 5},
	} {
		if err := w.say(t.Context(), c.events, start.Add(c.after)); err != nil {
			t.Fatal(err)
		}
		if got := said(); got != c.want {
			t.Errorf("%s: %d events, want %d", c.name, got, c.want)
		}
	}
	if err := w.say(t.Context(), nil, start.Add(time.Hour)); err != nil || len(w.said) != 0 {
		t.Errorf("remembers %d objects that need nothing: %v", len(w.said), err)
	}
}

// The plugin quotes the file, so it says what is wrong now and nothing else.
func TestReasonFile(t *testing.T) {
	w := testWitness(t)
	for _, want := range []string{"", "datapath/firewall: no nf_tables (load it)\n", ""} {
		w.node.board.OK("datapath/firewall")
		if want != "" {
			w.node.board.Fail("datapath/firewall", "no nf_tables", "load it")
		}
		if err := w.look(t.Context()); err != nil {
			t.Fatal(err)
		}
		if got, err := os.ReadFile(w.node.reasonFile()); err != nil || string(got) != want {
			t.Errorf("%q, %v; want %q", got, err, want)
		}
	}
}
