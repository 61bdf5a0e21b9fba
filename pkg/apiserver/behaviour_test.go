package apiserver_test

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	admissionv1 "k8s.io/api/admission/v1"
	admissionregistrationv1 "k8s.io/api/admissionregistration/v1"
	appsv1 "k8s.io/api/apps/v1"
	authenticationv1 "k8s.io/api/authentication/v1"
	autoscalingv1 "k8s.io/api/autoscaling/v1"
	autoscalingv2 "k8s.io/api/autoscaling/v2"
	batchv1 "k8s.io/api/batch/v1"
	coordinationv1 "k8s.io/api/coordination/v1"
	corev1 "k8s.io/api/core/v1"
	eventsv1 "k8s.io/api/events/v1"
	policyv1 "k8s.io/api/policy/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/kubernetes"
	"k8s.io/utils/ptr"
)

// TestBehaviour is what a client of the API may rely on. Each case has a
// namespace of its own.
func TestBehaviour(t *testing.T) {
	t.Parallel()
	ca, cfg := files(t)
	cfg.Handlers = map[string]http.Handler{"/hello": http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprint(w, len(r.TLS.PeerCertificates))
	})}
	c := start(t, ca, cfg)
	for _, tc := range []struct {
		name string
		run  func(t *testing.T, c *cluster, ns string)
	}{
		{"a stranger reads health and version only", strangers},
		{"an extra handler answers anybody and sees the certificate", extraHandler},
		{"the cluster starts with its namespaces and its own service", startingPoint},
		{"a deployment gets defaults and counts its changes", defaultsAndGeneration},
		{"bad objects are refused with the field that is wrong", refusals},
		{"all kinds of patch", patches},
		{"server-side apply finds conflicts and can be forced", serverSideApply},
		{"scale writes replicas and nothing else", scales},
		{"status and spec have separate doors", statusDoor},
		{"updates need the version they are based on", conflicts},
		{"a watch starts with the list and goes on", watches},
		{"a list comes in pages of one moment", pages},
		{"fields select", selects},
		{"a pod is bound once", binds},
		{"a pod that runs is given time to end", gracefulDelete},
		{"a pod has a priority and a quality of service", podAdmission},
		{"limits of a namespace complete and bound pods", limitRanges},
		{"a job finds its own pods", jobs},
		{"a namespace goes when it is empty", namespaceEnd},
		{"a service gets addresses of both families and keeps them", serviceAddresses},
		{"events are one thing in two groups", events},
		{"secrets are not on disk in clear", secretsAtRest},
		{"roles decide, and nobody gives more than he has", roles},
		{"aggregated roles are filled", aggregatedRoles},
		{"a service account has tokens that end with it", tokens},
		{"an agent sees what its pods need and no more", agents},
		{"an agent publishes its own key and where it is", peerKeys},
		{"an agent whose node was removed may do nothing", removedNode},
		{"an autoscaler is stored as it came", autoscalers},
		{"webhooks change and refuse", webhooks},
		{"an eviction asks the budget", evictions},
		{"dry run changes nothing", dryRun},
		{"unknown fields are refused when asked to", strictFields},
	} {
		t.Run(tc.name, func(t *testing.T) {
			ns, err := c.admin.CoreV1().Namespaces().Create(t.Context(), &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{GenerateName: "t-"}}, metav1.CreateOptions{})
			if err != nil {
				t.Fatal(err)
			}
			// The controller of service accounts would do this.
			must(c.admin.CoreV1().ServiceAccounts(ns.Name).Create(t.Context(), &corev1.ServiceAccount{ObjectMeta: metav1.ObjectMeta{Name: "default"}}, metav1.CreateOptions{}))(t)
			sub := *c
			sub.t = t
			tc.run(t, &sub, ns.Name)
		})
	}
}

// must fails the test on an error and returns the value.
func must[T any](v T, err error) func(t *testing.T) T {
	return func(t *testing.T) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}

func podSpec() corev1.PodSpec {
	return corev1.PodSpec{Containers: []corev1.Container{{Name: "c", Image: "echo"}}}
}

func pod(name string) *corev1.Pod {
	return &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Name: name, Labels: map[string]string{"app": "echo"}}, Spec: podSpec()}
}

func deployment(name string) *appsv1.Deployment {
	l := map[string]string{"app": name}
	return &appsv1.Deployment{ObjectMeta: metav1.ObjectMeta{Name: name}, Spec: appsv1.DeploymentSpec{
		Selector: &metav1.LabelSelector{MatchLabels: l},
		Template: corev1.PodTemplateSpec{ObjectMeta: metav1.ObjectMeta{Labels: l}, Spec: podSpec()},
	}}
}

func configMap(name string) *corev1.ConfigMap {
	return &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: name}, Data: map[string]string{"a": "1"}}
}

func strangers(t *testing.T, c *cluster, _ string) {
	for path, want := range map[string]int{
		"/healthz": 200, "/livez": 200, "/readyz": 200, "/version": 200,
		"/api": 401, "/apis": 401, "/api/v1/pods": 401, "/metrics": 401, "/openapi/v2": 401, "/healthz/etcd": 401,
	} {
		if got := c.get(path); got != want {
			t.Errorf("GET %s: %d, want %d", path, got, want)
		}
	}
	v := must(c.admin.Discovery().ServerVersion())(t)
	if v.GitVersion != "v1.37.2+meshd" {
		t.Errorf("version %s", v.GitVersion)
	}
}

func extraHandler(t *testing.T, c *cluster, _ string) {
	if got := c.get("/hello"); got != 200 {
		t.Errorf("GET /hello: %d, want 200", got)
	}
	client := c.client("somebody")
	b := must(client.Discovery().RESTClient().Get().AbsPath("/hello").DoRaw(t.Context()))(t)
	if string(b) != "1" {
		t.Errorf("the handler saw %s certificates, want 1", b)
	}
}

func startingPoint(t *testing.T, c *cluster, _ string) {
	for _, ns := range []string{"default", "kube-system", "kube-public", "kube-node-lease"} {
		must(c.admin.CoreV1().Namespaces().Get(t.Context(), ns, metav1.GetOptions{}))(t)
	}
	svc := must(c.admin.CoreV1().Services("default").Get(t.Context(), "kubernetes", metav1.GetOptions{}))(t)
	if svc.Spec.ClusterIP != "10.96.0.1" {
		t.Errorf("kubernetes has %s", svc.Spec.ClusterIP)
	}
	slice := must(c.admin.DiscoveryV1().EndpointSlices("default").Get(t.Context(), "kubernetes", metav1.GetOptions{}))(t)
	if got := slice.Endpoints[0].Addresses[0]; got != "192.0.2.1" {
		t.Errorf("kubernetes leads to %s", got)
	}
	must(c.admin.SchedulingV1().PriorityClasses().Get(t.Context(), "system-node-critical", metav1.GetOptions{}))(t)
}

