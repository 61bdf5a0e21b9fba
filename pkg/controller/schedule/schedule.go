// Package schedule decides on which node a pod runs. It is pure: a Cluster is
// a picture of nodes and pods, Plan says where each waiting pod goes or why
// it cannot, and nothing here speaks to anybody.
//
// The rules and the words are those of kube-scheduler's default plugins:
// taints, node selector and affinity, host ports, resources, topology spread,
// affinity between pods. Not here: preemption, gang scheduling, device claims.
package schedule

import (
	"cmp"
	"fmt"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/types"
	corev1helpers "k8s.io/component-helpers/scheduling/corev1"
)

// Placement is what Plan decided for one pod: a node, or why none.
type Placement struct {
	Pod  *corev1.Pod
	Node string
	// Err is nil when Node is set, an *Unschedulable when no node will do, and
	// anything else when the pod itself cannot be understood.
	Err error
}

// String reads like the command a person would type.
func (p Placement) String() string {
	if p.Err != nil {
		return fmt.Sprintf("%s/%s waits: %s", p.Pod.Namespace, p.Pod.Name, p.Err)
	}
	return fmt.Sprintf("bind %s/%s to %s", p.Pod.Namespace, p.Pod.Name, p.Node)
}

// Unschedulable says for how many nodes which reasons hold.
type Unschedulable struct {
	Nodes   int
	Reasons map[string]int
}

// Error is the sentence kube-scheduler writes into its FailedScheduling event.
func (u *Unschedulable) Error() string {
	if u.Nodes == 0 {
		return "no nodes available to schedule pods"
	}
	var reasons []string
	for r, n := range u.Reasons {
		reasons = append(reasons, fmt.Sprintf("%d %s", n, r))
	}
	slices.Sort(reasons)
	return fmt.Sprintf("0/%d nodes are available: %s.", u.Nodes, strings.Join(reasons, ", "))
}

// Picture is what a Cluster is made from. Nothing in it is changed.
type Picture struct {
	Nodes []*corev1.Node
	// Pods that have a node, finished ones included or not.
	Pods []*corev1.Pod
	// Namespaces by name with their labels, for affinity terms that select
	// namespaces by them.
	Namespaces map[string]labels.Set
	// Volumes, when set, says what the volumes of a pod ask of a node. An error
	// means the pod has to wait for the reason it names.
	Volumes func(*corev1.Pod) (VolumeFilter, error)
}

// VolumeFilter gives the reason why a pod with these volumes cannot run on a
// node, or "".
type VolumeFilter func(*corev1.Node) string

// Cluster is nodes with what runs on them. Pods placed by Plan are in it.
type Cluster struct {
	nodes      []*host
	byName     map[string]*host
	namespaces map[string]labels.Set
	volumes    func(*corev1.Pod) (VolumeFilter, error)
	// guarded are the pods with required anti-affinity.
	guarded []placed
}

type placed struct {
	pod  *corev1.Pod
	node *host
}

// host is a node and what is taken of it.
type host struct {
	*corev1.Node
	taints []corev1.Taint
	pods   []*corev1.Pod
	used   amounts
	// guess is used with the default requests for pods that state none.
	guess  amounts
	ports  []hostPort
	owners map[types.UID]int
}

// New takes the picture in.
func New(p Picture) *Cluster {
	c := &Cluster{byName: map[string]*host{}, namespaces: p.Namespaces, volumes: p.Volumes}
	for _, n := range p.Nodes {
		if n.DeletionTimestamp != nil {
			continue
		}
		h := &host{Node: n, taints: taintsOf(n), used: amounts{}, guess: amounts{}, owners: map[types.UID]int{}}
		c.nodes = append(c.nodes, h)
		c.byName[n.Name] = h
	}
	slices.SortFunc(c.nodes, func(a, b *host) int { return cmp.Compare(a.Name, b.Name) })
	for _, pod := range p.Pods {
		c.Add(pod, pod.Spec.NodeName)
	}
	return c
}

// Add puts pod on the node called name. Finished pods take nothing.
func (c *Cluster) Add(pod *corev1.Pod, name string) {
	h := c.byName[name]
	if h == nil || pod.Status.Phase == corev1.PodSucceeded || pod.Status.Phase == corev1.PodFailed {
		return
	}
	h.pods = append(h.pods, pod)
	h.used.add(requests(pod))
	h.guess.add(guessed(pod))
	h.ports = append(h.ports, portsOf(pod)...)
	if uid := ownerOf(pod); uid != "" && pod.DeletionTimestamp == nil {
		h.owners[uid]++
	}
	if len(antiAffinityTerms(pod)) > 0 {
		c.guarded = append(c.guarded, placed{pod, h})
	}
}

// Plan places the waiting pods one after the other, important and old ones
// first, each seeing where those before it went.
func (c *Cluster) Plan(waiting []*corev1.Pod) []Placement {
	waiting = slices.Clone(waiting)
	slices.SortFunc(waiting, func(a, b *corev1.Pod) int {
		return cmp.Or(
			-cmp.Compare(corev1helpers.PodPriority(a), corev1helpers.PodPriority(b)),
			a.CreationTimestamp.Compare(b.CreationTimestamp.Time),
			cmp.Compare(a.Namespace, b.Namespace),
			cmp.Compare(a.Name, b.Name))
	})
	plan := make([]Placement, 0, len(waiting))
	for _, pod := range waiting {
		node, err := c.Place(pod)
		plan = append(plan, Placement{Pod: pod, Node: node, Err: err})
		if err == nil {
			c.Add(pod, node)
		}
	}
	return plan
}

// Place chooses the node for pod: of those no filter refuses, the one with
// the best score; among equals the one with the fewest pods, then by name.
func (c *Cluster) Place(pod *corev1.Pod) (string, error) {
	filters, err := c.filters(pod)
	if err != nil {
		return "", err
	}
	why := &Unschedulable{Nodes: len(c.nodes), Reasons: map[string]int{}}
	var fit []*host
	for _, h := range c.nodes {
		reasons := refuse(filters, h)
		if len(reasons) == 0 {
			fit = append(fit, h)
		}
		for _, r := range reasons {
			why.Reasons[r]++
		}
	}
	if len(fit) == 0 {
		return "", why
	}
	scores := c.score(pod, fit)
	best := 0
	for i := range fit {
		if scores[i] > scores[best] || scores[i] == scores[best] && len(fit[i].pods) < len(fit[best].pods) {
			best = i
		}
	}
	return fit[best].Name, nil
}

// refuse returns the reasons of the first filter that has any.
func refuse(filters []filter, h *host) []string {
	for _, f := range filters {
		if r := f(h); len(r) > 0 {
			return r
		}
	}
	return nil
}

func ownerOf(pod *corev1.Pod) types.UID {
	for _, r := range pod.OwnerReferences {
		if r.Controller != nil && *r.Controller {
			return r.UID
		}
	}
	return ""
}

// taintsOf are the taints of n, and the one it is about to get: a node that
// does not say it is ready takes no pods, even before the taint is written.
func taintsOf(n *corev1.Node) []corev1.Taint {
	for _, t := range n.Spec.Taints {
		if t.Key == corev1.TaintNodeNotReady || t.Key == corev1.TaintNodeUnreachable {
			return n.Spec.Taints
		}
	}
	for _, c := range n.Status.Conditions {
		if c.Type == corev1.NodeReady && c.Status == corev1.ConditionTrue {
			return n.Spec.Taints
		}
	}
	return append(slices.Clone(n.Spec.Taints), corev1.Taint{Key: corev1.TaintNodeNotReady, Effect: corev1.TaintEffectNoSchedule})
}
