package agent

import (
	"net/netip"
	"time"

	v1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// bootPatience is how long after its start the agent waits for the API's word
// on pods it knows from their checkpoints only.
const bootPatience = 10 * time.Second

// hold says why no sandbox may be made for a pod, and when to ask again; the
// zero time stands for when the API was heard. heard says that it was, on this
// pod, since the agent started at started.
//
// A machine that was off for long may hold pods that were replaced elsewhere
// meanwhile. They wait for the API, but not for ever: a node alone runs what
// it ran. A pod of a StatefulSet does wait, for two of one identity are worse
// than none.
func hold(pod *v1.Pod, heard bool, started, now time.Time) (why string, until time.Time) {
	if heard {
		return "", time.Time{}
	}
	const waiting = "waiting for the API to say that the pod is still this node's"
	if owner := metav1.GetControllerOf(pod); owner != nil && owner.Kind == "StatefulSet" {
		return waiting, time.Time{}
	}
	if until = started.Add(bootPatience); now.Before(until) {
		return waiting, until
	}
	return "", time.Time{}
}

// holdResolver is hold for a pod that is to use the cluster's resolver while
// its address is not known: what stands in its resolv.conf stands there for
// its life.
func (a *Agent) holdResolver(pod *v1.Pod, now time.Time) (why string, until time.Time) {
	first := pod.Spec.DNSPolicy == v1.DNSClusterFirst && !pod.Spec.HostNetwork || pod.Spec.DNSPolicy == v1.DNSClusterFirstWithHostNet
	if !first || a.cfg.ClusterDNS == nil || len(a.cfg.ClusterDNS()) > 0 {
		return "", time.Time{}
	}
	return "waiting for the address of the cluster's resolver", now.Add(time.Second)
}

// holdPod is the one or the other.
func (a *Agent) holdPod(pod *v1.Pod, now time.Time) (why string, until time.Time) {
	a.mu.Lock()
	heard, started := a.apiSynced || a.seen[pod.UID], a.started
	a.mu.Unlock()
	if why, until = hold(pod, heard, started, now); why != "" {
		return why, until
	}
	return a.holdResolver(pod, now)
}

// clusterDNS are the servers pods use; none when there is no such resolver.
func (a *Agent) clusterDNS() []netip.Addr {
	if a.cfg.ClusterDNS == nil {
		return nil
	}
	return a.cfg.ClusterDNS()
}