func defaultsAndGeneration(t *testing.T, c *cluster, ns string) {
	api := c.admin.AppsV1().Deployments(ns)
	d := deployment("web")
	d.Status.Replicas = 7
	d = must(api.Create(t.Context(), d, metav1.CreateOptions{}))(t)
	if *d.Spec.Replicas != 1 || d.Spec.Template.Spec.RestartPolicy != corev1.RestartPolicyAlways || *d.Spec.RevisionHistoryLimit != 10 {
		t.Errorf("no defaults: %+v", d.Spec)
	}
	if d.Status.Replicas != 0 || d.Generation != 1 {
		t.Errorf("created with status %d and generation %d", d.Status.Replicas, d.Generation)
	}
	d.Labels = map[string]string{"x": "y"}
	d = must(api.Update(t.Context(), d, metav1.UpdateOptions{}))(t)
	if d.Generation != 1 {
		t.Errorf("a label raised the generation to %d", d.Generation)
	}
	d.Spec.Replicas = ptr.To[int32](3)
	d = must(api.Update(t.Context(), d, metav1.UpdateOptions{}))(t)
	if d.Generation != 2 {
		t.Errorf("generation %d after a change of the spec", d.Generation)
	}
}

func refusals(t *testing.T, c *cluster, ns string) {
	ctx := t.Context()
	bad := func(p *corev1.Pod, change func(*corev1.Pod)) *corev1.Pod { change(p); return p }
	_, noImage := c.admin.CoreV1().Pods(ns).Create(ctx, bad(pod("p"), func(p *corev1.Pod) { p.Spec.Containers[0].Image = "" }), metav1.CreateOptions{})
	_, badName := c.admin.CoreV1().ConfigMaps(ns).Create(ctx, configMap("Not_A_Name"), metav1.CreateOptions{})
	mismatch := deployment("web")
	mismatch.Spec.Template.Labels = map[string]string{"app": "other"}
	_, selector := c.admin.AppsV1().Deployments(ns).Create(ctx, mismatch, metav1.CreateOptions{})
	_, port := c.admin.CoreV1().Services(ns).Create(ctx, &corev1.Service{ObjectMeta: metav1.ObjectMeta{Name: "s"}, Spec: corev1.ServiceSpec{Ports: []corev1.ServicePort{{Port: 70000}}}}, metav1.CreateOptions{})
	_, class := c.admin.CoreV1().Pods(ns).Create(ctx, bad(pod("p"), func(p *corev1.Pod) { p.Spec.PriorityClassName = "none-such" }), metav1.CreateOptions{})
	_, verb := c.admin.RbacV1().Roles(ns).Create(ctx, &rbacv1.Role{ObjectMeta: metav1.ObjectMeta{Name: "r"}, Rules: []rbacv1.PolicyRule{{Resources: []string{"pods"}}}}, metav1.CreateOptions{})
	for _, tc := range []struct {
		err  error
		want string
	}{
		{noImage, "spec.containers[0].image: Required value"},
		{badName, "metadata.name: Invalid value: \"Not_A_Name\""},
		{selector, "`selector` does not match template `labels`"},
		{port, "spec.ports[0].port: Invalid value: 70000"},
		{class, "no PriorityClass with name none-such was found"},
		{verb, "rules[0].verbs: Required value"},
	} {
		if tc.err == nil || !strings.Contains(tc.err.Error(), tc.want) {
			t.Errorf("got %v\nwant %s", tc.err, tc.want)
		}
	}
	immutable := must(c.admin.AppsV1().Deployments(ns).Create(ctx, deployment("web"), metav1.CreateOptions{}))(t)
	immutable.Spec.Selector.MatchLabels["more"] = "x"
	immutable.Spec.Template.Labels["more"] = "x"
	if _, err := c.admin.AppsV1().Deployments(ns).Update(ctx, immutable, metav1.UpdateOptions{}); err == nil || !strings.Contains(err.Error(), "field is immutable") {
		t.Errorf("the selector changed: %v", err)
	}
}

func patches(t *testing.T, c *cluster, ns string) {
	ctx := t.Context()
	api := c.admin.AppsV1().Deployments(ns)
	must(api.Create(ctx, deployment("web"), metav1.CreateOptions{}))(t)
	for kind, body := range map[types.PatchType]string{
		types.StrategicMergePatchType: `{"spec":{"template":{"spec":{"containers":[{"name":"side","image":"side"}]}}}}`,
		types.MergePatchType:          `{"metadata":{"labels":{"merge":"yes"}}}`,
		types.JSONPatchType:           `[{"op":"replace","path":"/spec/replicas","value":4}]`,
	} {
		must(api.Patch(ctx, "web", kind, []byte(body), metav1.PatchOptions{}))(t)
	}
	d := must(api.Get(ctx, "web", metav1.GetOptions{}))(t)
	if len(d.Spec.Template.Spec.Containers) != 2 || d.Labels["merge"] != "yes" || *d.Spec.Replicas != 4 {
		t.Errorf("after all patches: %d containers, labels %v, %d replicas", len(d.Spec.Template.Spec.Containers), d.Labels, *d.Spec.Replicas)
	}
}

func serverSideApply(t *testing.T, c *cluster, ns string) {
	ctx := t.Context()
	api := c.admin.CoreV1().ConfigMaps(ns)
	apply := func(manager, value string, force bool) error {
		body := fmt.Sprintf(`{"apiVersion":"v1","kind":"ConfigMap","metadata":{"name":"m"},"data":{"k":%q}}`, value)
		_, err := api.Patch(ctx, "m", types.ApplyPatchType, []byte(body), metav1.PatchOptions{FieldManager: manager, Force: &force})
		return err
	}
	if err := apply("one", "1", false); err != nil {
		t.Fatal(err)
	}
	if err := apply("two", "2", false); !apierrors.IsConflict(err) || !strings.Contains(err.Error(), `conflict with "one"`) {
		t.Errorf("no conflict: %v", err)
	}
	if err := apply("two", "2", true); err != nil {
		t.Fatal(err)
	}
	if m := must(api.Get(ctx, "m", metav1.GetOptions{}))(t); m.Data["k"] != "2" {
		t.Errorf("k is %s", m.Data["k"])
	}
}

