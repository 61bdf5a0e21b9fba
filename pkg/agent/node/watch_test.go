package node

import (
	"context"
	"log/slog"
	"testing"
	"testing/synctest"
	"time"

	v1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes/fake"

	"meshd.dev/pkg/status"
)

// An idle node asks the API for its own object now and then only, and undoes
// what others do to it all the same.
func TestIdleNodeAsksLittle(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		client := fake.NewClientset(&v1.Node{ObjectMeta: metav1.ObjectMeta{Name: "n1"}}, &v1.Node{ObjectMeta: metav1.ObjectMeta{Name: "other"}})
		n, err := New(Config{Name: "n1", Client: client, Runtime: well{}, Port: "10250", LeaseInterval: time.Minute, MaxPods: 1,
			Dir: t.TempDir(), Board: &status.Board{}, Log: slog.New(slog.DiscardHandler)})
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error)
		go func() { done <- n.Run(ctx) }()
		count := func() map[string]int {
			seen := map[string]int{}
			for _, a := range client.Actions() {
				if a.GetResource().Resource == "nodes" {
					seen[a.GetVerb()]++
				}
			}
			client.ClearActions()
			return seen
		}
		time.Sleep(time.Minute)
		count()
		time.Sleep(time.Hour)
		if c := count(); c["get"] < 10 || c["get"] > 13 || c["patch"] < 10 || c["patch"] > 13 || c["list"] > 0 {
			t.Errorf("asked in an idle hour: %v", c)
		}
		nodes := client.CoreV1().Nodes()
		ready := func() v1.ConditionStatus {
			obj, err := client.Tracker().Get(v1.SchemeGroupVersion.WithResource("nodes"), "", "n1")
			if err != nil {
				t.Fatal(err)
			}
			for _, c := range obj.(*v1.Node).Status.Conditions {
				if c.Type == v1.NodeReady {
					return c.Status
				}
			}
			return ""
		}
		obj, err := nodes.Get(ctx, "n1", metav1.GetOptions{})
		if err != nil {
			t.Fatal(err)
		}
		obj = obj.DeepCopy()
		for i := range obj.Status.Conditions { // as the controller does when it hears nothing
			obj.Status.Conditions[i].Status = v1.ConditionUnknown
		}
		if _, err := nodes.UpdateStatus(ctx, obj, metav1.UpdateOptions{}); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Second)
		if got := ready(); got != v1.ConditionTrue {
			t.Errorf("a second after another wrote that nothing is known the node is ready: %q", got)
		}
		if err := nodes.Delete(ctx, "n1", metav1.DeleteOptions{}); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Second)
		if got := ready(); got != v1.ConditionTrue { // here it may make itself anew
			t.Errorf("a second after it was deleted the node is ready: %q", got)
		}
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}
