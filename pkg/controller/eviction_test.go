package controller

import (
	"fmt"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/rest"

	"meshd.dev/pkg/controller/liveness"
)

func restConfig() *rest.Config { return &rest.Config{Host: "https://192.0.2.1:6443"} }

// A node is "name Ready-status taint...", its pods "name owner-kind words":
// ready, done, leaving, tolerate (for ever), tolerate=<seconds>.
func lifeNode(line string) *corev1.Node {
	w := strings.Fields(line)
	n := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: w[0], UID: types.UID(w[0])}}
	n.Status.Conditions = []corev1.NodeCondition{{Type: corev1.NodeReady, Status: corev1.ConditionStatus(w[1])}}
	for _, t := range w[2:] {
		if t == "cordoned" {
			n.Spec.Unschedulable = true
			continue
		}
		key, effect, _ := strings.Cut(t, ":")
		n.Spec.Taints = append(n.Spec.Taints, corev1.Taint{Key: key, Effect: corev1.TaintEffect(effect)})
	}
	return n
}

func lifePod(node, line string) *corev1.Pod {
	w := strings.Fields(line)
	p := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: "d", Name: w[0], UID: types.UID(w[0])}}
	p.Spec.NodeName = node
	if w[1] != "none" {
		yes := true
		p.OwnerReferences = []metav1.OwnerReference{{Kind: w[1], Controller: &yes}}
	}
	for _, word := range w[2:] {
		k, v, limited := strings.Cut(word, "=")
		switch k {
		case "ready":
			p.Status.Conditions = []corev1.PodCondition{{Type: corev1.PodReady, Status: corev1.ConditionTrue}}
		case "done":
			p.Status.Phase = corev1.PodFailed
		case "leaving":
			now := metav1.Now()
			p.DeletionTimestamp = &now
		case "tolerate":
			t := corev1.Toleration{Key: corev1.TaintNodeUnreachable, Operator: corev1.TolerationOpExists, Effect: corev1.TaintEffectNoExecute}
			if limited {
				var s int64
				fmt.Sscan(v, &s)
				t.TolerationSeconds = &s
			}
			p.Spec.Tolerations = append(p.Spec.Tolerations, t)
		}
	}
	return p
}

func TestPlanNode(t *testing.T) {
	const cut = "node.kubernetes.io/unreachable:NoSchedule node.kubernetes.io/unreachable:NoExecute"
	lost := func(d time.Duration) liveness.Verdict { return liveness.Verdict{State: liveness.Lost, For: d} }
	alive := liveness.Verdict{State: liveness.Alive}
	for _, tc := range []struct {
		name    string
		node    string
		verdict liveness.Verdict
		pods    []string
		storm   []string
		tainted time.Duration
		want    string
	}{
		{"alive and ready", "n True", alive, []string{"a ReplicaSet ready"}, nil, 0, ""},
		{"lost just now", "n True", lost(0), []string{"a ReplicaSet ready", "b DaemonSet ready"}, nil, 0, `
			mark node n Unknown
			taint node n node.kubernetes.io/unreachable:NoSchedule node.kubernetes.io/unreachable:NoExecute
			mark pod d/a not ready
			mark pod d/b not ready`},
		{"lost and all said", "n Unknown " + cut, lost(time.Second), []string{"a ReplicaSet"}, nil, 0, ""},
		{"lost long enough", "n Unknown " + cut, lost(5 * time.Second), []string{"a ReplicaSet", "b StatefulSet", "c DaemonSet tolerate", "d none", "e Job", "f ReplicaSet leaving", "g ReplicaSet done"}, nil, 0, `
			evict pod d/a: node n is unreachable
			evict pod d/e: node n is unreachable`},
		{"a pod's own patience wins", "n Unknown " + cut, lost(20 * time.Second), []string{"a ReplicaSet tolerate=60", "b ReplicaSet tolerate=10", "c ReplicaSet tolerate", "d none tolerate=10"}, nil, 0, `
			evict pod d/b: node n is unreachable
			evict pod d/d: node n is unreachable`},
		{"the shortest of several wins", "n Unknown " + cut, lost(20 * time.Second), []string{"a ReplicaSet tolerate tolerate=60 tolerate=10", "b ReplicaSet tolerate=60 tolerate"}, nil, 0, `
			evict pod d/a: node n is unreachable`},
		{"no patience at all", "n Unknown " + cut, lost(0), []string{"a ReplicaSet tolerate=0"}, nil, 0, `
			evict pod d/a: node n is unreachable`},
		{"in a storm nothing is deleted", "n Unknown " + cut, lost(time.Hour), []string{"a ReplicaSet ready"}, []string{"n", "m"}, 0, `
			mark pod d/a not ready`},
		{"back, and its agent has not spoken yet", "n Unknown " + cut, alive, []string{"a ReplicaSet"}, nil, 0, `
			taint node n node.kubernetes.io/not-ready:NoSchedule`},
		{"back and ready", "n True node.kubernetes.io/not-ready:NoSchedule", alive, nil, nil, 0, `
			taint node n not at all`},
		{"says it is not ready: pods stay", "n False", alive, []string{"a ReplicaSet ready"}, nil, 0, `
			taint node n node.kubernetes.io/not-ready:NoSchedule`},
		{"not heard since we started: all stays as it is", "n Unknown " + cut, liveness.Verdict{}, []string{"a ReplicaSet"}, nil, 0, ""},
		{"cordoned gets its taint", "n True cordoned", alive, nil, nil, 0, `
			taint node n node.kubernetes.io/unschedulable:NoSchedule`},
		{"uncordoned loses it, others' taints stay", "n True gpu:NoSchedule node.kubernetes.io/unschedulable:NoSchedule", alive, nil, nil, 0, `
			taint node n gpu:NoSchedule`},
		{"a person drives pods away", "n True fire:NoExecute", alive, []string{"a ReplicaSet ready", "b StatefulSet ready", "c ReplicaSet tolerate"}, nil, 0, `
			evict pod d/a: node n has taint fire:NoExecute
			evict pod d/b: node n has taint fire:NoExecute
			evict pod d/c: node n has taint fire:NoExecute`},
	} {
		t.Run(tc.name, func(t *testing.T) {
			n := lifeNode(tc.node)
			v := view{nodes: []*corev1.Node{n}, pods: map[string][]*corev1.Pod{}, verdicts: map[string]liveness.Verdict{"n": tc.verdict},
				storm: tc.storm, evictAfter: 5 * time.Second, taintedFor: map[taintOn]time.Duration{}}
			for _, l := range tc.pods {
				v.pods["n"] = append(v.pods["n"], lifePod("n", l))
			}
			got := ""
			for _, s := range v.plan() {
				got += "\n\t\t\t" + s.String()
			}
			if got != tc.want {
				t.Errorf("\n got%s\nwant%s", got, tc.want)
			}
		})
	}
}

