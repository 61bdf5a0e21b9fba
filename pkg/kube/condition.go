package kube

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
)

// ErrNoNode: the cluster has no Node object of that name.
var ErrNoNode = errors.New("no such Node object")

// Network is what a node says of its own network in the condition
// NetworkUnavailable, by which Kubernetes keeps pods away from a node that
// cannot attach any.
type Network struct {
	Up bool
	// Reason is one word, Message a sentence.
	Reason, Message string
}

// PublishNetwork writes the condition on the Node object of that name, if the
// object says something else. Before the nodes are known it does nothing.
func (w *Window) PublishNetwork(ctx context.Context, node string, n Network) error {
	if !w.synced.Load() {
		return nil
	}
	stored, exists, err := w.nodes.GetStore().GetByKey(node)
	if err != nil || !exists {
		return fmt.Errorf("publish network condition: the cluster has no node %s: %w", node, cmp.Or(err, ErrNoNode))
	}
	obj := stored.(*corev1.Node)
	want := corev1.NodeCondition{Type: corev1.NodeNetworkUnavailable, Status: corev1.ConditionTrue, Reason: n.Reason, Message: n.Message}
	if n.Up {
		want.Status = corev1.ConditionFalse
	}
	now := metav1.Now()
	want.LastHeartbeatTime, want.LastTransitionTime = now, now
	i := slices.IndexFunc(obj.Status.Conditions, func(c corev1.NodeCondition) bool { return c.Type == want.Type })
	if i >= 0 {
		have := obj.Status.Conditions[i]
		if have.Status == want.Status && have.Reason == want.Reason && have.Message == want.Message {
			return nil
		}
		if have.Status == want.Status {
			want.LastTransitionTime = have.LastTransitionTime
		}
	}
	// Conditions are merged by type: the kubelet's own stay as they are.
	patch, err := json.Marshal(map[string]any{"status": map[string]any{"conditions": []corev1.NodeCondition{want}}})
	if err != nil {
		return fmt.Errorf("publish network condition: %w", err)
	}
	if _, err := w.cfg.Client.CoreV1().Nodes().Patch(ctx, node, types.StrategicMergePatchType, patch, metav1.PatchOptions{}, "status"); err != nil {
		return fmt.Errorf("publish network condition: %w", err)
	}
	return nil
}
