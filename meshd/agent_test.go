package main

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes"

	"meshd.dev/pkg/mesh"
	"meshd.dev/pkg/status"
)

// A cluster of somebody else's is our own API server without any controller:
// it is told by hand what a cluster says. The agent runs in this process, in
// the test's network namespace.

// guestTest is one node of that cluster.
type guestTest struct {
	t          *testing.T
	api        kubernetes.Interface
	kubeconfig string
	cfg        agentConfig
}

func newGuestTest(t *testing.T, api kubernetes.Interface, kubeconfig, name string, podCIDRs ...string) *guestTest {
	t.Helper()
	dir := t.TempDir()
	g := &guestTest{t: t, api: api, kubeconfig: kubeconfig}
	g.cfg = agentConfig{ClusterDomain: "cluster.local", Services: "on", ClusterDNS: []string{"auto"}, SpawnUserspace: true}
	g.cfg.Kubeconfig, g.cfg.NodeName, g.cfg.ListenPort, g.cfg.LogLevel, g.cfg.Shortcut = kubeconfig, name, 51820, "error", "off"
	g.cfg.DataDir, g.cfg.RunDir = filepath.Join(dir, "state"), filepath.Join(dir, "run")
	g.cfg.CNIConfDir, g.cfg.CNIBinDir, g.cfg.CNIPlugin = filepath.Join(dir, "net.d"), filepath.Join(dir, "bin"), filepath.Join(dir, "mesh")
	shell(t, "mkdir "+g.cfg.CNIConfDir+" "+g.cfg.CNIBinDir+"; echo meshd.dev/pkg/cni > "+g.cfg.CNIPlugin)
	node := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name}, Spec: corev1.NodeSpec{PodCIDRs: podCIDRs}}
	if len(podCIDRs) > 0 {
		node.Spec.PodCIDR = podCIDRs[0]
	}
	node, err := api.CoreV1().Nodes().Create(t.Context(), node, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = api.CoreV1().Nodes().Delete(context.Background(), name, metav1.DeleteOptions{}) })
	node.Status.Addresses = []corev1.NodeAddress{{Type: corev1.NodeInternalIP, Address: "192.0.2.1"}}
	if _, err := api.CoreV1().Nodes().UpdateStatus(t.Context(), node, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	return g
}

// run starts the agent; when the test ends it is stopped and cleaned up after,
// until nothing of it is here.
func (g *guestTest) run() {
	g.t.Helper()
	if err := g.cfg.complete(); err != nil {
		g.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- runAgent(ctx, g.cfg) }()
	g.t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			g.t.Error(err)
		}
		c := &cleanup{dataDir: g.cfg.DataDir, runDir: g.cfg.RunDir, cniConfDir: g.cfg.CNIConfDir, cniBinDirs: []string{g.cfg.CNIBinDir}, all: true, force: true}
		// Once, mostly: a process that was just started for the tunnel makes
		// its device a moment later.
		for range 50 {
			if err := c.run(&strings.Builder{}); err != nil {
				g.t.Error(err)
			}
			if len(g.left()) == 0 {
				return
			}
			time.Sleep(100 * time.Millisecond)
		}
		g.t.Errorf("after the clean-up there is still %v", g.left())
	})
}

// left is what of meshd is on this machine.
func (g *guestTest) left() (list []string) {
	for what, command := range map[string]string{
		"device": "ip -br link show mesh0", "routes": "ip route show table all proto 77 | grep .", "table": "nft list table inet meshd",
		"conflist": "ls " + g.cfg.CNIConfDir + "/*-meshd.conflist", "plugin": "ls " + g.cfg.CNIBinDir + "/mesh",
	} {
		if try(command) == nil {
			list = append(list, what)
		}
	}
	slices.Sort(list)
	return list
}

func (g *guestTest) until(ok func() error) {
	g.t.Helper()
	until(g.t, ok)
}

func (g *guestTest) hindrances() (string, error) {
	var doc status.Document
	if err := status.Fetch(g.t.Context(), filepath.Join(g.cfg.RunDir, "meshd.sock"), "/status", &doc); err != nil {
		return "", err
	}
	return strings.Join(hindrances(doc.Checks), "; "), nil
}

// stopsFor waits until the agent says why it does not go on.
func (g *guestTest) stopsFor(want string) {
	g.t.Helper()
	g.until(func() error {
		why, err := g.hindrances()
		if err != nil || strings.Contains(why, want) {
			return err
		}
		return errors.New("the agent says " + why + "; want " + want)
	})
}

// condition waits until the Node says that its network is up, or not and why.
func (g *guestTest) condition(want corev1.ConditionStatus, message string) {
	g.t.Helper()
	g.until(func() error {
		node, err := g.api.CoreV1().Nodes().Get(g.t.Context(), g.cfg.NodeName, metav1.GetOptions{})
		if err != nil {
			return err
		}
		for _, c := range node.Status.Conditions {
			if c.Type == corev1.NodeNetworkUnavailable && c.Status == want && strings.Contains(c.Message, message) {
				return nil
			}
		}
		return errors.New("the Node has no such condition")
	})
}