func TestBurials(t *testing.T) {
	at := func(i int, p *corev1.Pod) *corev1.Pod {
		p.CreationTimestamp = metav1.NewTime(time.Unix(int64(i), 0))
		return p
	}
	pods := []*corev1.Pod{
		lifePod("here", "runs ReplicaSet"),
		lifePod("gone", "orphan ReplicaSet"),
		lifePod("gone", "stuck StatefulSet leaving"),
		lifePod("", "never ReplicaSet leaving"),
		lifePod("", "waiting ReplicaSet"),
		at(3, lifePod("here", "new Job done")),
		at(1, lifePod("here", "oldest Job done")),
		at(2, lifePod("here", "old Job done")),
	}
	var got []string
	for _, b := range burials(pods, map[string]bool{"gone": true}, 2) {
		got = append(got, b.pod.Name+": "+b.why)
	}
	want := []string{"orphan: node gone is gone", "stuck: node gone is gone", "never: deleted before a node had it", "oldest: too many finished pods"}
	if fmt.Sprint(got) != fmt.Sprint(want) {
		t.Errorf("\n got %v\nwant %v", got, want)
	}
}

func TestTokenExpired(t *testing.T) {
	now := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	token := func(expiration string) *corev1.Secret {
		s := &corev1.Secret{Type: corev1.SecretTypeBootstrapToken, Data: map[string][]byte{}}
		if expiration != "" {
			s.Data["expiration"] = []byte(expiration)
		}
		return s
	}
	for _, tc := range []struct {
		name   string
		secret *corev1.Secret
		want   bool
	}{
		{"still good", token("2026-01-01T00:00:01Z"), false},
		{"over", token("2026-01-01T00:00:00Z"), true},
		{"in another zone", token("2026-01-01T02:00:00+01:00"), false},
		{"for ever", token(""), false},
		{"unreadable", token("tomorrow"), true},
		{"some other secret", &corev1.Secret{Type: corev1.SecretTypeOpaque, Data: map[string][]byte{"expiration": []byte("2020-01-01T00:00:00Z")}}, false},
	} {
		if got := tokenExpired(tc.secret, now); got != tc.want {
			t.Errorf("%s: got %v, want %v", tc.name, got, tc.want)
		}
	}
}
