package controller_test

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	coordinationv1 "k8s.io/api/coordination/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/util/retry"

	"meshd.dev/pkg/apiserver"
	"meshd.dev/pkg/controller"
	"meshd.dev/pkg/pki"
	"meshd.dev/pkg/status"
)

// The whole control plane against our own API server, with machines that are
// only made up: each renews its lease, runs what is bound to it by saying so,
// and can be cut off. Addresses: API 127.0.0.1, pods 10.244.0.0/16 and
// fd00:10:244::/48, services 10.96.0.0/16, machines 192.0.2.x.

const (
	// grace and evict are short because nothing here is measured; renewals
	// come ten times as often.
	grace = 1500 * time.Millisecond
	evict = 500 * time.Millisecond
	renew = 150 * time.Millisecond
	// patience is how long anything may take on a machine that is busy.
	patience = 60 * time.Second
)

// cluster is an API server, the controllers, and made-up machines.
type cluster struct {
	t      *testing.T
	rc     *rest.Config
	ca     []byte
	client kubernetes.Interface
	board  *status.Board
	stop   func() // of the controllers
}

func newCluster(t *testing.T) *cluster {
	t.Helper()
	rc, ca := startAPI(t)
	client, err := kubernetes.NewForConfig(rc)
	if err != nil {
		t.Fatal(err)
	}
	c := &cluster{t: t, rc: rc, ca: ca, client: client, board: &status.Board{}}
	c.stop = c.startControllers()
	return c
}

// startControllers runs the control plane until the test ends or the function
// it returns is called.
func (c *cluster) startControllers() (stop func()) {
	t := c.t
	t.Helper()
	control, err := controller.New(controller.Config{
		Client:          c.rc,
		PodCIDRs:        []netip.Prefix{netip.MustParsePrefix("10.244.0.0/16"), netip.MustParsePrefix("fd00:10:244::/48")},
		ServiceCIDRs:    []netip.Prefix{netip.MustParsePrefix("10.96.0.0/16")},
		RootCA:          c.ca,
		NodeGracePeriod: grace,
		EvictAfter:      evict,
		Board:           c.board,
		Log:             testLog(t),
	})
	if err != nil {
		t.Fatal(err)
	}
	return background(t, "controllers", control.Run)
}

// startAPI runs our API server on a free port of loopback.
func startAPI(t *testing.T) (*rest.Config, []byte) {
	t.Helper()
	dir := t.TempDir()
	ca, err := pki.LoadOrCreateCA(dir, "test")
	if err != nil {
		t.Fatal(err)
	}
	loopback := netip.MustParseAddr("127.0.0.1")
	cert, key, err := ca.Keep(dir, "serving", pki.Identity{User: "kube-apiserver", DNSNames: []string{"localhost"}, Addresses: []netip.Addr{loopback}})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := pki.LoadOrCreateKey(filepath.Join(dir, "sa.key")); err != nil {
		t.Fatal(err)
	}
	if _, err := pki.LoadOrCreateSecret(filepath.Join(dir, "secrets.key"), 32); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	t.Cleanup(cancel)
	api, err := apiserver.New(ctx, apiserver.Config{
		Listen: freePort(t), AdvertiseAddress: loopback, DataDir: filepath.Join(dir, "data"),
		CACert: filepath.Join(dir, "ca.crt"), ClientCA: filepath.Join(dir, "ca.crt"), ServingCert: cert, ServingKey: key,
		ServiceAccountKey: filepath.Join(dir, "sa.key"), EncryptionKey: filepath.Join(dir, "secrets.key"),
		ServiceCIDRs: []netip.Prefix{netip.MustParsePrefix("10.96.0.0/16")},
	})
	if err != nil {
		t.Fatal(err)
	}
	background(t, "API server", api.Run)
	select {
	case <-api.Ready():
	case <-time.After(patience):
		t.Fatal("the API server is not ready")
	}
	return api.Loopback(), pki.EncodeCert(ca.Cert)
}

func freePort(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}

// background runs fn until the test ends or stop is called, and waits for it
// then.
func background(t *testing.T, what string, fn func(context.Context) error) (stop func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- fn(ctx) }()
	stop = sync.OnceFunc(func() {
		start := time.Now()
		cancel()
		select {
		case err := <-done:
			t.Logf("%6.2fs %s stopped", time.Since(start).Seconds(), what)
			if err != nil && ctx.Err() == nil {
				t.Errorf("%s: %v", what, err)
			}
		case <-time.After(patience):
			t.Errorf("%s: does not stop", what)
		}
	})
	t.Cleanup(stop)
	return stop
}

