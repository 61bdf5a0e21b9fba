package registry_test

import (
	"fmt"
	"reflect"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	eventsv1 "k8s.io/api/events/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/utils/ptr"

	"meshd.dev/pkg/apiserver/registry"
	"meshd.dev/pkg/apiserver/upstream"
)

// TestTable: the rows agree with the types they speak of.
func TestTable(t *testing.T) {
	s := registry.NewScheme()
	seen := map[string]bool{}
	for _, k := range registry.Kinds() {
		name := k.GroupResource().String()
		if seen[name] {
			t.Errorf("%s is there twice", name)
		}
		seen[name] = true
		kind := reflect.TypeOf(k.Object).Elem().Name()
		for _, version := range []string{k.Version, runtime.APIVersionInternal} {
			obj, err := s.New(schema.GroupVersionKind{Group: k.Group, Version: version, Kind: kind})
			if err != nil || reflect.TypeOf(obj) != reflect.TypeOf(k.Object) {
				t.Errorf("%s: %s of %s is %T, %v", name, kind, version, obj, err)
			}
		}
		_, status := reflect.TypeOf(k.Object).Elem().FieldByName("Status")
		if status != k.Status {
			t.Errorf("%s: has a status: %v, serves one: %v", name, status, k.Status)
		}
		rules, ok := upstream.RulesFor(k.Object)
		if !ok || rules.Create == nil || rules.Update == nil {
			t.Errorf("%s: nothing checks it", name)
		}
		if k.Print != nil && k.Cells(k.Object) == nil {
			t.Errorf("%s: prints no cells", name)
		}
	}
}

// TestRulesConvert: no rule fails for want of a conversion.
func TestRulesConvert(t *testing.T) {
	for _, k := range registry.Kinds() {
		rules, _ := upstream.RulesFor(k.Object)
		errs := rules.Create(k.Object.DeepCopyObject())
		errs = append(errs, rules.Update(k.Object.DeepCopyObject(), k.Object.DeepCopyObject())...)
		if rules.Status != nil {
			errs = append(errs, rules.Status(k.Object.DeepCopyObject(), k.Object.DeepCopyObject())...)
		}
		for _, err := range errs {
			if strings.Contains(err.Error(), "convert") {
				t.Errorf("%s: %v", k.Resource, err)
			}
		}
	}
}

