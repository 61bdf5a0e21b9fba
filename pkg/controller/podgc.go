package controller

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/tools/cache"

	"meshd.dev/pkg/reconcile"
)

// podGC deletes the pods nobody will ever finish: those bound to a Node that
// no longer exists, those being deleted that no node ever had, and the oldest
// of more finished ones than anybody will read.
type podGC struct {
	plane       *plane
	pods, nodes cache.SharedIndexInformer
	loop        *reconcile.Loop
	// missing remembers since when a node is gone.
	missing map[string]time.Time
	now     func() time.Time
}

const (
	// quarantine is how long a Node must be gone before its pods are: time for
	// a slow cache, and for a node that is deleted and registers again.
	quarantine = 3 * time.Second
	// maxFinished is how many finished pods without a living owner are kept.
	maxFinished = 500
)

func newPodGC(p *plane) *podGC {
	c := &podGC{
		plane:   p,
		pods:    p.shared.Core().V1().Pods().Informer(),
		nodes:   p.shared.Core().V1().Nodes().Informer(),
		missing: map[string]time.Time{},
		now:     time.Now,
	}
	c.loop = p.loop("podgc", c.do, func(cfg *reconcile.Config) { cfg.Resync = time.Second })
	return c
}

func (c *podGC) Run(ctx context.Context) error {
	if !synced(ctx, c.pods, c.nodes) {
		return nil
	}
	return c.loop.Run(ctx)
}

func (c *podGC) do(ctx context.Context) error {
	pods := podsOf(c.pods.GetStore())
	gone := c.goneNodes(pods)
	var errs []error
	for _, b := range burials(pods, gone, maxFinished) {
		if err := c.bury(ctx, b); err != nil {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// goneNodes are the nodes pods are bound to that have been missing for the
// whole quarantine.
func (c *podGC) goneNodes(pods []*corev1.Pod) map[string]bool {
	gone, seen := map[string]bool{}, map[string]bool{}
	for _, p := range pods {
		name := p.Spec.NodeName
		if name == "" || seen[name] {
			continue
		}
		if _, ok, _ := c.nodes.GetStore().GetByKey(name); ok {
			continue
		}
		seen[name] = true
		if _, ok := c.missing[name]; !ok {
			c.missing[name] = c.now()
		}
		gone[name] = c.now().Sub(c.missing[name]) >= quarantine
	}
	for name := range c.missing {
		if !seen[name] {
			delete(c.missing, name)
		}
	}
	return gone
}

func (c *podGC) bury(ctx context.Context, b burial) error {
	if b.gone {
		// The cache may be behind: ask before believing that a node is gone.
		if _, err := c.plane.client.CoreV1().Nodes().Get(ctx, b.pod.Spec.NodeName, metav1.GetOptions{}); !apierrors.IsNotFound(err) {
			return err
		}
	}
	err := c.plane.client.CoreV1().Pods(b.pod.Namespace).Delete(ctx, b.pod.Name, metav1.DeleteOptions{
		GracePeriodSeconds: new(int64), Preconditions: &metav1.Preconditions{UID: &b.pod.UID}})
	if err != nil && !apierrors.IsNotFound(err) && !apierrors.IsConflict(err) {
		return fmt.Errorf("delete pod %s/%s (%s): %w", b.pod.Namespace, b.pod.Name, b.why, err)
	}
	c.plane.cfg.Log.Info("pod deleted for good", "pod", b.pod.Namespace+"/"+b.pod.Name, "why", b.why)
	return nil
}

// burial is a pod to delete at once, without grace, and why.
type burial struct {
	pod  *corev1.Pod
	why  string
	gone bool
}

// burials decides which pods nobody else will finish.
func burials(pods []*corev1.Pod, gone map[string]bool, keep int) []burial {
	var out []burial
	var finished []*corev1.Pod
	for _, p := range pods {
		switch {
		case p.Spec.NodeName != "" && gone[p.Spec.NodeName]:
			out = append(out, burial{p, fmt.Sprintf("node %s is gone", p.Spec.NodeName), true})
		case p.Spec.NodeName == "" && p.DeletionTimestamp != nil:
			out = append(out, burial{p, "deleted before a node had it", false})
		case p.Status.Phase == corev1.PodSucceeded || p.Status.Phase == corev1.PodFailed:
			finished = append(finished, p)
		}
	}
	slices.SortStableFunc(finished, func(a, b *corev1.Pod) int { return a.CreationTimestamp.Compare(b.CreationTimestamp.Time) })
	for _, p := range finished[:max(0, len(finished)-keep)] {
		out = append(out, burial{p, "too many finished pods", false})
	}
	return out
}

func podsOf(store cache.Store) []*corev1.Pod {
	objs := store.List()
	pods := make([]*corev1.Pod, 0, len(objs))
	for _, o := range objs {
		pods = append(pods, o.(*corev1.Pod))
	}
	return pods
}
