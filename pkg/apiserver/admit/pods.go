package admit

import (
	"context"
	"fmt"
	"strings"

	corev1 "k8s.io/api/core/v1"
	schedulingv1 "k8s.io/api/scheduling/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apiserver/pkg/admission"
	schedulinglisters "k8s.io/client-go/listers/scheduling/v1"
	"k8s.io/utils/ptr"
)

// newPod returns the pod that a creates, nil if a is about something else.
func newPod(a admission.Attributes) *corev1.Pod {
	if a.GetOperation() != admission.Create || a.GetSubresource() != "" || a.GetResource().GroupResource() != (schema.GroupResource{Resource: "pods"}) {
		return nil
	}
	pod, _ := a.GetObject().(*corev1.Pod)
	return pod
}

// Priority turns the class of a pod into a number.
type Priority struct {
	*admission.Handler
	classes schedulinglisters.PriorityClassLister
}

// NewPriority returns the plugin.
func NewPriority(classes schedulinglisters.PriorityClassLister) Priority {
	return Priority{admission.NewHandler(admission.Create), classes}
}

// Admit implements admission.MutationInterface.
func (p Priority) Admit(_ context.Context, a admission.Attributes, _ admission.ObjectInterfaces) error {
	pod := newPod(a)
	if pod == nil {
		return nil
	}
	class, err := p.class(pod.Spec.PriorityClassName)
	if err != nil {
		return admission.NewForbidden(a, err)
	}
	value, policy := int32(0), ptr.To(corev1.PreemptLowerPriority)
	if class != nil {
		pod.Spec.PriorityClassName = class.Name
		value = class.Value
		if class.PreemptionPolicy != nil {
			policy = class.PreemptionPolicy
		}
	}
	if pod.Spec.Priority != nil && *pod.Spec.Priority != value {
		return admission.NewForbidden(a, fmt.Errorf("the integer value of priority (%d) must not be provided in pod spec; priority admission controller computed %d from the given PriorityClass name", *pod.Spec.Priority, value))
	}
	pod.Spec.Priority = &value
	if pod.Spec.PreemptionPolicy == nil {
		pod.Spec.PreemptionPolicy = policy
	}
	return nil
}

// class of a pod: the one it names, else the default one, else none.
func (p Priority) class(name string) (*schedulingv1.PriorityClass, error) {
	if name != "" {
		class, err := p.classes.Get(name)
		if apierrors.IsNotFound(err) && strings.HasPrefix(name, "system-") {
			return nil, fmt.Errorf("no PriorityClass with name %v was found yet; try again", name)
		}
		if apierrors.IsNotFound(err) {
			return nil, fmt.Errorf("no PriorityClass with name %v was found", name)
		}
		return class, err
	}
	all, err := p.classes.List(labels.Everything())
	if err != nil {
		return nil, err
	}
	var def *schedulingv1.PriorityClass
	for _, c := range all {
		if c.GlobalDefault && (def == nil || c.Value < def.Value) {
			def = c
		}
	}
	return def, nil
}
