package plan

import (
	"time"
)

// stop wants nothing of the pod running, and nothing of it left when its
// object goes.
func (p *planner) stop(why string) {
	p.Stopping = true
	if p.startsUnderWay() || p.killAll(why, p.grace()) {
		return
	}
	up := false
	for _, s := range p.Observed.Sandboxes {
		if s.Ready || !p.Down[s.ID] {
			p.add(Op{Verb: StopSandbox, ID: s.ID})
			up = true
		}
	}
	if up {
		return
	}
	p.Stopped = true
	if p.Gone || p.Pod.DeletionTimestamp != nil {
		p.clear()
	}
}

// startsUnderWay waits for an operation that could make something new.
func (p *planner) startsUnderWay() bool {
	if p.Busy["sandbox"] || p.Busy["volumes"] {
		return true
	}
	for _, c := range p.Pod.Spec.InitContainers {
		if p.Busy["start/"+c.Name] {
			return true
		}
	}
	for _, c := range p.Pod.Spec.Containers {
		if p.Busy["start/"+c.Name] {
			return true
		}
	}
	return false
}

// killAll ends every container that may run, sidecars after the rest, the
// last of them first. It reports whether there was any.
func (p *planner) killAll(why string, grace time.Duration) bool {
	sidecars := map[string]int{}
	for i := range p.Pod.Spec.InitContainers {
		if c := &p.Pod.Spec.InitContainers[i]; IsSidecar(c) {
			sidecars[c.Name] = i
		}
	}
	var late *Container
	lateRank := -1
	early := false
	for i := range p.Observed.Containers {
		c := &p.Observed.Containers[i]
		if c.State != Running && c.State != Unknown {
			continue
		}
		if rank, ok := sidecars[c.Name]; ok && !p.Gone {
			if rank > lateRank {
				late, lateRank = c, rank
			}
			continue
		}
		early = true
		p.kill(c, grace, why)
	}
	if !early && late != nil {
		p.kill(late, grace, why)
	}
	return early || late != nil
}

// clear removes the stopped pod from the node.
func (p *planner) clear() {
	for _, s := range p.Observed.Sandboxes {
		p.add(Op{Verb: RemoveSandbox, ID: s.ID})
	}
	if len(p.Observed.Sandboxes) > 0 {
		return
	}
	for _, c := range p.Observed.Containers {
		p.add(Op{Verb: RemoveContainer, ID: c.ID, Name: c.Name})
	}
	if len(p.Observed.Containers) > 0 {
		return
	}
	if !p.VolumesGone {
		p.add(Op{Verb: TeardownVolumes})
		return
	}
	p.add(Op{Verb: Forget})
}

// collect removes what is no longer of use: of each container all but the
// newest and the one before it, and old sandboxes that hold nothing.
func (p *planner) collect() {
	seen := map[string]int{}
	held := map[string]bool{}
	for _, c := range p.Observed.Containers {
		seen[c.Name]++
		if seen[c.Name] > 2 && c.State != Running && c.State != Unknown {
			p.add(Op{Verb: RemoveContainer, ID: c.ID, Name: c.Name})
		}
		held[c.SandboxID] = true
	}
	for i, s := range p.Observed.Sandboxes {
		if i == 0 || held[s.ID] {
			continue
		}
		if s.Ready {
			p.add(Op{Verb: StopSandbox, ID: s.ID})
			continue
		}
		p.add(Op{Verb: RemoveSandbox, ID: s.ID})
	}
}
