package eviction

import (
	"context"
	"fmt"
	"slices"
	"time"

	corev1 "k8s.io/api/core/v1"
	policyv1 "k8s.io/api/policy/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	"k8s.io/apimachinery/pkg/apis/meta/internalversion"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apiserver/pkg/endpoints/request"
	"k8s.io/apiserver/pkg/registry/rest"
	"k8s.io/apiserver/pkg/util/dryrun"
	"k8s.io/client-go/util/retry"
)

// Config names the stores an eviction reads and writes.
type Config struct {
	Pods interface {
		rest.Getter
		rest.GracefulDeleter
	}
	Budgets interface {
		List(ctx context.Context, options *internalversion.ListOptions) (runtime.Object, error)
	}
	BudgetStatus interface {
		Update(ctx context.Context, name string, objInfo rest.UpdatedObjectInfo, createValidation rest.ValidateObjectFunc, updateValidation rest.ValidateObjectUpdateFunc, forceAllowCreate bool, options *metav1.UpdateOptions) (runtime.Object, bool, error)
	}
}

// REST is the storage of pods/eviction.
type REST struct{ cfg Config }

var (
	_ rest.NamedCreater             = (*REST)(nil)
	_ rest.GroupVersionKindProvider = (*REST)(nil)
)

// New returns the storage of pods/eviction.
func New(cfg Config) *REST { return &REST{cfg} }

// New returns an empty Eviction.
func (*REST) New() runtime.Object { return &policyv1.Eviction{} }

// Destroy has nothing to do.
func (*REST) Destroy() {}

// GroupVersionKind is that of the body, which is of another group than pods.
func (*REST) GroupVersionKind(schema.GroupVersion) schema.GroupVersionKind {
	return policyv1.SchemeGroupVersion.WithKind("Eviction")
}

const (
	// maxDisrupted bounds the pods a budget remembers as on their way out.
	maxDisrupted = 2000
	// retryAfter is what a refused client is told to wait.
	retryAfter = 10 * time.Second
)

// Create evicts the pod of that name, or answers 429 while its budget does not
// allow it.
func (r *REST) Create(ctx context.Context, name string, obj runtime.Object, validate rest.ValidateObjectFunc, opts *metav1.CreateOptions) (runtime.Object, error) {
	ev, ok := obj.(*policyv1.Eviction)
	if !ok {
		return nil, apierrors.NewBadRequest(fmt.Sprintf("want a policy/v1 Eviction, have %T", obj))
	}
	if ev.Name != name {
		return nil, apierrors.NewBadRequest(fmt.Sprintf("name in URL does not match name in Eviction object: %q and %q", name, ev.Name))
	}
	del, err := deleteOptions(ev, opts)
	if err != nil {
		return nil, err
	}
	if validate != nil {
		if err := validate(ctx, ev.DeepCopy()); err != nil {
			return nil, err
		}
	}
	err = retry.OnError(retry.DefaultBackoff, apierrors.IsConflict, func() error { return r.evict(ctx, name, del) })
	if apierrors.IsConflict(err) && del.Preconditions == nil {
		return nil, tooMany("the pod or its disruption budget is changing too fast", "")
	}
	if err != nil {
		return nil, err
	}
	return &metav1.Status{Status: metav1.StatusSuccess}, nil
}

// deleteOptions are those of the Eviction, with the dry run of the request.
func deleteOptions(ev *policyv1.Eviction, opts *metav1.CreateOptions) (*metav1.DeleteOptions, error) {
	del := &metav1.DeleteOptions{}
	if ev.DeleteOptions != nil {
		del = ev.DeleteOptions.DeepCopy()
	}
	if len(opts.DryRun) > 0 {
		if len(del.DryRun) > 0 && !slices.Equal(del.DryRun, opts.DryRun) {
			return nil, apierrors.NewBadRequest("dryRun of the request and of deleteOptions differ")
		}
		del.DryRun = opts.DryRun
	}
	return del, nil
}

