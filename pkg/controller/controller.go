// Package controller is the control plane above the API: the controllers of
// Kubernetes, unmodified (package upstream), and our own where we mean to be
// better or smaller: nodes and failover, pod CIDRs, scheduling, garbage of
// nodes that are gone. One process and one set of informers; every controller
// is a client of the API over HTTP, so any of them could run elsewhere.
//
// Each of ours is one file and one reconcile.Loop: an event only kicks, the
// loop compares whole states, what it decides is a pure function (packages
// schedule and liveness, and the plan function of the file) and doing it is a
// walk over the plan.
package controller

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"strings"
	"time"

	"github.com/go-logr/logr"
	"golang.org/x/sync/errgroup"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/util/wait"
	"k8s.io/client-go/discovery"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/kubernetes/scheme"
	typedcorev1 "k8s.io/client-go/kubernetes/typed/core/v1"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/cache"
	"k8s.io/client-go/tools/record"
	"k8s.io/klog/v2"

	"meshd.dev/pkg/controller/upstream"
	"meshd.dev/pkg/reconcile"
	"meshd.dev/pkg/status"
)

// Config of the control plane. Client is required; zero values take defaults.
type Config struct {
	// Client reaches the API with full rights.
	Client *rest.Config
	// PodCIDRs are the ranges the nodes' pod CIDRs are cut from, at most one a
	// family; the first is the primary one. Empty: no node gets a CIDR here.
	PodCIDRs []netip.Prefix
	// NodeMaskIPv4 and NodeMaskIPv6 are the prefix lengths of one node's share
	// in bits. Defaults 24 and 64.
	NodeMaskIPv4, NodeMaskIPv6 int
	// ServiceCIDRs must not overlap PodCIDRs; nothing else here needs them.
	ServiceCIDRs []netip.Prefix
	// RootCA (PEM) is published in every namespace as ConfigMap
	// kube-root-ca.crt. Empty: not published.
	RootCA []byte
	// NodeGracePeriod is how long a node may be silent before it counts as
	// unreachable; agents renew their lease about each second. Default 4 s,
	// for the reasons given at liveness.Config.
	NodeGracePeriod time.Duration
	// EvictAfter is how long after that its pods are replaced elsewhere, where
	// the pod itself does not say otherwise. Default 5 s.
	EvictAfter time.Duration
	Board      *status.Board
	Log        *slog.Logger
}

