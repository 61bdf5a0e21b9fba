package agent

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"time"

	"google.golang.org/grpc/codes"
	grpcstatus "google.golang.org/grpc/status"
	v1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/strategicpatch"

	"meshd.dev/pkg/agent/plan"
	"meshd.dev/pkg/agent/podspec"
	"meshd.dev/pkg/agent/podstatus"
	"meshd.dev/pkg/agent/volume"
)

// failure is an error with the reason the API shows for it.
type failure struct {
	reason string
	err    error
}

func (f *failure) Error() string { return f.err.Error() }
func (f *failure) Unwrap() error { return f.err }

// launch starts an operation unless its like is under way. The caller holds
// w.mu.
func (w *worker) launch(ctx context.Context, op plan.Op) {
	key := op.Key()
	if w.busy[key] {
		if op.Verb != plan.KillContainer || op.Grace >= w.grace[key]-time.Second {
			return
		}
		key += "/sooner" // a shorter grace than the one under way
		if w.busy[key] {
			return
		}
	}
	if op.Verb == plan.KillContainer {
		w.grace[op.Key()] = op.Grace
	}
	w.a.cfg.Log.Debug("pod operation", "pod", w.pod.Name, "namespace", w.pod.Namespace, "op", op.String())
	w.begin(ctx, key, func() error { return w.do(ctx, op) })
}

// begin runs f beside the worker under a key. The caller holds w.mu.
func (w *worker) begin(ctx context.Context, key string, f func() error) {
	w.busy[key] = true
	w.ops.Go(func() {
		err := f()
		w.mu.Lock()
		delete(w.busy, key)
		delete(w.grace, key)
		if key != statusKey {
			w.finished++
		}
		if ctx.Err() == nil && (err == nil || w.patience.Err() == nil || !gaveUp(err)) {
			w.settle(key, err) // else it was called off, which is no failure
		}
		w.mu.Unlock()
		w.kick()
	})
}

// gaveUp reports whether an operation ended because it was called off.
func gaveUp(err error) bool {
	return errors.Is(err, context.Canceled) || grpcstatus.Code(err) == codes.Canceled
}

// settle keeps or forgets the failure of an operation. The caller holds w.mu.
func (w *worker) settle(key string, err error) {
	if err == nil {
		delete(w.failures, key)
		return
	}
	f := plan.Failure{Reason: "Error", Message: err.Error(), Count: w.failures[key].Count + 1, At: time.Now()}
	var known *failure
	if errors.As(err, &known) {
		f.Reason = known.reason
	}
	w.failures[key] = f
	level := slog.LevelWarn
	if key == statusKey && f.Count > 1 {
		level = slog.LevelDebug // the API is away, and the node says so
	}
	w.a.cfg.Log.Log(context.Background(), level, "pod operation failed", "pod", w.pod.Name, "namespace", w.pod.Namespace, "op", key, "again in", time.Until(f.Until()).Round(time.Millisecond), "err", err)
}

func (w *worker) do(ctx context.Context, op plan.Op) error {
	pod := w.object()
	switch op.Verb {
	case plan.SetupVolumes:
		return w.setupVolumes(w.patience, pod)
	case plan.CreateSandbox:
		return w.createSandbox(ctx, pod, op)
	case plan.StopSandbox:
		if err := w.a.rt.StopSandbox(ctx, op.ID); err != nil {
			return err
		}
		w.mu.Lock()
		defer w.mu.Unlock()
		w.down[op.ID] = true
		return nil
	case plan.RemoveSandbox:
		return w.a.rt.RemoveSandbox(ctx, op.ID)
	case plan.StartContainer:
		return w.startContainer(ctx, pod, op)
	case plan.KillContainer:
		return w.killContainer(ctx, pod, op)
	case plan.RemoveContainer:
		return w.a.rt.Remove(ctx, op.ID)
	case plan.TeardownVolumes:
		return w.teardownVolumes()
	case plan.Forget:
		return w.forget(ctx, pod)
	}
	return fmt.Errorf("operation %q is not known", op.Verb)
}