func scales(t *testing.T, c *cluster, ns string) {
	ctx := t.Context()
	api := c.admin.AppsV1().Deployments(ns)
	must(api.Create(ctx, deployment("web"), metav1.CreateOptions{}))(t)
	s := must(api.UpdateScale(ctx, "web", &autoscalingv1.Scale{ObjectMeta: metav1.ObjectMeta{Name: "web", Namespace: ns}, Spec: autoscalingv1.ScaleSpec{Replicas: 6}}, metav1.UpdateOptions{}))(t)
	if s.Spec.Replicas != 6 || s.Status.Selector != "app=web" {
		t.Errorf("scale %+v", s)
	}
	if d := must(api.Get(ctx, "web", metav1.GetOptions{}))(t); *d.Spec.Replicas != 6 || d.Generation != 2 {
		t.Errorf("%d replicas, generation %d", *d.Spec.Replicas, d.Generation)
	}
	if _, err := api.Patch(ctx, "web", types.MergePatchType, []byte(`{"spec":{"replicas":-1}}`), metav1.PatchOptions{}, "scale"); !apierrors.IsInvalid(err) {
		t.Errorf("minus one replica: %v", err)
	}
}

func statusDoor(t *testing.T, c *cluster, ns string) {
	ctx := t.Context()
	api := c.admin.CoreV1().Pods(ns)
	p := must(api.Create(ctx, pod("p"), metav1.CreateOptions{}))(t)
	p.Status.Phase = corev1.PodRunning
	p.Spec.Containers[0].Image = "other"
	through := must(api.UpdateStatus(ctx, p, metav1.UpdateOptions{}))(t)
	if through.Status.Phase != corev1.PodRunning || through.Spec.Containers[0].Image != "echo" || through.Generation != 1 {
		t.Errorf("through status: phase %s, image %s, generation %d", through.Status.Phase, through.Spec.Containers[0].Image, through.Generation)
	}
	through.Status.Phase = corev1.PodFailed
	through.Labels["x"] = "y"
	if q := must(api.Update(ctx, through, metav1.UpdateOptions{}))(t); q.Status.Phase != corev1.PodRunning {
		t.Errorf("an update of the spec set the phase to %s", q.Status.Phase)
	}
}

func conflicts(t *testing.T, c *cluster, ns string) {
	ctx := t.Context()
	api := c.admin.CoreV1().ConfigMaps(ns)
	m := must(api.Create(ctx, configMap("m"), metav1.CreateOptions{}))(t)
	stale := m.DeepCopy()
	m.Data["a"] = "2"
	must(api.Update(ctx, m, metav1.UpdateOptions{}))(t)
	if _, err := api.Update(ctx, stale, metav1.UpdateOptions{}); !apierrors.IsConflict(err) {
		t.Errorf("a stale update: %v", err)
	}
	if err := api.Delete(ctx, "m", metav1.DeleteOptions{Preconditions: &metav1.Preconditions{UID: ptr.To(types.UID("other"))}}); !apierrors.IsConflict(err) {
		t.Errorf("a delete of another object: %v", err)
	}
}