// Defaults fills in what is zero.
func (c *Config) Defaults() {
	if c.NodeMaskIPv4 == 0 {
		c.NodeMaskIPv4 = 24
	}
	if c.NodeMaskIPv6 == 0 {
		c.NodeMaskIPv6 = 64
	}
	if c.NodeGracePeriod == 0 {
		c.NodeGracePeriod = 4 * time.Second
	}
	if c.EvictAfter == 0 {
		c.EvictAfter = 5 * time.Second
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
}

// Validate says what is wrong with c.
func (c *Config) Validate() error {
	var errs []error
	if c.Client == nil {
		errs = append(errs, errors.New("no API client"))
	}
	if c.NodeGracePeriod < 500*time.Millisecond {
		errs = append(errs, fmt.Errorf("node grace period %s: agents renew about each second, want at least 500ms", c.NodeGracePeriod))
	}
	if c.EvictAfter < 0 {
		errs = append(errs, fmt.Errorf("evict after %s: want zero or more", c.EvictAfter))
	}
	for _, p := range c.PodCIDRs {
		for _, s := range c.ServiceCIDRs {
			if p.Overlaps(s) {
				errs = append(errs, fmt.Errorf("pod CIDR %s overlaps service CIDR %s: want ranges apart", p, s))
			}
		}
	}
	return errors.Join(append(errs, validateRanges(c.PodCIDRs, c.NodeMaskIPv4, c.NodeMaskIPv6))...)
}

// Controllers is a control plane that has not started.
type Controllers struct {
	cfg Config
}

// New checks cfg. It does not speak to the API yet; Run waits for it.
func New(cfg Config) (*Controllers, error) {
	cfg.Defaults()
	if err := cfg.Validate(); err != nil {
		return nil, fmt.Errorf("controllers: %w", err)
	}
	return &Controllers{cfg: cfg}, nil
}

// Run waits until the API answers, runs every controller, and returns when
// ctx ended and all of them are gone.
func (c *Controllers) Run(ctx context.Context) error {
	ctx = klog.NewContext(ctx, logr.FromSlogHandler(quiet{c.cfg.Log.Handler(), ctx.Done()}))
	served, err := c.discover(ctx)
	if err != nil {
		return fmt.Errorf("controllers: %w", err)
	}
	client, err := kubernetes.NewForConfig(c.client("controller"))
	if err != nil {
		return fmt.Errorf("controllers: %w", err)
	}
	g, ctx := errgroup.WithContext(ctx)
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	p := newPlane(ctx, c.cfg, client)
	p.hasStorage = served(schema.GroupVersionResource{Group: "storage.k8s.io", Version: "v1", Resource: "storageclasses"})
	defer p.events.Shutdown()
	started := make(chan struct{})
	theirs, left, err := upstream.New(ctx, upstream.Config{Client: c.client, Informers: p.shared, Started: started, Serves: served})
	if err != nil {
		return fmt.Errorf("controllers: %w", err)
	}
	for _, name := range left {
		c.cfg.Log.Warn("controller left out: the API does not serve its resources", "controller", name)
	}
	ours, err := p.controllers(ctx, c.client("namespace-controller"))
	if err != nil {
		return fmt.Errorf("controllers: %w", err)
	}
	p.start(ctx)
	close(started)
	for _, t := range theirs {
		g.Go(func() error { t.Run(ctx); return nil })
	}
	for _, o := range ours {
		g.Go(func() error { return o(ctx) })
	}
	err = g.Wait()
	stop()
	p.shutdown()
	return err
}

// client is the configuration for the controller called name. No client side
// rate limit: the API server has its own ways to say "slower".
func (c *Controllers) client(name string) *rest.Config {
	rc := rest.AddUserAgent(rest.CopyConfig(c.cfg.Client), "meshd-"+name)
	rc.QPS = -1
	rc.ContentType = "application/vnd.kubernetes.protobuf"
	rc.AcceptContentTypes = "application/vnd.kubernetes.protobuf,application/json"
	return rc
}

// discover waits for the API and returns which resources it serves.
func (c *Controllers) discover(ctx context.Context) (func(schema.GroupVersionResource) bool, error) {
	dc, err := discovery.NewDiscoveryClientForConfig(c.client("discovery"))
	if err != nil {
		return nil, err
	}
	served := map[schema.GroupVersionResource]bool{}
	err = wait.PollUntilContextCancel(ctx, 200*time.Millisecond, true, func(context.Context) (bool, error) {
		_, lists, err := dc.ServerGroupsAndResources()
		if err != nil && len(lists) == 0 {
			c.cfg.Board.Report("controller/api", err, "see whether the API server runs")
			return false, nil
		}
		for _, l := range lists {
			gv, err := schema.ParseGroupVersion(l.GroupVersion)
			if err != nil {
				continue
			}
			for _, r := range l.APIResources {
				served[gv.WithResource(r.Name)] = true
			}
		}
		c.cfg.Board.OK("controller/api")
		return true, nil
	})
	return func(r schema.GroupVersionResource) bool { return served[r] }, err
}

// plane is what our own controllers share.
type plane struct {
	cfg    Config
	client kubernetes.Interface
	shared informers.SharedInformerFactory
	// leases is apart because it sees one namespace only.
	leases informers.SharedInformerFactory
	// rootCAs is apart because it sees one ConfigMap a namespace only.
	rootCAs informers.SharedInformerFactory
	events  record.EventBroadcaster
	// hasStorage says that the API serves volumes, claims and their classes.
	hasStorage bool
}

func newPlane(ctx context.Context, cfg Config, client kubernetes.Interface) *plane {
	factory := func(opts ...informers.SharedInformerOption) informers.SharedInformerFactory {
		return informers.NewSharedInformerFactoryWithOptions(client, 0, append(opts, informers.WithTransform(trim))...)
	}
	return &plane{
		cfg:    cfg,
		client: client,
		shared: factory(),
		leases: factory(informers.WithNamespace(corev1.NamespaceNodeLease)),
		rootCAs: factory(informers.WithTweakListOptions(func(o *metav1.ListOptions) {
			o.FieldSelector = "metadata.name=" + rootCAName
		})),
		events: record.NewBroadcaster(record.WithContext(ctx)),
	}
}

func (p *plane) start(ctx context.Context) {
	p.events.StartRecordingToSink(&typedcorev1.EventSinkImpl{Interface: p.client.CoreV1().Events("")})
	for _, f := range []informers.SharedInformerFactory{p.shared, p.leases, p.rootCAs} {
		f.Start(ctx.Done())
	}
}

func (p *plane) shutdown() {
	for _, f := range []informers.SharedInformerFactory{p.shared, p.leases, p.rootCAs} {
		f.Shutdown()
	}
}

// controllers of our own, as functions that run until their context ends.
func (p *plane) controllers(ctx context.Context, rc *rest.Config) ([]func(context.Context) error, error) {
	namespaces, err := newNamespaces(ctx, p, rc)
	if err != nil {
		return nil, err
	}
	runs := []func(context.Context) error{
		newNodeCIDR(p).Run,
		newNodeLifecycle(p).Run,
		newScheduler(p).Run,
		newEndpoints(p).Run,
		newPodGC(p).Run,
		newRootCA(p).Run,
		newTokens(p).Run,
		namespaces.Run,
	}
	if p.hasStorage {
		runs = append(runs, newVolumeBinder(p).Run)
	}
	return runs, nil
}

// loop makes the reconcile.Loop of the controller called name.
func (p *plane) loop(name string, do func(context.Context) error, tune ...func(*reconcile.Config)) *reconcile.Loop {
	cfg := reconcile.Config{
		Name: "controller/" + name,
		Do:   do,
		Log:  p.cfg.Log,
		Report: func(err error) {
			p.cfg.Board.Report("controller/"+name, err, "see the log of meshd server; the controller tries again by itself")
		},
	}
	for _, t := range tune {
		t(&cfg)
	}
	return reconcile.New(cfg)
}

// recorder writes events in the name of the controller called name.
func (p *plane) recorder(name string) record.EventRecorder {
	return p.events.NewRecorder(scheme.Scheme, corev1.EventSource{Component: name})
}

// watch calls kick whenever an object of the informer comes, changes in a way
// that matters, or goes. A nil matters means every change does.
func watch(inf cache.SharedIndexInformer, kick func(), matters func(old, new any) bool) {
	_, _ = inf.AddEventHandler(cache.ResourceEventHandlerFuncs{
		AddFunc: func(any) { kick() },
		UpdateFunc: func(old, new any) {
			if matters == nil || matters(old, new) {
				kick()
			}
		},
		DeleteFunc: func(any) { kick() },
	})
}

// synced waits for the informers' first full list; false when ctx ended.
func synced(ctx context.Context, infs ...cache.SharedIndexInformer) bool {
	for _, inf := range infs {
		if !cache.WaitForCacheSync(ctx.Done(), inf.HasSynced) {
			return false
		}
	}
	return true
}

// trim drops the managed fields, often half of an object and read by nobody
// here. A write without them leaves those of the server untouched.
func trim(obj any) (any, error) {
	if m, err := meta.Accessor(obj); err == nil {
		m.SetManagedFields(nil)
	}
	return obj, nil
}

// quiet turns the Info of the controllers of Kubernetes, who tell the story
// of their lives in it, into Debug, and their Error, which means that they try
// again, into Warn. It hears nothing of them any more once they were asked to
// stop: being cut short is an error to them.
type quiet struct {
	slog.Handler
	stopped <-chan struct{}
}

// staleCache is in the error with which they say that their cache has not
// seen their own last write yet: several times a second while they work.
const staleCache = "is not as new as written version"

func (q quiet) Enabled(ctx context.Context, l slog.Level) bool {
	select {
	case <-q.stopped:
		return false
	default:
		return q.Handler.Enabled(ctx, lower(l))
	}
}

func (q quiet) Handle(ctx context.Context, r slog.Record) error {
	r.Level = lower(r.Level)
	r.Attrs(func(a slog.Attr) bool {
		if err, ok := a.Value.Any().(error); ok && strings.Contains(err.Error(), staleCache) {
			r.Level = slog.LevelDebug
		}
		return true
	})
	if !q.Handler.Enabled(ctx, r.Level) {
		return nil
	}
	return q.Handler.Handle(ctx, r)
}

func (q quiet) WithAttrs(a []slog.Attr) slog.Handler { return quiet{q.Handler.WithAttrs(a), q.stopped} }
func (q quiet) WithGroup(n string) slog.Handler      { return quiet{q.Handler.WithGroup(n), q.stopped} }

func lower(l slog.Level) slog.Level {
	if l < slog.LevelWarn {
		return l - 4
	}
	return min(l, slog.LevelWarn)
}
