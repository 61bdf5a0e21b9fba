package podstatus

import (
	"encoding/json"
	"fmt"
	"strings"
	"testing"
	"time"

	v1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/equality"

	"meshd.dev/pkg/agent/plan"
)

var noon = time.Date(2026, 11, 24, 12, 0, 0, 123456789, time.UTC)

func sandbox() []plan.Sandbox {
	return []plan.Sandbox{{ID: "s", Ready: true, IPs: []string{"10.1.0.2", "fd00::2"}}}
}

func running(id, name string, attempt int) plan.Container {
	return plan.Container{ID: id, Name: name, SandboxID: "s", Attempt: attempt, State: plan.Running, Started: noon}
}

func exited(id, name string, attempt int, code int32) plan.Container {
	return plan.Container{ID: id, Name: name, SandboxID: "s", Attempt: attempt, State: plan.Exited, ExitCode: code, Started: noon, Finished: noon}
}

// text of a status: phase, conditions that hold, containers.
func text(s v1.PodStatus) string {
	out := []string{string(s.Phase)}
	for _, c := range s.Conditions {
		if c.Status == v1.ConditionTrue && c.Type != v1.PodScheduled {
			out = append(out, string(c.Type))
		}
	}
	for _, c := range append(s.InitContainerStatuses, s.ContainerStatuses...) {
		state := "waiting"
		switch {
		case c.State.Running != nil:
			state = "running"
		case c.State.Terminated != nil:
			state = fmt.Sprintf("%s %d", c.State.Terminated.Reason, c.State.Terminated.ExitCode)
		case c.State.Waiting != nil:
			state = c.State.Waiting.Reason
		}
		if t := c.LastTerminationState.Terminated; t != nil {
			state += fmt.Sprintf(" after %d", t.ExitCode)
		}
		out = append(out, fmt.Sprintf("%s#%d %s", c.Name, c.RestartCount, state))
	}
	return strings.Join(out, ", ")
}

func TestCompute(t *testing.T) {
	healthy := map[string]plan.Health{"x": {Started: true, Ready: true}}
	always := v1.ContainerRestartPolicyAlways
	for _, c := range []struct {
		name   string
		policy v1.RestartPolicy
		init   []v1.Container
		seen   []plan.Container
		health map[string]plan.Health
		plan   plan.Plan
		want   string
	}{
		{name: "new", plan: plan.Plan{Waiting: map[string]plan.Waiting{"app": {Reason: "ContainerCreating"}}},
			want: "Pending, PodReadyToStartContainers, Initialized, app#0 ContainerCreating"},
		{name: "running and ready", seen: []plan.Container{running("x", "app", 0)}, health: healthy,
			want: "Running, PodReadyToStartContainers, Initialized, ContainersReady, Ready, app#0 running"},
		{name: "running, not ready", seen: []plan.Container{running("x", "app", 0)}, health: map[string]plan.Health{"x": {Started: true}},
			want: "Running, PodReadyToStartContainers, Initialized, app#0 running"},
		{name: "just crashed, to be restarted", seen: []plan.Container{exited("x", "app", 0, 1)},
			plan: plan.Plan{Waiting: map[string]plan.Waiting{"app": {Reason: "ContainerCreating"}}},
			want: "Running, PodReadyToStartContainers, Initialized, app#0 Error 1"},
		{name: "waiting for a restart", seen: []plan.Container{exited("x", "app", 1, 1), exited("y", "app", 0, 2)},
			plan: plan.Plan{Waiting: map[string]plan.Waiting{"app": {Reason: "CrashLoopBackOff"}}},
			want: "Running, PodReadyToStartContainers, Initialized, app#1 CrashLoopBackOff after 1"},
		{name: "restarted", seen: []plan.Container{running("x", "app", 1), exited("y", "app", 0, 2)}, health: healthy,
			want: "Running, PodReadyToStartContainers, Initialized, ContainersReady, Ready, app#1 running after 2"},
		{name: "succeeded", policy: v1.RestartPolicyNever, seen: []plan.Container{exited("x", "app", 0, 0)},
			want: "Succeeded, PodReadyToStartContainers, Initialized, app#0 Completed 0"},
		{name: "failed", policy: v1.RestartPolicyNever, seen: []plan.Container{exited("x", "app", 0, 7)},
			want: "Failed, PodReadyToStartContainers, Initialized, app#0 Error 7"},
		{name: "done, but for its sidecar", policy: v1.RestartPolicyNever, init: []v1.Container{{Name: "side", RestartPolicy: &always}},
			seen: []plan.Container{exited("x", "app", 0, 0), running("y", "side", 0)}, health: map[string]plan.Health{"y": {Started: true, Ready: true}},
			want: "Running, PodReadyToStartContainers, Initialized, side#0 running, app#0 Completed 0"},
		{name: "init runs", init: []v1.Container{{Name: "i"}}, seen: []plan.Container{running("y", "i", 0)}, health: map[string]plan.Health{"y": {Started: true, Ready: true}},
			plan: plan.Plan{Waiting: map[string]plan.Waiting{"app": {Reason: "PodInitializing"}}},
			want: "Pending, PodReadyToStartContainers, i#0 running, app#0 PodInitializing"},
		{name: "init failed for good", policy: v1.RestartPolicyNever, init: []v1.Container{{Name: "i"}}, seen: []plan.Container{exited("y", "i", 0, 1)},
			want: "Failed, PodReadyToStartContainers, i#0 Error 1, app#0 ContainerCreating"},
		{name: "past its deadline", seen: []plan.Container{exited("x", "app", 0, 137)}, plan: plan.Plan{Stopping: true, Stopped: true, Failed: "DeadlineExceeded"},
			want: "Failed, PodReadyToStartContainers, Initialized, app#0 Error 137"},
	} {
		t.Run(c.name, func(t *testing.T) {
			pod := &v1.Pod{Spec: v1.PodSpec{RestartPolicy: c.policy, InitContainers: c.init, Containers: []v1.Container{{Name: "app"}}}}
			if c.policy == "" {
				pod.Spec.RestartPolicy = v1.RestartPolicyAlways
			}
			in := Input{Pod: pod, Observed: plan.Observed{Sandboxes: sandbox(), Containers: c.seen}, Plan: c.plan, Health: c.health,
				NodeIPs: []string{"192.0.2.1"}, Runtime: "containerd", StartTime: noon, Now: noon}
			got := Compute(in)
			if text(got) != c.want {
				t.Errorf("\n got %s\nwant %s", text(got), c.want)
			}
			twice(t, in, got)
		})
	}
}

