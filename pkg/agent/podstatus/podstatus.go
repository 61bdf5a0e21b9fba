// Package podstatus says what to report of a pod: its phase, conditions and
// the states of its containers, from what the runtime has and what the planner
// decided. It is pure.
package podstatus

import (
	"net"
	"slices"
	"time"

	v1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"meshd.dev/pkg/agent/plan"
	"meshd.dev/pkg/agent/podspec"
)

// Input of Compute.
type Input struct {
	Pod      *v1.Pod
	Observed plan.Observed
	Plan     plan.Plan
	// Health by container ID.
	Health map[string]plan.Health
	// NodeIPs, the preferred first.
	NodeIPs []string
	// Runtime is the scheme of container IDs, such as containerd.
	Runtime   string
	StartTime time.Time
	Now       time.Time
}

// Compute returns the status to report. What others own in it (conditions of
// other writers, the nominated node) is kept.
func Compute(in Input) v1.PodStatus {
	old := in.Pod.Status
	s := *old.DeepCopy()
	c := &computation{Input: in}
	s.ObservedGeneration = in.Pod.Generation
	s.QOSClass = podspec.QOS(in.Pod)
	s.InitContainerStatuses = c.containers(in.Pod.Spec.InitContainers, old.InitContainerStatuses, true)
	s.ContainerStatuses = c.containers(in.Pod.Spec.Containers, old.ContainerStatuses, false)
	if s.StartTime == nil && !in.StartTime.IsZero() {
		t := stamp(in.StartTime)
		s.StartTime = &t
	}
	c.addresses(&s)
	c.phase(&s)
	c.conditions(&s)
	return s
}

type computation struct{ Input }

// stamp is a time as the API keeps it: finer ones would differ for ever.
func stamp(t time.Time) metav1.Time { return metav1.NewTime(t.Truncate(time.Second)) }

func (c *computation) containers(specs []v1.Container, old []v1.ContainerStatus, init bool) []v1.ContainerStatus {
	var out []v1.ContainerStatus
	for i := range specs {
		out = append(out, c.container(&specs[i], findStatus(old, specs[i].Name), init))
	}
	return out
}

func findStatus(list []v1.ContainerStatus, name string) *v1.ContainerStatus {
	for i := range list {
		if list[i].Name == name {
			return &list[i]
		}
	}
	return nil
}

func (c *computation) container(spec *v1.Container, old *v1.ContainerStatus, init bool) v1.ContainerStatus {
	s := v1.ContainerStatus{Name: spec.Name, Image: spec.Image, Started: new(bool)}
	cur := c.Observed.Latest(spec.Name)
	if cur == nil {
		c.never(&s, old)
		return s
	}
	s.RestartCount = int32(cur.Attempt)
	s.ContainerID = c.Runtime + "://" + cur.ID
	s.ImageID = cur.ImageID
	if prev := c.Observed.Previous(spec.Name); prev != nil && prev.State == plan.Exited {
		s.LastTerminationState = c.terminated(prev)
	} else if old != nil {
		s.LastTerminationState = inherited(old, s.ContainerID)
	}
	waiting, waits := c.Plan.Waiting[spec.Name]
	h := c.Health[cur.ID]
	switch cur.State {
	case plan.Running:
		s.State.Running = &v1.ContainerStateRunning{StartedAt: stamp(cur.Started)}
		s.Started = &h.Started
		s.Ready = h.Started && h.Ready
		if init && !plan.IsSidecar(spec) {
			s.Ready = false
		}
	case plan.Exited:
		s.State = c.terminated(cur)
		// Between the end and a restart that comes at once it stays ended; the
		// wait for a later one is a state of its own.
		if waits && waiting.Reason != "ContainerCreating" && waiting.Reason != "PodInitializing" {
			s.LastTerminationState = s.State
			s.State = v1.ContainerState{Waiting: &v1.ContainerStateWaiting{Reason: waiting.Reason, Message: waiting.Message}}
		}
		s.Ready = init && s.State.Terminated != nil && cur.ExitCode == 0
	default:
		s.State.Waiting = &v1.ContainerStateWaiting{Reason: "ContainerCreating"}
		if waits {
			s.State.Waiting = &v1.ContainerStateWaiting{Reason: waiting.Reason, Message: waiting.Message}
		}
	}
	return s
}

// never describes a container the runtime knows nothing of. What the API
// remembers of one that did run is not thrown away.
func (c *computation) never(s *v1.ContainerStatus, old *v1.ContainerStatus) {
	if w, ok := c.Plan.Waiting[s.Name]; ok || old == nil || old.ContainerID == "" {
		s.State.Waiting = &v1.ContainerStateWaiting{Reason: "ContainerCreating"}
		if ok {
			s.State.Waiting = &v1.ContainerStateWaiting{Reason: w.Reason, Message: w.Message}
		}
		if old != nil {
			s.RestartCount = old.RestartCount
			s.LastTerminationState = inherited(old, "")
		}
		return
	}
	s.RestartCount, s.ContainerID, s.ImageID = old.RestartCount, old.ContainerID, old.ImageID
	s.LastTerminationState = old.LastTerminationState
	s.State = old.State
	if s.State.Terminated == nil {
		s.State = v1.ContainerState{Terminated: &v1.ContainerStateTerminated{
			Reason: "ContainerStatusUnknown", ExitCode: 137, ContainerID: old.ContainerID,
			Message: "The container could not be located when the pod was terminated",
		}}
	}
}

