package apiserver_test

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/client-go/tools/clientcmd"
	clientcmdapi "k8s.io/client-go/tools/clientcmd/api"

	"meshd.dev/pkg/apiserver"
	"meshd.dev/pkg/apiserver/testcerts"
)

const eventuallyTimeout = 30 * time.Second

func tick() <-chan time.Time { return time.After(20 * time.Millisecond) }

// TestRestart: what was acknowledged is there after the next start, and a
// start leaves no goroutine behind when it ends.
func TestRestart(t *testing.T) {
	ca, cfg := files(t)
	c := start(t, ca, cfg)
	c.stop()
	before := runtime.NumGoroutine()
	for i := range 2 {
		c := start(t, ca, cfg)
		maps := c.admin.CoreV1().ConfigMaps("default")
		must(maps.Create(t.Context(), configMap(fmt.Sprintf("m%d", i)), metav1.CreateOptions{}))(t)
		l := must(maps.List(t.Context(), metav1.ListOptions{}))(t)
		if len(l.Items) != i+1 {
			t.Errorf("start %d: %d objects, want %d", i, len(l.Items), i+1)
		}
		c.stop()
	}
	eventually(t, func() error {
		if n := runtime.NumGoroutine(); n > before {
			return fmt.Errorf("%d goroutines, %d before:\n%s", n, before, stacks())
		}
		return nil
	})
}

// TestStopWithOpenWatches: whoever watches does not keep the server from
// ending. The bound is no measurement; waiting for the watch takes a minute.
func TestStopWithOpenWatches(t *testing.T) {
	ca, cfg := files(t)
	c := start(t, ca, cfg)
	w := must(c.admin.CoreV1().ConfigMaps("default").Watch(t.Context(), metav1.ListOptions{}))(t)
	defer w.Stop()
	begun := time.Now()
	c.stop()
	if took := time.Since(begun); took > 45*time.Second {
		t.Errorf("the end took %v", took)
	}
}

func stacks() string {
	b := make([]byte, 1<<20)
	return string(b[:runtime.Stack(b, true)])
}

// TestStopEarly: a server can be told to end before and while it starts.
func TestStopEarly(t *testing.T) {
	_, cfg := files(t)
	for _, after := range []time.Duration{0, 50 * time.Millisecond} {
		s, err := apiserver.New(t.Context(), cfg)
		if err != nil {
			t.Fatalf("before the end after %v: %v", after, err)
		}
		ctx, cancel := context.WithTimeout(t.Context(), after)
		if err := s.Run(ctx); err != nil {
			t.Errorf("run for %v: %v", after, err)
		}
		cancel()
	}
	again, err := apiserver.New(t.Context(), cfg)
	if err != nil {
		t.Fatalf("after early ends: %v", err)
	}
	again.Close()
}

func TestConfigErrors(t *testing.T) {
	for _, tc := range []struct {
		name string
		bad  func(*apiserver.Config)
		want string
	}{
		{"no port", func(c *apiserver.Config) { c.Listen = "127.0.0.1" }, `listen address "127.0.0.1": want host:port`},
		{"no address", func(c *apiserver.Config) { c.AdvertiseAddress = c.AdvertiseAddress.Prev().Unmap(); c.Listen = "x:0" }, "want a port from 1 to 65535"},
		{"two ranges of a family", func(c *apiserver.Config) { c.ServiceCIDRs[1] = c.ServiceCIDRs[0] }, "want at most one of each family"},
		{"no key", func(c *apiserver.Config) { c.ServingKey = "" }, "serving key: want a file"},
		{"a short encryption key", func(c *apiserver.Config) { c.EncryptionKey = c.CACert }, "want 32"},
		{"a serving certificate of another CA", func(c *apiserver.Config) { other, _ := testcerts.New(t.TempDir()); c.CACert = other.File("ca.crt") }, "check serving certificate"},
		{"a key that does not fit", func(c *apiserver.Config) { c.ServingKey = c.ServiceAccountKey }, "read serving certificate"},
		{"a CA that is none", func(c *apiserver.Config) { c.ClientCA = c.EncryptionKey }, "client CA"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			_, cfg := files(t)
			tc.bad(&cfg)
			s, err := apiserver.New(t.Context(), cfg)
			if err == nil {
				s.Close()
			}
			if err == nil || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("got %v\nwant %s", err, tc.want)
			}
		})
	}
}

var widgets = schema.GroupVersionResource{Group: "example.com", Version: "v1", Resource: "widgets"}

const widgetCRD = `{"apiVersion":"apiextensions.k8s.io/v1","kind":"CustomResourceDefinition","metadata":{"name":"widgets.example.com"},
"spec":{"group":"example.com","scope":"Namespaced","names":{"plural":"widgets","singular":"widget","kind":"Widget"},
"versions":[{"name":"v1","served":true,"storage":true,"schema":{"openAPIV3Schema":{"type":"object","properties":{"spec":{"type":"object","properties":{"size":{"type":"integer","minimum":1}}}}}}}]}}`

