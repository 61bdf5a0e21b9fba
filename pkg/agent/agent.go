package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/record"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"meshd.dev/pkg/agent/exits"
	"meshd.dev/pkg/agent/node"
	"meshd.dev/pkg/agent/object"
	"meshd.dev/pkg/agent/podspec"
	"meshd.dev/pkg/agent/runtime"
	"meshd.dev/pkg/agent/server"
	"meshd.dev/pkg/agent/volume"
	"meshd.dev/pkg/reconcile"
	"meshd.dev/pkg/status"
)

// Config of an Agent. NodeName, Client, CRI, StateDir and NodeIPs are
// required; the rest has defaults.
type Config struct {
	NodeName string
	// Client carries the credentials of this node (system:node:NAME).
	Client *rest.Config
	// CRI is the path of the runtime's unix socket, absolute.
	CRI string
	// StateDir holds checkpoints and volumes; it must survive a reboot.
	StateDir string
	// PodLogDir has the kubelet's layout. Default /var/log/pods.
	PodLogDir string
	// NodeIPs are published as the node's internal addresses, the first one
	// being the preferred.
	NodeIPs []netip.Addr
	// Labels are set on the Node besides those every node has.
	Labels map[string]string
	// Listen is the address of the API server's door. Default ":10250".
	Listen string
	// ServingCert, ServingKey and ClientCA are PEM files. They are read again
	// when they change.
	ServingCert, ServingKey, ClientCA string
	// ClusterDNS gives the resolver pods use, at the time a pod starts; pods
	// wait while it gives none. Without it pods use the node's resolver.
	ClusterDNS func() []netip.Addr
	// ClusterDomain defaults to cluster.local.
	ClusterDomain string
	// ResolvConf is the node's resolver configuration, for pods that use it.
	// Default /etc/resolv.conf, or what is behind it when that names a stub
	// resolver on loopback, which pods cannot reach.
	ResolvConf string
	// LeaseInterval is the time between two renewals. Default 1 s.
	LeaseInterval time.Duration
	// MaxPods is published as the node's capacity. Default 250.
	MaxPods int
	// Board and Log may be nil.
	Board *status.Board
	Log   *slog.Logger
}

