package controller

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/klog/v2"

	"meshd.dev/pkg/controller/liveness"
)

// view is everything the node lifecycle controller decides from, at one
// moment; plan is what it decides.
type view struct {
	nodes    []*corev1.Node
	pods     map[string][]*corev1.Pod // by node
	verdicts map[string]liveness.Verdict
	storm    []string
	blind    time.Duration
	// evictAfter is how long a pod without a toleration of its own stays on a
	// lost node.
	evictAfter time.Duration
	// taintedFor is the age of NoExecute taints that are not ours.
	taintedFor map[taintOn]time.Duration
	now        time.Time
}

// taintOn is a taint on one node.
type taintOn struct {
	node       types.UID
	key, value string
}

// step is one thing to do; its String reads like what a person would say.
type step interface {
	fmt.Stringer
	do(context.Context, *nodeLifecycle) error
}

// plan for all nodes, in order of name. Taints before pods: nothing is to be
// scheduled back to where it is taken from.
func (v view) plan() []step {
	var steps []step
	for _, n := range v.nodes {
		verdict := v.verdicts[n.Name]
		if verdict.State == liveness.Lost {
			if readiness(n) != corev1.ConditionUnknown {
				steps = append(steps, markUnknown{n, v.now})
			}
		}
		if want := wantTaints(n, verdict.State); !sameTaints(n.Spec.Taints, want) {
			steps = append(steps, setTaints{n, want})
		}
		for _, p := range v.pods[n.Name] {
			if s := v.podStep(n, p, verdict); s != nil {
				steps = append(steps, s)
			}
		}
	}
	return steps
}

// podStep decides what happens to one pod of node n, nil for nothing.
func (v view) podStep(n *corev1.Node, p *corev1.Pod, verdict liveness.Verdict) step {
	if p.Status.Phase == corev1.PodSucceeded || p.Status.Phase == corev1.PodFailed {
		return nil
	}
	if p.DeletionTimestamp == nil && len(v.storm) == 0 {
		if why := v.evicts(n, p, verdict); why != "" {
			return evictPod{p, why}
		}
	}
	if ready := podCondition(p, corev1.PodReady); verdict.State == liveness.Lost && ready != nil && ready.Status == corev1.ConditionTrue {
		return markNotReady{p, v.now}
	}
	return nil
}

// evicts says why p has to leave n now, or "".
func (v view) evicts(n *corev1.Node, p *corev1.Pod, verdict liveness.Verdict) string {
	if verdict.State == liveness.Lost && replaceable(p) {
		stay, always := patience(p, unreachable(corev1.TaintEffectNoExecute), v.evictAfter)
		if !always && verdict.For >= stay {
			return fmt.Sprintf("node %s is unreachable", n.Name)
		}
	}
	for _, t := range n.Spec.Taints {
		if t.Effect != corev1.TaintEffectNoExecute || ours(t) {
			continue
		}
		stay, always := patience(p, t, 0)
		if !always && v.taintedFor[taintOn{n.UID, t.Key, t.Value}] >= stay {
			return fmt.Sprintf("node %s has taint %s", n.Name, t.ToString())
		}
	}
	return ""
}

// replaceable says whether deleting p on a lost node gains anything and risks
// nothing that must not be: somebody makes another one, and that other one
// does not carry the name and the data of one that may still be running.
func replaceable(p *corev1.Pod) bool {
	owner := metav1.GetControllerOf(p)
	if owner == nil {
		return slices.ContainsFunc(p.Spec.Tolerations, func(t corev1.Toleration) bool {
			return t.Key == corev1.TaintNodeUnreachable && t.TolerationSeconds != nil
		})
	}
	return owner.Kind != "StatefulSet" && owner.Kind != "DaemonSet" && owner.Kind != "Node"
}

// patience is how long p may stay on a node with taint: for ever when it
// tolerates it without a limit, the shortest limit of its tolerations that
// match, or standard when it has no wish of its own.
func patience(p *corev1.Pod, taint corev1.Taint, standard time.Duration) (stay time.Duration, always bool) {
	stay, always = standard, false
	wishes := 0
	for i := range p.Spec.Tolerations {
		t := &p.Spec.Tolerations[i]
		if !t.ToleratesTaint(klog.Logger{}, &taint, true) {
			continue
		}
		limited := t.TolerationSeconds != nil
		var d time.Duration
		if limited {
			d = time.Duration(max(0, *t.TolerationSeconds)) * time.Second
		}
		switch {
		case wishes == 0:
			stay, always = d, !limited
		case limited && (always || d < stay):
			stay, always = d, false
		}
		wishes++
	}
	return stay, always
}

func unreachable(effect corev1.TaintEffect) corev1.Taint {
	return corev1.Taint{Key: corev1.TaintNodeUnreachable, Effect: effect}
}

// ours are the taints only this controller sets and removes.
func ours(t corev1.Taint) bool {
	return t.Key == corev1.TaintNodeUnreachable || t.Key == corev1.TaintNodeNotReady || t.Key == corev1.TaintNodeUnschedulable
}

// wantTaints is what the taints of n should be: those of others as they are,
// and ours after its state. A node that lives but says it is not ready takes
// no new pods and keeps those it has: its agent is there to look after them.
func wantTaints(n *corev1.Node, state liveness.State) []corev1.Taint {
	if state == liveness.Unproven {
		return n.Spec.Taints
	}
	var want []corev1.Taint
	for _, t := range n.Spec.Taints {
		if !ours(t) {
			want = append(want, t)
		}
	}
	add := func(t corev1.Taint) {
		for _, have := range n.Spec.Taints {
			if have.MatchTaint(&t) {
				t = have // with its time
			}
		}
		want = append(want, t)
	}
	if n.Spec.Unschedulable {
		add(corev1.Taint{Key: corev1.TaintNodeUnschedulable, Effect: corev1.TaintEffectNoSchedule})
	}
	switch {
	case state == liveness.Lost:
		add(unreachable(corev1.TaintEffectNoSchedule))
		add(unreachable(corev1.TaintEffectNoExecute))
	case readiness(n) != corev1.ConditionTrue:
		add(corev1.Taint{Key: corev1.TaintNodeNotReady, Effect: corev1.TaintEffectNoSchedule})
	}
	return want
}

