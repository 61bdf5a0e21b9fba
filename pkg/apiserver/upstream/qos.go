package upstream

import (
	corev1 "k8s.io/api/core/v1"
	"k8s.io/kubernetes/pkg/apis/core/v1/helper/qos"
)

// QOSClass of p as its containers' requests and limits say.
func QOSClass(p *corev1.Pod) corev1.PodQOSClass { return qos.ComputePodQOS(p) }