// inherited is the last termination that the API knows, when the runtime has
// lost it.
func inherited(old *v1.ContainerStatus, id string) v1.ContainerState {
	if old.State.Terminated != nil && old.State.Terminated.ContainerID != id {
		return v1.ContainerState{Terminated: old.State.Terminated}
	}
	if t := old.LastTerminationState.Terminated; t != nil && t.ContainerID != id {
		return old.LastTerminationState
	}
	return v1.ContainerState{}
}

func (c *computation) terminated(k *plan.Container) v1.ContainerState {
	reason := k.Reason
	if reason == "" {
		reason = "Error"
		if k.ExitCode == 0 {
			reason = "Completed"
		}
	}
	t := &v1.ContainerStateTerminated{
		ExitCode: k.ExitCode, Reason: reason, Message: k.Message,
		ContainerID: c.Runtime + "://" + k.ID,
	}
	if !k.Started.IsZero() {
		t.StartedAt = stamp(k.Started)
	}
	if !k.Finished.IsZero() {
		t.FinishedAt = stamp(k.Finished)
	}
	return v1.ContainerState{Terminated: t}
}

func (c *computation) addresses(s *v1.PodStatus) {
	s.HostIPs, s.HostIP = nil, ""
	for _, ip := range c.NodeIPs {
		s.HostIPs = append(s.HostIPs, v1.HostIP{IP: ip})
	}
	if len(c.NodeIPs) > 0 {
		s.HostIP = c.NodeIPs[0]
	}
	ips := PodIPs(c.Pod, c.Observed.Sandbox(), c.NodeIPs)
	if len(ips) == 0 {
		return // a stopped pod keeps the address it had
	}
	s.PodIPs = nil
	for _, ip := range ips {
		s.PodIPs = append(s.PodIPs, v1.PodIP{IP: ip})
	}
	s.PodIP = ips[0]
}

// PodIPs are the addresses of a pod whose sandbox is up: the family of the
// node's first address first.
func PodIPs(pod *v1.Pod, s *plan.Sandbox, nodeIPs []string) []string {
	if s == nil || !s.Ready {
		return nil
	}
	if pod.Spec.HostNetwork {
		return nodeIPs
	}
	if len(nodeIPs) == 0 || len(s.IPs) < 2 {
		return s.IPs
	}
	ips := slices.Clone(s.IPs)
	slices.SortStableFunc(ips, func(a, b string) int {
		want := isIPv4(nodeIPs[0])
		switch {
		case isIPv4(a) == isIPv4(b):
			return 0
		case isIPv4(a) == want:
			return -1
		default:
			return 1
		}
	})
	return ips
}

func isIPv4(s string) bool {
	ip := net.ParseIP(s)
	return ip != nil && ip.To4() != nil
}

func (c *computation) phase(s *v1.PodStatus) {
	if s.Phase == v1.PodFailed || s.Phase == v1.PodSucceeded {
		return // final
	}
	s.Phase = c.phaseNow(s)
	if (s.Phase == v1.PodSucceeded || s.Phase == v1.PodFailed) && c.Observed.Running() {
		s.Phase = v1.PodRunning // a sidecar is still to be ended
	}
	if c.Plan.Failed != "" {
		s.Reason, s.Message = c.Plan.Failed, c.Plan.FailedMessage
		if c.Plan.Stopped {
			s.Phase = v1.PodFailed
		}
	}
}

func (c *computation) phaseNow(s *v1.PodStatus) v1.PodPhase {
	never := c.Pod.Spec.RestartPolicy == v1.RestartPolicyNever
	for i, st := range s.InitContainerStatuses {
		spec := &c.Pod.Spec.InitContainers[i]
		t := st.State.Terminated
		if t != nil && t.ExitCode != 0 && !plan.IsSidecar(spec) && !plan.ShouldRestartInit(c.Pod, spec, t.ExitCode) {
			return v1.PodFailed
		}
	}
	var running, waiting, stopped, succeeded, again int
	for i, st := range s.ContainerStatuses {
		t := st.State.Terminated
		if t == nil && st.State.Waiting != nil {
			t = st.LastTerminationState.Terminated
		}
		switch {
		case st.State.Running != nil:
			running++
		case t != nil:
			stopped++
			if t.ExitCode == 0 {
				succeeded++
			}
			if plan.ShouldRestart(c.Pod, &c.Pod.Spec.Containers[i], t.ExitCode) {
				again++
			}
		default:
			waiting++
		}
	}
	ended := c.Plan.Stopping && c.Plan.Stopped
	switch {
	case ended && stopped > 0 && succeeded == stopped && waiting == 0:
		return v1.PodSucceeded
	case ended && stopped > 0:
		return v1.PodFailed
	case ended && waiting > 0 && c.Pod.DeletionTimestamp != nil:
		return v1.PodFailed // it never ran
	case waiting > 0:
		return v1.PodPending
	case running > 0:
		return v1.PodRunning
	case stopped > 0 && again > 0:
		return v1.PodRunning
	case stopped > 0 && succeeded == stopped:
		return v1.PodSucceeded
	case stopped > 0 && (never || again == 0):
		return v1.PodFailed
	default:
		return v1.PodPending
	}
}
