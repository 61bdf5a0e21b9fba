package agent

import (
	"context"
	"strconv"
	"strings"
	"time"

	v1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/tools/cache"

	"meshd.dev/pkg/agent/plan"
	"meshd.dev/pkg/agent/podspec"
	agentruntime "meshd.dev/pkg/agent/runtime"
)

// older reports whether resource version a is before b. What is not a number
// is not older: the newer word counts.
func older(a, b string) bool {
	x, err1 := strconv.ParseUint(a, 10, 64)
	y, err2 := strconv.ParseUint(b, 10, 64)
	return err1 == nil && err2 == nil && x < y
}

// bareID takes the runtime's name off a container ID of the API.
func bareID(id string) string {
	if _, rest, ok := strings.Cut(id, "://"); ok {
		return rest
	}
	return id
}

// watchPods follows the pods bound to this node until ctx ends.
func (a *Agent) watchPods(ctx context.Context) error {
	selector := fields.OneTermEqualSelector("spec.nodeName", a.cfg.NodeName).String()
	pods := a.client.CoreV1().Pods("")
	_, informer := cache.NewInformerWithOptions(cache.InformerOptions{
		ListerWatcher: cache.ToListWatcherWithWatchListSemantics(&cache.ListWatch{
			ListWithContextFunc: func(ctx context.Context, o metav1.ListOptions) (runtime.Object, error) {
				o.FieldSelector = selector
				return pods.List(ctx, o)
			},
			WatchFuncWithContext: func(ctx context.Context, o metav1.ListOptions) (watch.Interface, error) {
				o.FieldSelector = selector
				return pods.Watch(ctx, o)
			},
		}, a.client),
		ObjectType: &v1.Pod{},
		Handler: cache.ResourceEventHandlerFuncs{
			AddFunc:    func(obj any) { a.podSeen(ctx, obj) },
			UpdateFunc: func(old, obj any) { a.podReplaced(ctx, old, obj) },
			DeleteFunc: a.podVanished,
		},
	})
	done := make(chan struct{})
	go func() {
		defer close(done)
		informer.RunWithContext(ctx)
	}()
	if cache.WaitForCacheSync(ctx.Done(), informer.HasSynced) {
		a.firstSync(ctx)
	}
	<-done
	return nil
}

func (a *Agent) podSeen(ctx context.Context, obj any) {
	pod, ok := obj.(*v1.Pod)
	if !ok || pod.Spec.NodeName != a.cfg.NodeName {
		return
	}
	if err := a.checkpoints.keep(pod); err != nil {
		a.cfg.Log.Warn("keep checkpoint", "pod", pod.Name, "namespace", pod.Namespace, "err", err)
	}
	a.mu.Lock()
	a.seen[pod.UID] = true
	a.mu.Unlock()
	a.ensure(ctx, pod)
}

// podReplaced may be told of another pod of the same name, when the end of the
// first and the birth of the second fell into a gap of the watch.
func (a *Agent) podReplaced(ctx context.Context, old, obj any) {
	was, ok := old.(*v1.Pod)
	is, ok2 := obj.(*v1.Pod)
	if ok && ok2 && was.UID != is.UID {
		a.podVanished(was)
	}
	a.podSeen(ctx, obj)
}

func (a *Agent) podVanished(obj any) {
	if gone, ok := obj.(cache.DeletedFinalStateUnknown); ok {
		obj = gone.Obj
	}
	pod, ok := obj.(*v1.Pod)
	if !ok {
		return
	}
	a.mu.Lock()
	delete(a.seen, pod.UID)
	w := a.workers[pod.UID]
	a.mu.Unlock()
	if w != nil {
		w.vanish()
		return
	}
	a.checkpoints.release(pod.UID)
}

// ensure has a worker for the pod and gives it the object.
func (a *Agent) ensure(ctx context.Context, pod *v1.Pod) { a.adopt(ctx, pod, false) }

// adopt is ensure; gone says that the pod is only to be ended.
func (a *Agent) adopt(ctx context.Context, pod *v1.Pod, gone bool) {
	a.mu.Lock()
	w := a.workers[pod.UID]
	fresh := w == nil
	if fresh {
		a.births++
		w = newWorker(a, pod, gone, a.births)
		a.workers[pod.UID] = w
		a.wg.Go(func() {
			w.run(ctx)
			a.ended(w)
		})
	}
	a.mu.Unlock()
	a.objects.Hold(pod.UID, podspec.Refs(pod))
	if !fresh && !gone {
		w.update(pod)
	}
}

// ended forgets a worker that has nothing left to do, and lets one of the same
// name go on that waited for it.
func (a *Agent) ended(w *worker) {
	a.mu.Lock()
	defer a.mu.Unlock()
	delete(a.workers, w.uid)
	if w.over && !a.seen[w.uid] {
		a.checkpoints.release(w.uid)
	}
	for id, uid := range a.owners {
		if uid == w.uid {
			delete(a.owners, id)
		}
	}
	for _, other := range a.workers {
		if other.name == w.name {
			other.kick()
		}
	}
}

// hasElder reports whether a pod of the same name, but an earlier one, is still
// on the node: an identity runs once at a time.
func (a *Agent) hasElder(w *worker) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, other := range a.workers {
		if other.name == w.name && other.born < w.born {
			return true
		}
	}
	return false
}