func watches(t *testing.T, c *cluster, ns string) {
	ctx := t.Context()
	api := c.admin.CoreV1().ConfigMaps(ns)
	must(api.Create(ctx, configMap("first"), metav1.CreateOptions{}))(t)
	// WatchList: the list is streamed, its end is a bookmark.
	w := must(api.Watch(ctx, metav1.ListOptions{
		SendInitialEvents: ptr.To(true), AllowWatchBookmarks: true, ResourceVersionMatch: metav1.ResourceVersionMatchNotOlderThan,
	}))(t)
	defer w.Stop()
	expect := func(kind watch.EventType, name string) {
		t.Helper()
		e, ok := <-w.ResultChan()
		if !ok {
			t.Fatal("the watch ended")
		}
		m := e.Object.(*corev1.ConfigMap)
		if e.Type != kind || m.Name != name {
			t.Fatalf("%s %q, want %s %q", e.Type, m.Name, kind, name)
		}
		if kind == watch.Bookmark && m.Annotations[metav1.InitialEventsAnnotationKey] != "true" {
			t.Error("the bookmark does not say that the list is complete")
		}
	}
	expect(watch.Added, "first")
	expect(watch.Bookmark, "")
	must(api.Create(ctx, configMap("second"), metav1.CreateOptions{}))(t)
	expect(watch.Added, "second")
	must(api.Patch(ctx, "second", types.MergePatchType, []byte(`{"data":{"a":"2"}}`), metav1.PatchOptions{}))(t)
	expect(watch.Modified, "second")
	if err := api.Delete(ctx, "second", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	expect(watch.Deleted, "second")
}

func pages(t *testing.T, c *cluster, ns string) {
	ctx := t.Context()
	api := c.admin.CoreV1().ConfigMaps(ns)
	for i := range 5 {
		must(api.Create(ctx, configMap(fmt.Sprintf("m%d", i)), metav1.CreateOptions{}))(t)
	}
	first := must(api.List(ctx, metav1.ListOptions{Limit: 2}))(t)
	must(api.Create(ctx, configMap("later"), metav1.CreateOptions{}))(t)
	names, next := len(first.Items), first.Continue
	for next != "" {
		l := must(api.List(ctx, metav1.ListOptions{Limit: 2, Continue: next}))(t)
		if l.ResourceVersion != first.ResourceVersion {
			t.Errorf("a page of %s in a list of %s", l.ResourceVersion, first.ResourceVersion)
		}
		names, next = names+len(l.Items), l.Continue
	}
	if names != 5 {
		t.Errorf("%d objects on all pages, want 5", names)
	}
}

func selects(t *testing.T, c *cluster, ns string) {
	ctx := t.Context()
	api := c.admin.CoreV1().Pods(ns)
	on := pod("on")
	on.Spec.NodeName = "n1"
	must(api.Create(ctx, on, metav1.CreateOptions{}))(t)
	must(api.Create(ctx, pod("off"), metav1.CreateOptions{}))(t)
	for selector, want := range map[string]string{"spec.nodeName=n1": "on", "spec.nodeName=": "off", "metadata.name=on": "on", "spec.nodeName!=n1,status.phase=Pending": "off"} {
		l := must(api.List(ctx, metav1.ListOptions{FieldSelector: selector}))(t)
		if len(l.Items) != 1 || l.Items[0].Name != want {
			t.Errorf("%s: %d pods", selector, len(l.Items))
		}
	}
	if _, err := api.List(ctx, metav1.ListOptions{FieldSelector: "spec.colour=red"}); !apierrors.IsBadRequest(err) {
		t.Errorf("an unknown field: %v", err)
	}
}

func binds(t *testing.T, c *cluster, ns string) {
	ctx := t.Context()
	api := c.admin.CoreV1().Pods(ns)
	p := must(api.Create(ctx, pod("p"), metav1.CreateOptions{}))(t)
	bind := func(uid types.UID, node string) error {
		return api.Bind(ctx, &corev1.Binding{ObjectMeta: metav1.ObjectMeta{Name: "p", UID: uid}, Target: corev1.ObjectReference{Kind: "Node", Name: node}}, metav1.CreateOptions{})
	}
	if err := bind("other", "n1"); !apierrors.IsConflict(err) {
		t.Errorf("bound another pod of that name: %v", err)
	}
	if err := bind(p.UID, "n1"); err != nil {
		t.Fatal(err)
	}
	if err := bind(p.UID, "n2"); !apierrors.IsConflict(err) || !strings.Contains(err.Error(), "already assigned") {
		t.Errorf("bound twice: %v", err)
	}
	p = must(api.Get(ctx, "p", metav1.GetOptions{}))(t)
	if p.Spec.NodeName != "n1" || len(p.Status.Conditions) != 1 || p.Status.Conditions[0].Type != corev1.PodScheduled {
		t.Errorf("on %q with conditions %v", p.Spec.NodeName, p.Status.Conditions)
	}
}

func gracefulDelete(t *testing.T, c *cluster, ns string) {
	ctx := t.Context()
	api := c.admin.CoreV1().Pods(ns)
	must(api.Create(ctx, pod("unscheduled"), metav1.CreateOptions{}))(t)
	if err := api.Delete(ctx, "unscheduled", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	if _, err := api.Get(ctx, "unscheduled", metav1.GetOptions{}); !apierrors.IsNotFound(err) {
		t.Errorf("a pod without node is still there: %v", err)
	}
	p := pod("runs")
	p.Spec.NodeName = "n1"
	must(api.Create(ctx, p, metav1.CreateOptions{}))(t)
	if err := api.Delete(ctx, "runs", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	p = must(api.Get(ctx, "runs", metav1.GetOptions{}))(t)
	if p.DeletionTimestamp == nil || *p.DeletionGracePeriodSeconds != 30 || p.Generation != 2 {
		t.Errorf("deletion %v, grace %v, generation %d", p.DeletionTimestamp, p.DeletionGracePeriodSeconds, p.Generation)
	}
	if err := api.Delete(ctx, "runs", metav1.DeleteOptions{GracePeriodSeconds: ptr.To[int64](0)}); err != nil {
		t.Fatal(err)
	}
	if _, err := api.Get(ctx, "runs", metav1.GetOptions{}); !apierrors.IsNotFound(err) {
		t.Errorf("still there after grace 0: %v", err)
	}
}

func podAdmission(t *testing.T, c *cluster, ns string) {
	ctx := t.Context()
	p := pod("p")
	p.Spec.PriorityClassName = "system-node-critical"
	p.Spec.Containers[0].Resources.Requests = corev1.ResourceList{corev1.ResourceCPU: resource.MustParse("10m")}
	p = must(c.admin.CoreV1().Pods(ns).Create(ctx, p, metav1.CreateOptions{}))(t)
	if *p.Spec.Priority != 2000001000 {
		t.Errorf("priority %d", *p.Spec.Priority)
	}
	if len(p.Spec.Tolerations) != 0 { // how long it stays on a lost node is the controllers' setting
		t.Errorf("tolerations %v", p.Spec.Tolerations)
	}
	if p.Status.QOSClass != corev1.PodQOSBurstable || p.Status.Phase != corev1.PodPending {
		t.Errorf("%s, %s", p.Status.QOSClass, p.Status.Phase)
	}
}

func limitRanges(t *testing.T, c *cluster, ns string) {
	ctx := t.Context()
	q := func(s string) corev1.ResourceList {
		return corev1.ResourceList{corev1.ResourceMemory: resource.MustParse(s)}
	}
	must(c.admin.CoreV1().LimitRanges(ns).Create(ctx, &corev1.LimitRange{ObjectMeta: metav1.ObjectMeta{Name: "l"}, Spec: corev1.LimitRangeSpec{Limits: []corev1.LimitRangeItem{
		{Type: corev1.LimitTypeContainer, Default: q("64Mi"), DefaultRequest: q("32Mi"), Max: q("128Mi")},
	}}}, metav1.CreateOptions{}))(t)
	// The server learns of the range by its own watch.
	eventually(t, func() error {
		p, err := c.admin.CoreV1().Pods(ns).Create(ctx, &corev1.Pod{ObjectMeta: metav1.ObjectMeta{GenerateName: "p-"}, Spec: podSpec()}, metav1.CreateOptions{})
		if err != nil {
			return err
		}
		if m := p.Spec.Containers[0].Resources.Limits.Memory().String(); m != "64Mi" {
			return fmt.Errorf("limit %s", m)
		}
		return nil
	})
	big := pod("big")
	big.Spec.Containers[0].Resources.Limits = q("1Gi")
	if _, err := c.admin.CoreV1().Pods(ns).Create(ctx, big, metav1.CreateOptions{}); !apierrors.IsForbidden(err) || !strings.Contains(err.Error(), "maximum memory usage per Container is 128Mi") {
		t.Errorf("a pod over the limit: %v", err)
	}
}

func jobs(t *testing.T, c *cluster, ns string) {
	spec := podSpec()
	spec.RestartPolicy = corev1.RestartPolicyNever
	j := must(c.admin.BatchV1().Jobs(ns).Create(t.Context(), &batchv1.Job{ObjectMeta: metav1.ObjectMeta{Name: "j"}, Spec: batchv1.JobSpec{Template: corev1.PodTemplateSpec{Spec: spec}}}, metav1.CreateOptions{}))(t)
	if got := j.Spec.Selector.MatchLabels[batchv1.ControllerUidLabel]; got != string(j.UID) {
		t.Errorf("selects %q, not itself", got)
	}
	if j.Spec.Template.Labels[batchv1.JobNameLabel] != "j" {
		t.Errorf("labels %v", j.Spec.Template.Labels)
	}
}

func namespaceEnd(t *testing.T, c *cluster, ns string) {
	ctx := t.Context()
	api := c.admin.CoreV1().Namespaces()
	if err := api.Delete(ctx, "kube-system", metav1.DeleteOptions{}); !apierrors.IsForbidden(err) {
		t.Errorf("kube-system: %v", err)
	}
	if err := api.Delete(ctx, ns, metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	n := must(api.Get(ctx, ns, metav1.GetOptions{}))(t)
	if n.Status.Phase != corev1.NamespaceTerminating || n.DeletionTimestamp == nil {
		t.Errorf("phase %s", n.Status.Phase)
	}
	if _, err := c.admin.CoreV1().ConfigMaps(ns).Create(ctx, configMap("m"), metav1.CreateOptions{}); !apierrors.HasStatusCause(err, corev1.NamespaceTerminatingCause) {
		t.Errorf("new content in a namespace that goes: %v", err)
	}
	n.Spec.Finalizers = nil
	must(api.Finalize(ctx, n, metav1.UpdateOptions{}))(t)
	if _, err := api.Get(ctx, ns, metav1.GetOptions{}); !apierrors.IsNotFound(err) {
		t.Errorf("still there: %v", err)
	}
	if _, err := c.admin.CoreV1().ConfigMaps("no-such").Create(ctx, configMap("m"), metav1.CreateOptions{}); !apierrors.IsNotFound(err) {
		t.Errorf("an object in no namespace: %v", err)
	}
}

func serviceAddresses(t *testing.T, c *cluster, ns string) {
	ctx := t.Context()
	api := c.admin.CoreV1().Services(ns)
	s := must(api.Create(ctx, &corev1.Service{ObjectMeta: metav1.ObjectMeta{Name: "s"}, Spec: corev1.ServiceSpec{
		IPFamilyPolicy: ptr.To(corev1.IPFamilyPolicyRequireDualStack), Type: corev1.ServiceTypeNodePort, Ports: []corev1.ServicePort{{Port: 80}},
	}}, metav1.CreateOptions{}))(t)
	if len(s.Spec.ClusterIPs) != 2 || !strings.HasPrefix(s.Spec.ClusterIPs[0], "10.96.") || !strings.HasPrefix(s.Spec.ClusterIPs[1], "fd00:10:96:") {
		t.Errorf("addresses %v", s.Spec.ClusterIPs)
	}
	if p := s.Spec.Ports[0].NodePort; p < 30000 || p > 32767 {
		t.Errorf("node port %d", p)
	}
	had := s.Spec.ClusterIPs
	s.Spec.Ports[0].Port = 81
	if s = must(api.Update(ctx, s, metav1.UpdateOptions{}))(t); s.Spec.ClusterIPs[0] != had[0] {
		t.Errorf("moved from %v to %v", had, s.Spec.ClusterIPs)
	}
	taken := &corev1.Service{ObjectMeta: metav1.ObjectMeta{Name: "other"}, Spec: corev1.ServiceSpec{ClusterIP: had[0], Ports: []corev1.ServicePort{{Port: 80}}}}
	if _, err := api.Create(ctx, taken, metav1.CreateOptions{}); !apierrors.IsInvalid(err) {
		t.Errorf("the same address twice: %v", err)
	}
}

func events(t *testing.T, c *cluster, ns string) {
	ctx := t.Context()
	must(c.admin.EventsV1().Events(ns).Create(ctx, &eventsv1.Event{
		ObjectMeta: metav1.ObjectMeta{Name: "e"}, EventTime: metav1.NowMicro(), ReportingController: "meshd.dev/test", ReportingInstance: "i",
		Action: "Look", Reason: "Seen", Note: "note", Type: "Normal", Regarding: corev1.ObjectReference{Kind: "Pod", Name: "p", Namespace: ns},
	}, metav1.CreateOptions{}))(t)
	e := must(c.admin.CoreV1().Events(ns).Get(ctx, "e", metav1.GetOptions{}))(t)
	if e.Message != "note" || e.InvolvedObject.Name != "p" {
		t.Errorf("as a core event: %+v", e)
	}
	l := must(c.admin.CoreV1().Events(ns).List(ctx, metav1.ListOptions{FieldSelector: "involvedObject.name=p,reason=Seen"}))(t)
	if len(l.Items) != 1 {
		t.Errorf("%d events selected", len(l.Items))
	}
}

func secretsAtRest(t *testing.T, c *cluster, ns string) {
	const password = "correct-horse-battery-staple"
	s := &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Name: "s"}, StringData: map[string]string{"password": password}}
	must(c.admin.CoreV1().Secrets(ns).Create(t.Context(), s, metav1.CreateOptions{}))(t)
	m := configMap("canary")
	m.Data["canary"] = "canary-in-clear"
	must(c.admin.CoreV1().ConfigMaps(ns).Create(t.Context(), m, metav1.CreateOptions{}))(t)
	found := map[string]bool{}
	err := filepath.WalkDir(c.cfg.DataDir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		b, err := os.ReadFile(path)
		for _, text := range []string{password, "canary-in-clear"} {
			found[text] = found[text] || bytes.Contains(b, []byte(text))
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	if found[password] || !found["canary-in-clear"] {
		t.Errorf("on disk: secret %v, config map %v; want false, true", found[password], found["canary-in-clear"])
	}
	if got := must(c.admin.CoreV1().Secrets(ns).Get(t.Context(), "s", metav1.GetOptions{}))(t); string(got.Data["password"]) != password {
		t.Errorf("read back %q", got.Data["password"])
	}
}

func roles(t *testing.T, c *cluster, ns string) {
	ctx := t.Context()
	dev := c.client("dev", "devs")
	if _, err := dev.CoreV1().Pods(ns).List(ctx, metav1.ListOptions{}); !apierrors.IsForbidden(err) {
		t.Fatalf("without a role: %v", err)
	}
	role := func(name, resource string, verbs ...string) *rbacv1.Role {
		return &rbacv1.Role{ObjectMeta: metav1.ObjectMeta{Name: name}, Rules: []rbacv1.PolicyRule{{APIGroups: []string{"", rbacv1.GroupName}, Resources: []string{resource}, Verbs: verbs}}}
	}
	binding := func(name string) *rbacv1.RoleBinding {
		return &rbacv1.RoleBinding{ObjectMeta: metav1.ObjectMeta{Name: name}, RoleRef: rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "Role", Name: name},
			Subjects: []rbacv1.Subject{{Kind: "Group", APIGroup: rbacv1.GroupName, Name: "devs"}}}
	}
	for name, resource := range map[string]string{"readers": "pods", "rolemakers": "roles"} {
		must(c.admin.RbacV1().Roles(ns).Create(ctx, role(name, resource, "get", "list", "create"), metav1.CreateOptions{}))(t)
		must(c.admin.RbacV1().RoleBindings(ns).Create(ctx, binding(name), metav1.CreateOptions{}))(t)
	}
	eventually(t, func() error {
		_, err := dev.CoreV1().Pods(ns).List(ctx, metav1.ListOptions{})
		return err
	})
	if _, err := dev.CoreV1().Secrets(ns).List(ctx, metav1.ListOptions{}); !apierrors.IsForbidden(err) {
		t.Errorf("another resource: %v", err)
	}
	eventually(t, func() error {
		_, err := dev.RbacV1().Roles(ns).Create(ctx, role("mine", "pods", "get"), metav1.CreateOptions{})
		return err
	})
	if _, err := dev.RbacV1().Roles(ns).Create(ctx, role("more", "secrets", "get"), metav1.CreateOptions{}); !apierrors.IsForbidden(err) || !strings.Contains(err.Error(), "not currently held") {
		t.Errorf("gave what he has not: %v", err)
	}
	node, object := c.agent("n-" + ns)
	must(c.admin.CoreV1().Nodes().Create(ctx, object, metav1.CreateOptions{}))(t)
	if _, err := node.CoreV1().Secrets(ns).List(ctx, metav1.ListOptions{}); !apierrors.IsForbidden(err) {
		t.Errorf("a node lists secrets: %v", err)
	}
}

func aggregatedRoles(t *testing.T, c *cluster, _ string) {
	eventually(t, func() error {
		r, err := c.admin.RbacV1().ClusterRoles().Get(t.Context(), "view", metav1.GetOptions{})
		if err == nil && len(r.Rules) == 0 {
			err = errors.New("view has no rules")
		}
		return err
	})
}

func tokens(t *testing.T, c *cluster, ns string) {
	ctx := t.Context()
	p := must(c.admin.CoreV1().Pods(ns).Create(ctx, pod("p"), metav1.CreateOptions{}))(t)
	if p.Spec.ServiceAccountName != "default" || len(p.Spec.Volumes) != 1 || p.Spec.Volumes[0].Projected == nil {
		t.Errorf("account %q, volumes %v", p.Spec.ServiceAccountName, p.Spec.Volumes)
	}
	request := &authenticationv1.TokenRequest{Spec: authenticationv1.TokenRequestSpec{ExpirationSeconds: ptr.To[int64](600)}}
	r := must(c.admin.CoreV1().ServiceAccounts(ns).CreateToken(ctx, "default", request, metav1.CreateOptions{}))(t)
	config := c.as("unused")
	config.CertData, config.KeyData, config.BearerToken = nil, nil, r.Status.Token
	who := must(kubernetes.NewForConfigOrDie(config).AuthenticationV1().SelfSubjectReviews().Create(ctx, &authenticationv1.SelfSubjectReview{}, metav1.CreateOptions{}))(t)
	if got := who.Status.UserInfo.Username; got != "system:serviceaccount:"+ns+":default" {
		t.Errorf("the token is of %s", got)
	}
	review := must(c.admin.AuthenticationV1().TokenReviews().Create(ctx, &authenticationv1.TokenReview{Spec: authenticationv1.TokenReviewSpec{Token: r.Status.Token}}, metav1.CreateOptions{}))(t)
	if !review.Status.Authenticated {
		t.Errorf("a token review says %+v", review.Status)
	}
	config.BearerToken = "none.such.token"
	if _, err := kubernetes.NewForConfigOrDie(config).CoreV1().Pods(ns).List(ctx, metav1.ListOptions{}); !apierrors.IsUnauthorized(err) {
		t.Errorf("with a token of somebody else: %v", err)
	}
}

func agents(t *testing.T, c *cluster, ns string) {
	ctx := t.Context()
	name := "n-" + ns
	agent, object := c.agent(name)
	if _, err := agent.CoreV1().Nodes().Create(ctx, object, metav1.CreateOptions{}); !apierrors.IsForbidden(err) {
		t.Errorf("it made its own node, which only joining does: %v", err)
	}
	node := must(c.admin.CoreV1().Nodes().Create(ctx, object, metav1.CreateOptions{}))(t)
	node.Status.Conditions = []corev1.NodeCondition{{Type: corev1.NodeReady, Status: corev1.ConditionTrue}}
	must(agent.CoreV1().Nodes().UpdateStatus(ctx, node, metav1.UpdateOptions{}))(t)
	if _, err := agent.CoreV1().Nodes().Create(ctx, &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "other-" + ns}}, metav1.CreateOptions{}); !apierrors.IsForbidden(err) {
		t.Errorf("it made another node: %v", err)
	}
	cidr := []byte(`{"spec":{"podCIDR":"10.244.9.0/24","podCIDRs":["10.244.9.0/24"]}}`)
	if _, err := agent.CoreV1().Nodes().Patch(ctx, name, types.MergePatchType, cidr, metav1.PatchOptions{}); !apierrors.IsForbidden(err) {
		t.Errorf("it gave itself addresses: %v", err)
	}
	must(agent.CoordinationV1().Leases("kube-node-lease").Create(ctx, &coordinationv1.Lease{ObjectMeta: metav1.ObjectMeta{Name: name}}, metav1.CreateOptions{}))(t)
	for _, s := range []string{"mine", "other"} {
		must(c.admin.CoreV1().Secrets(ns).Create(ctx, &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Name: s}}, metav1.CreateOptions{}))(t)
	}
	p := pod("p")
	p.Spec.NodeName = name
	p.Spec.Volumes = []corev1.Volume{{Name: "v", VolumeSource: corev1.VolumeSource{Secret: &corev1.SecretVolumeSource{SecretName: "mine"}}}}
	must(c.admin.CoreV1().Pods(ns).Create(ctx, p, metav1.CreateOptions{}))(t)
	if l := must(agent.CoreV1().Pods("").List(ctx, metav1.ListOptions{FieldSelector: "spec.nodeName=" + name}))(t); len(l.Items) != 1 {
		t.Errorf("it sees %d pods of its own, want 1", len(l.Items))
	}
	eventually(t, func() error {
		_, err := agent.CoreV1().Secrets(ns).Get(ctx, "mine", metav1.GetOptions{})
		return err
	})
	if _, err := agent.CoreV1().Secrets(ns).Get(ctx, "other", metav1.GetOptions{}); !apierrors.IsForbidden(err) {
		t.Errorf("it read a secret none of its pods uses: %v", err)
	}
}

