package controller

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"
	corev1 "k8s.io/api/core/v1"
	apiequality "k8s.io/apimachinery/pkg/api/equality"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/tools/cache"
	"k8s.io/client-go/tools/record"

	"meshd.dev/pkg/controller/schedule"
	"meshd.dev/pkg/reconcile"
)

// bindWorkers is how many bindings are written at once.
const bindWorkers = 8

// scheduler gives pods their nodes. Each round takes the whole picture, plans
// every waiting pod (package schedule) and writes the plan down.
type scheduler struct {
	plane                   *plane
	pods, nodes, namespaces cache.SharedIndexInformer
	// storage is nil where the API serves no volumes.
	storage          func() storage
	storageInformers []cache.SharedIndexInformer
	recorder         record.EventRecorder
	loop             *reconcile.Loop
	// assumed holds what was bound until the cache has seen it, so that the
	// next round counts it where it is. Only the loop touches it.
	assumed map[types.UID]assumption
	// waiting is how many pods found no node in the last round: while there
	// are none, only new pods are a reason for another round.
	waiting atomic.Int64
}

type assumption struct {
	key, node string
	pod       *corev1.Pod
}

func newScheduler(p *plane) *scheduler {
	s := &scheduler{
		plane:      p,
		pods:       p.shared.Core().V1().Pods().Informer(),
		nodes:      p.shared.Core().V1().Nodes().Informer(),
		namespaces: p.shared.Core().V1().Namespaces().Informer(),
		recorder:   p.recorder("default-scheduler"),
		assumed:    map[types.UID]assumption{},
	}
	s.loop = p.loop("scheduler", s.do)
	_, _ = s.pods.AddEventHandler(cache.ResourceEventHandlerFuncs{
		AddFunc:    s.podChanged,
		UpdateFunc: func(old, new any) { s.podMoved(old.(*corev1.Pod), new.(*corev1.Pod)) },
		DeleteFunc: func(any) { s.roomChanged() },
	})
	s.watchStorage(p)
	watch(s.nodes, s.roomChanged, func(old, new any) bool { return nodeMatters(old.(*corev1.Node), new.(*corev1.Node)) })
	return s
}

// watchStorage has a look at volumes where the API serves them.
func (s *scheduler) watchStorage(p *plane) {
	if !p.hasStorage {
		return
	}
	core := p.shared.Core().V1()
	claims, volumes, classes := core.PersistentVolumeClaims().Informer(), core.PersistentVolumes().Informer(), p.shared.Storage().V1().StorageClasses().Informer()
	s.storageInformers = []cache.SharedIndexInformer{claims, volumes, classes}
	for _, inf := range s.storageInformers {
		watch(inf, s.roomChanged, nil)
	}
	s.storage = func() storage { return readStorage(claims, volumes, classes) }
}

// podChanged is called for a pod that may be waiting.
func (s *scheduler) podChanged(obj any) {
	if waits(obj.(*corev1.Pod)) {
		s.loop.Kick()
	}
}

// podMoved is called for any change of a pod: it may wait now, or may have
// left its place.
func (s *scheduler) podMoved(old, new *corev1.Pod) {
	if waits(new) {
		if !apiequality.Semantic.DeepEqual(old.Spec, new.Spec) || !apiequality.Semantic.DeepEqual(old.Labels, new.Labels) {
			s.loop.Kick()
		}
		return
	}
	if old.Status.Phase != new.Status.Phase || old.DeletionTimestamp.IsZero() != new.DeletionTimestamp.IsZero() || old.Spec.NodeName != new.Spec.NodeName {
		s.roomChanged()
	}
}

// roomChanged is called when there may be a place for somebody who had none.
func (s *scheduler) roomChanged() {
	if s.waiting.Load() > 0 {
		s.loop.Kick()
	}
}

// waits says whether pod is ours to place.
func waits(pod *corev1.Pod) bool {
	return pod.Spec.NodeName == "" && pod.DeletionTimestamp == nil && len(pod.Spec.SchedulingGates) == 0 &&
		pod.Status.Phase != corev1.PodSucceeded && pod.Status.Phase != corev1.PodFailed &&
		(pod.Spec.SchedulerName == "" || pod.Spec.SchedulerName == corev1.DefaultSchedulerName)
}

