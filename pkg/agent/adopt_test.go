package agent

import (
	"context"
	"path/filepath"
	"testing"

	v1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"meshd.dev/pkg/agent/plan"
)

// away is the story of a node whose parts go away one after the other: the
// agent, the API, containerd. Pods live on, and what died meanwhile is raised.
func away(t *testing.T, l *lab, stop func()) {
	ctx := context.Background()
	_, err := l.admin.CoreV1().Secrets("default").Create(ctx, &v1.Secret{ObjectMeta: metav1.ObjectMeta{Name: "away"}, Data: map[string][]byte{"k": []byte("v")}}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	withSecret := container("main", "need", "/sec/k", ";", "wait")
	withSecret.EnvFrom = []v1.EnvFromSource{{SecretRef: &v1.SecretEnvSource{LocalObjectReference: v1.LocalObjectReference{Name: "away"}}}}
	withSecret.VolumeMounts = []v1.VolumeMount{{Name: "away", MountPath: "/sec"}}
	p := pod("stay", withSecret)
	p.Spec.Volumes = []v1.Volume{{Name: "away", VolumeSource: v1.VolumeSource{Secret: &v1.SecretVolumeSource{SecretName: "away"}}}}
	l.create(p)
	l.create(pod("die", container("main", "wait")))
	for _, name := range []string{"gone", "other", "last"} {
		l.create(pod(name, container("main", "wait")))
	}
	for _, name := range []string{"stay", "die", "gone", "other", "last"} {
		l.phase(name, v1.PodRunning)
	}
	stayID, gone := l.status("stay", "main").ContainerID, l.get("gone")
	checkpoint := filepath.Join(l.dir, "agent/pods", string(gone.UID)+".json")

	t.Log("the agent is away: one container dies, one pod is deleted by force")
	stop()
	kill(t, l.pid("die", "main"))
	now := int64(0)
	if err := l.admin.CoreV1().Pods("default").Delete(ctx, "gone", metav1.DeleteOptions{GracePeriodSeconds: &now}); err != nil {
		t.Fatal(err)
	}
	stop = l.startAgent()
	l.until("the dead container runs again", func() bool {
		s := l.status("die", "main")
		return s.RestartCount == 1 && s.State.Running != nil
	})
	l.until("nothing is left of the pod the API does not know", func() bool {
		pods, err := l.rt.List(ctx)
		return err == nil && pods[gone.UID] == nil && !exists(checkpoint) && !exists(filepath.Join(l.dir, "agent/volumes", string(gone.UID)))
	})
	if s := l.status("stay", "main"); s.ContainerID != stayID || s.RestartCount != 0 || !s.Ready {
		t.Errorf("the pod that was left alone is %+v", s)
	}

	t.Log("the API is away: a container that dies is raised all the same")
	stay, other := l.get("stay").UID, l.get("other").UID
	l.stopAPI()
	kill(t, l.pidOf(other, "main"))
	l.until("it runs again without the API", func() bool { return l.attempt(other, "main") == 1 })

	t.Log("the agent is started without the API, and raises a container from its checkpoint")
	stop()
	kill(t, l.pidOf(stay, "main"))
	l.startAgent()
	l.until("it runs again from the checkpoint, secret and all", func() bool { return l.attempt(stay, "main") == 1 })

	t.Log("the API is back, and hears of it")
	l.runAPI()
	l.until("the API has it", func() bool { return l.status("stay", "main").RestartCount == 1 })

	t.Log("containerd is killed and comes back: nothing happens to pods")
	die := l.status("die", "main").ContainerID
	l.stopContainerd()
	l.startContainerd()
	l.until("the node is ready", l.nodeReady)
	kill(t, l.pid("last", "main"))
	l.until("a death is noticed again", func() bool { return l.attempt(l.get("last").UID, "main") == 1 })
	if s := l.status("die", "main"); s.ContainerID != die || s.State.Running == nil {
		t.Errorf("the pod that was left alone is %+v", s)
	}
}

// attempt of a container that runs; -1 when it does not.
func (l *lab) attempt(uid types.UID, name string) int {
	pods, err := l.rt.List(context.Background())
	if err != nil {
		return -1
	}
	if p := pods[uid]; p != nil {
		if c := p.Latest(name); c != nil && c.State == plan.Running {
			return c.Attempt
		}
	}
	return -1
}