// peerKeys: what a node publishes to its peers must be its own and readable.
func peerKeys(t *testing.T, c *cluster, ns string) {
	ctx := t.Context()
	mine, theirs := "mine-"+ns, "theirs-"+ns
	key := func(b byte) string { return base64.StdEncoding.EncodeToString(bytes.Repeat([]byte{b}, 32)) }
	register := func(name, key string) kubernetes.Interface {
		agent, object := c.agent(name)
		if key != "" {
			object.Annotations["meshd.dev/public-key"] = key
		}
		must(c.admin.CoreV1().Nodes().Create(ctx, object, metav1.CreateOptions{}))(t)
		// Once it may read, the server knows the node and its key.
		must(agent.CoreV1().Nodes().Get(ctx, name, metav1.GetOptions{}))(t)
		return agent
	}
	register(theirs, key(7))
	agent := register(mine, "")
	for _, p := range []struct{ name, annotation, value, refusal string }{
		{"its own key", "meshd.dev/public-key", key(8), ""},
		{"another's key", "meshd.dev/public-key", key(7), `node "` + theirs + `" has it`},
		{"no key", "meshd.dev/public-key", "7", "want 32 bytes in base64"},
		{"where it is", "meshd.dev/endpoints", "192.0.2.1:51820,[2001:db8::1]:51820", ""},
		{"nowhere", "meshd.dev/endpoints", "127.0.0.1:51820", "want address:port of a unicast address"},
	} {
		for _, sub := range []string{"", "status"} {
			patch := fmt.Sprintf(`{"metadata":{"annotations":{%q:%q}}}`, p.annotation, p.value)
			_, err := agent.CoreV1().Nodes().Patch(ctx, mine, types.MergePatchType, []byte(patch), metav1.PatchOptions{}, strings.Fields(sub)...)
			if p.refusal == "" && err != nil || p.refusal != "" && (!apierrors.IsForbidden(err) || !strings.Contains(err.Error(), p.refusal)) {
				t.Errorf("publishes %s on nodes/%s: %v, want %q", p.name, sub, err, p.refusal)
			}
		}
	}
}

