package object

import (
	"errors"
	"log/slog"
	"os"
	"testing"

	v1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes/fake"
	clienttesting "k8s.io/client-go/testing"
)

func newStore(t *testing.T, client *fake.Clientset, dir string) (*Store, chan []types.UID) {
	news := make(chan []types.UID, 10)
	s := New(Config{Client: client, Dir: dir, SecretDir: dir, Log: slog.New(slog.DiscardHandler),
		Changed: func(pods []types.UID) { news <- pods }})
	t.Cleanup(s.Close)
	return s, news
}

func TestObjectsAreFollowedKeptAndLetGo(t *testing.T) {
	cm := &v1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: "cm", ResourceVersion: "1"}, Data: map[string]string{"k": "old"}}
	client, dir := fake.NewClientset(cm), t.TempDir()
	ref := Ref{"configmaps", "ns", "cm"}
	s, news := newStore(t, client, dir)
	if _, err := s.ConfigMap("ns", "cm"); err == nil {
		t.Error("an object nobody holds is given out")
	}
	s.Hold("pod", []Ref{ref, {"secrets", "ns", "none"}})
	if got, err := s.ConfigMap("ns", "cm"); err != nil || got.Data["k"] != "old" {
		t.Fatalf("got %v, %v", got, err)
	}
	if _, err := s.Secret("ns", "none"); !apierrors.IsNotFound(err) {
		t.Errorf("what does not exist is %v", err)
	}
	<-news
	cm = cm.DeepCopy()
	cm.Data["k"], cm.ResourceVersion = "new", "2"
	if _, err := client.CoreV1().ConfigMaps("ns").Update(t.Context(), cm, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	for {
		if pods := <-news; len(pods) != 1 || pods[0] != "pod" {
			t.Errorf("told %v", pods)
		}
		if got, err := s.ConfigMap("ns", "cm"); err == nil && got.Data["k"] == "new" {
			break
		}
	}
	s.Close()

	away := fake.NewClientset()
	away.PrependReactor("*", "*", func(clienttesting.Action) (bool, runtime.Object, error) { return true, nil, errors.New("away") })
	away.PrependWatchReactor("*", clienttesting.DefaultWatchReactor(nil, errors.New("away")))
	again, _ := newStore(t, away, dir)
	again.Hold("pod", []Ref{ref})
	if got, err := again.ConfigMap("ns", "cm"); err != nil || got.Data["k"] != "new" {
		t.Errorf("with the API away: %v, %v", got, err)
	}
	again.Hold("pod", nil)
	third, _ := newStore(t, away, dir)
	third.Hold("pod", []Ref{ref})
	third.mu.Lock()
	path := third.path(ref)
	third.mu.Unlock()
	if exists(path) {
		t.Error("an object nobody holds any more is kept on disk")
	}
}

// An API that has just started may refuse for a moment what it gave before.
func TestForbiddenIsNoProof(t *testing.T) {
	cm := &v1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: "cm", ResourceVersion: "1"}, Data: map[string]string{"k": "v"}}
	dir, ref := t.TempDir(), Ref{"configmaps", "ns", "cm"}
	refuse := func() *fake.Clientset {
		no := apierrors.NewForbidden(schema.GroupResource{Resource: "configmaps"}, "cm", errors.New("no pod needs it"))
		c := fake.NewClientset()
		c.PrependReactor("*", "*", func(clienttesting.Action) (bool, runtime.Object, error) { return true, nil, no })
		c.PrependWatchReactor("*", clienttesting.DefaultWatchReactor(nil, no))
		return c
	}
	s, news := newStore(t, fake.NewClientset(cm), dir)
	s.Hold("pod", []Ref{ref})
	<-news
	s.Close()

	again, _ := newStore(t, refuse(), dir)
	again.Hold("pod", []Ref{ref})
	if got, err := again.ConfigMap("ns", "cm"); err != nil || got.Data["k"] != "v" {
		t.Errorf("what was kept is given up: %v, %v", got, err)
	}
	e := &entry{ready: make(chan struct{}), obj: cm}
	e.once.Do(func() { close(e.ready) })
	if err := again.once(t.Context(), ref, e); !apierrors.IsForbidden(err) || e.obj != cm {
		t.Errorf("what is held is given up: %v, %v", e.obj, err)
	}
	fresh, _ := newStore(t, refuse(), t.TempDir())
	fresh.Hold("pod", []Ref{ref})
	if _, err := fresh.ConfigMap("ns", "cm"); !apierrors.IsForbidden(err) {
		t.Errorf("what never was is %v", err)
	}
}

func exists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}
