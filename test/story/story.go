// Package story is what meshd promises, told step by step on three machines of
// a lab: the demo prints it, the scenario tests check it. A step does one thing,
// waits until it is true, and says in a few words what was seen; the first one
// that fails ends the story.
package story

import (
	"context"
	"fmt"
	"log/slog"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"

	"meshd.dev/test/cluster"
	"meshd.dev/test/images"
	"meshd.dev/test/netlab"
)

// A Step is one sentence of the story.
type Step struct {
	Name string
	Do   func(ctx context.Context, w *World) (note string, err error)
}

// stepLimit bounds one step: a machine with two busy cores is slow, a story
// that hangs is worse.
const stepLimit = 4 * time.Minute

// Config says where the story takes place.
type Config struct {
	Name string // of the lab; empty means random
	Keep bool   // the lab outlives this program
	Bin  string // folder of meshd, meshctl and mesh
	Work string // folder for what is built on the way (images)
	// Manifest is the application, manifests/examples/demo.yaml.
	Manifest string
	// Kubectl is the command that works on the cluster, on machine m1; empty
	// is the one meshctl carries.
	Kubectl []string
	Log     *slog.Logger
}

// World is all a step can look at and act on.
type World struct {
	cluster.View

	cfg   Config
	tars  []string
	meshd map[string]int // process number on the host, by machine
	used  string         // a join token that was used
}

// New is a world before its first step.
func New(c Config) (*World, error) {
	bin, err := filepath.Abs(c.Bin)
	if err != nil {
		return nil, err
	}
	c.Bin = bin
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	return &World{cfg: c, meshd: map[string]int{}}, nil
}

// End takes the machines away.
func (w *World) End(ctx context.Context) error {
	if w.Lab == nil {
		return nil
	}
	return w.Lab.Destroy(ctx)
}

// Run does one step within its time.
func (s Step) Run(ctx context.Context, w *World) (string, time.Duration, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, stepLimit, fmt.Errorf("not within %v", stepLimit))
	defer cancel()
	start := time.Now()
	note, err := s.Do(ctx, w)
	return note, time.Since(start), err
}

// Names of the machines; m1 is the server.
var Names = []string{"m1", "m2", "m3"}

// BuildImages builds the images of the test programs.
func (w *World) BuildImages(ctx context.Context) (err error) {
	w.tars, err = images.Build(ctx, w.cfg.Work)
	return err
}

// Boot makes the machines and starts containerd with the images on each.
func (w *World) Boot(ctx context.Context, names ...string) error {
	if err := w.Make(ctx, names...); err != nil {
		return err
	}
	for _, name := range names {
		if err := w.Machine(name).PowerOn(ctx); err != nil {
			return err
		}
	}
	return w.each(ctx, names, func(ctx context.Context, m *netlab.Machine) error {
		if _, err := m.StartContainerd(ctx); err != nil {
			return err
		}
		return w.Import(ctx, m)
	})
}

// Make makes the machines and leaves them off.
func (w *World) Make(ctx context.Context, names ...string) (err error) {
	if w.Lab, err = netlab.New(ctx, netlab.Config{Name: w.cfg.Name, Keep: w.cfg.Keep, Binaries: w.cfg.Bin, Log: w.cfg.Log}); err != nil {
		return err
	}
	for _, name := range names {
		if _, err := w.Lab.Add(ctx, name); err != nil {
			return err
		}
	}
	return nil
}

// Import gives a machine's containerd the images.
func (w *World) Import(ctx context.Context, m *netlab.Machine) error {
	for _, tar := range w.tars {
		if err := m.Import(ctx, tar); err != nil {
			return err
		}
	}
	return nil
}

// each does the same on several machines at once.
func (w *World) each(ctx context.Context, names []string, do func(context.Context, *netlab.Machine) error) error {
	group, ctx := errgroup.WithContext(ctx)
	for _, name := range names {
		group.Go(func() error { return do(ctx, w.Machine(name)) })
	}
	return group.Wait()
}

// AdminKubeconfig is where a server leaves the administrator's kubeconfig.
const AdminKubeconfig = "/var/lib/meshd/admin.kubeconfig"

// StartServer starts meshd server on m1 and waits until its API is ready.
func (w *World) StartServer(ctx context.Context, flags ...string) error {
	m := w.Machine("m1")
	if err := w.startMeshd(ctx, m, append([]string{"server"}, flags...)); err != nil {
		return err
	}
	return w.waitFor(ctx, m, w.ConnectAdmin)
}

// Join starts meshd join on a machine; token is empty once it has joined.
func (w *World) Join(ctx context.Context, name, token string, flags ...string) error {
	args := append([]string{"join"}, flags...)
	if token != "" {
		args = append(args, w.Machine("m1").IPv4().String(), "--token", token)
	}
	return w.startMeshd(ctx, w.Machine(name), args)
}

// Token makes a join token on m1.
func (w *World) Token(ctx context.Context, flags ...string) (string, error) {
	out, err := w.Machine("m1").Run(ctx, append([]string{"meshctl", "token", "create"}, flags...)...)
	return strings.TrimSpace(out), err
}

func (w *World) startMeshd(ctx context.Context, m *netlab.Machine, args []string) error {
	argv := append([]string{"meshd"}, args...)
	argv = append(argv, "--node-name", m.Name, "--node-ip", m.IPv4().String())
	pid, err := m.Start(ctx, "meshd", argv...)
	w.meshd[m.Name] = pid
	return err
}

// ConnectAdmin makes w.API a client that dials from m1, and checks that it works.
func (w *World) ConnectAdmin(ctx context.Context) error {
	m := w.Machine("m1")
	out, err := m.Run(ctx, "cat", AdminKubeconfig)
	if err != nil {
		return err
	}
	return w.Connect(ctx, m, []byte(out))
}

// waitFor is until, but gives up when the machine's meshd has ended.
func (w *World) waitFor(ctx context.Context, m *netlab.Machine, ok func(context.Context) error) error {
	return cluster.Until(ctx, func(ctx context.Context) error {
		err := ok(ctx)
		if err != nil && !netlab.Alive(w.meshd[m.Name]) {
			return cluster.Final{Err: fmt.Errorf("meshd on %s has ended: %w\n%s", m.Name, err, w.MeshdLog(m.Name, 20))}
		}
		return err
	})
}

// MeshdLog is the end of a machine's meshd log.
func (w *World) MeshdLog(name string, lines int) string {
	return cluster.LastLines(w.Machine(name).Disk("/var/log/meshd.log"), lines)
}
