package agent

import (
	"context"
	"sync"
	"time"

	v1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	"k8s.io/apimachinery/pkg/types"

	"meshd.dev/pkg/agent/plan"
	"meshd.dev/pkg/agent/podspec"
	"meshd.dev/pkg/agent/podstatus"
	"meshd.dev/pkg/agent/probe"
)

// worker looks after one pod: it observes, plans, starts what is to be done
// and reports, each time it is kicked.
type worker struct {
	a      *Agent
	uid    types.UID
	name   string // namespace/name
	born   int    // the order of workers
	kicks  chan struct{}
	prober *probe.Prober
	ops    sync.WaitGroup
	// patience ends when the pod is to stop: pulls and hooks are given up
	// then, while what makes something in the runtime is waited for.
	patience context.Context
	giveUp   context.CancelFunc

	mu       sync.Mutex
	pod      *v1.Pod // the newest object known; never changed in place
	gone     bool    // the API has no such pod
	over     bool    // nothing is left to do
	finished int     // operations that ended
	wrote    string  // resource version of our own last write
	wroteAt  time.Time
	seen     plan.Observed
	busy     map[string]bool
	grace    map[string]time.Duration // of kills under way, by Op.Key
	failures map[string]plan.Failure
	down     map[string]bool
	volumes  volumeState
	start    time.Time
	evicted  string                 // why the pod is ended
	known    map[string]plan.Health // reported health of containers adopted
	told     map[string]string      // what events were sent for already
}

type volumeState struct {
	ready, stale, gone bool
	next               time.Time
}

func newWorker(a *Agent, pod *v1.Pod, gone bool, born int) *worker {
	w := &worker{
		a: a, uid: pod.UID, name: pod.Namespace + "/" + pod.Name, born: born, pod: pod, gone: gone, kicks: make(chan struct{}, 1),
		busy: map[string]bool{}, grace: map[string]time.Duration{}, failures: map[string]plan.Failure{},
		down: map[string]bool{}, told: map[string]string{}, known: reportedHealth(pod), start: time.Now(),
	}
	w.patience, w.giveUp = context.WithCancel(context.Background())
	if pod.Status.StartTime != nil {
		w.start = pod.Status.StartTime.Time
	}
	w.prober = probe.New(probe.Config{
		Exec:    a.rt.ExecSync,
		Changed: w.kick,
		Failed:  w.probeFailed,
		Log:     a.cfg.Log,
	})
	return w
}

// reportedHealth is what the API says of the containers, by ID.
func reportedHealth(pod *v1.Pod) map[string]plan.Health {
	out := map[string]plan.Health{}
	for _, list := range [][]v1.ContainerStatus{pod.Status.InitContainerStatuses, pod.Status.ContainerStatuses} {
		for _, s := range list {
			if s.State.Running != nil {
				out[bareID(s.ContainerID)] = plan.Health{Started: s.Started != nil && *s.Started, Ready: s.Ready}
			}
		}
	}
	return out
}

// kick asks for a look at the pod. It never blocks.
func (w *worker) kick() {
	select {
	case w.kicks <- struct{}{}:
	default:
	}
}

// object is the newest object of the pod.
func (w *worker) object() *v1.Pod {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.pod
}

// own writes are known before the watch tells of them; for so long what the
// watch says may be older.
const watchLag = 10 * time.Second

// update takes the object as the watch shows it, unless it is of before our own
// last write, or is that write: what followed from it was looked at then.
func (w *worker) update(pod *v1.Pod) {
	w.mu.Lock()
	late := older(pod.ResourceVersion, w.wrote) && time.Since(w.wroteAt) < watchLag ||
		w.wrote != "" && pod.ResourceVersion == w.wrote && w.pod.ResourceVersion == w.wrote && !w.gone
	if !late {
		w.take(pod)
	}
	w.mu.Unlock()
	if !late {
		w.kick()
	}
}

// written takes the API's answer to our own write.
func (w *worker) written(pod *v1.Pod) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if older(pod.ResourceVersion, w.pod.ResourceVersion) {
		return // the watch was quicker
	}
	w.wrote, w.wroteAt = pod.ResourceVersion, time.Now()
	w.take(pod)
}

// take makes pod the object. The caller holds w.mu.
func (w *worker) take(pod *v1.Pod) {
	if !equality.Semantic.DeepEqual(pod.Labels, w.pod.Labels) || !equality.Semantic.DeepEqual(pod.Annotations, w.pod.Annotations) {
		w.volumes.stale = true
	}
	w.pod = pod
	w.gone = false
}

// vanish says that the API has no such pod any more.
func (w *worker) vanish() {
	w.mu.Lock()
	w.gone = true
	w.mu.Unlock()
	w.kick()
}

// retry forgets failures: what caused them may have changed.
func (w *worker) retry(stale bool) {
	w.mu.Lock()
	for key, f := range w.failures {
		if f.Reason != plan.ErrImagePull {
			delete(w.failures, key)
		}
	}
	w.volumes.stale = w.volumes.stale || stale
	w.mu.Unlock()
	w.kick()
}

