// Package kube is the one window on cluster state: whatever serves the
// Kubernetes API, the rest of a node sees an immutable mesh.State, and the
// node's own record goes out through Publish.
//
// The last State is kept on disk, so that a node that boots while the API is
// away still knows its peers and its services.
package kube

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"sync"
	"sync/atomic"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/cache"

	"meshd.dev/pkg/durable"
	"meshd.dev/pkg/mesh"
	"meshd.dev/pkg/reconcile"
	"meshd.dev/pkg/status"
)

// Config of a Window. Client is required.
type Config struct {
	Client kubernetes.Interface
	// CacheFile keeps the last State; empty for none.
	CacheFile string
	// ServiceCIDRs has State tell the ranges of service addresses, from the
	// cluster's ServiceCIDR objects (networking.k8s.io/v1, Kubernetes 1.33 or
	// newer) or else from the services there are.
	ServiceCIDRs bool
	Board        *status.Board
	Log          *slog.Logger
}

// Window on cluster state. Use New.
type Window struct {
	cfg   Config
	state atomic.Pointer[mesh.State]
	loop  *reconcile.Loop
	// synced: everything was listed once.
	synced atomic.Bool

	nodes, services, slices, namespaces cache.SharedIndexInformer
	cidrs                               cache.SharedIndexInformer // nil where nobody asks for them

	mu          sync.Mutex
	subscribers []func()
	marks       marks

	read  objects     // owned by the loop
	saved *mesh.State // what CacheFile holds; owned by save
}

type key struct{ namespace, name string }

// byService indexes EndpointSlices by the service they are of.
const byService = "service"

// New makes a Window that already shows what CacheFile holds, if anything.
func New(cfg Config) *Window {
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	w := &Window{cfg: cfg}
	w.loop = reconcile.New(reconcile.Config{
		Name: "kube", Do: w.rebuild, Rest: 2 * time.Millisecond, Resync: 10 * time.Minute, Log: cfg.Log,
	})
	w.load()
	return w
}

// State is the newest one, nil before the first. It may come from disk.
func (w *Window) State() *mesh.State { return w.state.Load() }

// Subscribe has kick called after every change of State. kick must not block.
func (w *Window) Subscribe(kick func()) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.subscribers = append(w.subscribers, kick)
}

// Run watches the API until ctx ends.
func (w *Window) Run(ctx context.Context) error {
	factory := informers.NewSharedInformerFactoryWithOptions(w.cfg.Client, 0, informers.WithTransform(slim))
	w.nodes = factory.Core().V1().Nodes().Informer()
	w.services = factory.Core().V1().Services().Informer()
	w.namespaces = factory.Core().V1().Namespaces().Informer()
	w.slices = factory.Discovery().V1().EndpointSlices().Informer()
	if err := w.slices.AddIndexers(cache.Indexers{byService: indexByService}); err != nil {
		return err
	}
	if w.cfg.ServiceCIDRs { // of a factory of its own: not every API has them
		w.cidrs = informers.NewSharedInformerFactoryWithOptions(w.cfg.Client, 0, informers.WithTransform(slim)).Networking().V1().ServiceCIDRs().Informer()
		if _, err := w.cidrs.AddEventHandler(w.other()); err != nil {
			return err
		}
	}
	if err := w.listen(); err != nil {
		return err
	}
	w.cfg.Board.Fail("kube/sync", "the Kubernetes API has not answered yet", apiAway)
	factory.Start(ctx.Done())
	defer factory.Shutdown()
	if !cache.WaitForCacheSync(ctx.Done(), w.nodes.HasSynced, w.services.HasSynced, w.slices.HasSynced, w.namespaces.HasSynced) {
		return nil
	}
	w.synced.Store(true)
	w.cfg.Board.OK("kube/sync")
	if w.cidrs != nil {
		known, cancel := context.WithTimeout(ctx, cidrsPatience)
		done := make(chan struct{})
		go func() { defer close(done); w.watchServiceCIDRs(ctx, cancel) }()
		defer func() { <-done }()
		<-known.Done()
	}
	saved := make(chan struct{})
	go func() { defer close(saved); w.save(ctx) }()
	defer func() { <-saved }()
	return w.loop.Run(ctx)
}