// evict tries once; a conflict means that the pod or the budget changed.
func (r *REST) evict(ctx context.Context, name string, del *metav1.DeleteOptions) error {
	obj, err := r.cfg.Pods.Get(ctx, name, &metav1.GetOptions{})
	if err != nil {
		return err
	}
	pod, ok := obj.(*corev1.Pod)
	if !ok {
		return apierrors.NewInternalError(fmt.Errorf("pod %q: unexpected type %T", name, obj))
	}
	if err := matches(pod, del.Preconditions); err != nil {
		return err
	}
	// From here on the decision holds only for the pod as it was read.
	guarded := del.DeepCopy()
	if guarded.Preconditions == nil {
		guarded.Preconditions = &metav1.Preconditions{}
	}
	guarded.Preconditions.UID = &pod.UID
	if noDisruption(pod) {
		guarded.Preconditions.ResourceVersion = &pod.ResourceVersion
		return r.delete(ctx, name, guarded)
	}
	pdb, err := r.budgetOf(ctx, pod)
	if err != nil {
		return err
	}
	if pdb == nil {
		return r.delete(ctx, name, guarded)
	}
	if free, err := unhealthyIsFree(pod, pdb); err != nil {
		return err
	} else if free {
		guarded.Preconditions.ResourceVersion = &pod.ResourceVersion
		return r.delete(ctx, name, guarded)
	}
	if err := r.charge(ctx, pdb, pod.Name, del.DryRun); err != nil {
		return err
	}
	return r.delete(ctx, name, guarded)
}

func (r *REST) delete(ctx context.Context, name string, del *metav1.DeleteOptions) error {
	ctx = about(ctx, request.RequestInfo{Verb: "delete", APIVersion: "v1", Resource: "pods", Name: name})
	_, _, err := r.cfg.Pods.Delete(ctx, name, rest.ValidateAllObjectFunc, del)
	return err
}

// about is ctx for another object of the namespace: validation and errors of a
// store look there for what the request is about.
func about(ctx context.Context, info request.RequestInfo) context.Context {
	info.IsResourceRequest, info.APIPrefix, info.Namespace = true, "apis", request.NamespaceValue(ctx)
	if info.APIGroup == "" {
		info.APIPrefix = "api"
	}
	return request.WithRequestInfo(ctx, &info)
}

// matches holds the client's preconditions against the pod before a budget is
// charged for it.
func matches(pod *corev1.Pod, pre *metav1.Preconditions) error {
	if pre == nil {
		return nil
	}
	if pre.UID != nil && *pre.UID != pod.UID {
		return apierrors.NewConflict(corev1.Resource("pods"), pod.Name, fmt.Errorf("the UID in the precondition is %s, the pod's is %s", *pre.UID, pod.UID))
	}
	if pre.ResourceVersion != nil && *pre.ResourceVersion != pod.ResourceVersion {
		return apierrors.NewConflict(corev1.Resource("pods"), pod.Name, fmt.Errorf("the resource version in the precondition is %s, the pod's is %s", *pre.ResourceVersion, pod.ResourceVersion))
	}
	return nil
}

// noDisruption is true of pods that serve nobody: not started, over, or on
// their way out already.
func noDisruption(pod *corev1.Pod) bool {
	switch pod.Status.Phase {
	case corev1.PodSucceeded, corev1.PodFailed, corev1.PodPending:
		return true
	}
	return pod.DeletionTimestamp != nil
}

// budgetOf finds the one budget that covers the pod; nil if there is none.
func (r *REST) budgetOf(ctx context.Context, pod *corev1.Pod) (*policyv1.PodDisruptionBudget, error) {
	ctx = about(ctx, request.RequestInfo{Verb: "list", APIGroup: policyv1.GroupName, APIVersion: "v1", Resource: "poddisruptionbudgets"})
	obj, err := r.cfg.Budgets.List(ctx, &internalversion.ListOptions{})
	if err != nil {
		return nil, err
	}
	list, ok := obj.(*policyv1.PodDisruptionBudgetList)
	if !ok {
		return nil, apierrors.NewInternalError(fmt.Errorf("disruption budgets: unexpected type %T", obj))
	}
	var found *policyv1.PodDisruptionBudget
	for i := range list.Items {
		pdb := &list.Items[i]
		if pdb.Namespace != pod.Namespace {
			continue
		}
		sel, err := metav1.LabelSelectorAsSelector(pdb.Spec.Selector)
		if err != nil || !sel.Matches(labels.Set(pod.Labels)) {
			continue
		}
		if found != nil {
			return nil, apierrors.NewInternalError(fmt.Errorf("this pod has more than one PodDisruptionBudget, which the eviction subresource does not support: %s and %s", found.Name, pdb.Name))
		}
		found = pdb
	}
	return found, nil
}