func (c *Config) defaults() {
	if c.PodLogDir == "" {
		c.PodLogDir = "/var/log/pods"
	}
	if c.Listen == "" {
		c.Listen = ":10250"
	}
	if c.ClusterDomain == "" {
		c.ClusterDomain = "cluster.local"
	}
	if c.LeaseInterval == 0 {
		c.LeaseInterval = time.Second
	}
	if c.MaxPods == 0 {
		c.MaxPods = 250
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
}

func (c *Config) validate() error {
	var errs []error
	need := func(ok bool, what string) {
		if !ok {
			errs = append(errs, fmt.Errorf("agent config: %s is missing", what))
		}
	}
	need(c.NodeName != "", "NodeName")
	need(c.Client != nil, "Client")
	need(c.CRI != "", "CRI")
	need(c.StateDir != "", "StateDir")
	need(len(c.NodeIPs) > 0, "NodeIPs")
	return errors.Join(errs...)
}

// Agent runs the pods of one node.
type Agent struct {
	cfg      Config
	nodeIPs  []string
	memory   int64
	oomFloor int64

	client      kubernetes.Interface
	rt          *runtime.Client
	recorder    record.EventRecorder
	objects     *object.Store
	volumes     *volume.Volumes
	checkpoints *checkpoints
	pulled      *pulledImages
	node        *node.Node
	relist      *reconcile.Loop

	wg sync.WaitGroup // workers

	mu        sync.Mutex
	workers   map[types.UID]*worker
	births    int
	started   time.Time
	owners    map[string]types.UID // of containers and sandboxes
	seen      map[types.UID]bool   // pods the API has
	apiSynced bool
}

// New checks cfg and makes an Agent; Run starts it.
func New(cfg Config) (*Agent, error) {
	cfg.defaults()
	if err := cfg.validate(); err != nil {
		return nil, err
	}
	rest := rest.CopyConfig(cfg.Client)
	if rest.QPS == 0 {
		rest.QPS, rest.Burst = 50, 100
	}
	client, err := kubernetes.NewForConfig(rest)
	if err != nil {
		return nil, fmt.Errorf("agent: %w", err)
	}
	return newAgent(cfg, client)
}

func newAgent(cfg Config, client kubernetes.Interface) (*Agent, error) {
	a := &Agent{
		cfg: cfg, client: client,
		workers: map[types.UID]*worker{}, owners: map[string]types.UID{}, seen: map[types.UID]bool{},
	}
	for _, ip := range cfg.NodeIPs {
		a.nodeIPs = append(a.nodeIPs, ip.String())
	}
	var err error
	if a.rt, err = runtime.Dial(cfg.CRI); err != nil {
		return nil, err
	}
	_, port, err := net.SplitHostPort(cfg.Listen)
	if err != nil {
		return nil, fmt.Errorf("agent config: Listen: %w", err)
	}
	a.memory, a.oomFloor = node.Memory(), node.OOMFloor()
	a.node, err = node.New(node.Config{
		Name: cfg.NodeName, Client: client, Runtime: a.rt, IPs: cfg.NodeIPs, Labels: cfg.Labels, Port: port,
		LeaseInterval: cfg.LeaseInterval, MaxPods: cfg.MaxPods, Ready: a.nodeReady, Dir: cfg.StateDir, Board: cfg.Board, Log: cfg.Log,
	})
	return a, err
}

// Run keeps the node registered and its pods running until ctx ends. Pods go
// on running when it returns; the next Run adopts them.
func (a *Agent) Run(ctx context.Context) error {
	if err := a.open(); err != nil {
		return err
	}
	defer a.rt.Close()
	defer a.objects.Close()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var stop func()
	a.recorder, stop = newRecorder(ctx, a.client, a.cfg.NodeName)
	defer stop()
	srv, err := server.New(server.Config{
		Listen: a.cfg.Listen, Cert: a.cfg.ServingCert, Key: a.cfg.ServingKey, ClientCA: a.cfg.ClientCA,
		Pods: a, Runtime: a.rt, Log: a.cfg.Log,
	})
	if err != nil {
		return err
	}
	kept, err := a.checkpoints.load()
	if err != nil {
		return err
	}
	a.mu.Lock()
	a.started = time.Now()
	a.mu.Unlock()
	group, ctx := errgroup.WithContext(ctx)
	for _, pod := range kept {
		a.ensure(ctx, pod)
	}
	group.Go(func() error { return srv.Run(ctx) })
	group.Go(func() error { return a.node.Run(ctx) })
	group.Go(func() error { return a.relist.Run(ctx) })
	group.Go(func() error { return a.watchPods(ctx) })
	group.Go(func() error { return a.keepHouse(ctx) })
	group.Go(func() error {
		return exits.Run(ctx, exits.Config{Client: a.rt, Exit: a.exited, Connected: func() { a.connected(ctx) }, Log: a.cfg.Log})
	})
	err = group.Wait()
	a.wg.Wait()
	return err
}

// open makes the folders and the rooms that stand on them.
func (a *Agent) open() error {
	if err := os.MkdirAll(a.cfg.StateDir, 0o700); err != nil {
		return fmt.Errorf("agent state: %w", err)
	}
	dir, err := filepath.EvalSymlinks(a.cfg.StateDir)
	if err != nil {
		return fmt.Errorf("agent state: %w", err)
	}
	a.cfg.StateDir = dir
	secrets := filepath.Join(dir, "secrets")
	if err := volume.MemoryDir(secrets); err != nil {
		return fmt.Errorf("agent state: %w", err)
	}
	a.checkpoints = newCheckpoints(filepath.Join(dir, "pods"), a.cfg.Log)
	a.pulled = loadPulled(filepath.Join(dir, "pulled-images"))
	a.objects = object.New(object.Config{
		Client: a.client, Dir: filepath.Join(dir, "objects"), SecretDir: secrets,
		Changed: a.objectsChanged, Log: a.cfg.Log,
	})
	a.volumes = volume.New(volume.Config{
		Dir: filepath.Join(dir, "volumes"), Objects: a.objects, Token: a.token, Claim: a.claim, Log: a.cfg.Log,
	})
	a.relist = reconcile.New(reconcile.Config{Name: "agent/relist", Do: a.look, Resync: relistEvery, MaxBackoff: time.Second, Log: a.cfg.Log})
	return nil
}

// nodeReady lets pods try again what failed while the node was not: mostly a
// network that was not there yet.
func (a *Agent) nodeReady() {
	for _, w := range a.all() {
		w.retry(false)
	}
}

// facts are what a pod may ask about its node.
func (a *Agent) facts() podspec.Node {
	return podspec.Node{IPs: a.nodeIPs, Allocatable: a.node.Allocatable()}
}

// behindStub is where systemd-resolved keeps the servers behind its stub.
const behindStub = "/run/systemd/resolve/resolv.conf"

// resolvConf is the node's resolver configuration as pods can use it.
func (a *Agent) resolvConf() *cri.DNSConfig {
	if a.cfg.ResolvConf != "" {
		return podspec.ReadResolvConf(a.cfg.ResolvConf)
	}
	cfg := podspec.ReadResolvConf("/etc/resolv.conf")
	for _, s := range cfg.Servers {
		if ip, err := netip.ParseAddr(s); err != nil || !ip.IsLoopback() {
			return cfg
		}
	}
	if behind := podspec.ReadResolvConf(behindStub); len(behind.Servers) > 0 {
		return behind
	}
	return cfg
}

// runtimeName is the scheme of container IDs.
func (a *Agent) runtimeName() string {
	name, _, _ := strings.Cut(a.node.RuntimeVersion(), "://")
	if name == "" {
		return "containerd"
	}
	return name
}
