// Package scenario tells whole stories over the real binaries on machines of a
// lab. It needs root, containerd and runc, and bin/ built by make.
package scenario

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

// newWorld is a world that is taken away after the test, without a trace.
func newWorld(t *testing.T, kubectl ...string) *story.World {
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
	for _, binary := range []string{"meshd", "meshctl", "mesh", "meshd-wireguard"} {
		if _, err := os.Stat(filepath.Join(root, "bin", binary)); err != nil {
			t.Skipf("needs bin/%s: make", binary)
		}
	}
	w, err := story.New(story.Config{Bin: filepath.Join(root, "bin"), Work: t.TempDir(), Kubectl: kubectl,
		Manifest: filepath.Join(root, "manifests", "examples", "demo.yaml")})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			w.Report(t.Output())
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
	return w
}

// tell runs steps in order and stops at the first that fails.
func tell(t *testing.T, w *story.World, steps []story.Step) {
	t.Helper()
	for _, s := range steps {
		if !t.Run(s.Name, func(t *testing.T) {
			note, took, err := s.Run(t.Context(), w)
			if err != nil {
				t.Fatal(err)
			}
			t.Logf("%.2fs  %s", took.Seconds(), note)
		}) {
			t.Fatalf("the story ends at %q", s.Name)
		}
	}
}

func TestWholeLine(t *testing.T) {
	tell(t, newWorld(t), story.Steps())
}

func TestTokens(t *testing.T) { tell(t, newWorld(t), story.Tokens()) }

func TestAttached(t *testing.T) { tell(t, newWorld(t), story.Attached()) }

func TestPowerCut(t *testing.T) { tell(t, newWorld(t), story.PowerCut()) }

func TestKubectl(t *testing.T) { tell(t, newWorld(t), story.Kubectl()) }

// TestKubectlOfDebian is the same with Debian 12's kubectl, years older than
// the API; make puts it beside our binaries.
func TestKubectlOfDebian(t *testing.T) {
	if _, err := os.Stat(filepath.Join("..", "..", "bin", "kubectl-debian")); err != nil {
		t.Skip("needs bin/kubectl-debian: make bin/kubectl-debian")
	}
	tell(t, newWorld(t, "kubectl-debian", "--kubeconfig", story.AdminKubeconfig), story.Kubectl())
}
