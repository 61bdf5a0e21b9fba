package agent

import (
	"log/slog"
	"os"
	"path/filepath"
	"testing"

	v1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"meshd.dev/pkg/agent/plan"
)

func TestCheckpoints(t *testing.T) {
	dir := t.TempDir()
	fresh := func() *checkpoints { return newCheckpoints(dir, slog.New(slog.DiscardHandler)) }
	c := fresh()
	p := &v1.Pod{ObjectMeta: metav1.ObjectMeta{Name: "p", Namespace: "ns", UID: "u", ResourceVersion: "1"}, Spec: v1.PodSpec{Containers: []v1.Container{{Name: "c"}}}}
	if err := c.keep(p); err != nil {
		t.Fatal(err)
	}
	for name, text := range map[string]string{"half.json": `{"metadata":{"uid":"half"`, "other.json": `{"metadata":{"name":"x","namespace":"y","uid":"z"}}`} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	pods, err := fresh().load()
	if err != nil || len(pods) != 1 || pods[0].UID != "u" {
		t.Fatalf("loaded %v, %v", pods, err)
	}
	if !exists(filepath.Join(dir, "half.json.damaged")) || !exists(filepath.Join(dir, "other.json.damaged")) {
		t.Error("damaged checkpoints were not set aside")
	}
	if err := c.remove("u"); err != nil {
		t.Fatal(err)
	}
	p.ResourceVersion = "2"
	if err := c.keep(p); err != nil || exists(c.path("u")) {
		t.Errorf("a late word brought it back (%v)", err)
	}
}

// A pod that became ready after it was first kept is ready after a restart.
func TestCheckpointsKeepHealth(t *testing.T) {
	dir := t.TempDir()
	c := newCheckpoints(dir, slog.New(slog.DiscardHandler))
	p := &v1.Pod{ObjectMeta: metav1.ObjectMeta{Name: "p", Namespace: "ns", UID: "u"}, Spec: v1.PodSpec{Containers: []v1.Container{{Name: "c"}}}}
	for _, ready := range []bool{false, true, false} {
		started := true
		p.Status.ContainerStatuses = []v1.ContainerStatus{{Name: "c", ContainerID: "containerd://1", Ready: ready, Started: &started,
			State: v1.ContainerState{Running: &v1.ContainerStateRunning{}}}}
		if err := c.keep(p); err != nil {
			t.Fatal(err)
		}
		pods, err := newCheckpoints(dir, slog.New(slog.DiscardHandler)).load()
		if err != nil || len(pods) != 1 {
			t.Fatalf("loaded %v, %v", pods, err)
		}
		if got, want := reportedHealth(pods[0])["1"], (plan.Health{Started: true, Ready: ready}); got != want {
			t.Errorf("after the restart %+v, want %+v", got, want)
		}
	}
}

func FuzzCheckpoint(f *testing.F) {
	f.Add([]byte(`{"metadata":{"name":"p","namespace":"n","uid":"u"},"spec":{"containers":[{"name":"c"}]}}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		path := filepath.Join(t.TempDir(), "u.json")
		if err := os.WriteFile(path, b, 0o600); err != nil {
			t.Fatal(err)
		}
		if p, err := parseCheckpoint(path, "u"); err == nil && (p.UID != "u" || len(p.Spec.Containers) == 0) {
			t.Errorf("%q is taken for a pod", b)
		}
	})
}

func TestPullCredentials(t *testing.T) {
	s := &v1.Secret{Data: map[string][]byte{v1.DockerConfigJsonKey: []byte(`{"auths":{
		"r.test": {"username":"all","password":"p"}, "https://r.test/team": {"auth":"dGVhbTpzZWNyZXQ="}, "other.test": {"username":"x"}}}`)}}
	got, err := pullCredentials(s, "r.test/team/app:1")
	if err != nil || len(got) != 1 || got[0].Username != "team" || got[0].Password != "secret" {
		t.Errorf("got %v, %v", got, err)
	}
	if _, err := pullCredentials(&v1.Secret{}, "a"); err == nil {
		t.Error("an empty secret is accepted")
	}
}
