package main

import (
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"meshd.dev/pkg/status"
)

var now = time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)

func readyNode(name, address string, ready corev1.ConditionStatus, message string) corev1.Node {
	return corev1.Node{
		ObjectMeta: metav1.ObjectMeta{Name: name},
		Spec:       corev1.NodeSpec{PodCIDRs: []string{"10.244.1.0/24"}},
		Status: corev1.NodeStatus{
			Addresses:  []corev1.NodeAddress{{Type: corev1.NodeInternalIP, Address: address}},
			Conditions: []corev1.NodeCondition{{Type: corev1.NodeReady, Status: ready, Message: message}},
		},
	}
}

func pod(name string, age time.Duration, st corev1.PodStatus) corev1.Pod {
	return corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: name, CreationTimestamp: metav1.NewTime(now.Add(-age))},
		Spec:       corev1.PodSpec{NodeName: "m1"}, Status: st,
	}
}

func unready(age time.Duration) corev1.Pod {
	p := pod("web-1", age, corev1.PodStatus{Phase: corev1.PodPending, Conditions: []corev1.PodCondition{
		{Type: corev1.PodReady, Status: corev1.ConditionFalse, Message: "containers with unready status: [c]"}}})
	p.UID = "u1"
	return p
}

func service(name string) corev1.Service {
	return corev1.Service{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: name}, Spec: corev1.ServiceSpec{Selector: map[string]string{"app": name, "a": "b"}}}
}

// working is a cluster in which everything is as it should be.
func working() facts {
	return facts{
		socket: "/run/meshd/meshd.sock",
		daemon: &status.Document{Node: "m1", Role: "server", Version: "v1", Time: now, Started: now.Add(-time.Hour),
			Checks:  []status.Check{{Name: "dns/listening", Healthy: true}, {Name: "datapath/shortcut", Healthy: true, Note: "on for 2 pods"}},
			Tunnels: []status.Tunnel{{Peer: "m2", Endpoint: "192.0.2.2:51820", Handshake: now.Add(-7 * time.Second), RxBytes: 2048, TxBytes: 12, MTU: 1420, Backend: "userspace", Up: true}}},
		nodes: []corev1.Node{readyNode("m2", "192.0.2.2", corev1.ConditionTrue, ""), readyNode("m1", "192.0.2.1", corev1.ConditionTrue, "")},
		pods: []corev1.Pod{
			pod("web-1", time.Hour, corev1.PodStatus{Conditions: []corev1.PodCondition{{Type: corev1.PodReady, Status: corev1.ConditionTrue}}}),
			pod("job-1", time.Hour, corev1.PodStatus{Phase: corev1.PodSucceeded}),
			pod("web-2", time.Second, corev1.PodStatus{Phase: corev1.PodPending}),
		},
		services: []corev1.Service{service("web")},
		slices: []discoveryv1.EndpointSlice{{
			ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "web-x", Labels: map[string]string{discoveryv1.LabelServiceName: "web"}},
			Endpoints:  []discoveryv1.Endpoint{{Addresses: []string{"10.244.1.5"}}}}},
	}
}

func TestStatusTable(t *testing.T) {
	var out strings.Builder
	r := judge(working(), now)
	if err := printReport(&out, r); err != nil {
		t.Fatal(err)
	}
	want := `meshd v1 on m1 (server), up 1h0m0s

NODE   READY   ADDRESS     POD CIDRS       PODS
m1     True    192.0.2.1   10.244.1.0/24   3
m2     True    192.0.2.2   10.244.1.0/24   0

TUNNEL TO   UP    ENDPOINT          HANDSHAKE   RX         TX     MTU    BACK END
m2          yes   192.0.2.2:51820   7s ago      2.00 KiB   12 B   1420   userspace

pods       1 ready, 1 done, 1 starting, 0 failing
services   1, 1 with endpoints, 0 without
dns        up
shortcut   on for 2 pods

healthy
`
	if d := cmp.Diff(want, out.String()); d != "" {
		t.Error(d)
	}
	if !r.Healthy {
		t.Error("not healthy")
	}
}

