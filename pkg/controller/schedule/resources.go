package schedule

import (
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	resourcehelper "k8s.io/component-helpers/resource"
)

// amounts of resources; CPU in thousandths, everything else in units.
type amounts map[corev1.ResourceName]int64

func (a amounts) add(b amounts) {
	for r, n := range b {
		a[r] += n
	}
}

func toAmounts(list corev1.ResourceList) amounts {
	a := make(amounts, len(list))
	for r, q := range list {
		if r == corev1.ResourceCPU {
			a[r] = q.MilliValue()
		} else {
			a[r] = q.Value()
		}
	}
	return a
}

func requests(pod *corev1.Pod) amounts {
	return toAmounts(resourcehelper.PodRequests(pod, resourcehelper.PodResourcesOptions{}))
}

// guess is what a container that requests nothing is taken for when nodes are
// compared, so that such pods spread too. Kubernetes' figures.
var guess = corev1.ResourceList{
	corev1.ResourceCPU:    resource.MustParse("100m"),
	corev1.ResourceMemory: resource.MustParse("200Mi"),
}

func guessed(pod *corev1.Pod) amounts {
	return toAmounts(resourcehelper.PodRequests(pod, resourcehelper.PodResourcesOptions{NonMissingContainerRequests: guess}))
}

// resourceFilter refuses nodes whose allocatable resources are taken. A node
// that states no number of pods has no limit of them.
func resourceFilter(pod *corev1.Pod) filter {
	want := requests(pod)
	return func(h *host) []string {
		var reasons []string
		have := toAmounts(h.Status.Allocatable)
		if limit, ok := have[corev1.ResourcePods]; ok && int64(len(h.pods)) >= limit {
			reasons = append(reasons, reasonPods)
		}
		for r, n := range want {
			if n > 0 && n > have[r]-h.used[r] {
				reasons = append(reasons, "Insufficient "+string(r))
			}
		}
		return reasons
	}
}