// TestCustomResources: a definition makes a resource that validates, is in
// both forms of discovery, and outlives a restart.
func TestCustomResources(t *testing.T) {
	t.Parallel()
	ca, cfg := files(t)
	c := start(t, ca, cfg)
	crd := &unstructured.Unstructured{}
	if err := crd.UnmarshalJSON([]byte(widgetCRD)); err != nil {
		t.Fatal(err)
	}
	definitions := schema.GroupVersionResource{Group: "apiextensions.k8s.io", Version: "v1", Resource: "customresourcedefinitions"}
	must(c.dynamic().Resource(definitions).Create(t.Context(), crd, metav1.CreateOptions{}))(t)
	widget := func(name string, size int64) *unstructured.Unstructured {
		return &unstructured.Unstructured{Object: map[string]any{"apiVersion": "example.com/v1", "kind": "Widget",
			"metadata": map[string]any{"name": name}, "spec": map[string]any{"size": size}}}
	}
	eventually(t, func() error {
		_, err := c.dynamic().Resource(widgets).Namespace("default").Create(t.Context(), widget("w", 1), metav1.CreateOptions{})
		return err
	})
	if _, err := c.dynamic().Resource(widgets).Namespace("default").Create(t.Context(), widget("bad", 0), metav1.CreateOptions{}); err == nil || !strings.Contains(err.Error(), "spec.size") {
		t.Errorf("a widget of size 0: %v", err)
	}
	eventually(t, func() error {
		groups := must(c.admin.Discovery().RESTClient().Get().AbsPath("/apis").SetHeader("Accept", "application/json").DoRaw(t.Context()))(t)
		if !strings.Contains(string(groups), `"example.com/v1"`) {
			return fmt.Errorf("not in the list of old clients: %s", groups)
		}
		return nil
	})
	c.stop()
	c = start(t, ca, cfg)
	w := must(c.dynamic().Resource(widgets).Namespace("default").Get(t.Context(), "w", metav1.GetOptions{}))(t)
	if size, _, _ := unstructured.NestedInt64(w.Object, "spec", "size"); size != 1 {
		t.Errorf("size %d after the restart", size)
	}
}

// TestKubectl: the tool people use, against the server.
func TestKubectl(t *testing.T) {
	t.Parallel()
	kubectl, err := exec.LookPath("kubectl")
	if err != nil {
		t.Skip("kubectl is not installed")
	}
	ca, cfg := files(t)
	c := start(t, ca, cfg)
	config := kubeconfig(t, c)
	manifest := filepath.Join(t.TempDir(), "web.yaml")
	if err := os.WriteFile(manifest, []byte(webManifest), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct{ args, want string }{
		{"apply -f " + manifest, "deployment.apps/web created"},
		{"apply -f " + manifest, "deployment.apps/web unchanged"},
		{"apply --server-side --force-conflicts -f " + manifest, "deployment.apps/web serverside-applied"},
		{"get deployments", "NAME   READY   UP-TO-DATE   AVAILABLE   AGE"},
		{"get services web -o wide", "NAME   TYPE        CLUSTER-IP"},
		{"get pods,nodes,rs,ds,sts,jobs,cj,ns,ev,endpointslices,secrets,cm,leases,sa,pv,pvc,sc,pdb,netpol,ing,hpa -A", "kube-node-lease"},
		{"explain deployment.spec.strategy", "KIND:       Deployment"},
		{"scale deployment web --replicas 3", "deployment.apps/web scaled"},
		{"diff -f " + manifest, ""},
		{"rollout history deployment web", "deployment.apps/web"},
		{"describe deployment web", "StrategyType:"},
		{"auth can-i create pods", "yes"},
		{"api-resources", "horizontalpodautoscalers"},
		{"delete -f " + manifest, `deployment.apps "web" deleted`},
	} {
		cmd := exec.CommandContext(t.Context(), kubectl, append([]string{"--kubeconfig", config}, strings.Fields(tc.args)...)...)
		cmd.Env = append(os.Environ(), "HOME="+t.TempDir())
		out, err := cmd.CombinedOutput()
		if strings.HasPrefix(tc.args, "diff") && err != nil && cmd.ProcessState.ExitCode() == 1 {
			err = nil // there is a difference
		}
		if err != nil || !strings.Contains(string(out), tc.want) {
			t.Errorf("kubectl %s: %v\n%s\nwant %s", tc.args, err, out, tc.want)
		}
	}
}

const webManifest = `apiVersion: apps/v1
kind: Deployment
metadata: {name: web}
spec:
  replicas: 2
  selector: {matchLabels: {app: web}}
  template:
    metadata: {labels: {app: web}}
    spec: {containers: [{name: c, image: echo}]}
---
apiVersion: v1
kind: Service
metadata: {name: web}
spec: {selector: {app: web}, ports: [{port: 80}]}
`

func kubeconfig(t *testing.T, c *cluster) string {
	t.Helper()
	rc := c.as("admin", "system:masters")
	k := clientcmdapi.NewConfig()
	k.Clusters["c"] = &clientcmdapi.Cluster{Server: rc.Host, CertificateAuthorityData: rc.CAData}
	k.AuthInfos["u"] = &clientcmdapi.AuthInfo{ClientCertificateData: rc.CertData, ClientKeyData: rc.KeyData}
	k.Contexts["x"] = &clientcmdapi.Context{Cluster: "c", AuthInfo: "u"}
	k.CurrentContext = "x"
	path := filepath.Join(t.TempDir(), "kubeconfig")
	if err := clientcmd.WriteToFile(*k, path); err != nil {
		t.Fatal(err)
	}
	return path
}