// until waits for check to return "", and fails with what it last said.
func (c *cluster) until(what string, check func() string) {
	c.t.Helper()
	start := time.Now()
	for {
		problem := check()
		if problem == "" {
			c.t.Logf("%6.2fs %s", time.Since(start).Seconds(), what)
			return
		}
		if time.Since(start) > patience {
			c.t.Fatalf("%s: %s", what, problem)
		}
		time.Sleep(20 * time.Millisecond)
	}
}

// machine is a node that is only made up.
type machine struct {
	name   string
	client kubernetes.Interface
	cut    atomic.Bool
	mu     sync.Mutex
	next   int
}

// addMachine registers the node and keeps it alive until the test ends.
func (c *cluster) addMachine(name string) *machine {
	c.t.Helper()
	m := &machine{name: name, client: c.client}
	node := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name, Labels: map[string]string{corev1.LabelHostname: name, corev1.LabelOSStable: "linux"}}}
	if _, err := c.client.CoreV1().Nodes().Create(context.Background(), node, metav1.CreateOptions{}); err != nil {
		c.t.Fatal(err)
	}
	background(c.t, "machine "+name, m.run)
	return m
}

func (m *machine) run(ctx context.Context) error {
	tick := time.NewTicker(renew)
	defer tick.Stop()
	for ctx.Err() == nil {
		if !m.cut.Load() {
			_ = m.renew(ctx)
			_ = m.sayReady(ctx)
			_ = m.runPods(ctx)
		}
		select {
		case <-ctx.Done():
		case <-tick.C:
		}
	}
	return nil
}

func (m *machine) renew(ctx context.Context) error {
	leases := m.client.CoordinationV1().Leases(corev1.NamespaceNodeLease)
	now := metav1.NowMicro()
	lease, err := leases.Get(ctx, m.name, metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		_, err = leases.Create(ctx, &coordinationv1.Lease{ObjectMeta: metav1.ObjectMeta{Name: m.name}, Spec: coordinationv1.LeaseSpec{RenewTime: &now}}, metav1.CreateOptions{})
		return err
	}
	if err != nil {
		return err
	}
	lease.Spec.RenewTime = &now
	_, err = leases.Update(ctx, lease, metav1.UpdateOptions{})
	return err
}

func (m *machine) sayReady(ctx context.Context) error {
	node, err := m.client.CoreV1().Nodes().Get(ctx, m.name, metav1.GetOptions{})
	if err != nil {
		return err
	}
	if nodeReady(node) == corev1.ConditionTrue {
		return nil
	}
	node.Status.Conditions = []corev1.NodeCondition{{Type: corev1.NodeReady, Status: corev1.ConditionTrue, Reason: "AgentReady"}}
	node.Status.Allocatable = corev1.ResourceList{"cpu": resource.MustParse("4"), "memory": resource.MustParse("8Gi"), "pods": resource.MustParse("110")}
	node.Status.Capacity = node.Status.Allocatable
	_, err = m.client.CoreV1().Nodes().UpdateStatus(ctx, node, metav1.UpdateOptions{})
	return err
}

// runPods says that every pod bound here runs, or is gone when it was told to.
func (m *machine) runPods(ctx context.Context) error {
	pods, err := m.client.CoreV1().Pods("").List(ctx, metav1.ListOptions{FieldSelector: "spec.nodeName=" + m.name})
	if err != nil {
		return err
	}
	for i := range pods.Items {
		p := &pods.Items[i]
		if p.DeletionTimestamp != nil {
			_ = m.client.CoreV1().Pods(p.Namespace).Delete(ctx, p.Name, metav1.DeleteOptions{GracePeriodSeconds: new(int64), Preconditions: &metav1.Preconditions{UID: &p.UID}})
			continue
		}
		if podReady(p) || p.Status.Phase == corev1.PodSucceeded {
			continue
		}
		m.start(p)
		_, _ = m.client.CoreV1().Pods(p.Namespace).UpdateStatus(ctx, p, metav1.UpdateOptions{})
	}
	return nil
}

