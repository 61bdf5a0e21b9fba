package kube

import (
	"cmp"
	"context"
	"log/slog"
	"net/netip"
	"slices"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/cache"

	"meshd.dev/pkg/status"
)

// LocalConfig of a Local. Client and Node are required.
type LocalConfig struct {
	Client kubernetes.Interface
	Node   string
	Board  *status.Board
	Log    *slog.Logger
}

// Local is what the cluster says of one node's pods, and of policies. It is
// apart from the Window because a network does not need it: whoever lacks these
// rights is told less, and has a network all the same. Use NewLocal.
//
// Of the cluster's pods only the node's own come over the wire, and of these
// and of the policies only what stands here is kept.
type Local struct {
	cfg      LocalConfig
	changed  func()
	pods     cache.SharedIndexInformer
	policies cache.SharedIndexInformer
}

// NewLocal makes a Local that calls changed after every change; it must not
// block.
func NewLocal(cfg LocalConfig, changed func()) *Local {
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	own := informers.NewSharedInformerFactoryWithOptions(cfg.Client, 0, informers.WithTransform(slimPod),
		informers.WithTweakListOptions(func(o *metav1.ListOptions) { o.FieldSelector = "spec.nodeName=" + cfg.Node }))
	all := informers.NewSharedInformerFactoryWithOptions(cfg.Client, 0, informers.WithTransform(slimPolicy))
	return &Local{cfg: cfg, changed: changed, pods: own.Core().V1().Pods().Informer(), policies: all.Networking().V1().NetworkPolicies().Informer()}
}

// Run watches until ctx ends.
func (l *Local) Run(ctx context.Context) error {
	done := make(chan struct{}, 2)
	for check, informer := range map[string]cache.SharedIndexInformer{"kube/pods": l.pods, "kube/policies": l.policies} {
		if _, err := informer.AddEventHandler(handler(func(any) { l.changed() })); err != nil {
			return err
		}
		refused := func(_ context.Context, _ *cache.Reflector, err error) {
			if !informer.HasSynced() && (apierrors.IsForbidden(err) || apierrors.IsUnauthorized(err)) { // else kube/sync says it
				l.cfg.Board.Fail(check, "not known: "+err.Error(), "grant it: `kubectl apply -f manifests/base/rbac.yaml`; the network does not need it")
			}
		}
		if err := informer.SetWatchErrorHandlerWithContext(refused); err != nil {
			return err
		}
		go func() { informer.RunWithContext(ctx); done <- struct{}{} }()
	}
	<-done
	<-done
	return nil
}

// Pod of this node, as far as its network goes.
type Pod struct {
	Namespace, Name string
	UID             types.UID
	// Labels by which policies select it.
	Labels labels.Set
	// Addrs the cluster knows it by; none before it is attached.
	Addrs []netip.Addr
	// Waiting to be started, or Running at this moment. Neither: it ends, has
	// ended, or is between the two.
	Waiting, Running bool
}

// Pods of this node that are to have a network of their own, in order of their
// names; false before they are known.
func (l *Local) Pods() ([]Pod, bool) {
	if !l.pods.HasSynced() {
		return nil, false
	}
	var all []Pod
	for _, obj := range l.pods.GetStore().List() {
		if p := obj.(*corev1.Pod); !p.Spec.HostNetwork {
			all = append(all, PodOf(p))
		}
	}
	slices.SortFunc(all, func(a, b Pod) int { return cmp.Or(cmp.Compare(a.Namespace, b.Namespace), cmp.Compare(a.Name, b.Name)) })
	return all, true
}

// PodOf reads a Pod object. Addresses that are none are left out: the kubelet
// wrote them, and the API has looked at them.
func PodOf(p *corev1.Pod) Pod {
	pod := Pod{Namespace: p.Namespace, Name: p.Name, UID: p.UID, Labels: p.Labels}
	for _, ip := range p.Status.PodIPs {
		if a, err := netip.ParseAddr(ip.IP); err == nil {
			pod.Addrs = append(pod.Addrs, a.Unmap())
		}
	}
	if p.DeletionTimestamp != nil {
		return pod
	}
	pod.Waiting = p.Status.Phase == corev1.PodPending && len(pod.Addrs) == 0
	pod.Running = p.Status.Phase == corev1.PodRunning && len(pod.Addrs) > 0 &&
		slices.ContainsFunc(p.Status.ContainerStatuses, func(c corev1.ContainerStatus) bool { return c.State.Running != nil })
	return pod
}

// Policy is a NetworkPolicy, as far as whom it is about.
type Policy struct {
	Namespace, Name string
	UID             types.UID
	Selector        labels.Selector
}

// Selects reports whether the policy is about a pod.
func (p Policy) Selects(pod Pod) bool {
	return p.Namespace == pod.Namespace && p.Selector.Matches(pod.Labels)
}

// Policies of the cluster in order of their names; false before they are known.
func (l *Local) Policies() ([]Policy, bool) {
	if !l.policies.HasSynced() {
		return nil, false
	}
	var all []Policy
	for _, obj := range l.policies.GetStore().List() {
		p := obj.(*networkingv1.NetworkPolicy)
		selector, err := metav1.LabelSelectorAsSelector(&p.Spec.PodSelector)
		if err != nil { // the API has looked at it; to be sure, it is about all
			selector = labels.Everything()
		}
		all = append(all, Policy{p.Namespace, p.Name, p.UID, selector})
	}
	slices.SortFunc(all, func(a, b Policy) int {
		return cmp.Or(cmp.Compare(a.Namespace, b.Namespace), cmp.Compare(a.Name, b.Name))
	})
	return all, true
}

// slimPod keeps what PodOf reads.
func slimPod(obj any) (any, error) {
	p, ok := obj.(*corev1.Pod)
	if !ok {
		return obj, nil
	}
	slim := &corev1.Pod{ObjectMeta: slimMeta(p.ObjectMeta), Spec: corev1.PodSpec{NodeName: p.Spec.NodeName, HostNetwork: p.Spec.HostNetwork},
		Status: corev1.PodStatus{Phase: p.Status.Phase, PodIPs: p.Status.PodIPs}}
	for _, c := range p.Status.ContainerStatuses {
		if c.State.Running != nil {
			slim.Status.ContainerStatuses = []corev1.ContainerStatus{{State: corev1.ContainerState{Running: &corev1.ContainerStateRunning{}}}}
			break
		}
	}
	return slim, nil
}

// slimPolicy keeps whom a policy is about.
func slimPolicy(obj any) (any, error) {
	p, ok := obj.(*networkingv1.NetworkPolicy)
	if !ok {
		return obj, nil
	}
	return &networkingv1.NetworkPolicy{ObjectMeta: slimMeta(p.ObjectMeta), Spec: networkingv1.NetworkPolicySpec{PodSelector: p.Spec.PodSelector}}, nil
}

func slimMeta(m metav1.ObjectMeta) metav1.ObjectMeta {
	return metav1.ObjectMeta{Namespace: m.Namespace, Name: m.Name, UID: m.UID, ResourceVersion: m.ResourceVersion,
		DeletionTimestamp: m.DeletionTimestamp, Labels: m.Labels}
}
