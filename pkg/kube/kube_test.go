package kube

import (
	"context"
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes/fake"

	"meshd.dev/pkg/mesh"
	"meshd.dev/pkg/status"
)

const testKey = "xTIBA5rboUvnH4htodjb6e697QjLERt1NAB4mZqp8Dg="

func testNode(name string, annotations map[string]string) *corev1.Node {
	return &corev1.Node{
		ObjectMeta: metav1.ObjectMeta{Name: name, Annotations: annotations},
		Spec:       corev1.NodeSpec{PodCIDRs: []string{"10.244.1.0/24"}},
		Status: corev1.NodeStatus{
			Addresses:  []corev1.NodeAddress{{Type: corev1.NodeInternalIP, Address: "192.0.2.1"}, {Type: corev1.NodeHostName, Address: name}},
			Conditions: []corev1.NodeCondition{{Type: corev1.NodeReady, Status: corev1.ConditionTrue}},
		},
	}
}

func testService(name, ip string) *corev1.Service {
	return &corev1.Service{
		ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: name},
		Spec:       corev1.ServiceSpec{ClusterIP: ip, Ports: []corev1.ServicePort{{Name: "http", Port: 80}}},
	}
}

func testSlice(service, addr string) *discoveryv1.EndpointSlice {
	port, name := int32(8080), "http"
	return &discoveryv1.EndpointSlice{
		ObjectMeta:  metav1.ObjectMeta{Namespace: "default", Name: service + "-1", Labels: map[string]string{discoveryv1.LabelServiceName: service}},
		AddressType: discoveryv1.AddressTypeIPv4,
		Endpoints:   []discoveryv1.Endpoint{{Addresses: []string{addr}}},
		Ports:       []discoveryv1.EndpointPort{{Name: &name, Port: &port}},
	}
}

// eventually waits for the window to show what ok wants.
func eventually(t *testing.T, w *Window, what string, ok func(*mesh.State) bool) *mesh.State {
	t.Helper()
	changed := make(chan struct{}, 1)
	w.Subscribe(func() {
		select {
		case changed <- struct{}{}:
		default:
		}
	})
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	for {
		if s := w.State(); s != nil && ok(s) {
			return s
		}
		select {
		case <-changed:
		case <-ctx.Done():
			t.Fatalf("never saw %s; have %+v", what, w.State())
		}
	}
}

func run(t *testing.T, w *Window) {
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- w.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run: %v", err)
		}
	})
}

// A node cannot have the others talk to themselves, or to what is on their link.
func TestAddressesOfANode(t *testing.T) {
	n := testNode("m1", nil)
	for _, a := range []string{"127.0.0.1", "::1", "::ffff:127.0.0.1", "169.254.169.254", "::ffff:169.254.169.254", "fe80::1", "0.0.0.0", "224.0.0.1", "m1", "2001:db8::1"} {
		n.Status.Addresses = append(n.Status.Addresses, corev1.NodeAddress{Type: corev1.NodeInternalIP, Address: a})
	}
	node, err := NodeOf(n)
	if got := fmt.Sprint(node.Addresses); got != "[192.0.2.1 2001:db8::1]" {
		t.Errorf("addresses %s, want 192.0.2.1 and 2001:db8::1", got)
	}
	if err == nil || strings.Count(err.Error(), "status address") != 9 {
		t.Errorf("refused: %v, want 9 of them", err)
	}
}

