package agent

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	v1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"

	"meshd.dev/pkg/agent/logs"
	"meshd.dev/pkg/agent/plan"
	"meshd.dev/pkg/reconcile"
)

// keepHouse rotates logs and removes what no pod needs any more.
func (a *Agent) keepHouse(ctx context.Context) error {
	images := &imageUse{since: map[string]time.Time{}}
	do := func(ctx context.Context) error {
		err := errors.Join(a.rotateLogs(ctx), a.removeOrphans(ctx), a.evictHungry(ctx), a.collectImages(ctx, images))
		a.cfg.Board.Report("agent/housekeeping", err, "see the log of meshd")
		return err
	}
	return reconcile.New(reconcile.Config{Name: "agent/house", Do: do, Resync: 10 * time.Second, MinBackoff: 10 * time.Second, Log: a.cfg.Log}).Run(ctx)
}

// all is every worker there is now.
func (a *Agent) all() []*worker {
	a.mu.Lock()
	defer a.mu.Unlock()
	out := make([]*worker, 0, len(a.workers))
	for _, w := range a.workers {
		out = append(out, w)
	}
	return out
}

func (a *Agent) rotateLogs(ctx context.Context) error {
	var errs []error
	for _, w := range a.all() {
		for _, c := range w.observed().Containers {
			if c.State != plan.Running || c.LogPath == "" {
				continue
			}
			errs = append(errs, logs.Rotate(c.LogPath, logs.MaxSize, logs.MaxFiles, func() error { return a.rt.ReopenLog(ctx, c.ID) }))
		}
	}
	return errors.Join(errs...)
}

func (w *worker) observed() plan.Observed {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.seen
}

// removeOrphans removes folders of pods that are neither in the API nor in the
// runtime, once both have been heard.
func (a *Agent) removeOrphans(ctx context.Context) error {
	if !a.synced() {
		return nil
	}
	pods, err := a.rt.List(ctx)
	if err != nil {
		return err
	}
	known := map[types.UID]bool{}
	for uid := range pods {
		known[uid] = true
	}
	// After the runtime: a pod may have been born meanwhile.
	for _, w := range a.all() {
		known[w.uid] = true
	}
	var errs []error
	dirs, err := a.volumes.Pods()
	errs = append(errs, err)
	for _, uid := range dirs {
		if !known[uid] && !a.inAPI(uid) {
			a.cfg.Log.Info("removing volumes of a pod that is gone", "uid", uid)
			errs = append(errs, a.volumes.Teardown(uid))
		}
	}
	return errors.Join(append(errs, a.orphanLogs(known))...)
}

func (a *Agent) inAPI(uid types.UID) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.seen[uid] || a.workers[uid] != nil
}

// orphanLogs removes log folders of pods that are gone. Only what has the form
// namespace_name_uid is looked at.
func (a *Agent) orphanLogs(known map[types.UID]bool) error {
	entries, err := os.ReadDir(a.cfg.PodLogDir)
	if err != nil {
		if errors.Is(err, os.ErrNotExist) {
			return nil
		}
		return err
	}
	var errs []error
	for _, e := range entries {
		parts := strings.Split(e.Name(), "_")
		if len(parts) != 3 || !e.IsDir() {
			continue
		}
		uid := types.UID(parts[2])
		if known[uid] || a.inAPI(uid) {
			continue
		}
		errs = append(errs, os.RemoveAll(filepath.Join(a.cfg.PodLogDir, e.Name())))
	}
	return errors.Join(errs...)
}

// PodList is every pod of the node.
func (a *Agent) PodList() *v1.PodList {
	list := &v1.PodList{}
	for _, w := range a.all() {
		if pod := w.object(); pod.Spec.NodeName != "" {
			list.Items = append(list.Items, *pod)
		}
	}
	return list
}

func (a *Agent) byName(namespace, name string) *worker {
	var newest *worker
	for _, w := range a.all() {
		if w.name == namespace+"/"+name && (newest == nil || w.born > newest.born) {
			newest = w
		}
	}
	return newest
}

// Container finds a container by name: the newest, or the one before.
func (a *Agent) Container(namespace, pod, name string, previous bool) (plan.Container, error) {
	w := a.byName(namespace, pod)
	if w == nil {
		return plan.Container{}, fmt.Errorf("pod %s/%s is not on node %s", namespace, pod, a.cfg.NodeName)
	}
	obs := w.observed()
	c := obs.Latest(name)
	what := "container"
	if previous {
		c, what = obs.Previous(name), "previous terminated container"
		if cur := obs.Latest(name); c == nil && cur != nil && cur.State == plan.Exited {
			c = cur // the one that waits for its restart
		}
	}
	if c == nil {
		return plan.Container{}, fmt.Errorf("%s %q in pod %q not found", what, name, pod)
	}
	return *c, nil
}

// SandboxID of a running pod.
func (a *Agent) SandboxID(namespace, pod string) (string, error) {
	if w := a.byName(namespace, pod); w != nil {
		obs := w.observed()
		if s := obs.Sandbox(); s != nil && s.Ready {
			return s.ID, nil
		}
	}
	return "", fmt.Errorf("pod %s/%s does not run on node %s", namespace, pod, a.cfg.NodeName)
}