func TestAgent(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	config, admin := testAPI(t)
	api, err := kubernetes.NewForConfig(config)
	if err != nil {
		t.Fatal(err)
	}
	// With the rights of the manifests and no more.
	grant(t, api, "kubeadm")
	kubeconfig := as(t, admin, "meshd")
	all := []string{"conflist", "device", "plugin", "routes", "table"}

	t.Run("all is as it should be", func(t *testing.T) {
		g := newGuestTest(t, api, kubeconfig, "good", "10.244.1.0/24")
		g.run()
		g.condition(corev1.ConditionFalse, "")
		if left := g.left(); !slices.Equal(left, all) {
			t.Errorf("made %v, want %v", left, all)
		}
		g.until(func() error {
			node, err := api.CoreV1().Nodes().Get(t.Context(), "good", metav1.GetOptions{})
			if err == nil && (node.Annotations[mesh.AnnotationPublicKey] == "" || !strings.Contains(node.Annotations[mesh.AnnotationEndpoints], "192.0.2.1:51820")) {
				err = errors.New("key and endpoints are not published")
			}
			return err
		})
		if err := os.Remove(filepath.Join(g.cfg.CNIBinDir, "mesh")); err != nil {
			t.Fatal(err)
		}
		g.until(func() error { return try("ls " + g.cfg.CNIBinDir + "/mesh") })
		if why, err := g.hindrances(); why != "" || err != nil {
			t.Errorf("hindrances %q, %v", why, err)
		}
	})

	t.Run("no pod CIDR, and then one", func(t *testing.T) {
		g := newGuestTest(t, api, kubeconfig, "poor")
		g.run()
		g.stopsFor("kube/node: Node poor has no spec.podCIDRs")
		g.condition(corev1.ConditionTrue, "no spec.podCIDRs")
		if left := g.left(); len(left) > 0 {
			t.Errorf("half configured: %v", left)
		}
		patch := []byte(`{"spec":{"podCIDR":"10.244.2.0/24","podCIDRs":["10.244.2.0/24"]}}`)
		if _, err := api.CoreV1().Nodes().Patch(t.Context(), "poor", types.MergePatchType, patch, metav1.PatchOptions{}); err != nil {
			t.Fatal(err)
		}
		g.condition(corev1.ConditionFalse, "")
	})

	for _, c := range []struct {
		name, node, podCIDR, serviceCIDR, want string
	}{
		{"the machine inside the pod range", "inside", "192.0.2.0/24", "", "datapath/state: pod CIDR 192.0.2.0/24 contains 192.0.2.1"},
		{"pods inside the service range", "same", "10.244.3.0/24", "10.244.0.0/16", "datapath/state: pod CIDR 10.244.3.0/24 and service CIDR 10.244.0.0/16 overlap"},
	} {
		t.Run(c.name, func(t *testing.T) {
			g := newGuestTest(t, api, kubeconfig, c.node, c.podCIDR)
			if c.serviceCIDR != "" {
				g.cfg.ServiceCIDRs = []string{c.serviceCIDR}
			}
			g.run()
			g.stopsFor(c.want)
			g.condition(corev1.ConditionTrue, c.want)
			if left := g.left(); len(left) > 0 {
				t.Errorf("half configured: %v", left)
			}
		})
	}

	t.Run("no rights", func(t *testing.T) {
		g := newGuestTest(t, api, as(t, admin, "nobody-in-particular"), "unentitled", "10.244.4.0/24")
		g.run()
		g.stopsFor("kube/rights: these credentials may not: get nodes, list nodes, watch nodes, patch nodes, patch nodes/status, list services")
		g.stopsFor("kube/sync: ")
		if left := g.left(); len(left) > 0 {
			t.Errorf("half configured: %v", left)
		}
	})

	t.Run("no such node", func(t *testing.T) {
		g := newGuestTest(t, api, kubeconfig, "there", "10.244.5.0/24")
		g.cfg.NodeName = "elsewhere"
		g.run()
		g.stopsFor(`kube/node: the cluster has no Node "elsewhere"`)
	})

	t.Run("another network comes first", func(t *testing.T) {
		g := newGuestTest(t, api, kubeconfig, "second", "10.244.6.0/24")
		shell(t, "touch "+g.cfg.CNIConfDir+"/05-other.conflist")
		g.run()
		g.stopsFor("05-other.conflist comes before 10-meshd.conflist")
		shell(t, "rm "+g.cfg.CNIConfDir+"/05-other.conflist")
		g.condition(corev1.ConditionFalse, "")
	})
}
