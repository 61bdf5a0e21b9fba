package plan

import (
	"fmt"
	"slices"
	"time"

	v1 "k8s.io/api/core/v1"
)

// Health of a running container, as its probes see it.
type Health struct {
	// Started: its startup probe succeeded, or it has none.
	Started bool
	// Ready: its readiness probe succeeds, or it has none.
	Ready bool
	// Unhealthy says why it must be killed; empty when it must not.
	Unhealthy string
	// Grace, when not nil, replaces the pod's for that kill.
	Grace *time.Duration
}

// Failure of an operation, kept until it succeeds.
type Failure struct {
	// Reason as the API spells it, for instance ErrImagePull.
	Reason, Message string
	// Count of failures in a row.
	Count int
	At    time.Time
}

// ErrImagePull is the Reason of a failed pull, which is retried more slowly
// than the rest.
const ErrImagePull = "ErrImagePull"

// Until is when the operation may be tried again.
func (f Failure) Until() time.Time {
	if f.Reason == ErrImagePull {
		return f.At.Add(doubling(FirstBackoff, MaxBackoff, f.Count))
	}
	return f.At.Add(doubling(500*time.Millisecond, 30*time.Second, f.Count))
}

// Input of Next. Everything in it is a value; nothing is read besides.
type Input struct {
	Pod      *v1.Pod
	Observed Observed
	// Health by container ID.
	Health map[string]Health
	// Failures by Op.Key.
	Failures map[string]Failure
	// Busy holds the keys of operations under way.
	Busy map[string]bool
	// Down holds the sandboxes whose stop succeeded: their addresses are given
	// back.
	Down map[string]bool
	// VolumesReady: SetupVolumes succeeded since the agent started.
	VolumesReady bool
	// VolumesGone: TeardownVolumes succeeded.
	VolumesGone bool
	// Gone: the API has no such pod any more.
	Gone bool
	// NoNetwork says why a pod cannot be connected now; empty when it can.
	NoNetwork string
	// Hold says why no sandbox may be made now, until HoldUntil when that is
	// not zero; empty when one may.
	Hold      string
	HoldUntil time.Time
	// Evicted says why the node ends the pod; empty when it does not.
	Evicted string
	// Unsupported names what the pod asks and this agent cannot give.
	Unsupported string
	// StartTime is when the node first saw the pod.
	StartTime time.Time
	// Hash of a container's spec.
	Hash func(*v1.Container) string
	Now  time.Time
}

// Waiting is why a container does not run.
type Waiting struct{ Reason, Message string }

// Plan is what to do now and what to say meanwhile.
type Plan struct {
	Ops []Op
	// Wake is when to plan again even if nothing happens; zero for never.
	Wake time.Time
	// Waiting by container name.
	Waiting map[string]Waiting
	// Stopping: the pod is to end; Stopped: nothing of it runs any more.
	Stopping, Stopped bool
	// Failed is the reason the whole pod is ended with phase Failed, such as
	// DeadlineExceeded.
	Failed, FailedMessage string
	// Initialized: every init container has done its part.
	Initialized bool
}

func (p *Plan) add(o Op) { p.Ops = append(p.Ops, o) }

func (p *Plan) wake(t time.Time) {
	if p.Wake.IsZero() || t.Before(p.Wake) {
		p.Wake = t
	}
}

func (p *Plan) wait(name, reason, message string) {
	p.Waiting[name] = Waiting{Reason: reason, Message: message}
}

// goneGrace is given to containers whose pod was taken out of the API by
// force: another instance may already run.
const goneGrace = 2 * time.Second

// Next is the heart of the agent.
func Next(in Input) Plan {
	p := &planner{Input: in, Plan: Plan{Waiting: map[string]Waiting{}}}
	p.collect()
	p.decide()
	p.Ops = slices.DeleteFunc(p.Ops, func(o Op) bool { return p.held(o) })
	return p.Plan
}

type planner struct {
	Input
	Plan
}

// held keeps an operation back whose like is under way or failed lately.
func (p *planner) held(o Op) bool {
	key := o.Key()
	if p.Busy[key] && o.Verb != KillContainer {
		return true
	}
	f, failed := p.Failures[key]
	if failed && p.Now.Before(f.Until()) {
		p.wake(f.Until())
		return true
	}
	return false
}

func (p *planner) decide() {
	switch reason, message := p.deadline(); {
	case p.Gone || p.Pod.DeletionTimestamp != nil:
		p.stop("Stopping container")
	case reason != "":
		p.Failed, p.FailedMessage = reason, message
		p.stop("Pod ran longer than activeDeadlineSeconds")
	case p.Evicted != "":
		p.Failed, p.FailedMessage = "Evicted", p.Evicted
		p.stop("Pod is evicted")
	case p.Pod.Status.Phase == v1.PodFailed || p.Pod.Status.Phase == v1.PodSucceeded:
		p.stop("Pod has ended")
	case p.Unsupported != "":
		p.waitAll("Unsupported", p.Unsupported)
	default:
		p.run()
	}
}

