package apiserver

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"path/filepath"
	"runtime/debug"
	"time"

	"golang.org/x/sync/errgroup"
	apiextensions "k8s.io/apiextensions-apiserver/pkg/apiserver"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"

	"meshd.dev/pkg/apiserver/etcd"
)

// Server is one API server.
type Server struct {
	cfg      Config
	ready    chan struct{}
	loopback *rest.Config
	store    *etcd.Store
	listener net.Listener
	parts    parts
	crds     *apiextensions.CustomResourceDefinitions
	// run are the loops that live as long as the server.
	run []func(context.Context) error
}

// New reads the files cfg names, opens the store and the port, and builds the
// server. Nothing is answered before Run. A Server that is not run must be
// closed.
func New(ctx context.Context, cfg Config) (_ *Server, err error) {
	cfg.Defaults()
	if err := cfg.Validate(); err != nil {
		return nil, fmt.Errorf("configure API server: %w", err)
	}
	if err := checkServing(cfg); err != nil {
		return nil, fmt.Errorf("configure API server: %w", err)
	}
	s := &Server{cfg: cfg, ready: make(chan struct{})}
	done := false
	defer func() {
		if !done {
			s.Close()
		}
	}()
	if s.listener, err = listen(ctx, cfg.Listen); err != nil {
		return nil, err
	}
	if s.store, err = openStore(ctx, cfg); err != nil {
		return nil, err
	}
	if err := s.build(); err != nil {
		return nil, fmt.Errorf("build API server: %w", err)
	}
	done = true
	return s, nil
}

func listen(ctx context.Context, addr string) (net.Listener, error) {
	var lc net.ListenConfig
	l, err := lc.Listen(ctx, "tcp", addr)
	if err != nil {
		return nil, fmt.Errorf("listen for the API on %s: %w", addr, err)
	}
	return l, nil
}

func openStore(ctx context.Context, cfg Config) (*etcd.Store, error) {
	if len(cfg.EtcdEndpoints) > 0 {
		return etcd.Dial(cfg.EtcdEndpoints)
	}
	return etcd.Open(ctx, filepath.Join(cfg.DataDir, "etcd"), cfg.Log)
}

// Close gives back the port and the store of a Server that is not run.
func (s *Server) Close() {
	if s.crds != nil {
		s.crds.GenericAPIServer.Destroy()
	}
	if s.listener != nil {
		s.listener.Close()
	}
	if s.store != nil {
		s.store.Close()
	}
}

// Run serves until ctx ends, then closes the port and the store. It may be
// called once.
func (s *Server) Run(ctx context.Context) error {
	defer s.store.Close()
	defer s.listener.Close()
	if ctx.Err() != nil {
		s.crds.GenericAPIServer.Destroy()
		return nil
	}
	group, ctx := errgroup.WithContext(ctx)
	serving, stop := context.WithCancel(context.WithoutCancel(ctx))
	defer stop()
	prepared := s.crds.GenericAPIServer.PrepareRun()
	group.Go(func() error {
		if err := prepared.RunWithContext(serving); err != nil {
			return fmt.Errorf("serve the API: %w", err)
		}
		return nil
	})
	group.Go(func() error {
		defer stop()
		return s.untilEnd(ctx)
	})
	group.Go(func() error { s.awaitReady(serving); return nil })
	for _, f := range s.run {
		group.Go(func() error { return f(serving) })
	}
	err := group.Wait()
	// Informers end with the server; what they started must be gone when Run is.
	s.parts.informers.Shutdown()
	s.crds.Informers.Shutdown()
	return err
}

// startTimeout bounds how long a server that is told to end goes on starting.
const startTimeout = 15 * time.Second

// untilEnd returns when the server shall stop: its context or its store has
// ended, but not while it still starts, because k8s.io/apiserver ends the
// whole process when a start hook is cut short.
func (s *Server) untilEnd(ctx context.Context) error {
	var err error
	select {
	case <-ctx.Done():
	case <-s.store.Stopped():
		err = errors.New("serve the API: the embedded etcd stopped")
	}
	timeout := time.NewTimer(startTimeout)
	defer timeout.Stop()
	select {
	case <-s.ready:
	case <-timeout.C:
	}
	return err
}

// awaitReady asks /readyz until it says yes. There is no signal to wait for:
// readiness is the sum of checks of many parts.
func (s *Server) awaitReady(ctx context.Context) {
	client, err := kubernetes.NewForConfig(s.loopback)
	if err != nil {
		return
	}
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for {
		status := 0
		client.RESTClient().Get().AbsPath("/readyz").Do(ctx).StatusCode(&status)
		if status == http.StatusOK {
			close(s.ready)
			// Building handlers and documents leaves as much garbage as the
			// idle server uses afterwards.
			debug.FreeOSMemory()
			return
		}
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}

// Ready is closed when /readyz says yes.
func (s *Server) Ready() <-chan struct{} { return s.ready }

// Loopback is the configuration of a client with all rights, over HTTPS to
// this server. The caller gets a copy.
func (s *Server) Loopback() *rest.Config {
	c := rest.CopyConfig(s.loopback)
	c.ContentType = "application/vnd.kubernetes.protobuf"
	return c
}

// Snapshot writes the embedded database to path.
func (s *Server) Snapshot(path string) error { return s.store.Snapshot(path) }
