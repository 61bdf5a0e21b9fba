package kubernetes

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"meshd.dev/test/netlab"
)

func TestMain(m *testing.M) {
	netlab.Init()
	os.Exit(m.Run())
}

// newWorld is a cluster that is taken away after the test, without a trace.
// KEEP in the environment names the lab and leaves it to `LAB=NAME bin/demo exec
// MACHINE COMMAND` and `LAB=NAME bin/demo down`.
func newWorld(t *testing.T, c Config) *World {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	for _, tool := range []string{"containerd", "runc", "nft", "wg", "go"} {
		if _, err := exec.LookPath(tool); err != nil {
			t.Skipf("needs %s", tool)
		}
	}
	root := filepath.Join("..", "..")
	for _, binary := range []string{imageTar, "meshctl", "tools/etcd", "tools/kubectl", "tools/kube-apiserver",
		"tools/kube-controller-manager", "tools/kube-scheduler", "tools/kubelet", "tools/kube-proxy"} {
		if _, err := os.Stat(filepath.Join(root, "bin", binary)); err != nil {
			t.Skipf("needs bin/%s: make test-kubernetes", binary)
		}
	}
	c.Bin, c.Work, c.Manifests = filepath.Join(root, "bin"), t.TempDir(), filepath.Join(root, "manifests")
	c.Logs = filepath.Join(root, "bin", "logs", t.Name())
	c.Name = os.Getenv("KEEP")
	c.Keep = c.Name != ""
	w, err := New(t.Context(), c)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			w.Report(t.Output())
		}
		if c.Keep {
			return
		}
		if err := w.End(context.Background()); err != nil {
			t.Error(err)
		}
		if traces := w.Lab.Traces(); len(traces) > 0 {
			t.Errorf("left behind:\n%s", strings.Join(traces, "\n"))
		}
	})
	return w
}

// tell runs steps in order and stops at the first that fails.
func tell(t *testing.T, w *World, steps []Step) {
	t.Helper()
	for _, s := range steps {
		if !t.Run(s.Name, func(t *testing.T) {
			note, err := s.Run(t.Context(), w)
			if err != nil {
				t.Fatal(err)
			}
			t.Log(note)
		}) {
			t.Fatalf("the story ends at %q", s.Name)
		}
	}
}

// up is how every cluster begins.
func up(more ...Step) []Step {
	return append([]Step{
		{"three machines with containerd", bootMachines},
		{"etcd and the control plane on m1", startControlPlane},
		{"kubelets; without a CNI no node is Ready", startNodes},
	}, more...)
}

// network is what has to work on every cluster.
func network() []Step {
	return []Step{
		{"kubectl apply -k manifests/kubeadm: nodes Ready, meshctl status healthy", install},
		{"an application is ready", applicationReady},
		{"pods reach each other", podsReachEachOther},
		{"m1 reaches m3 by service name, underlay shows no payload", throughTunnel},
		{"names: our resolver answers at kube-dns' address", names},
		{"services and node ports", services},
		{"nodes reach pods, pods reach nodes", nodesAndPods},
		{"pods leave the cluster with their node's address, or as excluded", masquerade},
	}
}

func TestBesideKubeProxy(t *testing.T) {
	tell(t, newWorld(t, Config{Services: KubeProxy, Settings: []string{noMasquerade}}), slices.Concat(up(), network(), []Step{
		{"host ports", hostPort},
		{"bandwidth annotations", bandwidth},
		{"kill -9 a pod's program", crash},
		{"meshd may write to its own Node only", ownNodeOnly},
		{"a node that comes later", newNode},
		{"upgrade of the DaemonSet during a transfer", upgrade},
		{"a foreign CNI configuration before ours is named", foreignNetwork},
		{"without rights meshd says so and the network stays", noRights},
		{"uninstall leaves nothing on any node", uninstall},
	}))
}

func TestInPlaceOfKubeProxy(t *testing.T) {
	tell(t, newWorld(t, Config{Services: Ours, Settings: []string{noMasquerade}}), slices.Concat(up(), network(), []Step{
		{"host ports", hostPort},
		{"upgrade of the DaemonSet during a transfer", upgrade},
		{"uninstall leaves nothing on any node", uninstall},
	}))
}

func TestBadRanges(t *testing.T) {
	tell(t, newWorld(t, Config{Services: KubeProxy, NoPodCIDRs: true}), up(
		Step{"a node without pod CIDRs: status, condition, events and log say so", noPodCIDR},
		Step{"pod CIDRs around the node's address and inside the services: as well, and are in nobody else's way", badRanges},
	))
}

func TestWhatANodeLacks(t *testing.T) {
	tell(t, newWorld(t, Config{Services: KubeProxy, Nodes: []string{"m1", "m2"}}), append([]Step{
		{"two machines with containerd", bootMachines},
		{"one of them without TUN", noTUN}}, append(up()[1:],
		Step{"without rights: status, event and log say so", withoutRights},
		Step{"a kernel without nf_tables: status, condition, events and log say so", withoutNft},
		Step{"a kernel without TUN: as well, on that node", withoutTUN},
		Step{"with all of it the nodes come up", withAll},
		Step{"a pod of another network is named, and its event says what to do", foreignPod},
		Step{"policies are not enforced, and who has some is told", policies},
		Step{"booted without nf_tables: the pod's event says what meshd lacks", rebootWithoutNft},
	)...))
}

func TestKeyChange(t *testing.T) {
	tell(t, newWorld(t, Config{Services: Ours, Settings: []string{noMasquerade}}), up(
		Step{"kubectl apply -k manifests/kubeadm: nodes Ready, meshctl status healthy", install},
		Step{"an application is ready", applicationReady},
		Step{"a key changes, and the pod of meshd goes in the middle: nothing is cut", keyChange},
	))
}
