package main

import (
	"context"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/serializer/json"
	"k8s.io/client-go/discovery"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/kubernetes/scheme"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/restmapper"
	"sigs.k8s.io/kustomize/api/krusty"
	"sigs.k8s.io/kustomize/kyaml/filesys"
	"sigs.k8s.io/yaml"

	"meshd.dev/pkg/mesh"
)

// distributions have an overlay each.
var distributions = []string{"aks", "docker-desktop", "eks", "gke", "k3s", "kind", "kubeadm", "microk8s", "minikube", "rancher-desktop"}

// overlays are all that is applied: each has one that takes it away again.
func overlays() (all []string) {
	for _, d := range distributions {
		all = append(all, d, d+"/cleanup")
	}
	return all
}

// rendered is an overlay as kubectl apply -k sends it.
func rendered(t *testing.T, overlay string) (objects []runtime.Object, raw []map[string]any) {
	t.Helper()
	all, err := krusty.MakeKustomizer(krusty.MakeDefaultOptions()).Run(filesys.MakeFsOnDisk(), filepath.Join("..", "manifests", overlay))
	if err != nil {
		t.Fatalf("%s: %v", overlay, err)
	}
	strict := json.NewSerializerWithOptions(json.DefaultMetaFactory, scheme.Scheme, scheme.Scheme, json.SerializerOptions{Yaml: true, Strict: true})
	for _, r := range all.Resources() {
		text, err := r.AsYAML()
		if err != nil {
			t.Fatal(err)
		}
		obj, _, err := strict.Decode(text, nil, nil)
		if err != nil {
			t.Errorf("%s: %s %s: %v", overlay, r.GetKind(), r.GetName(), err)
			continue
		}
		var m map[string]any
		if err := yaml.Unmarshal(text, &m); err != nil {
			t.Fatal(err)
		}
		objects, raw = append(objects, obj), append(raw, m)
	}
	return objects, raw
}

// podsOf is the pod template of a workload.
func podsOf(obj runtime.Object) (string, *corev1.PodSpec) {
	switch o := obj.(type) {
	case *appsv1.DaemonSet:
		return o.Name, &o.Spec.Template.Spec
	case *appsv1.Deployment:
		return o.Name, &o.Spec.Template.Spec
	}
	return "", nil
}

