package runtime

import (
	"bytes"
	"context"
	"os"
	"strconv"
	"time"

	"k8s.io/apimachinery/pkg/types"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"meshd.dev/pkg/agent/plan"
)

// Pod is what the runtime has of one pod.
type Pod struct {
	UID             types.UID
	Namespace, Name string
	plan.Observed
}

// maxTerminationMessage is the kubelet's limit for one container.
const maxTerminationMessage = 4096

// Observe returns what the runtime has of one pod, complete.
func (c *Client) Observe(ctx context.Context, uid types.UID) (plan.Observed, error) {
	pods, err := c.list(ctx, uid)
	if err != nil {
		return plan.Observed{}, err
	}
	p, ok := pods[uid]
	if !ok {
		return plan.Observed{}, nil
	}
	for i := range p.Sandboxes {
		if err := c.fillSandbox(ctx, &p.Sandboxes[i]); err != nil {
			return plan.Observed{}, err
		}
	}
	for i := range p.Containers {
		if err := c.fillContainer(ctx, &p.Containers[i]); err != nil {
			return plan.Observed{}, err
		}
	}
	p.Sort()
	return p.Observed, nil
}

// List returns every pod of the runtime that carries the labels, without the
// details that cost a call each.
func (c *Client) List(ctx context.Context) (map[types.UID]*Pod, error) {
	pods, err := c.list(ctx, "")
	if err != nil {
		return nil, err
	}
	c.forget(pods)
	return pods, nil
}

// Sandboxes are the IDs of all that are ready, whoever made them.
func (c *Client) Sandboxes(ctx context.Context) (map[string]bool, error) {
	r, err := call(ctx, quick, "list sandboxes", func(ctx context.Context) (*cri.ListPodSandboxResponse, error) {
		return c.rt.ListPodSandbox(ctx, &cri.ListPodSandboxRequest{Filter: &cri.PodSandboxFilter{
			State: &cri.PodSandboxStateValue{State: cri.PodSandboxState_SANDBOX_READY}}})
	})
	if err != nil {
		return nil, err
	}
	ready := make(map[string]bool, len(r.Items))
	for _, s := range r.Items {
		ready[s.Id] = true
	}
	return ready, nil
}