func (p *planner) deadline() (reason, message string) {
	limit := p.Pod.Spec.ActiveDeadlineSeconds
	if limit == nil || p.StartTime.IsZero() {
		return "", ""
	}
	end := p.StartTime.Add(time.Duration(*limit) * time.Second)
	if p.Now.Before(end) {
		p.wake(end)
		return "", ""
	}
	return "DeadlineExceeded", "Pod was active on the node longer than the specified deadline"
}

func (p *planner) waitAll(reason, message string) {
	for _, c := range p.Pod.Spec.InitContainers {
		p.wait(c.Name, reason, message)
	}
	for _, c := range p.Pod.Spec.Containers {
		p.wait(c.Name, reason, message)
	}
}

// run wants the pod running.
func (p *planner) run() {
	if p.done() {
		p.stop("Pod has completed")
		return
	}
	s := p.Observed.Sandbox()
	if s == nil || !s.Ready {
		p.replaceSandbox(s)
		return
	}
	if !p.VolumesReady {
		p.volumes()
	}
	p.strays(s)
	if !p.initContainers(s) {
		return
	}
	p.Initialized = true
	for i := range p.Pod.Spec.Containers {
		p.container(s, &p.Pod.Spec.Containers[i], false)
	}
}

// strays ends what runs beside the newest of each container, or in a sandbox
// that is not the newest.
func (p *planner) strays(s *Sandbox) {
	for i := range p.Observed.Containers {
		c := &p.Observed.Containers[i]
		if c.State != Running && c.State != Unknown {
			continue
		}
		if c.SandboxID != s.ID || p.Observed.Latest(c.Name).ID != c.ID {
			p.kill(c, goneGrace, "Container was replaced")
		}
	}
}

// volumes asks for the volumes; starts are held until they are there, but
// what already runs is looked after.
func (p *planner) volumes() { p.add(Op{Verb: SetupVolumes}) }

// replaceSandbox ends what is left of the old sandbox and makes the next.
func (p *planner) replaceSandbox(old *Sandbox) {
	p.waitAll("ContainerCreating", "")
	for _, key := range []string{"volumes", "sandbox"} {
		if f, ok := p.Failures[key]; ok {
			p.waitAll("ContainerCreating", f.Message)
		}
	}
	if !p.VolumesReady {
		p.volumes()
	}
	attempt := 0
	if old != nil {
		attempt = int(old.Attempt) + 1
		if p.killAll("The pod's sandbox is gone", goneGrace) {
			return
		}
		if !p.Down[old.ID] {
			// It gives its address back before the next one is asked for.
			p.add(Op{Verb: StopSandbox, ID: old.ID})
			return
		}
	}
	if p.NoNetwork != "" && !p.Pod.Spec.HostNetwork {
		p.waitAll("ContainerCreating", "network is not ready: "+p.NoNetwork)
		return
	}
	if p.Hold != "" {
		p.waitAll("ContainerCreating", p.Hold)
		if !p.HoldUntil.IsZero() {
			p.wake(p.HoldUntil)
		}
		return
	}
	if p.VolumesReady {
		p.add(Op{Verb: CreateSandbox, Attempt: attempt})
	}
}

// initContainers reports whether the app containers may run.
func (p *planner) initContainers(s *Sandbox) bool {
	over := p.appStarted(s)
	for i := range p.Pod.Spec.InitContainers {
		c := &p.Pod.Spec.InitContainers[i]
		sidecar := IsSidecar(c)
		if over && !sidecar {
			continue
		}
		cur := p.Observed.Latest(c.Name)
		if cur != nil && cur.SandboxID == s.ID && cur.State == Exited && cur.ExitCode == 0 && !sidecar {
			continue
		}
		p.container(s, c, true)
		if sidecar && cur != nil && cur.State == Running && p.Health[cur.ID].Started || over {
			continue
		}
		p.pendingAfter(i)
		return false
	}
	return true
}

// pendingAfter marks what waits for the i-th init container.
func (p *planner) pendingAfter(i int) {
	for _, c := range p.Pod.Spec.InitContainers[i+1:] {
		p.wait(c.Name, "PodInitializing", "")
	}
	for _, c := range p.Pod.Spec.Containers {
		p.wait(c.Name, "PodInitializing", "")
	}
}

// appStarted reports whether an app container ever ran in this sandbox.
func (p *planner) appStarted(s *Sandbox) bool {
	for _, c := range p.Pod.Spec.Containers {
		cur := p.Observed.Latest(c.Name)
		if cur != nil && cur.SandboxID == s.ID && cur.State != Created {
			return true
		}
	}
	return false
}

// container wants one container running, or ended as its policy says.
func (p *planner) container(s *Sandbox, c *v1.Container, init bool) {
	cur := p.Observed.Latest(c.Name)
	switch {
	case p.Busy["start/"+c.Name]:
		p.waitStart(c.Name)
	case cur == nil:
		p.start(c, p.knownRestarts(c.Name), 0)
	case cur.State == Created:
		// The agent ended between create and start: begin again.
		p.waitStart(c.Name)
		p.add(Op{Verb: RemoveContainer, ID: cur.ID, Name: c.Name})
	case cur.State == Running:
		p.running(c, cur)
	case cur.State == Unknown:
		p.kill(cur, p.grace(), "Container is in an unknown state")
	default:
		p.ended(s, c, cur, init)
	}
}

