package plan

import (
	"slices"
	"time"

	v1 "k8s.io/api/core/v1"
)

// The back-off Kubernetes documents: the first restart at once, then 10 s
// doubling to 5 minutes, forgotten after 10 minutes of running.
const (
	FirstBackoff = 10 * time.Second
	MaxBackoff   = 300 * time.Second
	BackoffReset = 10 * time.Minute
)

// NextBackoff is the wait after the end of a container that itself had waited
// for prev and ran for ran.
func NextBackoff(prev, ran time.Duration, attempt int) time.Duration {
	switch {
	case ran >= BackoffReset:
		return 0
	case attempt == 0:
		return 0
	case prev == 0:
		return FirstBackoff
	default:
		return min(2*prev, MaxBackoff)
	}
}

// doubling is first for n = 1, twice that for n = 2, and so on up to most.
func doubling(first, most time.Duration, n int) time.Duration {
	for ; n > 1 && first < most; n-- {
		first *= 2
	}
	return min(first, most)
}

// IsSidecar reports whether an init container is one that goes on running.
func IsSidecar(c *v1.Container) bool {
	return c.RestartPolicy != nil && *c.RestartPolicy == v1.ContainerRestartPolicyAlways
}

// ShouldRestart reports whether a container that ended with exit code code is
// to run again.
func ShouldRestart(pod *v1.Pod, c *v1.Container, code int32) bool {
	for _, r := range c.RestartPolicyRules {
		if r.Action == v1.ContainerRestartRuleActionRestart && ruleMatches(r, code) {
			return true
		}
	}
	policy := pod.Spec.RestartPolicy
	if c.RestartPolicy != nil {
		policy = v1.RestartPolicy(*c.RestartPolicy)
	}
	switch policy {
	case v1.RestartPolicyNever:
		return false
	case v1.RestartPolicyOnFailure:
		return code != 0
	default:
		return true
	}
}

// ShouldRestartInit is ShouldRestart for init containers: success is final,
// and only Never makes failure final.
func ShouldRestartInit(pod *v1.Pod, c *v1.Container, code int32) bool {
	if IsSidecar(c) {
		return true
	}
	if code == 0 {
		return false
	}
	if pod.Spec.RestartPolicy == v1.RestartPolicyAlways && c.RestartPolicy == nil && len(c.RestartPolicyRules) == 0 {
		return true
	}
	return ShouldRestart(pod, c, code)
}

func ruleMatches(r v1.ContainerRestartRule, code int32) bool {
	if r.ExitCodes == nil {
		return false
	}
	in := slices.Contains(r.ExitCodes.Values, code)
	if r.ExitCodes.Operator == v1.ContainerRestartRuleOnExitCodesOpNotIn {
		return !in
	}
	return in
}
