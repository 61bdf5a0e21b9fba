package probe

import (
	"fmt"
	"time"

	v1 "k8s.io/api/core/v1"

	"meshd.dev/pkg/agent/plan"
)

// Kind of a probe.
type Kind string

// The three kinds.
const (
	Startup   Kind = "Startup"
	Liveness  Kind = "Liveness"
	Readiness Kind = "Readiness"
)

// verdict turns single answers into the container's health: it counts to the
// thresholds. It is pure.
type verdict struct {
	health plan.Health
	good   map[Kind]int
	bad    map[Kind]int
}

func newVerdict(c *v1.Container) *verdict {
	return &verdict{
		health: plan.Health{Started: c.StartupProbe == nil, Ready: c.ReadinessProbe == nil},
		good:   map[Kind]int{}, bad: map[Kind]int{},
	}
}

// due reports whether a probe of that kind is to be made now.
func (v *verdict) due(k Kind) bool {
	if v.health.Unhealthy != "" {
		return false
	}
	return (k == Startup) != v.health.Started
}

// add counts an answer and reports whether the health changed.
func (v *verdict) add(k Kind, p *v1.Probe, name string, err error) bool {
	before := v.health
	if err == nil {
		v.good[k]++
		v.bad[k] = 0
		if v.good[k] >= threshold(p.SuccessThreshold, 1) {
			switch k {
			case Startup:
				v.health.Started = true
			case Readiness:
				v.health.Ready = true
			}
		}
		return v.health != before
	}
	v.bad[k]++
	v.good[k] = 0
	if v.bad[k] < threshold(p.FailureThreshold, 3) {
		return false
	}
	switch k {
	case Readiness:
		v.health.Ready = false
	default:
		v.health.Unhealthy = fmt.Sprintf("Container %s failed %s probe", name, lower(k))
		if s := p.TerminationGracePeriodSeconds; s != nil {
			d := time.Duration(*s) * time.Second
			v.health.Grace = &d
		}
	}
	return v.health != before
}

func lower(k Kind) string {
	switch k {
	case Startup:
		return "startup"
	case Liveness:
		return "liveness"
	default:
		return "readiness"
	}
}

func threshold(n int32, otherwise int) int {
	if n <= 0 {
		return otherwise
	}
	return int(n)
}

func seconds(n int32, otherwise time.Duration) time.Duration {
	if n <= 0 {
		return otherwise
	}
	return time.Duration(n) * time.Second
}