// removedNode: a certificate outlives its node by months, what it may do does not.
func removedNode(t *testing.T, c *cluster, ns string) {
	ctx := t.Context()
	name := "n-" + ns
	agent, object := c.agent(name)
	lease := &coordinationv1.Lease{ObjectMeta: metav1.ObjectMeta{Name: name}}
	try := map[string]func() error{
		"list nodes":    func() error { _, err := agent.CoreV1().Nodes().List(ctx, metav1.ListOptions{}); return err },
		"list services": func() error { _, err := agent.CoreV1().Services("").List(ctx, metav1.ListOptions{}); return err },
		"list endpointslices": func() error {
			_, err := agent.DiscoveryV1().EndpointSlices("").List(ctx, metav1.ListOptions{})
			return err
		},
		"list its pods": func() error {
			_, err := agent.CoreV1().Pods("").List(ctx, metav1.ListOptions{FieldSelector: "spec.nodeName=" + name})
			return err
		},
		"renew its lease": func() error {
			_, err := agent.CoordinationV1().Leases("kube-node-lease").Update(ctx, lease, metav1.UpdateOptions{})
			return err
		},
		"write an event": func() error {
			_, err := agent.CoreV1().Events(ns).Create(ctx, &corev1.Event{ObjectMeta: metav1.ObjectMeta{GenerateName: "e-"},
				InvolvedObject: corev1.ObjectReference{Kind: "Pod", Namespace: ns, Name: "p"}}, metav1.CreateOptions{})
			return err
		},
	}
	must(c.admin.CoreV1().Nodes().Create(ctx, object, metav1.CreateOptions{}))(t)
	lease = must(agent.CoordinationV1().Leases("kube-node-lease").Create(ctx, lease, metav1.CreateOptions{}))(t)
	for what, do := range try {
		if err := do(); err != nil {
			t.Errorf("%s while it is in the cluster: %v", what, err)
		}
	}
	watch := must(agent.CoreV1().Services("").Watch(ctx, metav1.ListOptions{}))(t)
	defer watch.Stop()
	if err := c.admin.CoreV1().Nodes().Delete(ctx, name, metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	deleted := time.Now()
	for range watch.ResultChan() { // until the server ends it
	}
	t.Logf("the open watch ended %v after the node was deleted", time.Since(deleted))
	want := fmt.Sprintf("node %q is not in the cluster: it was removed, or has not joined", name)
	eventually(t, func() error {
		_, err := agent.CoreV1().Namespaces().Get(ctx, ns, metav1.GetOptions{})
		if !apierrors.IsForbidden(err) || !strings.Contains(err.Error(), want) {
			return fmt.Errorf("it reads on after it was removed: %v", err)
		}
		return nil
	})
	for what, do := range try {
		if err := do(); !apierrors.IsForbidden(err) || !strings.Contains(err.Error(), want) {
			t.Errorf("%s after it was removed: %v, want %q", what, err, want)
		}
	}
	// Another machine joins by the same name: the certificate stays worthless.
	heir, object := c.agent(name)
	must(c.admin.CoreV1().Nodes().Create(ctx, object, metav1.CreateOptions{}))(t)
	must(heir.CoreV1().Nodes().List(ctx, metav1.ListOptions{}))(t)
	for what, do := range try {
		if err := do(); !apierrors.IsForbidden(err) || !strings.Contains(err.Error(), "joined with another key") {
			t.Errorf("%s after another machine took its name: %v", what, err)
		}
	}
}

func autoscalers(t *testing.T, c *cluster, ns string) {
	h := must(c.admin.AutoscalingV2().HorizontalPodAutoscalers(ns).Create(t.Context(), &autoscalingv2.HorizontalPodAutoscaler{ObjectMeta: metav1.ObjectMeta{Name: "h"}, Spec: autoscalingv2.HorizontalPodAutoscalerSpec{
		ScaleTargetRef: autoscalingv2.CrossVersionObjectReference{APIVersion: "apps/v1", Kind: "Deployment", Name: "d"}, MaxReplicas: 4,
	}}, metav1.CreateOptions{}))(t)
	if *h.Spec.MinReplicas != 1 || h.Spec.Metrics[0].Resource.Name != corev1.ResourceCPU {
		t.Errorf("stored as %+v", h.Spec)
	}
}

func webhooks(t *testing.T, c *cluster, ns string) {
	ctx := t.Context()
	server := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		var review admissionv1.AdmissionReview
		if err := json.NewDecoder(r.Body).Decode(&review); err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		answer := &admissionv1.AdmissionResponse{UID: review.Request.UID, Allowed: review.Request.Name != "bad", Result: &metav1.Status{Message: "not this one"}}
		if r.URL.Path == "/mutate" {
			answer.Allowed = true
			answer.PatchType = ptr.To(admissionv1.PatchTypeJSONPatch)
			answer.Patch = []byte(`[{"op":"add","path":"/data/seen","value":"yes"}]`)
		}
		review.Request, review.Response = nil, answer
		_ = json.NewEncoder(w).Encode(review)
	}))
	defer server.Close()
	hook := func(path string) admissionregistrationv1.WebhookClientConfig {
		return admissionregistrationv1.WebhookClientConfig{URL: ptr.To(server.URL + path),
			CABundle: pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: server.Certificate().Raw})}
	}
	rules := []admissionregistrationv1.RuleWithOperations{{Operations: []admissionregistrationv1.OperationType{"CREATE"},
		Rule: admissionregistrationv1.Rule{APIGroups: []string{""}, APIVersions: []string{"v1"}, Resources: []string{"configmaps"}}}}
	only := &metav1.LabelSelector{MatchLabels: map[string]string{corev1.LabelMetadataName: ns}}
	none := ptr.To(admissionregistrationv1.SideEffectClassNone)
	must(c.admin.AdmissionregistrationV1().MutatingWebhookConfigurations().Create(ctx, &admissionregistrationv1.MutatingWebhookConfiguration{
		ObjectMeta: metav1.ObjectMeta{Name: ns},
		Webhooks: []admissionregistrationv1.MutatingWebhook{{Name: "m.example.com", ClientConfig: hook("/mutate"), Rules: rules,
			NamespaceSelector: only, SideEffects: none, AdmissionReviewVersions: []string{"v1"}}}}, metav1.CreateOptions{}))(t)
	must(c.admin.AdmissionregistrationV1().ValidatingWebhookConfigurations().Create(ctx, &admissionregistrationv1.ValidatingWebhookConfiguration{
		ObjectMeta: metav1.ObjectMeta{Name: ns},
		Webhooks: []admissionregistrationv1.ValidatingWebhook{{Name: "v.example.com", ClientConfig: hook("/validate"), Rules: rules,
			NamespaceSelector: only, SideEffects: none, AdmissionReviewVersions: []string{"v1"}}}}, metav1.CreateOptions{}))(t)
	eventually(t, func() error {
		m := configMap("")
		m.GenerateName = "m-"
		m, err := c.admin.CoreV1().ConfigMaps(ns).Create(ctx, m, metav1.CreateOptions{})
		if err == nil && m.Data["seen"] != "yes" {
			err = errors.New("the webhook did not change it")
		}
		return err
	})
	eventually(t, func() error {
		_, err := c.admin.CoreV1().ConfigMaps(ns).Create(ctx, configMap("bad"), metav1.CreateOptions{DryRun: []string{metav1.DryRunAll}})
		if err == nil || !strings.Contains(err.Error(), `admission webhook "v.example.com" denied the request: not this one`) {
			return fmt.Errorf("not refused: %w", err)
		}
		return nil
	})
}