func (w *worker) setupVolumes(ctx context.Context, pod *v1.Pod) error {
	w.mu.Lock()
	w.volumes.stale = false
	obs := w.seen
	w.mu.Unlock()
	facts := volume.Facts{Node: w.a.facts(), PodIPs: podstatus.PodIPs(pod, obs.Sandbox(), w.a.nodeIPs)}
	next, err := w.a.volumes.Setup(ctx, pod, facts)
	if err != nil {
		w.a.event(pod, "", v1.EventTypeWarning, "FailedMount", err.Error())
		w.mu.Lock()
		w.volumes.stale = true
		w.mu.Unlock()
		return &failure{"FailedMount", err}
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.volumes.ready, w.volumes.next = true, next
	return nil
}

func (w *worker) teardownVolumes() error {
	if err := w.a.volumes.Teardown(w.uid); err != nil {
		return err
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.volumes.gone = true
	return nil
}

func (w *worker) createSandbox(ctx context.Context, pod *v1.Pod, op plan.Op) error {
	host, _ := podspec.Hostname(pod, w.a.cfg.NodeName, w.a.cfg.ClusterDomain)
	dns := podspec.DNS(pod, w.a.clusterDNS(), w.a.cfg.ClusterDomain, w.a.resolvConf())
	cfg := podspec.Sandbox(pod, uint32(op.Attempt), host, dns, w.a.cfg.PodLogDir)
	if err := os.MkdirAll(cfg.LogDirectory, 0o755); err != nil {
		return err
	}
	if _, err := w.a.rt.RunSandbox(ctx, cfg); err != nil {
		if ctx.Err() == nil {
			w.a.event(pod, "", v1.EventTypeWarning, "FailedCreatePodSandBox", "Failed to create pod sandbox: "+err.Error())
		}
		return &failure{"FailedCreatePodSandBox", err}
	}
	if op.Attempt > 0 {
		w.a.event(pod, "", v1.EventTypeNormal, "SandboxChanged", "Pod sandbox changed, it was killed and re-created.")
	}
	return nil
}

// forget ends the pod on this node. Its object goes last, so that who sees it
// gone finds nothing left of it here.
func (w *worker) forget(ctx context.Context, pod *v1.Pod) error {
	if err := os.RemoveAll(podspec.LogDir(w.a.cfg.PodLogDir, pod)); err != nil {
		return err
	}
	if err := w.a.checkpoints.remove(w.uid); err != nil {
		return err
	}
	w.mu.Lock()
	gone := w.gone
	w.mu.Unlock()
	if !gone {
		if err := w.deleteObject(ctx, pod); err != nil {
			return err
		}
	}
	w.a.objects.Hold(w.uid, nil)
	w.mu.Lock()
	w.over = true
	w.mu.Unlock()
	w.a.cfg.Log.Info("pod ended", "pod", pod.Name, "namespace", pod.Namespace, "uid", w.uid)
	return nil
}

// deleteObject deletes exactly this pod's object, for good.
func (w *worker) deleteObject(ctx context.Context, pod *v1.Pod) error {
	ctx, cancel := context.WithTimeout(ctx, apiLimit)
	defer cancel()
	now := int64(0)
	err := w.a.client.CoreV1().Pods(pod.Namespace).Delete(ctx, pod.Name, metav1.DeleteOptions{
		GracePeriodSeconds: &now, Preconditions: metav1.NewUIDPreconditions(string(pod.UID)),
	})
	if err != nil && !apierrors.IsNotFound(err) && !apierrors.IsConflict(err) {
		return fmt.Errorf("delete pod: %w", err)
	}
	return nil
}

// apiLimit bounds one call of the API.
const apiLimit = 10 * time.Second

// statusKey is the key of a write of the status.
const statusKey = "status"

// report writes the status, unless a write is under way: its answer will kick.
// It returns when to try again. The caller holds w.mu.
func (w *worker) report(ctx context.Context, status v1.PodStatus, now time.Time) time.Time {
	const key = statusKey
	if w.busy[key] {
		return time.Time{}
	}
	if f, ok := w.failures[key]; ok && now.Before(f.Until()) {
		return f.Until()
	}
	pod := w.pod
	w.begin(ctx, key, func() error { return w.writeStatus(ctx, pod, status) })
	return time.Time{}
}

func (w *worker) writeStatus(ctx context.Context, pod *v1.Pod, status v1.PodStatus) error {
	patch, err := statusPatch(pod, status)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, apiLimit)
	defer cancel()
	written, err := w.a.client.CoreV1().Pods(pod.Namespace).Patch(ctx, pod.Name, types.StrategicMergePatchType, patch, metav1.PatchOptions{}, "status")
	switch {
	case apierrors.IsNotFound(err), apierrors.IsConflict(err):
		return w.lost(ctx, pod, err)
	case err != nil:
		return fmt.Errorf("write pod status: %w", err)
	}
	w.written(written)
	return nil
}

// lost acts on a write that found no such pod. A conflict is no proof: the name
// may be another pod's now, or others wrote the same pod again and again.
func (w *worker) lost(ctx context.Context, pod *v1.Pod, cause error) error {
	if apierrors.IsConflict(cause) {
		now, err := w.a.client.CoreV1().Pods(pod.Namespace).Get(ctx, pod.Name, metav1.GetOptions{})
		switch {
		case err == nil && now.UID == pod.UID:
			return fmt.Errorf("write pod status: %w", cause)
		case err != nil && !apierrors.IsNotFound(err):
			return fmt.Errorf("look for pod after %q: %w", cause, err)
		}
	}
	if w.a.synced() {
		w.vanish()
	}
	return nil
}

// statusPatch changes the status of exactly this pod, and of it only what
// differs.
func statusPatch(pod *v1.Pod, status v1.PodStatus) ([]byte, error) {
	before, err := json.Marshal(v1.Pod{Status: pod.Status})
	if err != nil {
		return nil, err
	}
	after, err := json.Marshal(v1.Pod{ObjectMeta: metav1.ObjectMeta{UID: pod.UID}, Status: status})
	if err != nil {
		return nil, err
	}
	return strategicpatch.CreateTwoWayMergePatch(before, after, v1.Pod{})
}