func (m *machine) start(p *corev1.Pod) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if p.Status.PodIP == "" {
		m.next++
		p.Status.PodIP = fmt.Sprintf("10.244.%s.%d", strings.TrimPrefix(m.name, "n"), m.next)
		p.Status.PodIPs = []corev1.PodIP{{IP: p.Status.PodIP}}
	}
	now := metav1.Now()
	if p.Labels["finishes"] != "" {
		p.Status.Phase = corev1.PodSucceeded
		return
	}
	p.Status.Phase = corev1.PodRunning
	p.Status.Conditions = slices.DeleteFunc(p.Status.Conditions, func(c corev1.PodCondition) bool { return c.Type == corev1.PodReady })
	p.Status.Conditions = append(p.Status.Conditions, corev1.PodCondition{Type: corev1.PodReady, Status: corev1.ConditionTrue, LastTransitionTime: now})
	p.Status.ContainerStatuses = []corev1.ContainerStatus{{Name: "c", Image: "image", Ready: true, State: corev1.ContainerState{Running: &corev1.ContainerStateRunning{StartedAt: now}}}}
}

func nodeReady(n *corev1.Node) corev1.ConditionStatus {
	for _, c := range n.Status.Conditions {
		if c.Type == corev1.NodeReady {
			return c.Status
		}
	}
	return ""
}

func podReady(p *corev1.Pod) bool {
	return slices.ContainsFunc(p.Status.Conditions, func(c corev1.PodCondition) bool {
		return c.Type == corev1.PodReady && c.Status == corev1.ConditionTrue
	})
}

func template(labels map[string]string) corev1.PodTemplateSpec {
	return corev1.PodTemplateSpec{ObjectMeta: metav1.ObjectMeta{Labels: labels},
		Spec: corev1.PodSpec{Containers: []corev1.Container{{Name: "c", Image: "image"}}}}
}

func deployment(namespace, name string, replicas int32) *appsv1.Deployment {
	l := map[string]string{"app": name}
	return &appsv1.Deployment{ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: name},
		Spec: appsv1.DeploymentSpec{Replicas: &replicas, Selector: &metav1.LabelSelector{MatchLabels: l}, Template: template(l)}}
}

// where says on which machine how many ready pods with the label run, as
// "n1:1 n2:1"; pods that are leaving do not count.
func (c *cluster) where(namespace, selector string) string {
	pods, err := c.client.CoreV1().Pods(namespace).List(context.Background(), metav1.ListOptions{LabelSelector: selector})
	if err != nil {
		return err.Error()
	}
	count := map[string]int{}
	for i := range pods.Items {
		if p := &pods.Items[i]; p.DeletionTimestamp == nil && podReady(p) {
			count[p.Spec.NodeName]++
		}
	}
	var out []string
	for n, k := range count {
		out = append(out, fmt.Sprintf("%s:%d", n, k))
	}
	slices.Sort(out)
	return strings.Join(out, " ")
}

func (c *cluster) untilWhere(what, namespace, selector, want string) {
	c.t.Helper()
	c.until(what, func() string {
		if got := c.where(namespace, selector); got != want {
			return fmt.Sprintf("pods %s are on %q, want %q", selector, got, want)
		}
		return ""
	})
}

// endpoints says how many addresses of a service are ready.
func (c *cluster) endpoints(namespace, service string) int {
	slices, err := c.client.DiscoveryV1().EndpointSlices(namespace).List(context.Background(), metav1.ListOptions{LabelSelector: "kubernetes.io/service-name=" + service})
	if err != nil {
		return -1
	}
	n := 0
	for _, s := range slices.Items {
		for _, e := range s.Endpoints {
			if e.Conditions.Ready != nil && *e.Conditions.Ready {
				n++
			}
		}
	}
	return n
}

func (c *cluster) untilEndpoints(what, namespace, service string, want int) {
	c.t.Helper()
	c.until(what, func() string {
		if got := c.endpoints(namespace, service); got != want {
			return fmt.Sprintf("service %s has %d ready endpoints, want %d", service, got, want)
		}
		return ""
	})
}

func (c *cluster) node(name string) *corev1.Node {
	n, err := c.client.CoreV1().Nodes().Get(context.Background(), name, metav1.GetOptions{})
	if err != nil {
		return &corev1.Node{}
	}
	return n
}

func (c *cluster) must(err error) {
	c.t.Helper()
	if err != nil {
		c.t.Fatal(err)
	}
}