func TestProblemsHaveAReasonAndANextStep(t *testing.T) {
	crash := corev1.PodStatus{ContainerStatuses: []corev1.ContainerStatus{{Name: "c", State: corev1.ContainerState{Waiting: &corev1.ContainerStateWaiting{Reason: "CrashLoopBackOff", Message: "back-off 10s"}}}}}
	for _, c := range []struct {
		name            string
		spoil           func(*facts)
		what, why, next string
	}{
		{"no daemon", func(f *facts) { f.daemon, f.daemonErr = nil, errors.New("connection refused") }, "meshd on this machine", "connection refused", "systemctl start meshd-server"},
		{"no API", func(f *facts) { f.apiErr = errors.New("list nodes: timeout") }, "api", "list nodes: timeout", "meshd server"},
		{"a failed check", func(f *facts) {
			f.daemon.Checks = []status.Check{{Name: "dns/upstream", Reason: "no upstream", Next: "name one"}}
		}, "dns/upstream", "no upstream", "name one"},
		{"a silent node", func(f *facts) { f.nodes[0] = readyNode("m2", "", corev1.ConditionUnknown, "lease expired") }, "node m2", "lease expired", "look at that machine"},
		{"a node that never came", func(f *facts) { f.nodes[0].Status.Conditions = nil }, "node m2", "never reported", "look at that machine"},
		{"a crashing pod", func(f *facts) { f.pods[0] = pod("web-1", time.Hour, crash) }, "pod shop/web-1", "container c: CrashLoopBackOff back-off 10s", "-n shop logs web-1 --previous"},
		{"an unschedulable pod", func(f *facts) {
			f.pods[0] = pod("web-1", time.Hour, corev1.PodStatus{Conditions: []corev1.PodCondition{{Type: corev1.PodScheduled, Status: corev1.ConditionFalse, Message: "0/2 nodes are available"}}})
		}, "pod shop/web-1", "0/2 nodes are available", "describe pod web-1"},
		{"a pod without a sandbox", func(f *facts) {
			f.pods[0] = unready(time.Minute)
			f.warnings = map[types.UID]warning{"u1": {"FailedCreatePodSandBox: no address left", now.Add(-time.Second)}}
		}, "pod shop/web-1", "no address left", "describe pod web-1"},
		{"a pod that was warned of long ago", func(f *facts) {
			f.pods[0] = unready(time.Hour)
			f.warnings = map[types.UID]warning{"u1": {"FailedCreatePodSandBox: no address left", now.Add(-time.Hour)}}
		}, "pod shop/web-1", "unready status: [c]", "describe pod web-1"},
		{"a pod that does not go", func(f *facts) {
			gone := metav1.NewTime(now.Add(-time.Hour))
			f.pods[0].DeletionTimestamp = &gone
		}, "pod shop/web-1", "its node m1 does not say so", "describe"},
		{"a service without endpoints", func(f *facts) { f.slices = nil }, "service shop/web", "no ready endpoint", "get pods -l a=b,app=web"},
	} {
		t.Run(c.name, func(t *testing.T) {
			f := working()
			c.spoil(&f)
			r := judge(f, now)
			if r.Healthy || len(r.Problems) != 1 {
				t.Fatalf("problems %+v, want one", r.Problems)
			}
			p := r.Problems[0]
			if p.What != c.what || !strings.Contains(p.Reason, c.why) || !strings.Contains(p.Next, c.next) {
				t.Errorf("problem %+v", p)
			}
		})
	}
}

// On a node of somebody else's Kubernetes the daemon's own checks alone are
// problems, whatever else the cluster is like.
func TestStatusOfAGuest(t *testing.T) {
	f := working()
	f.guest, f.daemon.Role, f.pods = true, guestRole, nil
	f.nodes[0] = readyNode("m2", "192.0.2.2", corev1.ConditionFalse, "kubelet stopped")
	f.services = append(f.services, service("empty"))
	var out strings.Builder
	if err := printReport(&out, judge(f, now)); err != nil {
		t.Fatal(err)
	}
	want := `meshd v1 on m1 (agent), up 1h0m0s

NODE   READY   ADDRESS     POD CIDRS
m1     True    192.0.2.1   10.244.1.0/24
m2     False   192.0.2.2   10.244.1.0/24

TUNNEL TO   UP    ENDPOINT          HANDSHAKE   RX         TX     MTU    BACK END
m2          yes   192.0.2.2:51820   7s ago      2.00 KiB   12 B   1420   userspace

services   2, 1 with endpoints, 1 without
dns        up
shortcut   on for 2 pods

healthy
`
	if diff := cmp.Diff(want, out.String()); diff != "" {
		t.Error(diff)
	}

	f.nodes, f.services, f.apiErr = nil, nil, errNoKubeconfig
	f.daemon.Checks = append(f.daemon.Checks, status.Check{Name: "kube/node", Reason: "no pod CIDR", Next: "give it one"})
	r := judge(f, now)
	if r.Healthy || len(r.Problems) != 1 || r.Problems[0].What != "kube/node" {
		t.Errorf("without credentials: %+v", r.Problems)
	}
}