func evictions(t *testing.T, c *cluster, ns string) {
	ctx := t.Context()
	p := pod("p")
	p.Spec.NodeName = "n1"
	p = must(c.admin.CoreV1().Pods(ns).Create(ctx, p, metav1.CreateOptions{}))(t)
	p.Status.Phase = corev1.PodRunning
	p.Status.Conditions = []corev1.PodCondition{{Type: corev1.PodReady, Status: corev1.ConditionTrue}}
	must(c.admin.CoreV1().Pods(ns).UpdateStatus(ctx, p, metav1.UpdateOptions{}))(t)
	must(c.admin.PolicyV1().PodDisruptionBudgets(ns).Create(ctx, &policyv1.PodDisruptionBudget{ObjectMeta: metav1.ObjectMeta{Name: "b"},
		Spec: policyv1.PodDisruptionBudgetSpec{Selector: &metav1.LabelSelector{MatchLabels: map[string]string{"app": "echo"}}}}, metav1.CreateOptions{}))(t)
	err := c.admin.CoreV1().RESTClient().Post().Namespace(ns).Resource("pods").Name("p").SubResource("eviction").
		Body(&policyv1.Eviction{ObjectMeta: metav1.ObjectMeta{Name: "p", Namespace: ns}}).MaxRetries(0).Do(ctx).Error()
	if !apierrors.IsTooManyRequests(err) {
		t.Errorf("against the budget: %v", err)
	}
}

