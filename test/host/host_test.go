// Package host tells how meshd lives with what else looks after the network of
// a machine: systemd-networkd, NetworkManager, firewalld and iptables as Debian
// has them, in machines of a lab, and the settings of the kernel; and how it
// lives under a systemd that is the first process of its machine.
//
// It needs root, containerd and runc, bin/ of make and bin/managers, which
// make unpacks from Debian's packages. The address plan is the lab's
// (test/netlab), m2 is the machine that is looked at, m1 the server.
package host

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"meshd.dev/test/netlab"
	"meshd.dev/test/story"
)

func TestMain(m *testing.M) {
	netlab.Init()
	os.Exit(m.Run())
}

// world is a cluster of two machines, m1 and m2, with a pod of everywhere on
// each.
type world struct {
	*story.World
	daemons map[string]int // what runs on m2 besides, by name
	before  string         // the rules of others on m2 before meshd
	// settings of m2's kernel before meshd, by path.
	settings map[string]string
}

// m2 is the machine that is looked at.
func (w *world) m2() *netlab.Machine { return w.Machine("m2") }

// A step is one sentence of a story.
type step struct {
	name string
	do   func(ctx context.Context, w *world) (note string, err error)
}

// newWorld is taken away after the test, without a trace. KEEP in the
// environment names the lab and leaves it to `LAB=NAME bin/demo exec MACHINE
// COMMAND` and `LAB=NAME bin/demo down`.
func newWorld(t *testing.T) *world {
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
	for _, file := range []string{"meshd", "meshctl", "mesh", "meshd-wireguard", "managers/done"} {
		if _, err := os.Stat(filepath.Join(root, "bin", file)); err != nil {
			t.Skipf("needs bin/%s: make build bin/managers/done", file)
		}
	}
	keep := os.Getenv("KEEP")
	w, err := story.New(story.Config{Name: keep, Keep: keep != "", Bin: filepath.Join(root, "bin"), Work: t.TempDir()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			w.Report(t.Output())
		}
		if keep != "" {
			return
		}
		if err := w.End(context.Background()); err != nil {
			t.Error(err)
		}
		if w.Lab == nil {
			return
		}
		if traces := w.Lab.Traces(); len(traces) > 0 {
			t.Errorf("left behind:\n%s", strings.Join(traces, "\n"))
		}
	})
	return &world{World: w, daemons: map[string]int{}}
}

// tell runs steps in order and stops at the first that fails.
func tell(t *testing.T, w *world, steps []step) {
	t.Helper()
	for _, s := range steps {
		if !t.Run(s.name, func(t *testing.T) {
			does := story.Step{Name: s.name, Do: func(ctx context.Context, _ *story.World) (string, error) { return s.do(ctx, w) }}
			note, took, err := does.Run(t.Context(), w.World)
			if err != nil {
				t.Fatal(err)
			}
			t.Logf("%.2fs  %s", took.Seconds(), note)
		}) {
			t.Fatalf("the story ends at %q", s.name)
		}
	}
}

// boot makes the machines, with Debian's managers beside meshd.
func boot(ctx context.Context, w *world) (string, error) {
	if err := w.BuildImages(ctx); err != nil {
		return "", err
	}
	if err := w.Boot(ctx, "m1", "m2"); err != nil {
		return "", err
	}
	if err := install(ctx, w.m2()); err != nil {
		return "", err
	}
	if err := w.startBus(ctx); err != nil {
		return "", err
	}
	return "", w.startUdev(ctx)
}

// start makes the cluster and its pods.
func start(ctx context.Context, w *world) (string, error) {
	if err := w.StartServer(ctx); err != nil {
		return "", err
	}
	token, err := w.Token(ctx)
	if err != nil {
		return "", err
	}
	if err := w.Join(ctx, "m2", token); err != nil {
		return "", err
	}
	names := []string{"m1", "m2"}
	if _, err := w.NodesReady(ctx, names); err != nil {
		return "", err
	}
	if err := w.Machine("m1").WriteFile("/root/everywhere.yaml", []byte(everywhere), 0o644); err != nil {
		return "", err
	}
	if _, err := w.Kubectl(ctx, "apply", "-f", "/root/everywhere.yaml"); err != nil {
		return "", err
	}
	if _, err := w.ReadyOn(ctx, "everywhere", 2); err != nil {
		return "", err
	}
	return w.StatusHealthy(ctx, names)
}

const everywhere = `apiVersion: v1
kind: Namespace
metadata: {name: demo}
---
apiVersion: apps/v1
kind: DaemonSet
metadata: {name: everywhere, namespace: demo}
spec:
  selector: {matchLabels: {app: everywhere}}
  template:
    metadata: {labels: {app: everywhere}}
    spec:
      terminationGracePeriodSeconds: 1
      containers:
      - name: echo
        image: meshd.local/echo:1
        imagePullPolicy: IfNotPresent
        env:
        - {name: POD_NAME, valueFrom: {fieldRef: {fieldPath: metadata.name}}}
        - {name: NODE_NAME, valueFrom: {fieldRef: {fieldPath: spec.nodeName}}}
        readinessProbe: {httpGet: {path: /readyz, port: 8080}, periodSeconds: 1}
`