// twice is once: what came back from the API is not changed again, a second
// later.
func twice(t *testing.T, in Input, first v1.PodStatus) {
	t.Helper()
	b, err := json.Marshal(first)
	if err != nil {
		t.Fatal(err)
	}
	pod := in.Pod.DeepCopy()
	if err := json.Unmarshal(b, &pod.Status); err != nil {
		t.Fatal(err)
	}
	back := pod.Status
	in.Pod, in.Now = pod, in.Now.Add(time.Second)
	if second := Compute(in); !equality.Semantic.DeepEqual(second, back) {
		t.Errorf("a second look changes\n%+v\nto\n%+v", back, second)
	}
}

func TestWhatTheRuntimeLostIsNotForgotten(t *testing.T) {
	pod := &v1.Pod{Spec: v1.PodSpec{RestartPolicy: v1.RestartPolicyAlways, Containers: []v1.Container{{Name: "app"}}}}
	pod.Status.ContainerStatuses = []v1.ContainerStatus{{Name: "app", RestartCount: 3, ContainerID: "containerd://old",
		State: v1.ContainerState{Terminated: &v1.ContainerStateTerminated{ExitCode: 9, ContainerID: "containerd://old"}}}}
	got := Compute(Input{Pod: pod, Observed: plan.Observed{Sandboxes: sandbox(), Containers: []plan.Container{running("x", "app", 4)}},
		Health: map[string]plan.Health{"x": {Started: true, Ready: true}}, Runtime: "containerd", Now: noon})
	if s := got.ContainerStatuses[0]; s.RestartCount != 4 || s.LastTerminationState.Terminated == nil || s.LastTerminationState.Terminated.ExitCode != 9 {
		t.Errorf("got %+v", s)
	}
}

func TestPodIPs(t *testing.T) {
	s := &plan.Sandbox{Ready: true, IPs: []string{"10.1.0.2", "fd00::2"}}
	if got := PodIPs(&v1.Pod{}, s, []string{"2001:db8::1"}); got[0] != "fd00::2" {
		t.Errorf("the node's first family goes first, got %v", got)
	}
	if got := PodIPs(&v1.Pod{Spec: v1.PodSpec{HostNetwork: true}}, s, []string{"192.0.2.1"}); len(got) != 1 || got[0] != "192.0.2.1" {
		t.Errorf("got %v", got)
	}
	s.Ready = false
	if got := PodIPs(&v1.Pod{}, s, nil); got != nil {
		t.Errorf("got %v", got)
	}
}