// own remembers whose the containers and sandboxes are, and forgets those that
// are no more since the look before.
func (a *Agent) own(uid types.UID, before, now plan.Observed) {
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, id := range before.IDs() {
		delete(a.owners, id)
	}
	for _, id := range now.IDs() {
		a.owners[id] = uid
	}
}

func (a *Agent) ownID(id string, uid types.UID) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.owners[id] = uid
}

// exited acts on the death of a container.
func (a *Agent) exited(e agentruntime.Exit) {
	a.rt.Died(e)
	a.mu.Lock()
	w := a.workers[a.owners[e.ID]]
	a.mu.Unlock()
	if w == nil {
		a.relist.Kick()
		return
	}
	a.cfg.Log.Debug("container ended", "uid", w.uid, "id", e.ID, "code", e.ExitCode)
	w.kick()
	// CRI knows more, such as that memory was short, when the runtime has
	// cleaned up.
	time.AfterFunc(cleanupLag, w.kick)
	time.AfterFunc(10*cleanupLag, w.kick)
}

// connected looks at everything when events begin to flow, and some times more:
// of a death just before, CRI may tell only when the runtime has cleaned up.
func (a *Agent) connected(ctx context.Context) {
	a.relist.Kick()
	a.wg.Go(func() {
		for _, d := range []time.Duration{200 * time.Millisecond, 500 * time.Millisecond, time.Second, 3 * time.Second} {
			select {
			case <-ctx.Done():
				return
			case <-time.After(d):
				a.relist.Kick()
			}
		}
	})
}

// objectsChanged has the pods look at their config maps and secrets anew.
func (a *Agent) objectsChanged(uids []types.UID) {
	a.mu.Lock()
	var list []*worker
	for _, uid := range uids {
		if w := a.workers[uid]; w != nil {
			list = append(list, w)
		}
	}
	a.mu.Unlock()
	for _, w := range list {
		w.retry(true)
	}
}

// firstSync asks the API for the whole list of this node's pods once. What the
// disk or the runtime remembers and the API does not is over; nothing is ended
// for that reason before.
func (a *Agent) firstSync(ctx context.Context) {
	known := a.listPods(ctx)
	if known == nil {
		return
	}
	a.mu.Lock()
	a.apiSynced = true
	var gone, rest []*worker
	for uid, w := range a.workers {
		if known[uid] || a.seen[uid] {
			rest = append(rest, w)
			continue
		}
		gone = append(gone, w)
	}
	a.mu.Unlock()
	for _, w := range gone {
		w.vanish()
	}
	for _, w := range rest {
		w.retry(false)
	}
	a.relist.Kick()
}

// listPods is the set of this node's pods in the API; nil when ctx ended
// before it answered.
func (a *Agent) listPods(ctx context.Context) map[types.UID]bool {
	selector := fields.OneTermEqualSelector("spec.nodeName", a.cfg.NodeName).String()
	for {
		list, err := a.client.CoreV1().Pods("").List(ctx, metav1.ListOptions{FieldSelector: selector})
		if err == nil {
			known := map[types.UID]bool{}
			for i := range list.Items {
				known[list.Items[i].UID] = true
			}
			return known
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(time.Second):
		}
	}
}

func (a *Agent) synced() bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.apiSynced
}

// look is the safety net below the events: it compares the whole runtime with
// what the workers saw last, and finds pods nobody looks after.
func (a *Agent) look(ctx context.Context) error {
	pods, err := a.rt.List(ctx)
	a.cfg.Board.Report("agent/runtime", err, "look at the container runtime: systemctl status containerd")
	if err != nil {
		return err
	}
	a.mu.Lock()
	workers := make(map[types.UID]*worker, len(a.workers))
	for uid, w := range a.workers {
		workers[uid] = w
	}
	synced := a.apiSynced
	a.mu.Unlock()
	for uid, p := range pods {
		w := workers[uid]
		switch {
		case w != nil:
			if w.differs(p.Observed) {
				w.kick()
			}
		case synced && p.Name != "":
			a.cfg.Log.Info("pod of the runtime is not in the API; ending it", "pod", p.Name, "namespace", p.Namespace, "uid", uid)
			a.adopt(ctx, &v1.Pod{ObjectMeta: metav1.ObjectMeta{Name: p.Name, Namespace: p.Namespace, UID: p.UID}}, true)
		}
		delete(workers, uid)
	}
	for _, w := range workers {
		if w.differs(plan.Observed{}) {
			w.kick()
		}
	}
	return nil
}

// differs reports whether the runtime shows something else than the worker saw
// last.
func (w *worker) differs(now plan.Observed) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	if len(now.Containers) != len(w.seen.Containers) || len(now.Sandboxes) != len(w.seen.Sandboxes) {
		return true
	}
	for i, c := range now.Containers {
		if c.ID != w.seen.Containers[i].ID || c.State != w.seen.Containers[i].State {
			return true
		}
	}
	for i, s := range now.Sandboxes {
		if s.ID != w.seen.Sandboxes[i].ID || s.Ready != w.seen.Sandboxes[i].Ready {
			return true
		}
	}
	return false
}

// cleanupLag is about how long after a death CRI has the whole story.
const cleanupLag = 150 * time.Millisecond

// relistEvery is the pace of look while events flow.
const relistEvery = 15 * time.Second
