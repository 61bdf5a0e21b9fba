package agent

import (
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"

	v1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"

	"meshd.dev/pkg/agent/plan"
	"meshd.dev/pkg/durable"
)

// checkpoints are the pods' objects on disk, so that pods are looked after
// while the API is away.
type checkpoints struct {
	dir string
	log *slog.Logger

	mu    sync.Mutex
	kept  map[types.UID]string
	ended map[types.UID]bool // a late word of the watch must not bring them back
}

func newCheckpoints(dir string, log *slog.Logger) *checkpoints {
	return &checkpoints{dir: dir, log: log, kept: map[types.UID]string{}, ended: map[types.UID]bool{}}
}

func (c *checkpoints) path(uid types.UID) string { return filepath.Join(c.dir, string(uid)+".json") }

// load reads all of them. One that cannot be read is set aside, not used.
func (c *checkpoints) load() ([]*v1.Pod, error) {
	entries, err := os.ReadDir(c.dir)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read checkpoints: %w", err)
	}
	var pods []*v1.Pod
	for _, e := range entries {
		name := e.Name()
		if strings.HasPrefix(name, ".") || !strings.HasSuffix(name, ".json") {
			continue
		}
		path := filepath.Join(c.dir, name)
		pod, err := parseCheckpoint(path, types.UID(strings.TrimSuffix(name, ".json")))
		if err != nil {
			c.log.Error("checkpoint of a pod is damaged; set aside", "path", path, "err", err)
			_ = os.Rename(path, path+".damaged")
			continue
		}
		pods = append(pods, pod)
	}
	return pods, nil
}

func parseCheckpoint(path string, uid types.UID) (*v1.Pod, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	pod := &v1.Pod{}
	if err := json.Unmarshal(b, pod); err != nil {
		return nil, err
	}
	if pod.UID != uid || pod.Name == "" || pod.Namespace == "" || len(pod.Spec.Containers) == 0 {
		return nil, fmt.Errorf("it is not the object of pod %s", uid)
	}
	return pod, nil
}

// keep writes the object when anything but the course of its status changed.
// The health of its containers is kept: after a restart of the agent what was
// ready still is, until a probe says otherwise.
func (c *checkpoints) keep(pod *v1.Pod) error {
	slim := pod.DeepCopy()
	slim.ManagedFields = nil
	essence := slim.DeepCopy()
	essence.ResourceVersion = ""
	essence.Status = v1.PodStatus{Phase: endedPhase(pod), StartTime: pod.Status.StartTime}
	key, err := json.Marshal(struct {
		Pod    *v1.Pod
		Health map[string]plan.Health
	}{essence, reportedHealth(pod)})
	if err != nil {
		return err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.ended[pod.UID] || c.kept[pod.UID] == string(key) {
		return nil
	}
	b, err := json.Marshal(slim)
	if err != nil {
		return err
	}
	if _, err := durable.WriteFileIfChanged(c.path(pod.UID), b, 0o600); err != nil {
		return err
	}
	c.kept[pod.UID] = string(key)
	return nil
}

// endedPhase is the phase when it is final: a pod that ended must not be
// started again after a reboot.
func endedPhase(pod *v1.Pod) v1.PodPhase {
	if pod.Status.Phase == v1.PodSucceeded || pod.Status.Phase == v1.PodFailed {
		return pod.Status.Phase
	}
	return ""
}

// remove forgets a pod that has ended; nothing is kept of it until the API has
// forgotten it too, which release says.
func (c *checkpoints) remove(uid types.UID) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.kept, uid)
	c.ended[uid] = true
	if err := os.Remove(c.path(uid)); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return nil
}

func (c *checkpoints) release(uid types.UID) {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.ended, uid)
}
