package agent

import (
	"context"
	"fmt"
	"io/fs"
	"path/filepath"

	"golang.org/x/sys/unix"
	v1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"

	"meshd.dev/pkg/agent/plan"
	"meshd.dev/pkg/agent/podspec"
)

// evictHungry ends pods that hold more of the disk than they asked for: an
// emptyDir beyond its sizeLimit, a container beyond its limit of
// ephemeral-storage.
func (a *Agent) evictHungry(ctx context.Context) error {
	var used map[string]int64
	for _, w := range a.all() {
		pod := w.object()
		if !diskLimited(pod) || pod.DeletionTimestamp != nil {
			continue
		}
		if used == nil {
			var err error
			if used, err = a.rt.WritableBytes(ctx); err != nil {
				return err
			}
		}
		if why := a.hungry(pod, w.observed(), used); why != "" {
			w.evict(why)
		}
	}
	return nil
}

func diskLimited(pod *v1.Pod) bool {
	for _, v := range pod.Spec.Volumes {
		if v.EmptyDir != nil && v.EmptyDir.SizeLimit != nil && v.EmptyDir.Medium == v1.StorageMediumDefault {
			return true
		}
	}
	for _, c := range pod.Spec.Containers {
		if _, ok := c.Resources.Limits[v1.ResourceEphemeralStorage]; ok {
			return true
		}
	}
	return false
}

// hungry says what of the pod is over its limit.
func (a *Agent) hungry(pod *v1.Pod, obs plan.Observed, used map[string]int64) string {
	var all, limit int64
	for _, v := range pod.Spec.Volumes {
		if v.EmptyDir == nil || v.EmptyDir.Medium != v1.StorageMediumDefault {
			continue
		}
		size := diskUse(a.volumes.Dir(pod.UID, v.Name))
		all += size
		if most := v.EmptyDir.SizeLimit; most != nil && most.Sign() > 0 && size > most.Value() {
			return fmt.Sprintf("Usage of EmptyDir volume %q exceeds the limit %q.", v.Name, most.String())
		}
	}
	for _, c := range pod.Spec.Containers {
		size := diskUse(filepath.Join(podspec.LogDir(a.cfg.PodLogDir, pod), c.Name))
		if cur := obs.Latest(c.Name); cur != nil {
			size += used[cur.ID]
		}
		all += size
		most, ok := c.Resources.Limits[v1.ResourceEphemeralStorage]
		if !ok {
			continue
		}
		limit += most.Value()
		if size > most.Value() {
			return fmt.Sprintf("Container %s exceeded its local ephemeral storage limit %q.", c.Name, most.String())
		}
	}
	if limit > 0 && all > limit {
		return fmt.Sprintf("Pod ephemeral local storage usage exceeds the total limit of containers %s.", resource.NewQuantity(limit, resource.BinarySI))
	}
	return ""
}

// diskUse is what the files below dir take of the disk, in bytes.
func diskUse(dir string) int64 {
	var sum int64
	_ = filepath.WalkDir(dir, func(path string, _ fs.DirEntry, err error) error {
		var st unix.Stat_t
		if err == nil && unix.Lstat(path, &st) == nil {
			sum += st.Blocks * 512
		}
		return nil // what vanishes meanwhile takes nothing
	})
	return sum
}

// evict ends the pod with phase Failed.
func (w *worker) evict(why string) {
	w.mu.Lock()
	news := w.evicted == ""
	w.evicted = why
	w.mu.Unlock()
	if news {
		w.a.event(w.object(), "", v1.EventTypeWarning, "Evicted", why)
		w.kick()
	}
}
