package admit

import (
	"context"
	"fmt"
	"strings"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apiserver/pkg/admission"
	corelisters "k8s.io/client-go/listers/core/v1"
)

// Limits applies the LimitRanges of a namespace to new pods: defaults where a
// container says nothing, then the bounds of containers and of the pod.
type Limits struct {
	*admission.Handler
	ranges corelisters.LimitRangeLister
}

// NewLimits returns the plugin.
func NewLimits(ranges corelisters.LimitRangeLister) Limits {
	return Limits{admission.NewHandler(admission.Create), ranges}
}

// items are the rules of namespace for things of kind.
func (l Limits) items(namespace string, kind corev1.LimitType) ([]corev1.LimitRangeItem, error) {
	all, err := l.ranges.LimitRanges(namespace).List(labels.Everything())
	if err != nil {
		return nil, err
	}
	var items []corev1.LimitRangeItem
	for _, r := range all {
		for _, i := range r.Spec.Limits {
			if i.Type == kind {
				items = append(items, i)
			}
		}
	}
	return items, nil
}

// Admit implements admission.MutationInterface.
func (l Limits) Admit(_ context.Context, a admission.Attributes, _ admission.ObjectInterfaces) error {
	pod := newPod(a)
	if pod == nil {
		return nil
	}
	items, err := l.items(a.GetNamespace(), corev1.LimitTypeContainer)
	if err != nil {
		return admission.NewForbidden(a, err)
	}
	for _, item := range items {
		for _, containers := range [][]corev1.Container{pod.Spec.InitContainers, pod.Spec.Containers} {
			for i := range containers {
				complete(&containers[i].Resources, item)
			}
		}
	}
	return nil
}

// complete sets what r does not say.
func complete(r *corev1.ResourceRequirements, item corev1.LimitRangeItem) {
	set := func(to *corev1.ResourceList, from corev1.ResourceList) {
		for name, q := range from {
			if _, ok := (*to)[name]; ok {
				continue
			}
			if *to == nil {
				*to = corev1.ResourceList{}
			}
			(*to)[name] = q.DeepCopy()
		}
	}
	// A limit somebody wrote is also his request, before our default is.
	set(&r.Requests, only(r.Limits, item.DefaultRequest))
	set(&r.Limits, item.Default)
	set(&r.Requests, item.DefaultRequest)
}

// only the entries of l whose names are in like.
func only(l, like corev1.ResourceList) corev1.ResourceList {
	out := corev1.ResourceList{}
	for name, q := range l {
		if _, ok := like[name]; ok {
			out[name] = q
		}
	}
	return out
}

// Validate implements admission.ValidationInterface.
func (l Limits) Validate(_ context.Context, a admission.Attributes, _ admission.ObjectInterfaces) error {
	pod := newPod(a)
	if pod == nil {
		return nil
	}
	containers, err := l.items(a.GetNamespace(), corev1.LimitTypeContainer)
	if err != nil {
		return admission.NewForbidden(a, err)
	}
	pods, err := l.items(a.GetNamespace(), corev1.LimitTypePod)
	if err != nil {
		return admission.NewForbidden(a, err)
	}
	var wrong []string
	for _, c := range pod.Spec.Containers {
		for _, item := range containers {
			wrong = append(wrong, check(item, c.Resources)...)
		}
	}
	for _, item := range pods {
		wrong = append(wrong, check(item, sum(pod.Spec.Containers))...)
	}
	if len(wrong) > 0 {
		return admission.NewForbidden(a, fmt.Errorf("%s", strings.Join(wrong, ", ")))
	}
	return nil
}

func sum(containers []corev1.Container) corev1.ResourceRequirements {
	total := corev1.ResourceRequirements{Requests: corev1.ResourceList{}, Limits: corev1.ResourceList{}}
	add := func(to, from corev1.ResourceList) {
		for name, q := range from {
			have := to[name]
			have.Add(q)
			to[name] = have
		}
	}
	for _, c := range containers {
		add(total.Requests, c.Resources.Requests)
		add(total.Limits, c.Resources.Limits)
	}
	return total
}

// check says how r breaks item.
func check(item corev1.LimitRangeItem, r corev1.ResourceRequirements) (wrong []string) {
	say := func(format string, args ...any) { wrong = append(wrong, fmt.Sprintf(format, args...)) }
	for name, low := range item.Min {
		if q, ok := r.Requests[name]; !ok || q.Cmp(low) < 0 {
			say("minimum %s usage per %s is %s, but request is %s", name, item.Type, low.String(), shown(q, ok))
		}
	}
	for name, high := range item.Max {
		if q, ok := r.Limits[name]; !ok || q.Cmp(high) > 0 {
			say("maximum %s usage per %s is %s, but limit is %s", name, item.Type, high.String(), shown(q, ok))
		}
	}
	for name, ratio := range item.MaxLimitRequestRatio {
		limit, request := r.Limits[name], r.Requests[name]
		if request.IsZero() || limit.IsZero() || limit.AsApproximateFloat64()/request.AsApproximateFloat64() > ratio.AsApproximateFloat64() {
			say("%s max limit to request ratio per %s is %s, but limit is %s and request is %s", name, item.Type, ratio.String(), limit.String(), request.String())
		}
	}
	return wrong
}

func shown(q resource.Quantity, ok bool) string {
	if !ok {
		return "not set"
	}
	return q.String()
}
