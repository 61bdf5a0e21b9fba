package kube

import (
	"context"
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/client-go/kubernetes/fake"
	clienttesting "k8s.io/client-go/testing"

	"meshd.dev/pkg/mesh"
	"meshd.dev/pkg/status"
)

func TestRangesAroundServices(t *testing.T) {
	for _, c := range []struct {
		name, addrs, want string
	}{
		{"no service", "", ""},
		{"one", "10.96.0.1", "10.96.0.1/32"},
		{"some, of both families", "10.96.0.1 10.96.0.10 fd00:10:96::a 10.96.255.2 fd00:10:96::1", "10.96.0.0/16 fd00:10:96::/124"},
		{"as wide as a range may be", "10.96.0.1 10.111.0.1", "10.96.0.0/12"},
		{"of two ranges far apart", "10.96.0.1 172.20.0.1 fd00:10:96::1", "fd00:10:96::1/128"},
	} {
		t.Run(c.name, func(t *testing.T) {
			var services []*mesh.Service
			for _, a := range strings.Fields(c.addrs) {
				services = append(services, &mesh.Service{ClusterIPs: []netip.Addr{netip.MustParseAddr(a)}})
			}
			if got := strings.Trim(fmt.Sprint(around(services)), "[]"); got != c.want {
				t.Errorf("%s, want %s", got, c.want)
			}
		})
	}
}

func TestServiceCIDRsOfTheCluster(t *testing.T) {
	cidr := &networkingv1.ServiceCIDR{ObjectMeta: metav1.ObjectMeta{Name: "kubernetes"},
		Spec: networkingv1.ServiceCIDRSpec{CIDRs: []string{"10.96.0.0/16", "fd00:10:96::/112"}}}
	served := []*metav1.APIResourceList{{GroupVersion: "networking.k8s.io/v1", APIResources: []metav1.APIResource{{Name: "servicecidrs", Kind: "ServiceCIDR"}}}}
	for _, c := range []struct {
		name   string
		ask    bool
		served []*metav1.APIResourceList
		want   string
	}{
		{"nobody asks", false, served, ""},
		{"the cluster says", true, served, "10.96.0.0/16 fd00:10:96::/112"},
		{"an old cluster", true, nil, "10.96.0.7/32"},
	} {
		t.Run(c.name, func(t *testing.T) {
			client := fake.NewClientset(testNode("m1", nil), testService("web", "10.96.0.7"), cidr)
			client.Resources = c.served
			w := New(Config{Client: client, ServiceCIDRs: c.ask})
			run(t, w)
			eventually(t, w, c.want, func(s *mesh.State) bool { return strings.Trim(fmt.Sprint(s.ServiceCIDRs), "[]") == c.want })
		})
	}
}

func TestMissingRightIsNamed(t *testing.T) {
	client := fake.NewClientset()
	client.PrependReactor("list", "endpointslices", func(clienttesting.Action) (bool, runtime.Object, error) {
		return true, nil, apierrors.NewForbidden(schema.GroupResource{Group: "discovery.k8s.io", Resource: "endpointslices"}, "", fmt.Errorf("no"))
	})
	board := &status.Board{}
	w := New(Config{Client: client, Board: board})
	run(t, w)
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	for {
		for _, c := range board.Checks() {
			if c.Name == "kube/sync" && !c.Healthy && strings.Contains(c.Reason, "endpointslices.discovery.k8s.io is forbidden") {
				if !strings.Contains(c.Next, "rbac.yaml") {
					t.Errorf("next step %q", c.Next)
				}
				return
			}
		}
		select {
		case <-ctx.Done():
			t.Fatalf("the board says %+v", board.Checks())
		case <-time.After(10 * time.Millisecond):
		}
	}
}

func TestPublishNetwork(t *testing.T) {
	node := testNode("m1", nil)
	ready := node.Status.Conditions
	client := fake.NewClientset(node)
	w := New(Config{Client: client})
	if err := w.PublishNetwork(t.Context(), "m1", Network{Up: true}); err != nil || len(client.Actions()) > 0 {
		t.Errorf("before anything is known: %v, %v", err, client.Actions())
	}
	run(t, w)
	eventually(t, w, "the node", func(s *mesh.State) bool { return len(s.Nodes) == 1 })
	for _, n := range []Network{{Reason: "Down", Message: "no pod CIDR"}, {Up: true, Reason: "Up", Message: "fine"}} {
		if err := w.PublishNetwork(t.Context(), "m1", n); err != nil {
			t.Fatal(err)
		}
		obj, err := client.CoreV1().Nodes().Get(t.Context(), "m1", metav1.GetOptions{})
		if err != nil {
			t.Fatal(err)
		}
		var have corev1.NodeCondition
		for _, c := range obj.Status.Conditions {
			if c.Type == corev1.NodeNetworkUnavailable {
				have = c
			}
		}
		if up := have.Status == corev1.ConditionFalse; up != n.Up || have.Reason != n.Reason || have.Message != n.Message {
			t.Errorf("condition %+v, want %+v", have, n)
		}
		if len(obj.Status.Conditions) != len(ready)+1 {
			t.Errorf("conditions %+v", obj.Status.Conditions)
		}
	}
	if err := w.PublishNetwork(t.Context(), "other", Network{Up: true}); err == nil || !strings.Contains(err.Error(), "no node other") {
		t.Errorf("a node that is none: %v", err)
	}
}

// An API that does not say at first what it serves is asked again.
func TestServiceCIDRsAfterAFailedQuestion(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		client := fake.NewClientset(testNode("m1", nil), testService("web", "10.96.0.7"), &networkingv1.ServiceCIDR{
			ObjectMeta: metav1.ObjectMeta{Name: "kubernetes"}, Spec: networkingv1.ServiceCIDRSpec{CIDRs: []string{"10.96.0.0/16"}}})
		client.Resources = []*metav1.APIResourceList{{GroupVersion: "networking.k8s.io/v1", APIResources: []metav1.APIResource{{Name: "servicecidrs"}}}}
		asked := 0
		client.PrependReactor("get", "resource", func(clienttesting.Action) (bool, runtime.Object, error) {
			asked++
			return asked == 1, nil, fmt.Errorf("not now")
		})
		w := New(Config{Client: client, ServiceCIDRs: true})
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan struct{})
		go func() { defer close(done); _ = w.Run(ctx) }()
		for _, c := range []struct {
			after time.Duration
			want  string
		}{{time.Second, "[10.96.0.7/32]"}, {askAgain, "[10.96.0.0/16]"}} {
			time.Sleep(c.after)
			if s := w.State(); s == nil || fmt.Sprint(s.ServiceCIDRs) != c.want {
				t.Errorf("after %s more: %+v, want %s", c.after, s, c.want)
			}
		}
		cancel()
		<-done
	})
}