func (w *Window) listen() error {
	node := handler(func(obj any) { w.mark(func(m *marks) { m.nodes[keyOf(obj).name] = true }) })
	service := handler(func(obj any) { w.mark(func(m *marks) { m.services[keyOf(obj)] = true }) })
	slice := handler(func(obj any) { w.mark(func(m *marks) { m.services[serviceOfSlice(obj)] = true }) })
	for informer, h := range map[cache.SharedIndexInformer]cache.ResourceEventHandler{w.nodes: node, w.namespaces: w.other(), w.services: service, w.slices: slice} {
		if _, err := informer.AddEventHandler(h); err != nil {
			return err
		}
		if err := informer.SetWatchErrorHandlerWithContext(w.refused); err != nil {
			return err
		}
	}
	return nil
}

const apiAway = "is the server up and reachable? `meshctl kubectl get nodes` on it"

// refused says why nothing is known yet. Once everything was listed, the
// library's retries are nobody's business: what is known stays good.
func (w *Window) refused(_ context.Context, _ *cache.Reflector, err error) {
	if w.synced.Load() {
		return
	}
	next := apiAway
	if apierrors.IsForbidden(err) || apierrors.IsUnauthorized(err) {
		next = "these credentials lack a right: compare with the ClusterRole in manifests/base/rbac.yaml"
	}
	w.cfg.Board.Report("kube/sync", err, next)
}

// Away says that a watch waits for an API that cannot be reached.
func (w *Window) Away(err error) { w.refused(context.Background(), nil, err) }

func handler(f func(any)) cache.ResourceEventHandler {
	return cache.ResourceEventHandlerFuncs{
		AddFunc:    f,
		UpdateFunc: func(old, obj any) { f(old); f(obj) },
		DeleteFunc: func(obj any) {
			if gone, ok := obj.(cache.DeletedFinalStateUnknown); ok {
				obj = gone.Obj
			}
			f(obj)
		},
	}
}

// slim drops what nobody here reads, before it is kept.
func slim(obj any) (any, error) {
	if m, err := meta.Accessor(obj); err == nil {
		m.SetManagedFields(nil)
	}
	if n, ok := obj.(*corev1.Node); ok {
		n.Status.Images = nil
	}
	return obj, nil
}

func indexByService(obj any) ([]string, error) {
	k := serviceOfSlice(obj)
	return []string{k.namespace + "/" + k.name}, nil
}

func serviceOfSlice(obj any) key {
	s, ok := obj.(*discoveryv1.EndpointSlice)
	if !ok {
		return key{}
	}
	return key{s.Namespace, s.Labels[discoveryv1.LabelServiceName]}
}

func keyOf(obj any) key {
	m, err := meta.Accessor(obj)
	if err != nil {
		return key{}
	}
	return key{m.GetNamespace(), m.GetName()}
}

func (w *Window) load() {
	if w.cfg.CacheFile == "" {
		return
	}
	b, err := os.ReadFile(w.cfg.CacheFile)
	if errors.Is(err, os.ErrNotExist) {
		return
	}
	state := new(mesh.State)
	if err == nil {
		err = json.Unmarshal(b, state)
	}
	if err != nil {
		w.cfg.Log.Warn("set aside the state on disk; the API will tell anew", "file", w.cfg.CacheFile, "err", err)
		_ = os.Rename(w.cfg.CacheFile, w.cfg.CacheFile+".corrupt")
		return
	}
	w.state.Store(state)
	w.saved = state
}

// saveInterval bounds how much work a busy cluster makes for the disk.
const saveInterval = 2 * time.Second

func (w *Window) save(ctx context.Context) {
	if w.cfg.CacheFile == "" {
		return
	}
	ticker := time.NewTicker(saveInterval)
	defer ticker.Stop()
	for {
		if state := w.state.Load(); state != w.saved {
			err := w.write(state)
			w.cfg.Board.Report("kube/cache", err, "free space on the disk, or mend the permissions of the state folder")
			if err == nil {
				w.saved = state
			}
		}
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
		}
	}
}

func (w *Window) write(state *mesh.State) error {
	b, err := json.Marshal(state)
	if err != nil {
		return fmt.Errorf("keep state: %w", err)
	}
	_, err = durable.WriteFileIfChanged(w.cfg.CacheFile, b, 0o600)
	return err
}