// nodeMatters leaves out the heartbeats among the changes of a node.
func nodeMatters(old, new *corev1.Node) bool {
	return !apiequality.Semantic.DeepEqual(old.Spec, new.Spec) ||
		!apiequality.Semantic.DeepEqual(old.Labels, new.Labels) ||
		!apiequality.Semantic.DeepEqual(old.Status.Allocatable, new.Status.Allocatable) ||
		readiness(old) != readiness(new)
}

func readiness(n *corev1.Node) corev1.ConditionStatus {
	for _, c := range n.Status.Conditions {
		if c.Type == corev1.NodeReady {
			return c.Status
		}
	}
	return ""
}

func (s *scheduler) Run(ctx context.Context) error {
	if !synced(ctx, append(s.storageInformers, s.pods, s.nodes, s.namespaces)...) {
		return nil
	}
	return s.loop.Run(ctx)
}

func (s *scheduler) do(ctx context.Context) error {
	cluster, waiting := s.picture()
	if len(waiting) == 0 {
		s.waiting.Store(0)
		return nil
	}
	// Whatever changes from here on is a reason to look again.
	s.waiting.Store(int64(len(waiting)))
	plan := cluster.Plan(waiting)
	errs := make([]error, len(plan))
	var g errgroup.Group
	g.SetLimit(bindWorkers)
	done := make([]bool, len(plan))
	for i, p := range plan {
		g.Go(func() error {
			done[i], errs[i] = s.write(ctx, p)
			return nil
		})
	}
	_ = g.Wait()
	left := len(plan)
	for i, p := range plan {
		if done[i] {
			left--
			s.assumed[p.Pod.UID] = assumption{p.Pod.Namespace + "/" + p.Pod.Name, p.Node, p.Pod}
		}
	}
	s.waiting.Store(int64(left))
	return errors.Join(errs...)
}

// picture is the cluster as the caches show it, with what was bound since,
// and the pods that wait for a node.
func (s *scheduler) picture() (*schedule.Cluster, []*corev1.Pod) {
	s.forgetSeen()
	var waiting, bound []*corev1.Pod
	for _, p := range podsOf(s.pods.GetStore()) {
		_, assumed := s.assumed[p.UID]
		switch {
		case p.Spec.NodeName != "":
			bound = append(bound, p)
		case waits(p) && !assumed:
			waiting = append(waiting, p)
		}
	}
	if len(waiting) == 0 {
		return nil, nil
	}
	spaces := map[string]labels.Set{}
	for _, o := range s.namespaces.GetStore().List() {
		ns := o.(*corev1.Namespace)
		spaces[ns.Name] = ns.Labels
	}
	picture := schedule.Picture{Nodes: nodesOf(s.nodes.GetStore()), Pods: bound, Namespaces: spaces}
	if s.storage != nil {
		picture.Volumes = s.storage().filter
	}
	cluster := schedule.New(picture)
	for _, a := range s.assumed {
		cluster.Add(a.pod, a.node)
	}
	return cluster, waiting
}

// forgetSeen drops the assumptions the cache has caught up with.
func (s *scheduler) forgetSeen() {
	for uid, a := range s.assumed {
		obj, ok, _ := s.pods.GetStore().GetByKey(a.key)
		if !ok || obj.(*corev1.Pod).UID != uid || obj.(*corev1.Pod).Spec.NodeName != "" {
			delete(s.assumed, uid)
		}
	}
}

