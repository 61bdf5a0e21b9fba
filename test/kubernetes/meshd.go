package kubernetes

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"meshd.dev/test/cluster"
	"meshd.dev/test/netlab"
)

// What manifests/ and make image call things.
const (
	meshdNamespace = "meshd"
	meshdImage     = "meshd.dev/meshd:dev"
	nextImage      = "meshd.dev/meshd:next" // the same under another name: an upgrade
	imageTar       = "meshd-image.tar"
	agentLabels    = "app.kubernetes.io/name=meshd,app.kubernetes.io/component=agent"
)

// importMeshd gives a machine's containerd our image, under both names.
func (w *World) importMeshd(ctx context.Context, m *netlab.Machine) error {
	if err := m.Import(ctx, filepath.Join(w.cfg.Bin, imageTar)); err != nil {
		return err
	}
	_, err := m.Run(ctx, "ctr", "-n", "k8s.io", "images", "tag", meshdImage, nextImage)
	return err
}

// overlay is manifests/kubeadm with what this cluster needs otherwise: without
// kube-proxy somebody has to say where the API is before there are services.
func (w *World) overlay() (folder string, err error) {
	if w.folder != "" {
		return w.folder, nil
	}
	defer func() { w.folder = folder }()
	m1 := w.Machine("m1")
	if err := os.CopyFS(m1.Disk("/srv/manifests"), os.DirFS(w.cfg.Manifests)); err != nil {
		return "", err
	}
	settings := w.cfg.Settings
	if w.cfg.Services == Ours {
		settings = append(slices.Clone(settings), "api-server: "+w.server())
	}
	if len(settings) == 0 {
		return "/srv/manifests/kubeadm", nil
	}
	base, err := os.ReadFile(m1.Disk("/srv/manifests/base/config.yaml"))
	if err != nil {
		return "", err
	}
	text := string(base) + strings.Join(settings, "\n") + "\n"
	if err := m1.WriteFile("/srv/manifests/lab/config.yaml", []byte(text), 0o644); err != nil {
		return "", err
	}
	return "/srv/manifests/lab", m1.WriteFile("/srv/manifests/lab/kustomization.yaml", []byte(labOverlay), 0o644)
}

const labOverlay = `apiVersion: kustomize.config.k8s.io/v1beta1
kind: Kustomization
resources: [../kubeadm]
configMapGenerator:
- {name: meshd, namespace: meshd, behavior: replace, files: [config.yaml]}
`

// Install applies the manifests. Nothing else is done to any node.
func (w *World) Install(ctx context.Context) error {
	folder, err := w.overlay()
	if err != nil {
		return err
	}
	_, err = w.Kubectl(ctx, "apply", "-k", folder)
	return err
}

// meshdPod is the pod of the DaemonSet meshd on a node.
func (w *World) meshdPod(ctx context.Context, node string) (*corev1.Pod, error) {
	list, err := w.API.CoreV1().Pods(meshdNamespace).List(ctx, metav1.ListOptions{LabelSelector: agentLabels})
	if err != nil {
		return nil, err
	}
	for _, p := range list.Items {
		if p.Spec.NodeName == node && p.DeletionTimestamp == nil {
			return &p, nil
		}
	}
	return nil, fmt.Errorf("no pod of DaemonSet meshd on %s", node)
}

// Status is what meshctl status says in the meshd pod of a node; err if it finds
// something unhealthy.
func (w *World) Status(ctx context.Context, node string, args ...string) (string, error) {
	p, err := w.meshdPod(ctx, node)
	if err != nil {
		return "", err
	}
	return w.Kubectl(ctx, append([]string{"exec", "-n", meshdNamespace, p.Name, "--", "/meshctl", "status"}, args...)...)
}

// StatusHealthy waits until meshctl status is content on each node, with a
// tunnel up to each other one; it returns what carries them.
func (w *World) StatusHealthy(ctx context.Context, names []string) (backend string, err error) {
	err = w.Until(ctx, func(ctx context.Context) error {
		for _, name := range names {
			out, err := w.Status(ctx, name, "--json")
			if err != nil {
				table, _ := w.Status(ctx, name)
				return fmt.Errorf("%w\n%s", err, table)
			}
			var doc struct {
				Tunnels []struct {
					Backend string
					Up      bool
				}
			}
			if err := json.Unmarshal([]byte(out), &doc); err != nil {
				return fmt.Errorf("meshctl status --json on %s: %w", name, err)
			}
			up := 0
			for _, t := range doc.Tunnels {
				if t.Up {
					up, backend = up+1, t.Backend
				}
			}
			if up != len(names)-1 {
				return fmt.Errorf("%s: %d tunnels up, want %d:\n%s", name, up, len(names)-1, out)
			}
		}
		return nil
	})
	return backend, err
}

// rolledOut waits until a DaemonSet has its newest template ready on every node.
func (w *World) rolledOut(ctx context.Context, name string, n int) error {
	return w.Until(ctx, func(ctx context.Context) error {
		ds, err := w.API.AppsV1().DaemonSets(meshdNamespace).Get(ctx, name, metav1.GetOptions{})
		if err != nil {
			return err
		}
		s := ds.Status
		if s.ObservedGeneration < ds.Generation || int(s.DesiredNumberScheduled) != n || int(s.UpdatedNumberScheduled) != n || int(s.NumberReady) != n {
			return fmt.Errorf("DaemonSet %s: want %d pods new and ready, have %d to be, %d new, %d ready: %w", name, n,
				s.DesiredNumberScheduled, s.UpdatedNumberScheduled, s.NumberReady, w.complaints(ctx))
		}
		return nil
	})
}

// complaints are what our pods wait for.
func (w *World) complaints(ctx context.Context) error {
	list, err := w.API.CoreV1().Pods(meshdNamespace).List(ctx, metav1.ListOptions{})
	if err != nil {
		return err
	}
	return errors.New(cluster.Describe(list.Items))
}