func TestEveryDistributionHasAnOverlay(t *testing.T) {
	found, err := filepath.Glob(filepath.Join("..", "manifests", "*", "kustomization.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, f := range found {
		if name := filepath.Base(filepath.Dir(f)); name != "base" && name != "cleanup" {
			names = append(names, name)
		}
	}
	if !slices.Equal(names, distributions) {
		t.Errorf("overlays %v, want %v", names, distributions)
	}
}

func TestOverlays(t *testing.T) {
	page, err := os.ReadFile(filepath.Join("..", "manifests", "README.md"))
	if err != nil {
		t.Fatal(err)
	}
	for _, overlay := range overlays() {
		t.Run(overlay, func(t *testing.T) {
			objects, _ := rendered(t, overlay)
			for _, obj := range objects {
				if name, pods := podsOf(obj); pods != nil {
					checkPods(t, name, pods)
				}
				if d, ok := obj.(*appsv1.DaemonSet); ok && (d.Name == "meshd" || d.Name == "meshd-cleanup") {
					checkTable(t, string(page), strings.TrimSuffix(overlay, "/cleanup"), d.Spec.Template.Spec.Volumes)
				}
				if c, ok := obj.(*corev1.ConfigMap); ok {
					checkSettings(t, c.Data["config.yaml"])
				}
			}
		})
	}
}

// Uninstalling takes what meshd wrote on its Node as well.
func TestPageNamesWhatStaysOnNodes(t *testing.T) {
	page, err := os.ReadFile(filepath.Join("..", "manifests", "README.md"))
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{mesh.AnnotationPublicKey, mesh.AnnotationEndpoints, mesh.AnnotationNextKey, mesh.AnnotationRotateKey, mesh.AnnotationKeyExchange} {
		if !strings.Contains(string(page), " "+name+"-") {
			t.Errorf("README.md does not remove %s", name)
		}
	}
}

// The kustomization on the page does what it says.
func TestKustomizationOnThePage(t *testing.T) {
	manifests := os.DirFS(filepath.Join("..", "manifests"))
	page, err := fs.ReadFile(manifests, "README.md")
	if err != nil {
		t.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(page), "```yaml\n")
	text, _, _ := strings.Cut(rest, "```\n")
	dir := t.TempDir()
	if err := os.CopyFS(filepath.Join(dir, "manifests"), manifests); err != nil {
		t.Fatal(err)
	}
	mine := filepath.Join(dir, "mine")
	if err := os.Mkdir(mine, 0o755); err != nil {
		t.Fatal(err)
	}
	for name, content := range map[string]string{"kustomization.yaml": text, "config.yaml": "services: on\n"} {
		if err := os.WriteFile(filepath.Join(mine, name), []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	all, err := krusty.MakeKustomizer(krusty.MakeDefaultOptions()).Run(filesys.MakeFsOnDisk(), mine)
	if err != nil {
		t.Fatal(err)
	}
	out, err := all.AsYaml()
	if err != nil {
		t.Fatal(err)
	}
	for want, times := range map[string]int{"image: registry.example/meshd:1.0": 2, "image: meshd.dev/meshd:dev": 0, "services: on": 1,
		"path: /etc/systemd/network\n": 1, "path: /var/lib/rancher/k3s/agent/etc/cni/net.d": 1} {
		if n := strings.Count(string(out), want); n != times {
			t.Errorf("%q is there %d times, want %d", want, n, times)
		}
	}
}

// checkPods: what each pod of ours must and must not have, and that the
// program knows the arguments it is given.
func checkPods(t *testing.T, name string, pods *corev1.PodSpec) {
	t.Helper()
	if !pods.HostNetwork || !slices.ContainsFunc(pods.Tolerations, func(o corev1.Toleration) bool { return o.Operator == corev1.TolerationOpExists && o.Key == "" }) {
		t.Errorf("%s: needs the machine's network and no other, on every machine", name)
	}
	for _, c := range append(slices.Clone(pods.InitContainers), pods.Containers...) {
		s := c.SecurityContext
		if s == nil || s.Privileged != nil && *s.Privileged || s.Capabilities == nil || !slices.Equal(s.Capabilities.Drop, []corev1.Capability{"ALL"}) {
			t.Errorf("%s/%s: security context %+v", name, c.Name, s)
		}
		if c.Image != "meshd.dev/meshd:dev" || c.ImagePullPolicy != corev1.PullIfNotPresent {
			t.Errorf("%s/%s: image %s %s", name, c.Name, c.Image, c.ImagePullPolicy)
		}
		if c.Lifecycle != nil {
			t.Errorf("%s/%s: nothing is to be undone when a pod ends", name, c.Name)
		}
		cmd, args, err := newCommand().Find(c.Args)
		if err == nil {
			err = cmd.ParseFlags(args)
		}
		if err == nil {
			err = cmd.ValidateArgs(cmd.Flags().Args())
		}
		if err != nil {
			t.Errorf("%s/%s: meshd %s: %v", name, c.Name, strings.Join(c.Args, " "), err)
		}
	}
}

// checkTable: the page names the paths the overlay has.
func checkTable(t *testing.T, page, overlay string, volumes []corev1.Volume) {
	t.Helper()
	for line := range strings.Lines(page) {
		if !strings.HasPrefix(line, "| ["+overlay+"]") && !strings.HasPrefix(line, "| `"+overlay+"`") {
			continue
		}
		for _, v := range volumes {
			if (v.Name == "cni-conf" || v.Name == "cni-bin") && !strings.Contains(line, "`"+v.HostPath.Path+"`") {
				t.Errorf("README.md: the line of %s does not name %s", overlay, v.HostPath.Path)
			}
		}
		return
	}
	t.Errorf("README.md: no line for %s", overlay)
}

func checkSettings(t *testing.T, text string) {
	t.Helper()
	cmd := agentCommand()
	if err := applyConfig([]byte(text), cmd.Flags()); err != nil {
		t.Errorf("config.yaml: %v", err)
	}
}

// Our own API server takes every object that it serves the kind of, with
// validation of unknown fields.
func TestOverlaysAgainstTheAPI(t *testing.T) {
	config, _ := testAPI(t)
	client, err := dynamic.NewForConfig(config)
	if err != nil {
		t.Fatal(err)
	}
	found, err := discovery.NewDiscoveryClientForConfig(config)
	if err != nil {
		t.Fatal(err)
	}
	groups, err := restmapper.GetAPIGroupResources(found)
	if err != nil {
		t.Fatal(err)
	}
	mapper := restmapper.NewDiscoveryRESTMapper(groups)
	typed, err := kubernetes.NewForConfig(config)
	if err != nil {
		t.Fatal(err)
	}
	for _, ns := range []string{"meshd", "meshd-cleanup"} {
		if _, err := typed.CoreV1().Namespaces().Create(t.Context(), &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: ns}}, metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	unserved := map[string]bool{}
	for _, overlay := range overlays() {
		_, raw := rendered(t, overlay)
		for _, m := range raw {
			obj := &unstructured.Unstructured{Object: m}
			if obj.GetKind() == "Namespace" {
				continue
			}
			gvk := obj.GroupVersionKind()
			mapping, err := mapper.RESTMapping(gvk.GroupKind(), gvk.Version)
			if meta.IsNoMatchError(err) {
				unserved[gvk.Kind] = true
				continue
			}
			if err != nil {
				t.Fatal(err)
			}
			var to dynamic.ResourceInterface = client.Resource(mapping.Resource)
			if mapping.Scope.Name() == meta.RESTScopeNameNamespace {
				to = client.Resource(mapping.Resource).Namespace(obj.GetNamespace())
			}
			if _, err := to.Create(t.Context(), obj, metav1.CreateOptions{DryRun: []string{metav1.DryRunAll}, FieldValidation: metav1.FieldValidationStrict}); err != nil {
				t.Errorf("%s: %s %s: %v", overlay, obj.GetKind(), obj.GetName(), err)
			}
		}
	}
	want := map[string]bool{"ValidatingAdmissionPolicy": true, "ValidatingAdmissionPolicyBinding": true}
	for kind := range unserved {
		if !want[kind] {
			t.Errorf("our API does not serve %s", kind)
		}
	}
}

// testAPI is an API server of ours on loopback, without controllers, and two
// ways to it with full rights.
func testAPI(t *testing.T) (config *rest.Config, kubeconfig string) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	at := l.Addr().String()
	l.Close()
	quietLibraries(slog.New(slog.DiscardHandler))
	cfg := serverConfig{Listen: at, PodCIDRs: []string{"10.244.0.0/16"}, ServiceCIDRs: []string{"10.96.0.0/16"}, ClusterDomain: "cluster.local"}
	cfg.NodeName, cfg.NodeIPs, cfg.DataDir, cfg.RunDir, cfg.CNIConf = "m1", []string{"127.0.0.1"}, t.TempDir(), t.TempDir(), "10"+conflistSuffix
	cfg.ListenPort, cfg.AgentPort, cfg.Shortcut = 51820, 10250, "off"
	if err := cfg.complete(); err != nil {
		t.Fatal(err)
	}
	keys, err := prepareKeys(cfg)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	api, err := newAPI(ctx, cfg, keys, &lateHandler{}, slog.New(slog.NewTextHandler(io.Discard, nil)))
	if err != nil {
		cancel()
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- api.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	select {
	case <-api.Ready():
	case err := <-done:
		done <- err
		t.Fatal(err)
	case <-time.After(time.Minute):
		t.Fatal("the API does not come up")
	}
	return api.Loopback(), cfg.state("admin.kubeconfig")
}