// TestControlPlane is one story; each part stands on the one before.
func TestControlPlane(t *testing.T) {
	c := newCluster(t)
	ctx := context.Background()
	core, apps := c.client.CoreV1(), c.client.AppsV1()
	machines := map[string]*machine{}
	for _, n := range []string{"n1", "n2", "n3"} {
		machines[n] = c.addMachine(n)
	}

	c.until("each node has its own pod CIDRs", func() string {
		seen := map[string]bool{}
		for n := range machines {
			cidrs := c.node(n).Spec.PodCIDRs
			if len(cidrs) != 2 || seen[cidrs[0]] || seen[cidrs[1]] {
				return fmt.Sprintf("node %s has %v", n, cidrs)
			}
			seen[cidrs[0]], seen[cidrs[1]] = true, true
		}
		return ""
	})
	c.until("default service account and root CA in the default namespace", func() string {
		if _, err := core.ServiceAccounts("default").Get(ctx, "default", metav1.GetOptions{}); err != nil {
			return err.Error()
		}
		if m, err := core.ConfigMaps("default").Get(ctx, "kube-root-ca.crt", metav1.GetOptions{}); err != nil || !strings.Contains(m.Data["ca.crt"], "CERTIFICATE") {
			return fmt.Sprint("no root CA: ", err)
		}
		return ""
	})

	_, err := core.Namespaces().Create(ctx, &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "shop"}}, metav1.CreateOptions{})
	c.must(err)
	c.until("service account in the new namespace", func() string {
		_, err := core.ServiceAccounts("shop").Get(ctx, "default", metav1.GetOptions{})
		return errText(err)
	})
	_, err = core.Services("shop").Create(ctx, &corev1.Service{ObjectMeta: metav1.ObjectMeta{Name: "web"},
		Spec: corev1.ServiceSpec{Selector: map[string]string{"app": "web"}, Ports: []corev1.ServicePort{{Port: 80, TargetPort: intstr.FromInt32(8080)}}}}, metav1.CreateOptions{})
	c.must(err)
	_, err = apps.Deployments("shop").Create(ctx, deployment("shop", "web", 3), metav1.CreateOptions{})
	c.must(err)
	c.untilWhere("three replicas on three machines", "shop", "app=web", "n1:1 n2:1 n3:1")
	c.untilEndpoints("three endpoints", "shop", "web", 3)

	c.daemonSetAndStatefulSet()

	t.Run("a machine falls silent", func(t *testing.T) {
		machines["n2"].cut.Store(true)
		c.until("node n2 Unknown and tainted", func() string {
			n := c.node("n2")
			if nodeReady(n) != corev1.ConditionUnknown || len(n.Spec.Taints) != 2 {
				return fmt.Sprintf("ready %s, taints %v", nodeReady(n), n.Spec.Taints)
			}
			return ""
		})
		c.untilWhere("its pods are replaced on the others", "shop", "app=web", c.either("shop", "app=web", "n1:1 n3:2", "n1:2 n3:1"))
		c.untilEndpoints("three endpoints again", "shop", "web", 3)
		c.untilWhere("the pod with an identity is not", "shop", "app=db", "n1:1 n3:1")
		if got := c.checks("node/n2"); got == "" {
			t.Error("the board says nothing of the lost node")
		}
		machines["n2"].cut.Store(false)
		c.until("node n2 is back", func() string {
			n := c.node("n2")
			if nodeReady(n) != corev1.ConditionTrue || len(n.Spec.Taints) != 0 {
				return fmt.Sprintf("ready %s, taints %v", nodeReady(n), n.Spec.Taints)
			}
			return ""
		})
		c.untilWhere("and so is the pod with an identity", "shop", "app=db", "n1:1 n2:1 n3:1")
		c.until("its old pods are gone", func() string {
			pods, err := core.Pods("shop").List(ctx, metav1.ListOptions{LabelSelector: "app=web"})
			if err != nil || len(pods.Items) != 3 {
				return fmt.Sprint(len(pods.Items), " pods ", err)
			}
			return ""
		})
	})

	t.Run("two of three machines fall silent: nothing is deleted", func(t *testing.T) {
		before := c.names("shop", "app=web")
		machines["n1"].cut.Store(true)
		machines["n3"].cut.Store(true)
		c.until("the board warns", func() string {
			if got := c.checks("controller/eviction"); !strings.Contains(got, "n1, n3") {
				return "eviction: " + got
			}
			return ""
		})
		c.until("both nodes Unknown", func() string {
			if a, b := nodeReady(c.node("n1")), nodeReady(c.node("n3")); a != corev1.ConditionUnknown || b != corev1.ConditionUnknown {
				return fmt.Sprint(a, " ", b)
			}
			return ""
		})
		time.Sleep(3 * evict) // nothing must happen: there is no event to wait for
		if after := c.names("shop", "app=web"); after != before {
			t.Errorf("pods were %s, are %s", before, after)
		}
		machines["n1"].cut.Store(false)
		machines["n3"].cut.Store(false)
		c.until("all nodes Ready", func() string {
			for n := range machines {
				if got := nodeReady(c.node(n)); got != corev1.ConditionTrue {
					return n + " " + string(got)
				}
			}
			return ""
		})
	})

	t.Run("the controllers start anew", func(t *testing.T) {
		before := c.names("shop", "app=web") + c.cidrs()
		c.stop()
		machines["n1"].cut.Store(true) // silent while nobody looks
		c.expiredToken()
		c.startControllers()
		c.until("the silent node is noticed all the same", func() string {
			if got := nodeReady(c.node("n1")); got != corev1.ConditionUnknown {
				return string(got)
			}
			return ""
		})
		machines["n1"].cut.Store(false)
		c.until("all nodes Ready", func() string {
			for n := range machines {
				if got := nodeReady(c.node(n)); got != corev1.ConditionTrue {
					return n + " " + string(got)
				}
			}
			return ""
		})
		if after := c.names("shop", "app=web") + c.cidrs(); after != before {
			t.Errorf("before %s, after %s", before, after)
		}
	})

	c.until("the join token that expired meanwhile is gone", func() string {
		_, err := core.Secrets("kube-system").Get(ctx, "bootstrap-token-abcdef", metav1.GetOptions{})
		if apierrors.IsNotFound(err) {
			return ""
		}
		return fmt.Sprint("it is there: ", err)
	})
	t.Run("a disruption budget counts", func(t *testing.T) { c.budget() })

	t.Run("a claim gets a folder on the machine of its pod", func(t *testing.T) { c.localVolume() })

	t.Run("scale and rollout", func(t *testing.T) {
		scaled, err := apps.Deployments("shop").GetScale(ctx, "web", metav1.GetOptions{})
		c.must(err)
		scaled.Spec.Replicas = 6
		_, err = apps.Deployments("shop").UpdateScale(ctx, "web", scaled, metav1.UpdateOptions{})
		c.must(err)
		c.until("six replicas", func() string {
			d, err := apps.Deployments("shop").Get(ctx, "web", metav1.GetOptions{})
			if err != nil || d.Status.ReadyReplicas != 6 {
				return fmt.Sprint(d.Status.ReadyReplicas, err)
			}
			return ""
		})
		c.must(retry.RetryOnConflict(retry.DefaultRetry, func() error {
			d, err := apps.Deployments("shop").Get(ctx, "web", metav1.GetOptions{})
			if err != nil {
				return err
			}
			d.Spec.Template.Spec.Containers[0].Image = "image:2"
			_, err = apps.Deployments("shop").Update(ctx, d, metav1.UpdateOptions{})
			return err
		}))
		c.until("rolled out, two on each machine", func() string {
			d, err := apps.Deployments("shop").Get(ctx, "web", metav1.GetOptions{})
			if err != nil || d.Status.ObservedGeneration != d.Generation || d.Status.UpdatedReplicas != 6 || d.Status.Replicas != 6 || d.Status.ReadyReplicas != 6 {
				return fmt.Sprintf("%+v %v", d.Status, err)
			}
			return ""
		})
	})

	t.Run("a pod nobody can run says why", func(t *testing.T) {
		p := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "huge"}, Spec: template(nil).Spec}
		p.Spec.Containers[0].Resources.Requests = corev1.ResourceList{"cpu": resource.MustParse("100")}
		_, err := core.Pods("shop").Create(ctx, p, metav1.CreateOptions{})
		c.must(err)
		const want = "0/3 nodes are available: 3 Insufficient cpu."
		c.until("in its condition", func() string {
			p, err := core.Pods("shop").Get(ctx, "huge", metav1.GetOptions{})
			for _, k := range p.Status.Conditions {
				if k.Type == corev1.PodScheduled && k.Message == want {
					return ""
				}
			}
			return fmt.Sprint(p.Status.Conditions, err)
		})
		c.until("in an event", func() string {
			events, err := core.Events("shop").List(ctx, metav1.ListOptions{})
			for _, e := range events.Items {
				if e.Reason == "FailedScheduling" && e.Message == want {
					return ""
				}
			}
			return fmt.Sprint(len(events.Items), " events ", err)
		})
	})

	t.Run("jobs", func(t *testing.T) { c.jobs() })

	t.Run("deleting an owner deletes what it owns", func(t *testing.T) {
		foreground := metav1.DeletePropagationForeground
		c.must(apps.Deployments("shop").Delete(ctx, "web", metav1.DeleteOptions{PropagationPolicy: &foreground}))
		c.until("no deployment, replica set or pod is left", func() string {
			_, err := apps.Deployments("shop").Get(ctx, "web", metav1.GetOptions{})
			sets, _ := apps.ReplicaSets("shop").List(ctx, metav1.ListOptions{LabelSelector: "app=web"})
			if left := c.names("shop", "app=web"); left != "" || !apierrors.IsNotFound(err) || len(sets.Items) > 0 {
				return fmt.Sprint(left, err, len(sets.Items))
			}
			return ""
		})
	})

	t.Run("a node that is deleted takes its pods along", func(t *testing.T) {
		machines["n3"].cut.Store(true)
		c.must(core.Nodes().Delete(ctx, "n3", metav1.DeleteOptions{}))
		c.until("nothing is bound to it", func() string {
			pods, err := core.Pods("").List(ctx, metav1.ListOptions{FieldSelector: "spec.nodeName=n3"})
			if err != nil || len(pods.Items) > 0 {
				return fmt.Sprint(len(pods.Items), " pods ", err)
			}
			return ""
		})
	})

	t.Run("deleting a namespace empties it", func(t *testing.T) {
		c.must(core.Namespaces().Delete(ctx, "shop", metav1.DeleteOptions{}))
		c.until("the namespace is gone", func() string {
			ns, err := core.Namespaces().Get(ctx, "shop", metav1.GetOptions{})
			if apierrors.IsNotFound(err) {
				return ""
			}
			return fmt.Sprint(ns.Status.Conditions, err)
		})
	})

	for _, check := range c.board.Checks() {
		if !check.Healthy && !strings.HasPrefix(check.Name, "node/") {
			t.Errorf("the board says at the end: %s: %s", check.Name, check.Reason)
		}
	}
}

