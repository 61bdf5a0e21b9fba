package kube

import (
	"context"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"
	"unicode/utf8"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/client-go/kubernetes/fake"
	clienttesting "k8s.io/client-go/testing"

	"meshd.dev/pkg/status"
)

func localPod(name string, edit func(*corev1.Pod)) *corev1.Pod {
	p := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Namespace: "demo", Name: name, UID: "uid-1", Labels: map[string]string{"app": "web"},
			Annotations: map[string]string{"secret": "x"}, ManagedFields: []metav1.ManagedFieldsEntry{{Manager: "x"}}},
		Spec: corev1.PodSpec{NodeName: "m1", Containers: []corev1.Container{{Name: "c", Env: []corev1.EnvVar{{Name: "PASSWORD", Value: "x"}}}}},
		Status: corev1.PodStatus{Phase: corev1.PodRunning, PodIPs: []corev1.PodIP{{IP: "10.244.1.5"}, {IP: "fd00::5"}},
			ContainerStatuses: []corev1.ContainerStatus{{Name: "c", Image: "x"}, {Name: "d", State: corev1.ContainerState{Running: &corev1.ContainerStateRunning{}}}}},
	}
	if edit != nil {
		edit(p)
	}
	return p
}

func TestPodsOfANode(t *testing.T) {
	for _, c := range []struct {
		name string
		edit func(*corev1.Pod)
		want string
	}{
		{"running", nil, "demo/p app=web [10.244.1.5 fd00::5] running"},
		{"not attached yet", func(p *corev1.Pod) {
			p.Status = corev1.PodStatus{Phase: corev1.PodPending}
		}, "demo/p app=web [] waiting"},
		{"attached, its image is fetched", func(p *corev1.Pod) { p.Status.Phase = corev1.PodPending }, "demo/p app=web [10.244.1.5 fd00::5]"},
		{"going", func(p *corev1.Pod) { p.DeletionTimestamp = new(metav1.Now()) }, "demo/p app=web [10.244.1.5 fd00::5]"},
		{"crashed", func(p *corev1.Pod) { p.Status.ContainerStatuses = nil }, "demo/p app=web [10.244.1.5 fd00::5]"},
		{"has run", func(p *corev1.Pod) { p.Status.Phase = corev1.PodSucceeded }, "demo/p app=web [10.244.1.5 fd00::5]"},
		{"an address that is none", func(p *corev1.Pod) { p.Status.PodIPs[0].IP = "x" }, "demo/p app=web [fd00::5] running"},
	} {
		t.Run(c.name, func(t *testing.T) {
			whole := localPod("p", c.edit)
			slim, err := slimPod(whole)
			if err != nil {
				t.Fatal(err)
			}
			for _, obj := range []any{whole, slim} { // what is dropped is not missed
				p := PodOf(obj.(*corev1.Pod))
				got := fmt.Sprintf("%s/%s %s %v", p.Namespace, p.Name, p.Labels, p.Addrs)
				if p.Waiting {
					got += " waiting"
				}
				if p.Running {
					got += " running"
				}
				if got != c.want {
					t.Errorf("%s, want %s", got, c.want)
				}
			}
			if kept := slim.(*corev1.Pod); kept.Annotations != nil || kept.ManagedFields != nil || kept.Spec.Containers != nil {
				t.Errorf("kept %+v", kept)
			}
		})
	}
}

func TestPoliciesSelect(t *testing.T) {
	pod := PodOf(localPod("p", nil))
	for _, c := range []struct {
		name     string
		ns       string
		selector metav1.LabelSelector
		want     bool
	}{
		{"all of the namespace", "demo", metav1.LabelSelector{}, true},
		{"another namespace", "other", metav1.LabelSelector{}, false},
		{"by label", "demo", metav1.LabelSelector{MatchLabels: map[string]string{"app": "web"}}, true},
		{"not by label", "demo", metav1.LabelSelector{MatchLabels: map[string]string{"app": "db"}}, false},
		{"by expression", "demo", metav1.LabelSelector{MatchExpressions: []metav1.LabelSelectorRequirement{{Key: "app", Operator: "In", Values: []string{"web"}}}}, true},
		{"by one that cannot be read", "demo", metav1.LabelSelector{MatchExpressions: []metav1.LabelSelectorRequirement{{Key: "app", Operator: "?"}}}, true},
	} {
		client := fake.NewClientset(&networkingv1.NetworkPolicy{ObjectMeta: metav1.ObjectMeta{Namespace: c.ns, Name: "x"}, Spec: networkingv1.NetworkPolicySpec{PodSelector: c.selector}})
		l := runLocal(t, client, nil)
		if policies, _ := l.Policies(); len(policies) != 1 || policies[0].Selects(pod) != c.want {
			t.Errorf("%s: %+v; want %t", c.name, policies, c.want)
		}
	}
}

