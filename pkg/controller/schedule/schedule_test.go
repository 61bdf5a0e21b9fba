package schedule

import (
	"fmt"
	"strconv"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/types"
)

// Nodes and pods are written as one line each: a name and words.
//
//	node: cpu=2 mem=4Gi pods=10 taint=k:v:NoSchedule cordoned notready zone=z
//	pod:  cpu=100m mem=1Gi owner=a on=n1 app=x port=80 tolerate=k node=zone:z
//	      near=app:x far=app:x farzone=app:x spread=zone:1 softspread=zone
//	      prefer=zone:z priority=5 terminating done

func node(line string) *corev1.Node {
	words := strings.Fields(line)
	n := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: words[0], Labels: map[string]string{corev1.LabelHostname: words[0]}}}
	n.Status.Allocatable = corev1.ResourceList{"cpu": resource.MustParse("4"), "memory": resource.MustParse("8Gi"), "pods": resource.MustParse("110")}
	ready := corev1.ConditionTrue
	for _, w := range words[1:] {
		k, v, _ := strings.Cut(w, "=")
		switch k {
		case "cpu", "pods":
			n.Status.Allocatable[corev1.ResourceName(k)] = resource.MustParse(v)
		case "mem":
			n.Status.Allocatable["memory"] = resource.MustParse(v)
		case "taint":
			t := strings.Split(v, ":")
			n.Spec.Taints = append(n.Spec.Taints, corev1.Taint{Key: t[0], Value: t[1], Effect: corev1.TaintEffect(t[2])})
		case "cordoned":
			n.Spec.Unschedulable = true
			n.Spec.Taints = append(n.Spec.Taints, corev1.Taint{Key: corev1.TaintNodeUnschedulable, Effect: corev1.TaintEffectNoSchedule})
		case "notready":
			ready = corev1.ConditionFalse
		default:
			n.Labels[k] = v
		}
	}
	n.Status.Conditions = []corev1.NodeCondition{{Type: corev1.NodeReady, Status: ready}}
	return n
}

func selector(kv string) *metav1.LabelSelector {
	k, v, _ := strings.Cut(kv, ":")
	return &metav1.LabelSelector{MatchLabels: map[string]string{k: v}}
}

func pod(i int, line string) *corev1.Pod {
	words := strings.Fields(line)
	p := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{
		Namespace: "default", Name: words[0], UID: types.UID(fmt.Sprint(i, words[0])), Labels: map[string]string{},
		CreationTimestamp: metav1.NewTime(time.Date(2026, 1, 1, 0, 0, i, 0, time.UTC)),
	}}
	c := corev1.Container{Name: "c", Resources: corev1.ResourceRequirements{Requests: corev1.ResourceList{}}}
	a := &corev1.Affinity{NodeAffinity: &corev1.NodeAffinity{}, PodAffinity: &corev1.PodAffinity{}, PodAntiAffinity: &corev1.PodAntiAffinity{}}
	p.Spec.Affinity = a
	for _, w := range words[1:] {
		k, v, _ := strings.Cut(w, "=")
		switch k {
		case "cpu":
			c.Resources.Requests["cpu"] = resource.MustParse(v)
		case "mem":
			c.Resources.Requests["memory"] = resource.MustParse(v)
		case "owner":
			yes := true
			p.OwnerReferences = []metav1.OwnerReference{{UID: types.UID(v), Controller: &yes}}
		case "on":
			p.Spec.NodeName = v
		case "ns":
			p.Namespace = v
		case "port":
			n, _ := strconv.Atoi(v)
			c.Ports = append(c.Ports, corev1.ContainerPort{HostPort: int32(n)})
		case "tolerate":
			p.Spec.Tolerations = append(p.Spec.Tolerations, corev1.Toleration{Key: v, Operator: corev1.TolerationOpExists})
		case "node":
			key, value, _ := strings.Cut(v, ":")
			p.Spec.NodeSelector = map[string]string{key: value}
		case "named": // as the DaemonSet controller asks for a node
			a.NodeAffinity.RequiredDuringSchedulingIgnoredDuringExecution = &corev1.NodeSelector{NodeSelectorTerms: []corev1.NodeSelectorTerm{{
				MatchFields: []corev1.NodeSelectorRequirement{{Key: "metadata.name", Operator: corev1.NodeSelectorOpIn, Values: []string{v}}}}}}
		case "prefer":
			key, value, _ := strings.Cut(v, ":")
			a.NodeAffinity.PreferredDuringSchedulingIgnoredDuringExecution = []corev1.PreferredSchedulingTerm{{Weight: 10, Preference: corev1.NodeSelectorTerm{
				MatchExpressions: []corev1.NodeSelectorRequirement{{Key: key, Operator: corev1.NodeSelectorOpIn, Values: []string{value}}}}}}
		case "near":
			a.PodAffinity.RequiredDuringSchedulingIgnoredDuringExecution = []corev1.PodAffinityTerm{{LabelSelector: selector(v), TopologyKey: corev1.LabelHostname}}
		case "nearns":
			a.PodAffinity.RequiredDuringSchedulingIgnoredDuringExecution = []corev1.PodAffinityTerm{{LabelSelector: selector(v), TopologyKey: corev1.LabelHostname, NamespaceSelector: selector("team:b")}}
		case "far":
			a.PodAntiAffinity.RequiredDuringSchedulingIgnoredDuringExecution = []corev1.PodAffinityTerm{{LabelSelector: selector(v), TopologyKey: corev1.LabelHostname}}
		case "farzone":
			a.PodAntiAffinity.RequiredDuringSchedulingIgnoredDuringExecution = []corev1.PodAffinityTerm{{LabelSelector: selector(v), TopologyKey: "zone"}}
		case "softnear":
			a.PodAffinity.PreferredDuringSchedulingIgnoredDuringExecution = []corev1.WeightedPodAffinityTerm{{Weight: 5, PodAffinityTerm: corev1.PodAffinityTerm{LabelSelector: selector(v), TopologyKey: corev1.LabelHostname}}}
		case "spread", "softspread":
			key, skew, _ := strings.Cut(v, ":")
			n, _ := strconv.Atoi(skew)
			when := corev1.DoNotSchedule
			if k == "softspread" {
				when = corev1.ScheduleAnyway
			}
			p.Spec.TopologySpreadConstraints = []corev1.TopologySpreadConstraint{{MaxSkew: int32(n), TopologyKey: key, WhenUnsatisfiable: when, LabelSelector: selector("app:x")}}
		case "priority":
			n, _ := strconv.Atoi(v)
			n32 := int32(n)
			p.Spec.Priority = &n32
		case "terminating":
			now := metav1.Now()
			p.DeletionTimestamp = &now
		case "done":
			p.Status.Phase = corev1.PodSucceeded
		default:
			p.Labels[k] = v
		}
	}
	p.Spec.Containers = []corev1.Container{c}
	return p
}

