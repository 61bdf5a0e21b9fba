package agent

import (
	"context"
	"errors"
	"net/netip"
	"strings"
	"testing"
	"time"

	v1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes/fake"
	clienttesting "k8s.io/client-go/testing"

	"meshd.dev/pkg/agent/plan"
)

func ownedBy(kind string) *v1.Pod {
	yes := true
	p := pod("p", container("main"))
	p.UID = "u"
	if kind != "" {
		p.OwnerReferences = []metav1.OwnerReference{{Kind: kind, Name: "o", Controller: &yes}}
	}
	return p
}

func TestPodsFromCheckpointsWaitForTheAPI(t *testing.T) {
	boot := time.Date(2026, 11, 24, 12, 0, 0, 0, time.UTC)
	for _, c := range []struct {
		name, kind string
		heard      bool
		after      time.Duration
		want       string
	}{
		{"at boot a pod waits", "ReplicaSet", false, time.Second, "held, again in 9s"},
		{"one of nobody too", "", false, 0, "held, again in 10s"},
		{"until the API was heard", "ReplicaSet", true, time.Second, "free"},
		{"or did not answer for long", "ReplicaSet", false, 10 * time.Second, "free"},
		{"a stateful one waits on", "StatefulSet", false, time.Hour, "held"},
		{"until the API was heard", "StatefulSet", true, time.Second, "free"},
	} {
		now := boot.Add(c.after)
		why, until := hold(ownedBy(c.kind), c.heard, boot, now)
		got := "free"
		if why != "" {
			got = "held"
		}
		if !until.IsZero() {
			got += ", again in " + until.Sub(now).String()
		}
		if got != c.want {
			t.Errorf("%s: got %s, want %s", c.name, got, c.want)
		}
	}
}

func TestPodsWaitForTheirResolver(t *testing.T) {
	none := func() []netip.Addr { return nil }
	one := func() []netip.Addr { return []netip.Addr{netip.MustParseAddr("10.99.0.1")} }
	for _, c := range []struct {
		name   string
		dns    func() []netip.Addr
		policy v1.DNSPolicy
		host   bool
		held   bool
	}{
		{"not known yet", none, v1.DNSClusterFirst, false, true},
		{"known", one, v1.DNSClusterFirst, false, false},
		{"there is none", nil, v1.DNSClusterFirst, false, false},
		{"the node's own", none, v1.DNSDefault, false, false},
		{"the pod's own", none, v1.DNSNone, false, false},
		{"in the node's network", none, v1.DNSClusterFirst, true, false},
		{"in the node's network, the cluster's all the same", none, v1.DNSClusterFirstWithHostNet, true, true},
	} {
		a := &Agent{cfg: Config{ClusterDNS: c.dns}, apiSynced: true}
		p := pod("p", container("main"))
		p.Spec.DNSPolicy, p.Spec.HostNetwork = c.policy, c.host
		if why, _ := a.holdPod(p, time.Now()); (why != "") != c.held {
			t.Errorf("%s: held because of %q", c.name, why)
		}
	}
}

// A pod is gone when the API says so, not when a write of its status fails.
func TestStatusWriteThatFindsNoPod(t *testing.T) {
	pods := schema.GroupResource{Resource: "pods"}
	for _, c := range []struct {
		name     string
		patchErr error
		there    types.UID // of the pod of that name; "" for none
		getErr   error
		gone     bool
		err      string
	}{
		{"not found", apierrors.NewNotFound(pods, "p"), "", nil, true, ""},
		{"a race of writers", apierrors.NewConflict(pods, "p", errors.New("modified")), "u", nil, false, "write pod status"},
		{"another pod's name", apierrors.NewConflict(pods, "p", errors.New("uid")), "v", nil, true, ""},
		{"a conflict, and gone since", apierrors.NewConflict(pods, "p", errors.New("uid")), "", nil, true, ""},
		{"a conflict, and the API away", apierrors.NewConflict(pods, "p", errors.New("uid")), "", errors.New("away"), false, "look for pod"},
	} {
		client := fake.NewClientset()
		client.PrependReactor("patch", "pods", func(clienttesting.Action) (bool, runtime.Object, error) { return true, nil, c.patchErr })
		client.PrependReactor("get", "pods", func(clienttesting.Action) (bool, runtime.Object, error) {
			now := ownedBy("")
			now.UID = c.there
			switch {
			case c.getErr != nil:
				return true, nil, c.getErr
			case c.there == "":
				return true, nil, apierrors.NewNotFound(pods, "p")
			}
			return true, now, nil
		})
		a := &Agent{client: client, apiSynced: true}
		w := newWorker(a, ownedBy(""), false, 1)
		err := w.writeStatus(context.Background(), w.pod, v1.PodStatus{Phase: v1.PodRunning})
		if w.gone != c.gone || (err != nil) != (c.err != "") || err != nil && !strings.Contains(err.Error(), c.err) {
			t.Errorf("%s: gone %v, %v", c.name, w.gone, err)
		}
	}
}

func observed(sandbox string, containers ...string) plan.Observed {
	o := plan.Observed{Sandboxes: []plan.Sandbox{{ID: sandbox}}}
	for _, id := range containers {
		o.Containers = append(o.Containers, plan.Container{ID: id})
	}
	return o
}

// What the agent remembers of containers does not outlive them.
func TestOwnersAreForgotten(t *testing.T) {
	a := &Agent{owners: map[string]types.UID{"made": "u", "others": "v"}}
	a.own("u", plan.Observed{}, observed("s", "c0"))
	a.own("u", observed("s", "c0"), observed("s", "c1"))
	if got := len(a.owners); got != 4 || a.owners["c0"] != "" || a.owners["c1"] != "u" || a.owners["made"] != "u" {
		t.Errorf("it remembers %v", a.owners)
	}
}
