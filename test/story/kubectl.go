package story

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"meshd.dev/test/cluster"
)

// Kubectl is the story of the commands people type every day, on one machine,
// with the kubectl of Config.
func Kubectl() []Step {
	return []Step{
		{"a cluster of one machine with one pod", func(ctx context.Context, w *World) (string, error) { return "", Idle(ctx, w) }},
		{"get nodes", says([]string{"get", "nodes"}, "m1", "Ready")},
		{"get pods", says([]string{"get", "pods", "-n", cluster.Namespace, "-o", "wide"}, "idle-", "Running", "1/1")},
		{"describe node", says([]string{"describe", "node", "m1"}, "PodCIDR", "containerd", "idle-")},
		{"describe pod, with events", says([]string{"describe", "pods", "-n", cluster.Namespace, "-l", "app=idle"}, "Events:", "Started")},
		{"logs", says([]string{"logs", "-n", cluster.Namespace, "deploy/idle"}, "serving as pod idle-")},
		{"scale to 3", scaled},
		{"rollout restart makes new pods", rolledOut},
		{"explain", says([]string{"explain", "deployment.spec.replicas"}, "FIELD:", "replicas")},
		{"a mistake in YAML is named", refusesMistake},
		{"delete the namespace and all in it", deleted},
	}
}

// says runs kubectl and wants words in what it prints.
func says(args []string, words ...string) func(context.Context, *World) (string, error) {
	return func(ctx context.Context, w *World) (string, error) {
		return "", cluster.Until(ctx, func(ctx context.Context) error {
			out, err := w.Kubectl(ctx, args...)
			if err != nil {
				return err
			}
			for _, word := range words {
				if !strings.Contains(out, word) {
					return fmt.Errorf("kubectl %s: want %q in\n%s", strings.Join(args, " "), word, out)
				}
			}
			return nil
		})
	}
}

func scaled(ctx context.Context, w *World) (string, error) {
	if _, err := w.Kubectl(ctx, "scale", "-n", cluster.Namespace, "deploy/idle", "--replicas=3"); err != nil {
		return "", err
	}
	_, err := w.ReadyOn(ctx, "idle", 3)
	return "", err
}

func rolledOut(ctx context.Context, w *World) (string, error) {
	old, err := w.Pods(ctx, "idle")
	if err != nil {
		return "", err
	}
	for _, args := range [][]string{{"restart"}, {"status", "--timeout=120s"}} {
		if _, err := w.Kubectl(ctx, append([]string{"rollout", args[0], "-n", cluster.Namespace, "deploy/idle"}, args[1:]...)...); err != nil {
			return "", err
		}
	}
	now, err := w.Pods(ctx, "idle")
	if err != nil {
		return "", err
	}
	for _, a := range old {
		for _, b := range now {
			if a.UID == b.UID {
				return "", fmt.Errorf("pod %s is the old one", b.Name)
			}
		}
	}
	return "", nil
}

func refusesMistake(ctx context.Context, w *World) (string, error) {
	const mistake = `apiVersion: apps/v1
kind: Deployment
metadata: {name: mistake, namespace: demo}
spec:
  replica: 3
  selector: {matchLabels: {app: a}}
  template:
    metadata: {labels: {app: b}}
    spec: {containers: [{name: c, image: x}]}
`
	if err := w.Machine("m1").WriteFile("/root/mistake.yaml", []byte(mistake), 0o644); err != nil {
		return "", err
	}
	_, err := w.Kubectl(ctx, "apply", "-f", "/root/mistake.yaml")
	if err == nil {
		return "", errors.New("a Deployment with an unknown field was accepted")
	}
	if text := err.Error(); !strings.Contains(text, "unknown field") || !strings.Contains(text, `replica"`) {
		return "", fmt.Errorf("want an error that names the unknown field spec.replica, got: %w", err)
	}
	return "", nil
}

func deleted(ctx context.Context, w *World) (string, error) {
	if _, err := w.Kubectl(ctx, "delete", "namespace", cluster.Namespace, "--timeout=120s"); err != nil {
		return "", err
	}
	return "", cluster.Until(ctx, func(ctx context.Context) error {
		for _, p := range w.Machine("m1").Processes() {
			if p.Name() == "echo" || p.Name() == "pause" {
				return fmt.Errorf("process %d (%s) of a deleted pod runs still", p.Pid, p.Name())
			}
		}
		return nil
	})
}