func (p *planner) ended(s *Sandbox, c *v1.Container, cur *Container, init bool) {
	again := ShouldRestart(p.Pod, c, cur.ExitCode)
	if init {
		again = cur.SandboxID != s.ID || ShouldRestartInit(p.Pod, c, cur.ExitCode)
	}
	if !again {
		return
	}
	wait := NextBackoff(cur.Backoff, cur.Finished.Sub(cur.Started), cur.Attempt)
	if cur.SandboxID != s.ID && (init || cur.Finished.Sub(cur.Started) >= FirstBackoff) {
		wait = 0 // it died with its sandbox, by no fault of its own
	}
	until := cur.Finished.Add(wait)
	if p.Now.Before(until) {
		p.wait(c.Name, "CrashLoopBackOff", fmt.Sprintf("back-off %v restarting failed container=%s pod=%s_%s(%s)",
			wait, c.Name, p.Pod.Name, p.Pod.Namespace, p.Pod.UID))
		p.wake(until)
		return
	}
	p.start(c, cur.Attempt+1, wait)
}

func (p *planner) running(c *v1.Container, cur *Container) {
	h := p.Health[cur.ID]
	switch {
	case p.Busy["kill/"+cur.ID]:
	case h.Unhealthy != "":
		grace := p.grace()
		if h.Grace != nil {
			grace = *h.Grace
		}
		p.kill(cur, grace, h.Unhealthy)
	case cur.Hash != "" && p.Hash != nil && cur.Hash != p.Hash(c):
		p.kill(cur, p.grace(), fmt.Sprintf("Container %s definition changed", c.Name))
	}
}

func (p *planner) kill(c *Container, grace time.Duration, why string) {
	p.add(Op{Verb: KillContainer, ID: c.ID, Name: c.Name, Grace: grace, Reason: why})
}

func (p *planner) start(c *v1.Container, attempt int, waited time.Duration) {
	p.waitStart(c.Name)
	if f, ok := p.Failures["volumes"]; ok && !p.VolumesReady {
		p.wait(c.Name, "ContainerCreating", f.Message)
	}
	if p.VolumesReady {
		p.add(Op{Verb: StartContainer, Name: c.Name, Attempt: attempt, Backoff: waited})
	}
}

// waitStart says why a container that should start has not.
func (p *planner) waitStart(name string) {
	f, failed := p.Failures["start/"+name]
	switch {
	case failed && f.Reason == ErrImagePull && p.Now.Before(f.Until()) && p.Now.After(f.At.Add(time.Second)):
		p.wait(name, "ImagePullBackOff", "Back-off pulling image: "+f.Message)
	case failed:
		p.wait(name, f.Reason, f.Message)
	case len(p.Pod.Spec.InitContainers) > 0 && !p.isInit(name):
		p.wait(name, "PodInitializing", "")
	default:
		p.wait(name, "ContainerCreating", "")
	}
}

func (p *planner) isInit(name string) bool {
	return slices.ContainsFunc(p.Pod.Spec.InitContainers, func(c v1.Container) bool { return c.Name == name })
}

// knownRestarts is the attempt of a container the runtime knows nothing of:
// the API may remember runs of it.
func (p *planner) knownRestarts(name string) int {
	for _, list := range [][]v1.ContainerStatus{p.Pod.Status.ContainerStatuses, p.Pod.Status.InitContainerStatuses} {
		for _, s := range list {
			if s.Name == name && s.ContainerID != "" {
				return int(s.RestartCount) + 1
			}
		}
	}
	return 0
}

// done reports whether every container has ended for good.
func (p *planner) done() bool {
	if p.initFailed() {
		return true
	}
	for i := range p.Pod.Spec.Containers {
		c := &p.Pod.Spec.Containers[i]
		cur := p.Observed.Latest(c.Name)
		if cur == nil || cur.State != Exited || ShouldRestart(p.Pod, c, cur.ExitCode) || p.Busy["start/"+c.Name] {
			return false
		}
	}
	return true
}

func (p *planner) initFailed() bool {
	s := p.Observed.Sandbox()
	for i := range p.Pod.Spec.InitContainers {
		c := &p.Pod.Spec.InitContainers[i]
		cur := p.Observed.Latest(c.Name)
		if s == nil || cur == nil || cur.State != Exited || cur.SandboxID != s.ID || cur.ExitCode == 0 {
			continue
		}
		if !ShouldRestartInit(p.Pod, c, cur.ExitCode) {
			return true
		}
	}
	return false
}

func (p *planner) grace() time.Duration {
	if p.Gone {
		return goneGrace
	}
	seconds := int64(30)
	if p.Pod.Spec.TerminationGracePeriodSeconds != nil {
		seconds = *p.Pod.Spec.TerminationGracePeriodSeconds
	}
	if p.Pod.DeletionTimestamp != nil && p.Pod.DeletionGracePeriodSeconds != nil {
		seconds = *p.Pod.DeletionGracePeriodSeconds
	}
	return time.Duration(seconds) * time.Second
}
