package podstatus

import (
	"fmt"
	"slices"
	"strings"

	v1 "k8s.io/api/core/v1"

	"meshd.dev/pkg/agent/plan"
)

func (c *computation) conditions(s *v1.PodStatus) {
	set := func(t v1.PodConditionType, ok bool, reason, message string) {
		c.set(s, v1.PodCondition{Type: t, Status: truth(ok), Reason: reason, Message: message})
	}
	over := s.Phase == v1.PodSucceeded || s.Phase == v1.PodFailed
	sb := c.Observed.Sandbox()
	set(v1.PodReadyToStartContainers, sb != nil && sb.Ready, "", "")

	if bad := c.notInitialized(s); len(bad) > 0 {
		set(v1.PodInitialized, false, "ContainersNotInitialized", "containers with incomplete status: ["+strings.Join(bad, " ")+"]")
	} else {
		reason := ""
		if s.Phase == v1.PodSucceeded {
			reason = "PodCompleted"
		}
		set(v1.PodInitialized, true, reason, "")
	}

	ready, reason, message := c.containersReady(s)
	if over {
		ready, reason, message = false, "PodCompleted", ""
		if s.Phase == v1.PodFailed {
			reason = "PodFailed"
		}
	}
	set(v1.ContainersReady, ready, reason, message)
	if ready {
		ready, reason, message = c.gates(s)
	}
	set(v1.PodReady, ready, reason, message)

	if !slices.ContainsFunc(s.Conditions, func(k v1.PodCondition) bool { return k.Type == v1.PodScheduled }) {
		set(v1.PodScheduled, true, "", "")
	}
}

func truth(b bool) v1.ConditionStatus {
	if b {
		return v1.ConditionTrue
	}
	return v1.ConditionFalse
}

func (c *computation) notInitialized(s *v1.PodStatus) []string {
	var bad []string
	if c.Plan.Initialized {
		return nil
	}
	if s.Phase == v1.PodSucceeded {
		return nil
	}
	for i, st := range s.InitContainerStatuses {
		done := st.State.Terminated != nil && st.State.Terminated.ExitCode == 0
		if plan.IsSidecar(&c.Pod.Spec.InitContainers[i]) {
			done = st.Started != nil && *st.Started
		}
		if !done {
			bad = append(bad, st.Name)
		}
	}
	return bad
}

func (c *computation) containersReady(s *v1.PodStatus) (bool, string, string) {
	var bad []string
	for i, st := range s.InitContainerStatuses {
		if plan.IsSidecar(&c.Pod.Spec.InitContainers[i]) && !st.Ready {
			bad = append(bad, st.Name)
		}
	}
	for _, st := range s.ContainerStatuses {
		if !st.Ready {
			bad = append(bad, st.Name)
		}
	}
	if len(bad) > 0 {
		return false, "ContainersNotReady", "containers with unready status: [" + strings.Join(bad, " ") + "]"
	}
	return true, "", ""
}

// gates are conditions of others that must hold before the pod is ready.
func (c *computation) gates(s *v1.PodStatus) (bool, string, string) {
	var bad []string
	for _, g := range c.Pod.Spec.ReadinessGates {
		ok := slices.ContainsFunc(s.Conditions, func(k v1.PodCondition) bool {
			return k.Type == g.ConditionType && k.Status == v1.ConditionTrue
		})
		if !ok {
			bad = append(bad, fmt.Sprintf("corresponding condition of pod readiness gate %q is not True.", g.ConditionType))
		}
	}
	if len(bad) > 0 {
		return false, "ReadinessGatesNotReady", strings.Join(bad, " ")
	}
	return true, "", ""
}

// set replaces a condition, keeping the time of its last change when only the
// words differ.
func (c *computation) set(s *v1.PodStatus, k v1.PodCondition) {
	k.ObservedGeneration = c.Pod.Generation
	k.LastTransitionTime = stamp(c.Now)
	for i := range s.Conditions {
		if s.Conditions[i].Type != k.Type {
			continue
		}
		if s.Conditions[i].Status == k.Status {
			k.LastTransitionTime = s.Conditions[i].LastTransitionTime
		}
		s.Conditions[i] = k
		return
	}
	s.Conditions = append(s.Conditions, k)
}