// unhealthyIsFree reports whether a pod that is not ready may go without being
// charged to the budget.
func unhealthyIsFree(pod *corev1.Pod, pdb *policyv1.PodDisruptionBudget) (bool, error) {
	if isReady(pod) {
		return false, nil
	}
	policy := policyv1.IfHealthyBudget
	if p := pdb.Spec.UnhealthyPodEvictionPolicy; p != nil {
		policy = *p
	}
	switch policy {
	case policyv1.AlwaysAllow:
		return true, nil
	case policyv1.IfHealthyBudget:
		return pdb.Status.DesiredHealthy > 0 && pdb.Status.CurrentHealthy >= pdb.Status.DesiredHealthy, nil
	}
	return false, apierrors.NewInternalError(fmt.Errorf("disruption budget %s: unhealthyPodEvictionPolicy %q is not known", pdb.Name, policy))
}

func isReady(pod *corev1.Pod) bool {
	return slices.ContainsFunc(pod.Status.Conditions, func(c corev1.PodCondition) bool {
		return c.Type == corev1.PodReady && c.Status == corev1.ConditionTrue
	})
}

// charge spends one disruption of the budget on the pod.
func (r *REST) charge(ctx context.Context, pdb *policyv1.PodDisruptionBudget, pod string, dryRun []string) error {
	pdb = pdb.DeepCopy()
	if err := spend(pdb, pod, time.Now()); err != nil {
		return err
	}
	if dryrun.IsDryRun(dryRun) {
		return nil
	}
	ctx = about(ctx, request.RequestInfo{Verb: "update", APIGroup: policyv1.GroupName, APIVersion: "v1",
		Resource: "poddisruptionbudgets", Subresource: "status", Name: pdb.Name})
	// The resource version of what was read makes this conditional.
	_, _, err := r.cfg.BudgetStatus.Update(ctx, pdb.Name, rest.DefaultUpdatedObjectInfo(pdb),
		rest.ValidateAllObjectFunc, rest.ValidateAllObjectUpdateFunc, false, &metav1.UpdateOptions{})
	return err
}

// spend takes one disruption from the status of pdb, or says why not.
func spend(pdb *policyv1.PodDisruptionBudget, pod string, now time.Time) error {
	st := &pdb.Status
	forbidden := func(why string) error {
		return apierrors.NewForbidden(policyv1.Resource("poddisruptionbudget"), pdb.Name, fmt.Errorf("%s", why))
	}
	const violates = "Cannot evict pod as it would violate the pod's disruption budget."
	switch {
	case st.ObservedGeneration < pdb.Generation:
		return tooMany(violates, fmt.Sprintf("The disruption budget %s is still being processed by the server.", pdb.Name))
	case st.DisruptionsAllowed < 0:
		return forbidden("pdb disruptions allowed is negative")
	case len(st.DisruptedPods) > maxDisrupted:
		return forbidden("DisruptedPods map too big - too many evictions not confirmed by PDB controller")
	case st.DisruptionsAllowed == 0:
		return tooMany(violates, fmt.Sprintf("The disruption budget %s needs %d healthy pods and has %d currently", pdb.Name, st.DesiredHealthy, st.CurrentHealthy))
	}
	st.DisruptionsAllowed--
	if st.DisruptionsAllowed == 0 {
		meta.SetStatusCondition(&st.Conditions, metav1.Condition{
			Type: policyv1.DisruptionAllowedCondition, Status: metav1.ConditionFalse,
			Reason: policyv1.InsufficientPodsReason, ObservedGeneration: st.ObservedGeneration,
		})
	}
	if st.DisruptedPods == nil {
		st.DisruptedPods = map[string]metav1.Time{}
	}
	st.DisruptedPods[pod] = metav1.Time{Time: now}
	return nil
}

// tooMany is the 429 by which kubectl drain knows to try again.
func tooMany(msg, cause string) error {
	err := apierrors.NewTooManyRequests(msg, int(retryAfter/time.Second))
	if cause != "" {
		err.ErrStatus.Details.Causes = append(err.ErrStatus.Details.Causes, metav1.StatusCause{Type: policyv1.DisruptionBudgetCause, Message: cause})
	}
	return err
}
