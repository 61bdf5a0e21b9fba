package agent

import (
	"context"

	v1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/kubernetes/scheme"
	typedv1 "k8s.io/client-go/kubernetes/typed/core/v1"
	"k8s.io/client-go/tools/record"
	"k8s.io/client-go/tools/reference"

	"meshd.dev/pkg/agent/plan"
)

// newRecorder sends events to the API until stop is called. Client-go merges
// what repeats itself.
func newRecorder(ctx context.Context, client kubernetes.Interface, node string) (r record.EventRecorder, stop func()) {
	b := record.NewBroadcaster(record.WithContext(ctx))
	b.StartRecordingToSink(&typedv1.EventSinkImpl{Interface: client.CoreV1().Events("")})
	return b.NewRecorder(scheme.Scheme, v1.EventSource{Component: "meshd", Host: node}), b.Shutdown
}

// event tells a person what happened to a pod, or to a container of it.
func (a *Agent) event(pod *v1.Pod, container, kind, reason, message string) {
	if pod.Spec.NodeName == "" {
		return // an orphan: the API knows no such pod
	}
	var obj runtime.Object = pod
	if container != "" {
		if ref, err := reference.GetReference(scheme.Scheme, pod); err == nil {
			ref.FieldPath = fieldPath(pod, container)
			obj = ref
		}
	}
	if len(message) > 1024 {
		message = message[:1021] + "..."
	}
	a.recorder.Event(obj, kind, reason, message)
}

func fieldPath(pod *v1.Pod, container string) string {
	for _, c := range pod.Spec.InitContainers {
		if c.Name == container {
			return "spec.initContainers{" + container + "}"
		}
	}
	return "spec.containers{" + container + "}"
}

// backoffEvents tells of each wait once. The caller holds w.mu.
func (w *worker) backoffEvents(p plan.Plan) {
	for name, wait := range p.Waiting {
		if wait.Reason != "CrashLoopBackOff" {
			continue
		}
		cur := w.seen.Latest(name)
		if cur == nil || w.told[name] == cur.ID {
			continue
		}
		w.told[name] = cur.ID
		w.a.event(w.pod, name, v1.EventTypeWarning, "BackOff", "Back-off restarting failed container "+name+" in pod "+w.pod.Name+"_"+w.pod.Namespace)
	}
}

// refuse tells once that the pod cannot run here. The caller holds w.mu.
func (w *worker) refuse(why string) {
	if w.told["unsupported"] == why {
		return
	}
	w.told["unsupported"] = why
	w.a.event(w.pod, "", v1.EventTypeWarning, "Unsupported", why)
}
