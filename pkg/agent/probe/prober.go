package probe

import (
	"context"
	"log/slog"
	"math/rand/v2"
	"sync"
	"time"

	v1 "k8s.io/api/core/v1"

	"meshd.dev/pkg/agent/plan"
)

// Config of a Prober.
type Config struct {
	Exec Exec
	// Changed is told that the health of a container of the pod changed. It
	// must not block.
	Changed func()
	// Failed is told of every bad answer.
	Failed func(container string, k Kind, err error)
	Log    *slog.Logger
}

// Prober asks the containers of one pod.
type Prober struct {
	cfg Config
	ctx context.Context
	end context.CancelFunc
	wg  sync.WaitGroup

	mu   sync.Mutex
	runs map[string]*run
}

// run is the questioning of one run of a container.
type run struct {
	stop    context.CancelFunc
	target  Target
	started time.Time

	verdict *verdict      // guarded by Prober.mu
	wake    chan struct{} // closed when the startup probe succeeded
}

// New makes a Prober; Close ends it.
func New(cfg Config) *Prober {
	ctx, end := context.WithCancel(context.Background())
	return &Prober{cfg: cfg, ctx: ctx, end: end, runs: map[string]*run{}}
}

// Close ends all probes and waits for them.
func (p *Prober) Close() {
	p.end()
	p.wg.Wait()
}

// Running is a container to be asked.
type Running struct {
	Target
	Started time.Time
	// Known is its health as it was last reported, when the agent adopts it.
	Known *plan.Health
}

// Set says which containers run now; probing of others ends.
func (p *Prober) Set(list []Running) {
	p.mu.Lock()
	defer p.mu.Unlock()
	want := map[string]bool{}
	for _, r := range list {
		want[r.ID] = true
		if p.runs[r.ID] == nil {
			p.runs[r.ID] = p.begin(r)
		}
	}
	for id, r := range p.runs {
		if !want[id] {
			r.stop()
			delete(p.runs, id)
		}
	}
}

// Health by container ID.
func (p *Prober) Health() map[string]plan.Health {
	p.mu.Lock()
	defer p.mu.Unlock()
	out := make(map[string]plan.Health, len(p.runs))
	for id, r := range p.runs {
		out[id] = r.verdict.health
	}
	return out
}

func (p *Prober) begin(r Running) *run {
	ctx, stop := context.WithCancel(p.ctx)
	n := &run{stop: stop, target: r.Target, started: r.Started, verdict: newVerdict(r.Spec), wake: make(chan struct{})}
	if r.Known != nil {
		n.verdict.health = *r.Known
		if r.Spec.StartupProbe == nil {
			n.verdict.health.Started = true
		}
		if r.Spec.ReadinessProbe == nil {
			n.verdict.health.Ready = true
		}
	}
	if n.verdict.health.Started {
		close(n.wake)
	}
	for k, spec := range map[Kind]*v1.Probe{Startup: r.Spec.StartupProbe, Liveness: r.Spec.LivenessProbe, Readiness: r.Spec.ReadinessProbe} {
		if spec != nil && !(k == Startup && n.verdict.health.Started) {
			p.wg.Go(func() { p.ask(ctx, n, k, spec) })
		}
	}
	return n
}

// ask makes the probes of one kind until the container is gone or is to be
// killed; a startup probe ends with its success.
func (p *Prober) ask(ctx context.Context, n *run, k Kind, spec *v1.Probe) {
	if k != Startup {
		select {
		case <-ctx.Done():
			return
		case <-n.wake:
		}
	}
	period, limit := seconds(spec.PeriodSeconds, 10*time.Second), seconds(spec.TimeoutSeconds, time.Second)
	first := time.Until(n.started.Add(time.Duration(spec.InitialDelaySeconds) * time.Second))
	if time.Since(n.started) > period { // adopted: not all pods of the node at once
		first = max(first, rand.N(period))
	}
	timer := time.NewTimer(max(0, first))
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-timer.C:
		}
		begin := time.Now()
		err := Once(ctx, spec.ProbeHandler, n.target, limit, p.cfg.Exec)
		if ctx.Err() != nil {
			return
		}
		if err != nil {
			p.cfg.Failed(n.target.Spec.Name, k, err)
		}
		if !p.judge(n, k, spec, err) {
			return
		}
		timer.Reset(p.pause(n, k, spec, period, begin))
	}
}

// eager is how often a container that is not ready is asked in its first
// seconds, so that it serves as soon as it can. Commands are dear.
func eager(h v1.ProbeHandler) time.Duration {
	if h.Exec != nil {
		return time.Second
	}
	return 200 * time.Millisecond
}

const eagerFor = 10 * time.Second

// pause is the wait for the next probe.
func (p *Prober) pause(n *run, k Kind, spec *v1.Probe, period time.Duration, begin time.Time) time.Duration {
	p.mu.Lock()
	ready := n.verdict.health.Ready
	p.mu.Unlock()
	if k == Readiness && !ready && time.Since(n.started) < eagerFor {
		period = min(period, eager(spec.ProbeHandler))
	}
	return max(10*time.Millisecond, period-time.Since(begin))
}

// judge counts the answer and reports whether to go on.
func (p *Prober) judge(n *run, k Kind, spec *v1.Probe, err error) bool {
	p.mu.Lock()
	if !n.verdict.due(k) {
		on := k != Startup && n.verdict.health.Unhealthy == ""
		p.mu.Unlock()
		return on
	}
	changed := n.verdict.add(k, spec, n.target.Spec.Name, err)
	health := n.verdict.health
	p.mu.Unlock()
	if changed {
		if k == Startup && health.Started {
			close(n.wake)
		}
		p.cfg.Changed()
	}
	return health.Unhealthy == "" && !(k == Startup && health.Started)
}
