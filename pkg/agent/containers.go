package agent

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	v1 "k8s.io/api/core/v1"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"meshd.dev/pkg/agent/plan"
	"meshd.dev/pkg/agent/podspec"
	"meshd.dev/pkg/agent/podstatus"
	"meshd.dev/pkg/agent/probe"
)

// startContainer makes one run of a container: image, configuration, create,
// start, hook.
func (w *worker) startContainer(ctx context.Context, pod *v1.Pod, op plan.Op) error {
	c := podspec.Find(pod, op.Name)
	w.mu.Lock()
	sb := w.seen.Sandbox()
	w.mu.Unlock()
	if c == nil || sb == nil {
		return fmt.Errorf("container %s or its sandbox is gone", op.Name)
	}
	host, fqdn := podspec.Hostname(pod, w.a.cfg.NodeName, w.a.cfg.ClusterDomain)
	dns := podspec.DNS(pod, w.a.clusterDNS(), w.a.cfg.ClusterDomain, w.a.resolvConf())
	sandboxCfg := podspec.Sandbox(pod, sb.Attempt, host, dns, w.a.cfg.PodLogDir)
	image, err := w.ensureImage(w.patience, pod, c, sandboxCfg)
	if err != nil {
		return err
	}
	ips := podstatus.PodIPs(pod, sb, w.a.nodeIPs)
	cfg, err := w.containerConfig(ctx, pod, c, op, image, ips, host, fqdn)
	if err != nil {
		w.a.event(pod, c.Name, v1.EventTypeWarning, "Failed", "Error: "+err.Error())
		return &failure{"CreateContainerConfigError", err}
	}
	logs := filepath.Join(sandboxCfg.LogDirectory, c.Name)
	if err := os.MkdirAll(logs, 0o755); err != nil {
		return &failure{"CreateContainerError", err}
	}
	id, err := w.a.rt.Create(ctx, sb.ID, cfg, sandboxCfg)
	if err != nil {
		w.a.event(pod, c.Name, v1.EventTypeWarning, "Failed", "Error: "+err.Error())
		return &failure{"CreateContainerError", err}
	}
	w.a.ownID(id, w.uid)
	w.a.event(pod, c.Name, v1.EventTypeNormal, "Created", "Container created")
	if err := w.a.rt.Start(ctx, id); err != nil {
		w.a.event(pod, c.Name, v1.EventTypeWarning, "Failed", "Error: "+err.Error())
		return &failure{"RunContainerError", err}
	}
	w.a.event(pod, c.Name, v1.EventTypeNormal, "Started", "Container started")
	if op.Attempt > 0 {
		w.a.cfg.Log.Info("container restarted", "pod", pod.Name, "namespace", pod.Namespace, "container", c.Name, "restarts", op.Attempt)
	}
	if c.Lifecycle != nil && c.Lifecycle.PostStart != nil {
		w.kick() // it runs already
		return w.postStart(ctx, pod, c, id, ips)
	}
	return nil
}

func (w *worker) containerConfig(ctx context.Context, pod *v1.Pod, c *v1.Container, op plan.Op, image *cri.Image, ips []string, host, fqdn string) (*cri.ContainerConfig, error) {
	facts := w.a.facts()
	env, err := podspec.Env(pod, c, facts, ips, w.a.objects)
	if err != nil {
		return nil, err
	}
	mounts, err := w.a.volumes.Mounts(ctx, pod, c, env)
	if err != nil {
		return nil, err
	}
	if !mountsAt(c, "/etc/hosts") {
		base, _ := os.ReadFile("/etc/hosts")
		hosts, err := w.a.volumes.Hosts(pod.UID, podspec.Hosts(pod, ips, host, fqdn, base))
		if err != nil {
			return nil, err
		}
		mounts = append(mounts, &cri.Mount{ContainerPath: "/etc/hosts", HostPath: hosts})
	}
	message := ""
	if c.TerminationMessagePath != "" {
		if message, err = w.a.volumes.MessageFile(pod.UID, c.Name, op.Attempt); err != nil {
			return nil, err
		}
		mounts = append(mounts, &cri.Mount{ContainerPath: c.TerminationMessagePath, HostPath: message})
	}
	cfg, err := podspec.Container(pod, c, podspec.Run{
		Attempt: op.Attempt, Backoff: op.Backoff, Env: env, Mounts: mounts, Image: image.Id,
		MessageFile: message, SeccompDir: filepath.Join(w.a.cfg.StateDir, "seccomp"),
		NodeMemory: w.a.memory, OOMFloor: w.a.oomFloor,
	})
	if err != nil {
		return nil, err
	}
	return cfg, podspec.UseImageUser(pod, c, cfg, image)
}

