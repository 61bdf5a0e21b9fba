package node

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	v1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/client-go/kubernetes/fake"
	clienttesting "k8s.io/client-go/testing"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"meshd.dev/pkg/status"
)

func TestReadiness(t *testing.T) {
	good, bad := &cri.RuntimeCondition{Type: "RuntimeReady", Status: true}, &cri.RuntimeCondition{Type: "RuntimeReady", Reason: "x"}
	net, noNet := &cri.RuntimeCondition{Type: "NetworkReady", Status: true}, &cri.RuntimeCondition{Type: "NetworkReady", Reason: "NetworkPluginNotReady", Message: "no conflist"}
	for _, c := range []struct {
		name string
		list []*cri.RuntimeCondition
		err  error
		want string
	}{
		{"well", []*cri.RuntimeCondition{good, net}, nil, "Ready=True NetworkUnavailable=False"},
		{"no network", []*cri.RuntimeCondition{good, noNet}, nil, "Ready=False NetworkUnavailable=True"},
		{"not ready", []*cri.RuntimeCondition{bad, net}, nil, "Ready=False NetworkUnavailable=False"},
		{"away", nil, errors.New("gone"), "Ready=False"},
	} {
		var got []string
		for _, k := range readiness(c.list, c.err) {
			got = append(got, string(k.Type)+"="+string(k.Status))
		}
		if strings.Join(got, " ") != c.want {
			t.Errorf("%s: got %v, want %s", c.name, got, c.want)
		}
	}
}

// A node that was removed says so and does not come back by itself; it does
// when it has joined again.
func TestRemovedNode(t *testing.T) {
	for _, verb := range []string{"create", "get"} { // the one the API refuses
		t.Run(verb, func(t *testing.T) { removedNode(t, verb) })
	}
}

func removedNode(t *testing.T, verb string) {
	synctest.Test(t, func(t *testing.T) {
		joined := false
		client, board := fake.NewClientset(), &status.Board{}
		asked := 0
		client.PrependReactor(verb, "nodes", func(clienttesting.Action) (bool, runtime.Object, error) {
			if joined {
				return false, nil, nil
			}
			asked++
			return true, nil, apierrors.NewForbidden(schema.GroupResource{Resource: "nodes"}, "n1", errors.New(`node "n1" is not in the cluster: it was removed, or has not joined`))
		})
		n, err := New(Config{Name: "n1", Client: client, Runtime: well{}, Port: "10250", LeaseInterval: time.Second, MaxPods: 1,
			Dir: t.TempDir(), Board: board, Log: slog.New(slog.DiscardHandler)})
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error)
		go func() { done <- n.Run(ctx) }()
		said := func() string {
			var out []string
			for _, c := range board.Checks() {
				out = append(out, fmt.Sprintf("%s %v %s", c.Name, c.Healthy, c.Reason))
			}
			return strings.Join(out, "; ")
		}
		time.Sleep(time.Minute + time.Second)
		gone := "node n1 is not in the cluster: it was removed"
		if got, want := said(), "agent/lease false "+gone+"; agent/node false "+gone; got != want {
			t.Errorf("the board says %s, want %s", got, want)
		}
		if next := board.Checks()[1].Next; !strings.Contains(next, "meshctl token create") {
			t.Errorf("next is %q", next)
		}
		if asked < 2 || asked > 4 {
			t.Errorf("asked %d times in a minute", asked)
		}
		joined = true
		if err := client.Tracker().Add(&v1.Node{ObjectMeta: metav1.ObjectMeta{Name: "n1"}}); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Minute)
		if got, want := said(), "agent/lease true ; agent/node true "; got != want {
			t.Errorf("the board says %s, want %s", got, want)
		}
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}

// well is a runtime in good health.
type well struct{}

func (well) Version(context.Context) (string, error) { return "containerd://1", nil }

func (well) Conditions(context.Context) ([]*cri.RuntimeCondition, error) {
	return []*cri.RuntimeCondition{{Type: "RuntimeReady", Status: true}, {Type: "NetworkReady", Status: true}}, nil
}

func TestAddressesAreReplacedWhole(t *testing.T) {
	got, err := replaceAddresses([]byte(`{"status":{"addresses":[],"$setElementOrder/addresses":[]}}`), []v1.NodeAddress{
		{Type: v1.NodeInternalIP, Address: "192.0.2.1"}, {Type: v1.NodeInternalIP, Address: "2001:db8::1"}})
	want := `{"status":{"addresses":[{"$patch":"replace"},{"type":"InternalIP","address":"192.0.2.1"},{"type":"InternalIP","address":"2001:db8::1"}]}}`
	if err != nil || string(got) != want {
		t.Errorf("got %s, %v", got, err)
	}
}