// cidrs of all nodes, in order of name.
func (c *cluster) cidrs() string {
	nodes, err := c.client.CoreV1().Nodes().List(context.Background(), metav1.ListOptions{})
	if err != nil {
		return err.Error()
	}
	out := ""
	for _, n := range nodes.Items {
		out += fmt.Sprint(" ", n.Name, n.Spec.PodCIDRs)
	}
	return out
}

func errText(err error) string {
	if err != nil {
		return err.Error()
	}
	return ""
}

// either returns the one of the wants that is true, or the first.
func (c *cluster) either(namespace, selector string, wants ...string) string {
	deadline := time.Now().Add(patience)
	for time.Now().Before(deadline) {
		if got := c.where(namespace, selector); slices.Contains(wants, got) {
			return got
		}
		time.Sleep(20 * time.Millisecond)
	}
	return wants[0]
}

// checks is the reason of an unhealthy check, or "".
func (c *cluster) checks(name string) string {
	for _, k := range c.board.Checks() {
		if k.Name == name && !k.Healthy {
			return k.Reason
		}
	}
	return ""
}

func (c *cluster) names(namespace, selector string) string {
	pods, err := c.client.CoreV1().Pods(namespace).List(context.Background(), metav1.ListOptions{LabelSelector: selector})
	if err != nil {
		return err.Error()
	}
	var names []string
	for _, p := range pods.Items {
		if p.DeletionTimestamp == nil {
			names = append(names, p.Name)
		}
	}
	slices.Sort(names)
	return strings.Join(names, " ")
}

// testLog writes to the log of the test: everything when MESHD_TEST_DEBUG is
// set, otherwise warnings.
func testLog(t *testing.T) *slog.Logger {
	level := slog.LevelWarn
	if os.Getenv("MESHD_TEST_DEBUG") != "" {
		level = slog.LevelDebug
	}
	return slog.New(slog.NewTextHandler(t.Output(), &slog.HandlerOptions{Level: level}))
}