const three = "n1\nn2\nn3"

func TestPlan(t *testing.T) {
	for _, tc := range []struct{ name, nodes, pods, want string }{
		{"three of one owner over three empty nodes", three, "a owner=d\nb owner=d\nc owner=d", "a n1, b n2, c n3"},
		{"a fourth goes anywhere, a fifth elsewhere", three, "a owner=d\nb owner=d\nc owner=d\nd owner=d\ne owner=d", "a n1, b n2, c n3, d n1, e n2"},
		{"two owners do not mind each other", "n1\nn2", "a owner=d\nb owner=e\nc owner=d\nd owner=e", "a n1, b n2, c n2, d n1"},
		{"spread beats a fuller node", "n1\nn2", "big on=n2 cpu=3 mem=6Gi\nx on=n1 owner=d\na owner=d", "a n2"},
		{"without an owner the emptier node", "n1\nn2", "x on=n1 cpu=1\na", "a n2"},
		{"pods that request nothing spread too", three, "a\nb\nc", "a n1, b n2, c n3"},
		{"pods that leave do not count for the spread", "n1\nn2", "x on=n1 owner=d terminating\ny on=n2 owner=d\na owner=d", "a n1"},
		{"finished pods take nothing", "n1 cpu=1", "x on=n1 cpu=1 done\na cpu=1", "a n1"},
		{"no nodes", "", "a", "a: no nodes available to schedule pods"},
		{"not enough CPU", three, "a cpu=5", "a: 0/3 nodes are available: 3 Insufficient cpu."},
		{"not enough of both", "n1", "a cpu=5 mem=9Gi", "a: 0/1 nodes are available: 1 Insufficient cpu, 1 Insufficient memory."},
		{"what others take counts", "n1\nn2", "x on=n1 cpu=3\na cpu=2\nb cpu=2\nc cpu=2", "a n2, b n2, c: 0/2 nodes are available: 2 Insufficient cpu."},
		{"too many pods", "n1 pods=1", "x on=n1\na", "a: 0/1 nodes are available: 1 Too many pods."},
		{"cordoned", "n1 cordoned\nn2 cordoned", "a", "a: 0/2 nodes are available: 2 node(s) were unschedulable."},
		{"cordon tolerated", "n1 cordoned", "a tolerate=node.kubernetes.io/unschedulable", "a n1"},
		{"taint", "n1 taint=gpu:yes:NoSchedule\nn2 cpu=1", "a cpu=2", "a: 0/2 nodes are available: 1 Insufficient cpu, 1 node(s) had untolerated taint {gpu: yes}."},
		{"taint tolerated", "n1 taint=gpu:yes:NoSchedule", "a tolerate=gpu", "a n1"},
		{"soft taint is avoided", "n1 taint=old:yes:PreferNoSchedule\nn2", "x on=n2 cpu=1\na", "a n2"},
		{"not ready and not yet tainted", "n1 notready\nn2", "a owner=d\nb owner=d", "a n2, b n2"},
		{"node selector", "n1\nn2 zone=b", "a node=zone:b\nb node=zone:c", "a n2, b: 0/2 nodes are available: 2 node(s) didn't match Pod's node affinity/selector."},
		{"by field, as DaemonSets do", three, "a named=n3", "a n3"},
		{"preferred node", "n1\nn2 zone=b", "x on=n2 cpu=1\na prefer=zone:b", "a n2"},
		{"host port", "n1\nn2", "a port=80\nb port=80\nc port=80", "a n1, b n2, c: 0/2 nodes are available: 2 node(s) didn't have free ports for the requested pod ports."},
		{"far from its own kind", "n1\nn2", "a app=x far=app:x\nb app=x far=app:x\nc app=x far=app:x", "a n1, b n2, c: 0/2 nodes are available: 2 node(s) didn't match pod anti-affinity rules."},
		{"kept away by one that is there", "n1", "x on=n1 app=x far=app:y\na app=y", "a: 0/1 nodes are available: 1 node(s) didn't satisfy existing pods anti-affinity rules."},
		{"far by zone", "n1 zone=a\nn2 zone=a\nn3 zone=b", "a app=x farzone=app:x\nb app=x farzone=app:x", "a n1, b n3"},
		{"near another", three, "x on=n2 app=x cpu=1\na near=app:x", "a n2"},
		{"near nobody", three, "a near=app:x", "a: 0/3 nodes are available: 3 node(s) didn't match pod affinity rules."},
		{"first of a group that wants to be together", three, "a app=x near=app:x\nb app=x near=app:x", "a n1, b n1"},
		{"near one of another namespace", three, "x on=n3 ns=other app=x\na near=app:x\nb nearns=app:x", "a: 0/3 nodes are available: 3 node(s) didn't match pod affinity rules., b n3"},
		{"rather near another", three, "x on=n2 app=x cpu=1\na softnear=app:x", "a n2"},
		{"spread over zones", "n1 zone=a\nn2 zone=a\nn3 zone=b", "a app=x spread=zone:1\nb app=x spread=zone:1\nc app=x spread=zone:1\nd app=x spread=zone:1", "a n1, b n3, c n2, d n3"},
		{"spread cannot be kept", "n1 zone=a\nn2 zone=b cordoned", "x on=n1 app=x\na app=x spread=zone:1", "a: 0/2 nodes are available: 1 node(s) didn't match pod topology spread constraints, 1 node(s) were unschedulable."},
		{"spread needs the label", "n1", "a app=x spread=zone:1", "a: 0/1 nodes are available: 1 node(s) didn't match pod topology spread constraints (missing required label)."},
		{"rather spread over zones", "n1 zone=a\nn2 zone=b", "x on=n1 app=x\ny on=n2 cpu=1\na app=x softspread=zone:1", "a n2"},
		{"important ones first", "n1 pods=1", "a\nb priority=10", "b n1, a: 0/1 nodes are available: 1 Too many pods."},
	} {
		t.Run(tc.name, func(t *testing.T) {
			var pic Picture
			for _, l := range lines(tc.nodes) {
				pic.Nodes = append(pic.Nodes, node(l))
			}
			var waiting []*corev1.Pod
			for i, l := range lines(tc.pods) {
				if p := pod(i, l); p.Spec.NodeName != "" {
					pic.Pods = append(pic.Pods, p)
				} else {
					waiting = append(waiting, p)
				}
			}
			pic.Namespaces = map[string]labels.Set{"default": {}, "other": {"team": "b"}}
			var got []string
			for _, p := range New(pic).Plan(waiting) {
				if p.Err != nil {
					got = append(got, p.Pod.Name+": "+p.Err.Error())
				} else {
					got = append(got, p.Pod.Name+" "+p.Node)
				}
			}
			if g := strings.Join(got, ", "); g != tc.want {
				t.Errorf("\n got %s\nwant %s", g, tc.want)
			}
		})
	}
}

func lines(s string) []string {
	if s == "" {
		return nil
	}
	return strings.Split(s, "\n")
}

// A hundred nodes and a thousand pods: what a round costs at the size we mean.
func BenchmarkPlan(b *testing.B) {
	var pic Picture
	for i := range 100 {
		pic.Nodes = append(pic.Nodes, node(fmt.Sprintf("n%03d cpu=32 mem=64Gi zone=z%d", i, i%3)))
	}
	for i := range 1000 {
		pic.Pods = append(pic.Pods, pod(i, fmt.Sprintf("p%d on=n%03d cpu=100m owner=d%d app=x", i, i%100, i%20)))
	}
	waiting := make([]*corev1.Pod, 0, 30)
	for i := range 30 {
		waiting = append(waiting, pod(i, fmt.Sprintf("w%d cpu=100m owner=new app=x", i)))
	}
	for b.Loop() {
		New(pic).Plan(waiting)
	}
}
