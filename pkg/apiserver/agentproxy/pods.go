package agentproxy

import (
	"context"
	"fmt"
	"strings"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// podOf reads the pod and refuses one that is on no node yet.
func (p *Proxy) podOf(ctx context.Context, name string) (*corev1.Pod, error) {
	obj, err := p.pods.Get(ctx, name, &metav1.GetOptions{})
	if err != nil {
		return nil, err
	}
	pod, ok := obj.(*corev1.Pod)
	if !ok {
		return nil, apierrors.NewInternalError(fmt.Errorf("pod %q: unexpected type %T", name, obj))
	}
	if pod.Spec.NodeName == "" {
		return nil, apierrors.NewBadRequest(fmt.Sprintf("pod %s is not assigned to a node yet%s", pod.Name, whyPending(pod)))
	}
	return pod, nil
}

func whyPending(pod *corev1.Pod) string {
	for _, c := range pod.Status.Conditions {
		if c.Type == corev1.PodScheduled && c.Status == corev1.ConditionFalse && c.Message != "" {
			return ": " + c.Message
		}
	}
	return ""
}

// running refuses to start anything in a pod that is over.
func running(pod *corev1.Pod, what string) error {
	if p := pod.Status.Phase; p == corev1.PodSucceeded || p == corev1.PodFailed {
		return apierrors.NewBadRequest(fmt.Sprintf("cannot %s: pod %s has ended, its phase is %s", what, pod.Name, p))
	}
	return nil
}

// containerOf finds the container a client named, or the only one there is.
func containerOf(pod *corev1.Pod, name string) (string, error) {
	var plain, init, ephemeral []string
	for _, c := range pod.Spec.Containers {
		plain = append(plain, c.Name)
	}
	for _, c := range pod.Spec.InitContainers {
		init = append(init, c.Name)
	}
	for _, c := range pod.Spec.EphemeralContainers {
		ephemeral = append(ephemeral, c.Name)
	}
	all := fmt.Sprintf("choose one of: [%s]", strings.Join(plain, " "))
	if len(init) > 0 {
		all += fmt.Sprintf(" or one of the init containers: [%s]", strings.Join(init, " "))
	}
	if len(ephemeral) > 0 {
		all += fmt.Sprintf(" or one of the ephemeral containers: [%s]", strings.Join(ephemeral, " "))
	}
	if name == "" {
		if len(plain) == 1 {
			return plain[0], nil
		}
		return "", apierrors.NewBadRequest(fmt.Sprintf("a container name must be specified for pod %s, %s", pod.Name, all))
	}
	for _, names := range [][]string{plain, init, ephemeral} {
		for _, n := range names {
			if n == name {
				return name, nil
			}
		}
	}
	return "", apierrors.NewBadRequest(fmt.Sprintf("container %s is not valid for pod %s, %s", name, pod.Name, all))
}