func TestWindowFollowsTheAPI(t *testing.T) {
	client := fake.NewClientset(
		testNode("m1", map[string]string{mesh.AnnotationPublicKey: testKey, mesh.AnnotationEndpoints: "192.0.2.1:51820"}),
		testService("web", "10.96.0.7"), testService("db", "None"), testSlice("web", "10.244.1.5"))
	w := New(Config{Client: client})
	run(t, w)
	s := eventually(t, w, "the first state", func(s *mesh.State) bool { return len(s.Services) == 2 })
	if n, ok := s.Node("m1"); !ok || !n.Ready || n.PublicKey.String() != testKey || n.Endpoints[0].String() != "192.0.2.1:51820" {
		t.Errorf("node m1: %+v", n)
	}
	web, db := s.Services[1], s.Services[0]
	if len(web.Endpoints) != 1 || !web.Endpoints[0].Ready || web.Endpoints[0].Ports[0].Port != 8080 || !db.Headless {
		t.Errorf("services %+v %+v", web, db)
	}

	slice := testSlice("web", "10.244.1.6")
	slice.Name = "web-2"
	if _, err := client.DiscoveryV1().EndpointSlices("default").Create(t.Context(), slice, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	next := eventually(t, w, "a second endpoint", func(s *mesh.State) bool { return len(s.Services[1].Endpoints) == 2 })
	if next.Services[0] != db {
		t.Error("the untouched service has a new pointer")
	}
	if len(web.Endpoints) != 1 {
		t.Error("a published service was changed in place")
	}
	if err := client.CoreV1().Services("default").Delete(t.Context(), "web", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	eventually(t, w, "the service gone", func(s *mesh.State) bool { return len(s.Services) == 1 })
}

// A State that was made step by step is the one a new Window reads at once,
// and one fault is told of until it is mended.
func TestStepByStep(t *testing.T) {
	client := fake.NewClientset()
	board := &status.Board{}
	w := New(Config{Client: client, Board: board})
	run(t, w)
	eventually(t, w, "the first state", func(*mesh.State) bool { return true })
	nodes, services, namespaces := client.CoreV1().Nodes(), client.CoreV1().Services("default"), client.CoreV1().Namespaces()
	none := metav1.CreateOptions{}
	faulty := testNode("m2", map[string]string{mesh.AnnotationPublicKey: "short"})
	for i, step := range []func() error{
		func() error { _, err := nodes.Create(t.Context(), testNode("m3", nil), none); return err },
		func() error { _, err := nodes.Create(t.Context(), testNode("m1", nil), none); return err },
		func() error { _, err := nodes.Create(t.Context(), faulty, none); return err },
		func() error {
			_, err := services.Create(t.Context(), testService("web", "10.96.0.7"), none)
			return err
		},
		func() error {
			_, err := nodes.Update(t.Context(), testNode("m3", map[string]string{mesh.AnnotationPublicKey: testKey}), metav1.UpdateOptions{})
			return err
		},
		func() error {
			_, err := client.DiscoveryV1().EndpointSlices("default").Create(t.Context(), testSlice("web", "10.244.1.5"), none)
			return err
		},
		func() error { return nodes.Delete(t.Context(), "m1", metav1.DeleteOptions{}) },
		func() error {
			_, err := namespaces.Create(t.Context(), &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "n"}}, none)
			return err
		},
		func() error { return services.Delete(t.Context(), "web", metav1.DeleteOptions{}) },
	} {
		before := w.State()
		if err := step(); err != nil {
			t.Fatal(err)
		}
		now := eventually(t, w, fmt.Sprintf("step %d", i), func(s *mesh.State) bool { return s != before })
		if now.Heard.IsZero() {
			t.Errorf("step %d: it is not said when it was heard of", i)
		}
		fresh := New(Config{Client: client})
		run(t, fresh)
		if all := eventually(t, fresh, "everything", func(*mesh.State) bool { return true }); !slices.EqualFunc(now.Services, all.Services, equalService) ||
			!slices.EqualFunc(now.Nodes, all.Nodes, mesh.Node.Equal) || !slices.Equal(now.Namespaces, all.Namespaces) {
			t.Errorf("step %d: have\n%+v\nread at once\n%+v", i, now, all)
		}
		if faults := fmt.Sprint(board.Checks()); strings.Contains(faults, "node m2") != (i >= 2) {
			t.Errorf("step %d: checks %s", i, faults)
		}
	}
}