func mountsAt(c *v1.Container, path string) bool {
	for _, m := range c.VolumeMounts {
		if filepath.Clean(m.MountPath) == path {
			return true
		}
	}
	return false
}

// hookLimit bounds a postStart hook, which has no limit of its own.
const hookLimit = 10 * time.Minute

func (w *worker) postStart(ctx context.Context, pod *v1.Pod, c *v1.Container, id string, ips []string) error {
	err := w.hook(w.patience, c, c.Lifecycle.PostStart, id, ips, hookLimit)
	if err == nil || w.patience.Err() != nil {
		return nil
	}
	w.a.event(pod, c.Name, v1.EventTypeWarning, "FailedPostStartHook", "PostStartHook failed: "+err.Error())
	grace := 30 * time.Second
	if s := pod.Spec.TerminationGracePeriodSeconds; s != nil {
		grace = time.Duration(*s) * time.Second
	}
	w.a.event(pod, c.Name, v1.EventTypeNormal, "Killing", "FailedPostStartHook")
	return w.a.rt.Stop(ctx, id, grace)
}

func (w *worker) hook(ctx context.Context, c *v1.Container, h *v1.LifecycleHandler, id string, ips []string, limit time.Duration) error {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	target := probe.Target{ID: id, Spec: c}
	if len(ips) > 0 {
		target.IP = ips[0]
	}
	switch {
	case h.Exec != nil:
		return probe.Once(ctx, v1.ProbeHandler{Exec: h.Exec}, target, limit, w.a.rt.ExecSync)
	case h.HTTPGet != nil:
		return probe.Once(ctx, v1.ProbeHandler{HTTPGet: h.HTTPGet}, target, limit, nil)
	case h.TCPSocket != nil:
		return probe.Once(ctx, v1.ProbeHandler{TCPSocket: h.TCPSocket}, target, limit, nil)
	case h.Sleep != nil:
		select {
		case <-ctx.Done():
		case <-time.After(time.Duration(h.Sleep.Seconds) * time.Second):
		}
		return nil
	}
	return errors.New("the hook says nothing of what to do")
}

// killContainer asks a container to end, and makes it when it does not.
func (w *worker) killContainer(ctx context.Context, pod *v1.Pod, op plan.Op) error {
	end := time.Now().Add(op.Grace)
	c := podspec.Find(pod, op.Name)
	w.a.event(pod, op.Name, v1.EventTypeNormal, "Killing", op.Reason)
	w.mu.Lock()
	ips := podstatus.PodIPs(pod, w.seen.Sandbox(), w.a.nodeIPs)
	w.mu.Unlock()
	if c != nil && c.Lifecycle != nil && c.Lifecycle.PreStop != nil && op.Grace > 0 {
		if err := w.hook(ctx, c, c.Lifecycle.PreStop, op.ID, ips, op.Grace); err != nil {
			w.a.event(pod, op.Name, v1.EventTypeWarning, "FailedPreStopHook", "PreStopHook failed: "+err.Error())
		}
	}
	grace := op.Grace
	if grace > 0 {
		grace = max(time.Until(end), min(2*time.Second, op.Grace))
	}
	return w.a.rt.Stop(ctx, op.ID, grace)
}
