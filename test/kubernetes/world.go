package kubernetes

import (
	"context"
	"fmt"
	"log/slog"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"meshd.dev/test/cluster"
	"meshd.dev/test/images"
	"meshd.dev/test/netlab"
)

// Services says who makes service addresses work.
type Services string

// Either kube-proxy runs on every node and meshd beside it, or meshd alone.
const (
	KubeProxy Services = "kube-proxy"
	Ours      Services = "meshd"
)

// Config says what cluster to make.
type Config struct {
	Bin       string   // folder of meshd-image.tar, meshctl and tools/
	Work      string   // folder for what is built on the way
	Manifests string   // folder manifests of the repository
	Logs      string   // folder that gets the logs of a cluster that fails
	Nodes     []string // default m1, m2, m3
	Services  Services
	// Settings are lines for the agents' config.yaml.
	Settings []string
	// NoPodCIDRs is a cluster that gives its nodes none.
	NoPodCIDRs bool
	Name       string // of the lab; empty means random
	Keep       bool   // the lab outlives this program
}

// World is all a step can look at and act on.
type World struct {
	cluster.View

	cfg     Config
	ca      *authority
	tars    []string // images for every machine
	daemons []daemon
	nodes   []string          // of the cluster so far
	folder  string            // of the manifests that were applied, on m1
	before  map[string]string // what each node looked like without meshd
}

// A Step is one sentence of a story.
type Step struct {
	Name string
	Do   func(ctx context.Context, w *World) (note string, err error)
}

// stepLimit bounds one step: a machine with two busy cores is slow, a story
// that hangs is worse.
const stepLimit = 4 * time.Minute

// Run does one step within its time.
func (s Step) Run(ctx context.Context, w *World) (string, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, stepLimit, fmt.Errorf("not within %v", stepLimit))
	defer cancel()
	return s.Do(ctx, w)
}

// outside is the machine that is not of the cluster.
const outside = "out"

// New makes a lab without machines.
func New(ctx context.Context, c Config) (*World, error) {
	bin, err := filepath.Abs(c.Bin)
	if err != nil {
		return nil, err
	}
	c.Bin = bin
	if len(c.Nodes) == 0 {
		c.Nodes = []string{"m1", "m2", "m3"}
	}
	w := &World{cfg: c, nodes: c.Nodes, before: map[string]string{}}
	if w.ca, err = newAuthority(); err != nil {
		return nil, err
	}
	if w.tars, err = images.Build(ctx, c.Work); err != nil {
		return nil, err
	}
	w.Lab, err = netlab.New(ctx, netlab.Config{Name: c.Name, Keep: c.Keep, Binaries: c.Bin, HostBootID: true, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		return nil, err
	}
	return w, nil
}

// End takes the machines away.
func (w *World) End(ctx context.Context) error { return w.Lab.Destroy(ctx) }

// Boot adds machines with containerd and the images on each.
func (w *World) Boot(ctx context.Context, names ...string) error {
	for _, name := range names {
		m, err := w.Lab.Add(ctx, name)
		if err != nil {
			return err
		}
		if err := m.PowerOn(ctx); err != nil {
			return err
		}
	}
	return w.each(ctx, names, func(ctx context.Context, m *netlab.Machine) error {
		if _, err := m.StartContainerd(ctx); err != nil {
			return err
		}
		for _, tar := range w.tars {
			if err := m.Import(ctx, tar); err != nil {
				return err
			}
		}
		return w.importMeshd(ctx, m)
	})
}

// each does the same on several machines at once.
func (w *World) each(ctx context.Context, names []string, do func(context.Context, *netlab.Machine) error) error {
	group, ctx := errgroup.WithContext(ctx)
	for _, name := range names {
		group.Go(func() error { return do(ctx, w.Machine(name)) })
	}
	return group.Wait()
}

// Kubectl runs kubectl as the administrator, on m1.
func (w *World) Kubectl(ctx context.Context, args ...string) (string, error) {
	return w.Machine("m1").Run(ctx, slices.Concat([]string{tools + "kubectl", "--kubeconfig", adminKC}, args)...)
}

// Apply applies YAML.
func (w *World) Apply(ctx context.Context, name, yaml string) error {
	path := "/srv/" + name + ".yaml"
	if err := w.Machine("m1").WriteFile(path, []byte(yaml), 0o644); err != nil {
		return err
	}
	_, err := w.Kubectl(ctx, "apply", "-f", path)
	return err
}

// NodesAre waits until exactly these nodes exist and ok says nothing against
// any of them.
func (w *World) NodesAre(ctx context.Context, names []string, against func(corev1.Node) string) ([]corev1.Node, error) {
	var found []corev1.Node
	err := w.Until(ctx, func(ctx context.Context) error {
		list, err := w.API.CoreV1().Nodes().List(ctx, metav1.ListOptions{})
		if err != nil {
			return err
		}
		found = list.Items
		var have, not []string
		for _, n := range found {
			have = append(have, n.Name)
			if why := against(n); why != "" {
				not = append(not, n.Name+": "+why)
			}
		}
		slices.Sort(have)
		if want := slices.Sorted(slices.Values(names)); !slices.Equal(have, want) || len(not) > 0 {
			return fmt.Errorf("nodes %v, want %v; %s", have, want, strings.Join(not, "; "))
		}
		return nil
	})
	return found, err
}

// notReady says why a node is not Ready; empty if it is.
func notReady(n corev1.Node) string {
	for _, c := range n.Status.Conditions {
		if c.Type != corev1.NodeReady {
			continue
		}
		if c.Status == corev1.ConditionTrue {
			return ""
		}
		return fmt.Sprintf("%s %s %s", c.Status, c.Reason, c.Message)
	}
	return "no Ready condition yet"
}