// write does what was decided, and says whether the pod is bound now: the
// reason why it is not, the wish for volumes on the chosen node, or the
// binding, in that order.
func (s *scheduler) write(ctx context.Context, p schedule.Placement) (bound bool, err error) {
	if p.Err != nil {
		return false, s.explain(ctx, p)
	}
	if missing, err := s.askVolumes(ctx, p); missing || err != nil {
		return false, err
	}
	err = s.plane.client.CoreV1().Pods(p.Pod.Namespace).Bind(ctx, &corev1.Binding{
		ObjectMeta: metav1.ObjectMeta{Namespace: p.Pod.Namespace, Name: p.Pod.Name, UID: p.Pod.UID},
		Target:     corev1.ObjectReference{Kind: "Node", Name: p.Node},
	}, metav1.CreateOptions{})
	if apierrors.IsNotFound(err) {
		return false, nil // deleted meanwhile; the cache will say so in a moment
	}
	if err != nil {
		return false, fmt.Errorf("%s: %w", p, err)
	}
	s.plane.cfg.Log.Debug("pod bound", "pod", p.Pod.Namespace+"/"+p.Pod.Name, "node", p.Node)
	s.recorder.Eventf(p.Pod, corev1.EventTypeNormal, "Scheduled", "Successfully assigned %s/%s to %s", p.Pod.Namespace, p.Pod.Name, p.Node)
	return true, nil
}

// askVolumes tells the claims of a placed pod that have no volume yet on which
// node it should be, and says whether there are any. The pod is bound in the
// round that follows when they have.
func (s *scheduler) askVolumes(ctx context.Context, p schedule.Placement) (missing bool, err error) {
	if s.storage == nil {
		return false, nil
	}
	claims, err := s.storage().claimsOf(p.Pod)
	if err != nil {
		return false, err
	}
	var errs []error
	for _, claim := range claims {
		if bound(claim) {
			continue
		}
		missing = true
		if claim.Annotations[selectedNode] == p.Node {
			continue
		}
		patch, err := json.Marshal(map[string]any{"metadata": map[string]any{"uid": claim.UID, "annotations": map[string]any{selectedNode: p.Node}}})
		if err != nil {
			return missing, err
		}
		if _, err := s.plane.client.CoreV1().PersistentVolumeClaims(claim.Namespace).Patch(ctx, claim.Name, types.MergePatchType, patch, metav1.PatchOptions{}); err != nil {
			errs = append(errs, fmt.Errorf("select node %s for claim %s/%s: %w", p.Node, claim.Namespace, claim.Name, err))
		}
	}
	return missing, errors.Join(errs...)
}

// explain writes why a pod waits into its status and an event, when that is
// news.
func (s *scheduler) explain(ctx context.Context, p schedule.Placement) error {
	was := podCondition(p.Pod, corev1.PodScheduled)
	if was != nil && was.Status == corev1.ConditionFalse && was.Message == p.Err.Error() {
		return nil
	}
	s.recorder.Event(p.Pod, corev1.EventTypeWarning, "FailedScheduling", p.Err.Error())
	since := metav1.Now()
	if was != nil && was.Status == corev1.ConditionFalse {
		since = was.LastTransitionTime
	}
	return patchPodCondition(ctx, s.plane, p.Pod, corev1.PodCondition{
		Type: corev1.PodScheduled, Status: corev1.ConditionFalse, Reason: corev1.PodReasonUnschedulable,
		Message: p.Err.Error(), LastTransitionTime: since,
	})
}

func podCondition(pod *corev1.Pod, t corev1.PodConditionType) *corev1.PodCondition {
	for i := range pod.Status.Conditions {
		if pod.Status.Conditions[i].Type == t {
			return &pod.Status.Conditions[i]
		}
	}
	return nil
}

// patchPodCondition sets one condition in the status of pod and touches
// nothing else. A pod that is gone meanwhile needs none.
func patchPodCondition(ctx context.Context, p *plane, pod *corev1.Pod, c corev1.PodCondition) error {
	patch, err := json.Marshal(map[string]any{
		"metadata": map[string]any{"uid": pod.UID},
		"status": map[string]any{"conditions": []any{map[string]any{
			"type": c.Type, "status": c.Status, "reason": c.Reason, "message": c.Message,
			"lastTransitionTime": c.LastTransitionTime.UTC().Format(time.RFC3339),
		}}},
	})
	if err != nil {
		return err
	}
	_, err = p.client.CoreV1().Pods(pod.Namespace).Patch(ctx, pod.Name, types.StrategicMergePatchType, patch, metav1.PatchOptions{}, "status")
	if err != nil && !apierrors.IsNotFound(err) && !apierrors.IsConflict(err) {
		return fmt.Errorf("set condition %s of pod %s/%s: %w", c.Type, pod.Namespace, pod.Name, err)
	}
	return nil
}