// runLocal until both lists are known, or are not to be.
func runLocal(t *testing.T, client *fake.Clientset, board *status.Board) *Local {
	t.Helper()
	l := NewLocal(LocalConfig{Client: client, Node: "m1", Board: board}, func() {})
	ctx, cancel := context.WithCancel(context.Background())
	var done sync.WaitGroup
	done.Go(func() { _ = l.Run(ctx) })
	t.Cleanup(func() { cancel(); done.Wait() })
	for end := time.Now().Add(10 * time.Second); time.Now().Before(end); time.Sleep(5 * time.Millisecond) {
		if l.policies.HasSynced() && (l.pods.HasSynced() || len(board.Checks()) > 0) {
			return l
		}
	}
	t.Fatal("nothing is known")
	return nil
}

func TestLocalAsksForItsOwnPods(t *testing.T) {
	client := fake.NewClientset(localPod("a", nil), localPod("b", func(p *corev1.Pod) { p.Spec.HostNetwork = true }))
	l := runLocal(t, client, nil)
	if pods, known := l.Pods(); !known || len(pods) != 1 || pods[0].Name != "a" {
		t.Errorf("%v, %t", pods, known)
	}
	for _, a := range client.Actions() {
		if list, ok := a.(clienttesting.ListAction); ok && a.GetResource().Resource == "pods" {
			if got := list.GetListRestrictions().Fields.String(); got != "spec.nodeName=m1" {
				t.Errorf("asks for pods by %q", got)
			}
		}
	}
}

func TestLocalWithoutTheRight(t *testing.T) {
	client := fake.NewClientset()
	client.PrependReactor("list", "pods", func(clienttesting.Action) (bool, runtime.Object, error) {
		return true, nil, apierrors.NewForbidden(schema.GroupResource{Resource: "pods"}, "", fmt.Errorf("no"))
	})
	board := &status.Board{}
	l := runLocal(t, client, board)
	if _, known := l.Pods(); known {
		t.Error("pods are known")
	}
	if c := board.Checks(); len(c) != 1 || c[0].Name != "kube/pods" || !strings.Contains(c[0].Reason, "pods is forbidden") {
		t.Errorf("board: %+v", c)
	}
}

func TestSayOnce(t *testing.T) {
	client := fake.NewClientset()
	long := strings.Repeat("ä", 600)
	for range 2 { // whoever says it
		for _, e := range []Event{
			{About: PodOf(localPod("p", nil)).Reference(), Reason: "R", Message: "one"},
			{About: PodOf(localPod("p", nil)).Reference(), Reason: "R", Message: long},
			{About: corev1.ObjectReference{APIVersion: "v1", Kind: "Node", Name: strings.Repeat("n", 179) + ".m1", UID: "m1"}, Reason: "R", Message: "of a node"},
		} {
			if err := Say(t.Context(), client, "m1", e); err != nil {
				t.Error(err)
			}
		}
	}
	list, err := client.CoreV1().Events("").List(t.Context(), metav1.ListOptions{})
	if err != nil || len(list.Items) != 3 {
		t.Fatalf("%d events, %v", len(list.Items), err)
	}
	for _, e := range list.Items {
		if e.Source.Host != "m1" || e.ReportingInstance != "m1" || len(e.Message) > 1024 || !utf8.ValidString(e.Message) || strings.Contains(e.Name, "..") || len(e.Name) > 253 {
			t.Errorf("%+v", e)
		}
		if want := map[bool]string{true: "default", false: "demo"}[e.InvolvedObject.Kind == "Node"]; e.Namespace != want {
			t.Errorf("event of a %s in namespace %s", e.InvolvedObject.Kind, e.Namespace)
		}
	}
	e := Event{About: corev1.ObjectReference{Name: "p"}, Again: time.Hour}
	at := time.Unix(7200, 0)
	if e.name(at) != e.name(at.Add(59*time.Minute)) || e.name(at) == e.name(at.Add(time.Hour)) {
		t.Error("an event is not said again after its time, or too soon")
	}
}