func dryRun(t *testing.T, c *cluster, ns string) {
	ctx := t.Context()
	must(c.admin.CoreV1().ConfigMaps(ns).Create(ctx, configMap("m"), metav1.CreateOptions{DryRun: []string{metav1.DryRunAll}}))(t)
	if _, err := c.admin.CoreV1().ConfigMaps(ns).Get(ctx, "m", metav1.GetOptions{}); !apierrors.IsNotFound(err) {
		t.Errorf("it is there: %v", err)
	}
}

func strictFields(t *testing.T, c *cluster, ns string) {
	obj := &unstructured.Unstructured{Object: map[string]any{"apiVersion": "v1", "kind": "ConfigMap", "metadata": map[string]any{"name": "m"}, "dta": map[string]any{}}}
	_, err := c.dynamic().Resource(schema.GroupVersionResource{Version: "v1", Resource: "configmaps"}).Namespace(ns).
		Create(t.Context(), obj, metav1.CreateOptions{FieldValidation: metav1.FieldValidationStrict})
	if !apierrors.IsBadRequest(err) || !strings.Contains(err.Error(), `unknown field "dta"`) {
		t.Errorf("got %v", err)
	}
}

// eventually repeats f until it succeeds: some of the server's own caches
// follow writes a little later.
func eventually(t *testing.T, f func() error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), eventuallyTimeout)
	defer cancel()
	for {
		err := f()
		if err == nil {
			return
		}
		select {
		case <-ctx.Done():
			t.Fatal(err)
		case <-tick():
		}
	}
}