// Died notes a death that CRI will show only when the runtime has cleaned up
// behind it, some 50 ms later.
func (c *Client) Died(e Exit) {
	if e.At.IsZero() {
		return // not known how; CRI will say
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.exits[e.ID] = e
}

// forget drops what is remembered of containers that are no more.
func (c *Client) forget(pods map[types.UID]*Pod) {
	alive := map[string]bool{}
	for _, p := range pods {
		for _, k := range p.Containers {
			alive[k.ID] = true
		}
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	for id := range c.ended {
		if !alive[id] {
			delete(c.ended, id)
		}
	}
	for id, e := range c.exits {
		if !alive[id] && time.Since(e.At) > time.Minute {
			delete(c.exits, id)
		}
	}
}

func (c *Client) list(ctx context.Context, uid types.UID) (map[types.UID]*Pod, error) {
	var sel map[string]string
	if uid != "" {
		sel = map[string]string{LabelPodUID: string(uid)}
	}
	sandboxes, err := call(ctx, quick, "list sandboxes", func(ctx context.Context) (*cri.ListPodSandboxResponse, error) {
		return c.rt.ListPodSandbox(ctx, &cri.ListPodSandboxRequest{Filter: &cri.PodSandboxFilter{LabelSelector: sel}})
	})
	if err != nil {
		return nil, err
	}
	containers, err := call(ctx, quick, "list containers", func(ctx context.Context) (*cri.ListContainersResponse, error) {
		return c.rt.ListContainers(ctx, &cri.ListContainersRequest{Filter: &cri.ContainerFilter{LabelSelector: sel}})
	})
	if err != nil {
		return nil, err
	}
	pods := map[types.UID]*Pod{}
	pod := func(labels map[string]string) *Pod {
		uid := types.UID(labels[LabelPodUID])
		if uid == "" {
			return nil
		}
		if pods[uid] == nil {
			pods[uid] = &Pod{UID: uid, Namespace: labels[LabelPodNamespace], Name: labels[LabelPodName]}
		}
		return pods[uid]
	}
	for _, s := range sandboxes.Items {
		if p := pod(s.Labels); p != nil {
			p.Sandboxes = append(p.Sandboxes, plan.Sandbox{
				ID: s.Id, Attempt: s.GetMetadata().GetAttempt(), Created: when(s.CreatedAt),
				Ready: s.State == cri.PodSandboxState_SANDBOX_READY,
			})
		}
	}
	for _, k := range containers.Containers {
		if p := pod(k.Labels); p != nil {
			p.Containers = append(p.Containers, listed(k))
		}
	}
	for _, p := range pods {
		p.Sort()
	}
	return pods, nil
}

func listed(k *cri.Container) plan.Container {
	attempt, err := strconv.Atoi(k.Annotations[AnnotationRestarts])
	if err != nil {
		attempt = int(k.GetMetadata().GetAttempt())
	}
	backoff, _ := time.ParseDuration(k.Annotations[AnnotationBackoff])
	return plan.Container{
		ID: k.Id, Name: k.GetMetadata().GetName(), SandboxID: k.PodSandboxId, Attempt: attempt,
		State: state(k.State), Created: when(k.CreatedAt), Image: k.GetImage().GetImage(), ImageID: k.ImageRef,
		Hash: k.Annotations[AnnotationHash], Backoff: backoff,
	}
}

func state(s cri.ContainerState) plan.State {
	switch s {
	case cri.ContainerState_CONTAINER_CREATED:
		return plan.Created
	case cri.ContainerState_CONTAINER_RUNNING:
		return plan.Running
	case cri.ContainerState_CONTAINER_EXITED:
		return plan.Exited
	default:
		return plan.Unknown
	}
}

// when reads CRI's nanoseconds, of which 0 stands for never.
func when(ns int64) time.Time {
	if ns <= 0 {
		return time.Time{}
	}
	return time.Unix(0, ns)
}

// fillSandbox adds the addresses of a sandbox that is up.
func (c *Client) fillSandbox(ctx context.Context, s *plan.Sandbox) error {
	c.mu.Lock()
	_, died := c.exits[s.ID]
	c.mu.Unlock()
	s.Ready = s.Ready && !died
	if !s.Ready {
		return nil
	}
	r, err := call(ctx, quick, "ask status of sandbox "+s.ID, func(ctx context.Context) (*cri.PodSandboxStatusResponse, error) {
		return c.rt.PodSandboxStatus(ctx, &cri.PodSandboxStatusRequest{PodSandboxId: s.ID})
	})
	if NotFound(err) {
		s.Ready = false
		return nil
	}
	if err != nil {
		return err
	}
	s.Ready = r.Status.GetState() == cri.PodSandboxState_SANDBOX_READY
	s.IPs = nil
	if ip := r.Status.GetNetwork().GetIp(); ip != "" {
		s.IPs = append(s.IPs, ip)
	}
	for _, more := range r.Status.GetNetwork().GetAdditionalIps() {
		s.IPs = append(s.IPs, more.Ip)
	}
	return nil
}

// fillContainer adds times, exit code and message.
func (c *Client) fillContainer(ctx context.Context, k *plan.Container) error {
	c.mu.Lock()
	known, ok := c.ended[k.ID]
	exit, died := c.exits[k.ID]
	c.mu.Unlock()
	if ok {
		*k = known
		return nil
	}
	r, err := call(ctx, quick, "ask status of container "+k.ID, func(ctx context.Context) (*cri.ContainerStatusResponse, error) {
		return c.rt.ContainerStatus(ctx, &cri.ContainerStatusRequest{ContainerId: k.ID})
	})
	if NotFound(err) {
		k.State = plan.Exited
		k.Reason, k.ExitCode = "ContainerStatusUnknown", 137
		return nil
	}
	if err != nil {
		return err
	}
	s := r.Status
	k.State, k.Started, k.Finished = state(s.State), when(s.StartedAt), when(s.FinishedAt)
	k.ExitCode, k.Reason, k.Message, k.LogPath = s.ExitCode, s.Reason, s.Message, s.LogPath
	if s.ImageRef != "" {
		k.ImageID = s.ImageRef
	}
	if died && (k.State == plan.Running || k.State == plan.Unknown) {
		k.State, k.ExitCode, k.Finished = plan.Exited, exit.ExitCode, exit.At
		k.Reason = "Error"
		if exit.ExitCode == 0 {
			k.Reason = "Completed"
		}
		terminationMessage(k, s)
		return nil
	}
	if k.State == plan.Exited {
		terminationMessage(k, s)
		c.mu.Lock()
		c.ended[k.ID] = *k
		delete(c.exits, k.ID)
		c.mu.Unlock()
	}
	return nil
}

// terminationMessage reads what the container left behind, or the end of its
// log when that was asked for.
func terminationMessage(k *plan.Container, s *cri.ContainerStatus) {
	if msg := tail(s.Annotations[AnnotationMessageFile], maxTerminationMessage); msg != "" {
		k.Message = msg
		return
	}
	if s.Annotations[AnnotationMessageFrom] == "FallbackToLogsOnError" && k.ExitCode != 0 {
		k.Message = logTail(s.LogPath)
	}
}

// logTail is the text of the last lines of a log in CRI's format.
func logTail(path string) string {
	var out []byte
	for line := range bytes.Lines([]byte(tail(path, 2048))) {
		fields := bytes.SplitN(line, []byte(" "), 4)
		if len(fields) == 4 {
			out = append(out, fields[3]...)
		}
	}
	return string(out)
}

// tail is the last n bytes of a file, empty when there is none.
func tail(path string, n int64) string {
	if path == "" {
		return ""
	}
	f, err := os.Open(path)
	if err != nil {
		return ""
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil || !st.Mode().IsRegular() {
		return ""
	}
	b := make([]byte, min(n, st.Size()))
	read, _ := f.ReadAt(b, max(0, st.Size()-n))
	return string(b[:read])
}