func TestStateSurvivesOnDisk(t *testing.T) {
	file := filepath.Join(t.TempDir(), "state.json")
	client := fake.NewClientset(testNode("m1", nil), testService("web", "10.96.0.7"), testSlice("web", "10.244.1.5"))
	t.Run("written", func(t *testing.T) {
		w := New(Config{Client: client, CacheFile: file})
		run(t, w)
		eventually(t, w, "the service", func(s *mesh.State) bool { return len(s.Services) == 1 })
		for { // the writer comes by on its own time
			if _, err := os.Stat(file); err == nil {
				break
			}
			time.Sleep(10 * time.Millisecond)
		}
	})
	s := New(Config{Client: client, CacheFile: file}).State()
	if s == nil || s.Services[0].Endpoints[0].Addr != netip.MustParseAddr("10.244.1.5") {
		t.Errorf("state after restart: %+v", s)
	}
	if err := os.WriteFile(file, []byte("{broken"), 0o600); err != nil {
		t.Fatal(err)
	}
	if s := New(Config{Client: client, CacheFile: file}).State(); s != nil {
		t.Errorf("a broken file gave %+v", s)
	}
	if _, err := os.Stat(file + ".corrupt"); err != nil {
		t.Errorf("the broken file was not set aside: %v", err)
	}
}

func TestBadNodesAreNamedAndHalfUsed(t *testing.T) {
	for _, c := range []struct{ name, key, endpoints, want string }{
		{"key", "short", "192.0.2.1:1", "public key"},
		{"endpoint", testKey, "127.0.0.1:51820", "want address:port of a unicast address"},
		{"no port", testKey, "192.0.2.1", "want address:port"},
		{"too many", testKey, strings.Repeat("192.0.2.1:1,", 17), "more than 16"},
	} {
		t.Run(c.name, func(t *testing.T) {
			n, err := NodeOf(testNode("m1", map[string]string{mesh.AnnotationPublicKey: c.key, mesh.AnnotationEndpoints: c.endpoints}))
			if err == nil || !strings.Contains(err.Error(), c.want) || !strings.Contains(err.Error(), "node m1") {
				t.Errorf("error %v, want %q", err, c.want)
			}
			if len(n.PodCIDRs) != 1 {
				t.Error("the rest of the node was thrown away")
			}
		})
	}
}

func TestPublish(t *testing.T) {
	client := fake.NewClientset(testNode("m1", map[string]string{"other": "kept"}))
	key, _ := mesh.ParseKey(testKey)
	r := Record{PublicKey: key, Endpoints: []netip.AddrPort{netip.MustParseAddrPort("192.0.2.1:51820"), netip.MustParseAddrPort("[2001:db8::1]:51820")}}
	for range 2 {
		if err := Publish(t.Context(), client, "m1", r); err != nil {
			t.Fatal(err)
		}
	}
	obj, err := client.CoreV1().Nodes().Get(t.Context(), "m1", metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	n, err := NodeOf(obj)
	if err != nil || n.PublicKey != key || len(n.Endpoints) != 2 || obj.Annotations["other"] != "kept" {
		t.Errorf("node %+v, %v", n, err)
	}
	patches := 0
	for _, a := range client.Actions() {
		if a.GetVerb() == "patch" {
			patches++
		}
	}
	if patches != 1 {
		t.Errorf("%d patches for the same record, want 1", patches)
	}
}

func FuzzNodeOf(f *testing.F) {
	f.Add(testKey, "192.0.2.1:51820,[2001:db8::1]:51820", "10.244.1.0/24")
	f.Fuzz(func(t *testing.T, key, endpoints, cidr string) {
		n := testNode("m1", map[string]string{mesh.AnnotationPublicKey: key, mesh.AnnotationEndpoints: endpoints})
		n.Spec.PodCIDRs = []string{cidr}
		node, _ := NodeOf(n)
		if _, err := parseEndpoints(FormatEndpoints(node.Endpoints)); err != nil {
			t.Errorf("accepted endpoints do not read again: %v", err)
		}
		if _, err := json.Marshal(node); err != nil {
			t.Errorf("accepted node cannot be kept: %v", err)
		}
	})
}
