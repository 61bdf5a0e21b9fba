package schedule

import (
	"fmt"

	corev1 "k8s.io/api/core/v1"
	corev1helpers "k8s.io/component-helpers/scheduling/corev1"
	"k8s.io/component-helpers/scheduling/corev1/nodeaffinity"
	"k8s.io/klog/v2"
)

// The reasons, as kube-scheduler words them.
const (
	reasonUnschedulable = "node(s) were unschedulable"
	reasonAffinity      = "node(s) didn't match Pod's node affinity/selector"
	reasonPorts         = "node(s) didn't have free ports for the requested pod ports"
	reasonPods          = "Too many pods"
	reasonSpread        = "node(s) didn't match pod topology spread constraints"
	reasonSpreadLabel   = reasonSpread + " (missing required label)"
	reasonPodAffinity   = "node(s) didn't match pod affinity rules"
	reasonPodAnti       = "node(s) didn't match pod anti-affinity rules"
	reasonExistingAnti  = "node(s) didn't satisfy existing pods anti-affinity rules"
)

// filter gives the reasons why the pod it was made for cannot run on a node.
type filter func(*host) []string

// filters for pod, cheap ones first.
func (c *Cluster) filters(pod *corev1.Pod) ([]filter, error) {
	spread, err := c.spreadFilter(pod)
	if err != nil {
		return nil, err
	}
	affinity, err := c.affinityFilter(pod)
	if err != nil {
		return nil, err
	}
	fs := []filter{cordonFilter(pod), taintFilter(pod), nodeAffinityFilter(pod), portFilter(pod), resourceFilter(pod)}
	if c.volumes != nil {
		vf, err := c.volumes(pod)
		if err != nil {
			return nil, err
		}
		fs = append(fs, volumeFilter(vf))
	}
	return append(fs, spread, affinity), nil
}

func cordonFilter(pod *corev1.Pod) filter {
	cordon := corev1.Taint{Key: corev1.TaintNodeUnschedulable, Effect: corev1.TaintEffectNoSchedule}
	tolerated := tolerates(pod, cordon)
	return func(h *host) []string {
		if h.Spec.Unschedulable && !tolerated {
			return []string{reasonUnschedulable}
		}
		return nil
	}
}

func taintFilter(pod *corev1.Pod) filter {
	return func(h *host) []string {
		for _, t := range h.taints {
			if t.Effect == corev1.TaintEffectPreferNoSchedule {
				continue
			}
			// A cordoned node carries this one too; it is refused above.
			if t.Key == corev1.TaintNodeUnschedulable && h.Spec.Unschedulable {
				continue
			}
			if !tolerates(pod, t) {
				return []string{fmt.Sprintf("node(s) had untolerated taint {%s: %s}", t.Key, t.Value)}
			}
		}
		return nil
	}
}

func tolerates(pod *corev1.Pod, t corev1.Taint) bool {
	return corev1helpers.TolerationsTolerateTaint(klog.Logger{}, pod.Spec.Tolerations, &t, true)
}

func nodeAffinityFilter(pod *corev1.Pod) filter {
	want := nodeaffinity.GetRequiredNodeAffinity(pod)
	return func(h *host) []string {
		if ok, err := want.Match(h.Node); err != nil || !ok {
			return []string{reasonAffinity}
		}
		return nil
	}
}

func volumeFilter(vf VolumeFilter) filter {
	return func(h *host) []string {
		if vf == nil {
			return nil
		}
		if r := vf(h.Node); r != "" {
			return []string{r}
		}
		return nil
	}
}

// hostPort is a port of the node's own that a pod takes.
type hostPort struct {
	ip       string
	protocol corev1.Protocol
	port     int32
}

func portsOf(pod *corev1.Pod) []hostPort {
	var ports []hostPort
	for _, cs := range [][]corev1.Container{pod.Spec.InitContainers, pod.Spec.Containers} {
		for _, c := range cs {
			for _, p := range c.Ports {
				if p.HostPort > 0 {
					ports = append(ports, hostPort{p.HostIP, p.Protocol, p.HostPort})
				}
			}
		}
	}
	return ports
}

func portFilter(pod *corev1.Pod) filter {
	want := portsOf(pod)
	return func(h *host) []string {
		for _, w := range want {
			for _, u := range h.ports {
				if w.clashes(u) {
					return []string{reasonPorts}
				}
			}
		}
		return nil
	}
}

func (a hostPort) clashes(b hostPort) bool {
	if a.port != b.port || protocol(a.protocol) != protocol(b.protocol) {
		return false
	}
	return a.ip == b.ip || wildcard(a.ip) || wildcard(b.ip)
}

func wildcard(ip string) bool { return ip == "" || ip == "0.0.0.0" || ip == "::" }

func protocol(p corev1.Protocol) corev1.Protocol {
	if p == "" {
		return corev1.ProtocolTCP
	}
	return p
}