func TestColumns(t *testing.T) {
	status := func(phase corev1.PodPhase, states ...corev1.ContainerStatus) *corev1.Pod {
		p := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Name: "p"}, Status: corev1.PodStatus{Phase: phase, ContainerStatuses: states}}
		for range states {
			p.Spec.Containers = append(p.Spec.Containers, corev1.Container{})
		}
		return p
	}
	running := corev1.ContainerStatus{Ready: true, State: corev1.ContainerState{Running: &corev1.ContainerStateRunning{}}}
	waiting := func(reason string) corev1.ContainerStatus {
		return corev1.ContainerStatus{RestartCount: 3, State: corev1.ContainerState{Waiting: &corev1.ContainerStateWaiting{Reason: reason}}}
	}
	exited := func(code int32, reason string) corev1.ContainerStatus {
		return corev1.ContainerStatus{State: corev1.ContainerState{Terminated: &corev1.ContainerStateTerminated{ExitCode: code, Reason: reason}}}
	}
	going := status(corev1.PodRunning, running)
	going.DeletionTimestamp = &metav1.Time{}
	initializing := status(corev1.PodPending, waiting("PodInitializing"))
	initializing.Spec.InitContainers = []corev1.Container{{Name: "a"}, {Name: "b"}}
	initializing.Status.InitContainerStatuses = []corev1.ContainerStatus{exited(0, "Completed"), {Name: "b"}}
	ready := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "n", Labels: map[string]string{"node-role.kubernetes.io/control-plane": ""}},
		Spec:   corev1.NodeSpec{Unschedulable: true},
		Status: corev1.NodeStatus{Conditions: []corev1.NodeCondition{{Type: corev1.NodeReady, Status: corev1.ConditionTrue}}}}
	for _, tc := range []struct {
		name, resource string
		cells          int
		want           string
		obj            runtime.Object
	}{
		{"a pod that runs", "pods", 4, "p 1/1 Running 0", status(corev1.PodRunning, running)},
		{"a pod that crashes", "pods", 4, "p 1/2 CrashLoopBackOff 3", status(corev1.PodRunning, running, waiting("CrashLoopBackOff"))},
		{"a pod that is over", "pods", 4, "p 0/1 Completed 0", status(corev1.PodSucceeded, exited(0, "Completed"))},
		{"a pod that failed", "pods", 4, "p 0/1 ExitCode:7 0", status(corev1.PodFailed, exited(7, ""))},
		{"a pod that goes", "pods", 4, "p 1/1 Terminating 0", going},
		{"a pod that starts", "pods", 4, "p 0/1 Init:1/2 0", initializing},
		{"a node that is drained", "nodes", 3, "n Ready,SchedulingDisabled control-plane", ready},
		{"a deployment", "deployments", 4, "d 1/2 2 1", &appsv1.Deployment{ObjectMeta: metav1.ObjectMeta{Name: "d"}, Spec: appsv1.DeploymentSpec{Replicas: ptr.To[int32](2)},
			Status: appsv1.DeploymentStatus{ReadyReplicas: 1, UpdatedReplicas: 2, AvailableReplicas: 1}}},
		{"a service", "services", 5, "s NodePort 10.96.0.9 <none> 80:30080/TCP", &corev1.Service{ObjectMeta: metav1.ObjectMeta{Name: "s"}, Spec: corev1.ServiceSpec{
			Type: corev1.ServiceTypeNodePort, ClusterIPs: []string{"10.96.0.9"}, Ports: []corev1.ServicePort{{Port: 80, NodePort: 30080, Protocol: "TCP"}}}}},
		{"a load balancer that waits", "services", 5, "s LoadBalancer <none> <pending> <none>", &corev1.Service{ObjectMeta: metav1.ObjectMeta{Name: "s"}, Spec: corev1.ServiceSpec{Type: corev1.ServiceTypeLoadBalancer}}},
		{"a claim", "persistentvolumeclaims", 6, "c Bound v 1Gi RWO fast", &corev1.PersistentVolumeClaim{ObjectMeta: metav1.ObjectMeta{Name: "c"},
			Spec: corev1.PersistentVolumeClaimSpec{VolumeName: "v", StorageClassName: ptr.To("fast")},
			Status: corev1.PersistentVolumeClaimStatus{Phase: corev1.ClaimBound, AccessModes: []corev1.PersistentVolumeAccessMode{corev1.ReadWriteOnce},
				Capacity: corev1.ResourceList{corev1.ResourceStorage: resource.MustParse("1Gi")}}}},
		{"an event", "events", 5, "<unknown> Normal Pulled pod/p image pulled", &corev1.Event{Type: "Normal", Reason: "Pulled", Message: "image pulled\n",
			InvolvedObject: corev1.ObjectReference{Kind: "Pod", Name: "p"}}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			for _, k := range registry.Kinds() {
				if k.Resource != tc.resource {
					continue
				}
				var got []string
				for _, c := range k.Cells(tc.obj) {
					got = append(got, fmt.Sprint(c))
				}
				if d := cmp.Diff(tc.want, strings.Join(got[:tc.cells], " ")); d != "" {
					t.Error(d)
				}
			}
		})
	}
}

// TestEventConversion: an event goes to the other group and back unchanged.
func TestEventConversion(t *testing.T) {
	want := &corev1.Event{ObjectMeta: metav1.ObjectMeta{Name: "e", Namespace: "n"}, Reason: "Seen", Message: "m", Type: "Warning", Count: 3,
		InvolvedObject: corev1.ObjectReference{Kind: "Pod", Name: "p"}, Source: corev1.EventSource{Component: "c", Host: "h"}, ReportingController: "r"}
	s := registry.NewScheme()
	other, err := s.ConvertToVersion(want, schema.GroupVersion{Group: "events.k8s.io", Version: "v1"})
	if err != nil {
		t.Fatal(err)
	}
	if e := other.(*eventsv1.Event); e.Note != "m" || e.Regarding.Name != "p" || e.DeprecatedCount != 3 {
		t.Errorf("there: %+v", e)
	}
	back := &corev1.Event{}
	if err := s.Convert(other, back, nil); err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(want, back); d != "" {
		t.Error(d)
	}
}