func sameTaints(a, b []corev1.Taint) bool {
	return len(a) == len(b) && !slices.ContainsFunc(a, func(t corev1.Taint) bool {
		return !slices.ContainsFunc(b, func(u corev1.Taint) bool { return t.MatchTaint(&u) && t.Value == u.Value })
	})
}

// markUnknown says that nobody knows any more how the node is.
type markUnknown struct {
	node *corev1.Node
	now  time.Time
}

func (s markUnknown) String() string { return "mark node " + s.node.Name + " Unknown" }

func (s markUnknown) do(ctx context.Context, c *nodeLifecycle) error {
	kinds := []corev1.NodeConditionType{corev1.NodeReady}
	for _, k := range s.node.Status.Conditions {
		if k.Type != corev1.NodeReady && k.Status != corev1.ConditionUnknown {
			kinds = append(kinds, k.Type)
		}
	}
	var conditions []any
	for _, t := range kinds {
		conditions = append(conditions, map[string]any{
			"type": t, "status": corev1.ConditionUnknown, "reason": "NodeStatusUnknown",
			"message": "The agent of the node stopped renewing its lease.", "lastTransitionTime": s.now.UTC().Format(time.RFC3339),
		})
	}
	patch, err := json.Marshal(map[string]any{"status": map[string]any{"conditions": conditions}})
	if err != nil {
		return err
	}
	if _, err := c.plane.client.CoreV1().Nodes().Patch(ctx, s.node.Name, types.StrategicMergePatchType, patch, metav1.PatchOptions{}, "status"); err != nil {
		return ignoreGone(err)
	}
	c.plane.cfg.Log.Info("node is lost", "node", s.node.Name)
	c.recorder.Eventf(s.node, corev1.EventTypeWarning, "NodeNotReady", "Node %s is unreachable: its lease was not renewed for %s", s.node.Name, c.plane.cfg.NodeGracePeriod)
	return nil
}

// setTaints replaces the taints of a node, unless it changed since.
type setTaints struct {
	node   *corev1.Node
	taints []corev1.Taint
}

func (s setTaints) String() string {
	out := "taint node " + s.node.Name
	if len(s.taints) == 0 {
		return out + " not at all"
	}
	for _, t := range s.taints {
		out += " " + t.ToString()
	}
	return out
}

func (s setTaints) do(ctx context.Context, c *nodeLifecycle) error {
	taints := slices.Clone(s.taints)
	for i := range taints {
		if taints[i].TimeAdded == nil && ours(taints[i]) && taints[i].Effect == corev1.TaintEffectNoExecute {
			now := metav1.NewTime(c.now())
			taints[i].TimeAdded = &now
		}
	}
	patch, err := json.Marshal(map[string]any{
		"metadata": map[string]any{"uid": s.node.UID, "resourceVersion": s.node.ResourceVersion},
		"spec":     map[string]any{"taints": taints},
	})
	if err != nil {
		return err
	}
	_, err = c.plane.client.CoreV1().Nodes().Patch(ctx, s.node.Name, types.MergePatchType, patch, metav1.PatchOptions{})
	if apierrors.IsConflict(err) {
		c.loop.Kick() // the cache is behind; look again
		return nil
	}
	if err != nil {
		return ignoreGone(err)
	}
	c.plane.cfg.Log.Info(s.String())
	return nil
}

// markNotReady takes a pod of a lost node out of its services.
type markNotReady struct {
	pod *corev1.Pod
	now time.Time
}

func (s markNotReady) String() string {
	return "mark pod " + s.pod.Namespace + "/" + s.pod.Name + " not ready"
}

func (s markNotReady) do(ctx context.Context, c *nodeLifecycle) error {
	c.recorder.Event(s.pod, corev1.EventTypeWarning, "NodeNotReady", "Node is not ready")
	return patchPodCondition(ctx, c.plane, s.pod, corev1.PodCondition{
		Type: corev1.PodReady, Status: corev1.ConditionFalse, Reason: "NodeUnreachable",
		Message: "The agent of node " + s.pod.Spec.NodeName + " stopped renewing its lease.", LastTransitionTime: metav1.NewTime(s.now),
	})
}

// evictPod deletes a pod with its own grace period, so that its owner makes
// another one. The object goes when the node is back and has stopped it, or
// when the Node is deleted.
type evictPod struct {
	pod *corev1.Pod
	why string
}

func (s evictPod) String() string {
	return "evict pod " + s.pod.Namespace + "/" + s.pod.Name + ": " + s.why
}

func (s evictPod) do(ctx context.Context, c *nodeLifecycle) error {
	err := c.plane.client.CoreV1().Pods(s.pod.Namespace).Delete(ctx, s.pod.Name, metav1.DeleteOptions{Preconditions: &metav1.Preconditions{UID: &s.pod.UID}})
	if err != nil {
		return ignoreGone(err)
	}
	c.plane.cfg.Log.Info(s.String())
	c.recorder.Event(s.pod, corev1.EventTypeNormal, "TaintManagerEviction", "Deleted: "+s.why)
	return nil
}

// ignoreGone drops errors that say the object is gone or another one.
func ignoreGone(err error) error {
	if apierrors.IsNotFound(err) || apierrors.IsConflict(err) {
		return nil
	}
	return err
}