// run works until the pod is over or ctx ends.
func (w *worker) run(ctx context.Context) {
	defer w.prober.Close()
	defer w.ops.Wait()
	defer w.giveUp()
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-w.kicks:
		case <-timer.C:
		}
		next := w.sync(ctx)
		w.mu.Lock()
		over := w.over
		w.mu.Unlock()
		if over {
			return
		}
		timer.Reset(max(time.Millisecond, time.Until(next)))
	}
}

// resync is the longest time between two looks at a pod.
const resync = 2 * time.Minute

// sync looks once and starts what is to be done. It returns when to look
// again.
func (w *worker) sync(ctx context.Context) time.Time {
	now := time.Now()
	w.mu.Lock()
	finished, before := w.finished, w.seen
	w.mu.Unlock()
	obs, err := w.a.rt.Observe(ctx, w.uid)
	if err != nil {
		if ctx.Err() == nil {
			w.a.cfg.Log.Debug("look at pod", "uid", w.uid, "err", err)
		}
		return now.Add(time.Second)
	}
	w.a.own(w.uid, before, obs)
	w.probe(obs)

	w.mu.Lock()
	defer w.mu.Unlock()
	if w.over || w.finished != finished {
		return now // an operation ended while we looked: what we saw is of before
	}
	w.seen = obs
	plan.Forgive(w.failures, w.down, obs)
	in := w.input(obs, now)
	p := plan.Next(in)
	if w.a.hasElder(w) {
		p = plan.Plan{Waiting: map[string]plan.Waiting{}}
	}
	if p.Stopping {
		w.giveUp()
	}
	w.backoffEvents(p)
	status := podstatus.Compute(podstatus.Input{
		Pod: w.pod, Observed: obs, Plan: p, Health: in.Health, NodeIPs: w.a.nodeIPs,
		Runtime: w.a.runtimeName(), StartTime: w.start, Now: now,
	})
	p.Ops = w.refresh(p.Ops, in, p.Stopping)
	next := now.Add(resync)
	soonest := func(t time.Time) {
		if !t.IsZero() && t.Before(next) {
			next = t
		}
	}
	soonest(p.Wake)
	if !p.Stopping {
		soonest(w.volumes.next)
	}
	dirty := !w.gone && !equality.Semantic.DeepEqual(status, w.pod.Status)
	if dirty {
		soonest(w.report(ctx, status, now))
	}
	for _, op := range p.Ops {
		if op.Verb == plan.Forget && dirty {
			continue // the last words first
		}
		w.launch(ctx, op)
	}
	return next
}

func (w *worker) input(obs plan.Observed, now time.Time) plan.Input {
	in := plan.Input{
		Pod: w.pod, Observed: obs, Health: w.prober.Health(), Failures: w.failures, Busy: w.busy,
		Down: w.down, VolumesReady: w.volumes.ready, VolumesGone: w.volumes.gone, Gone: w.gone, Evicted: w.evicted, NoNetwork: w.a.node.NetworkProblem(),
		StartTime: w.start, Hash: podspec.Hash, Now: now,
	}
	in.Hold, in.HoldUntil = w.a.holdPod(w.pod, now)
	if !w.gone {
		in.Unsupported = podspec.Unsupported(w.pod)
	}
	if in.Unsupported != "" {
		w.refuse(in.Unsupported)
	}
	return in
}

// refresh adds a new look at the volumes when their content may have changed.
func (w *worker) refresh(ops []plan.Op, in plan.Input, stopping bool) []plan.Op {
	v := &w.volumes
	if !v.ready || stopping || in.Busy["volumes"] {
		return ops
	}
	if !v.stale && (v.next.IsZero() || in.Now.Before(v.next)) {
		return ops
	}
	if f, ok := in.Failures["volumes"]; ok && in.Now.Before(f.Until()) {
		return ops
	}
	return append(ops, plan.Op{Verb: plan.SetupVolumes})
}

// probe tells the prober which containers run.
func (w *worker) probe(obs plan.Observed) {
	w.mu.Lock()
	pod := w.pod
	w.mu.Unlock()
	var list []probe.Running
	ips := podstatus.PodIPs(pod, obs.Sandbox(), w.a.nodeIPs)
	if len(ips) > 0 {
		for i := range obs.Containers {
			c := &obs.Containers[i]
			spec := podspec.Find(pod, c.Name)
			if c.State != plan.Running || spec == nil || obs.Latest(c.Name) != c {
				continue
			}
			r := probe.Running{Target: probe.Target{ID: c.ID, IP: ips[0], Spec: spec}, Started: c.Started}
			if h, ok := w.known[c.ID]; ok {
				r.Known = &h
			}
			list = append(list, r)
		}
	}
	w.prober.Set(list)
}

func (w *worker) probeFailed(container string, k probe.Kind, err error) {
	w.a.event(w.object(), container, v1.EventTypeWarning, "Unhealthy", string(k)+" probe failed: "+err.Error())
}
