// Package server is the agent's door for the API server: logs, exec, attach and
// port-forward, on the paths of the kubelet. Who knocks must show a client
// certificate of the cluster's CA that is the API server's or an
// administrator's.
package server

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"slices"
	"sync"
	"time"

	v1 "k8s.io/api/core/v1"

	"meshd.dev/pkg/agent/plan"
	"meshd.dev/pkg/agent/runtime"
)

// Pods is what the server asks about pods.
type Pods interface {
	// PodList is every pod of the node with its status.
	PodList() *v1.PodList
	// Container finds a container by name: the newest, or the one before.
	Container(namespace, pod, name string, previous bool) (plan.Container, error)
	// SandboxID of a running pod.
	SandboxID(namespace, pod string) (string, error)
}

// Config of a Server.
type Config struct {
	Listen string
	// Cert, Key and ClientCA are PEM files, read again when they change.
	Cert, Key, ClientCA string
	Pods                Pods
	Runtime             *runtime.Client
	Log                 *slog.Logger
}

// Server answers the API server.
type Server struct {
	cfg   Config
	files *files
}

// New checks the files and makes a Server.
func New(cfg Config) (*Server, error) {
	f := &files{cert: cfg.Cert, key: cfg.Key, ca: cfg.ClientCA}
	if _, err := f.config(nil); err != nil {
		return nil, fmt.Errorf("agent server: %w", err)
	}
	return &Server{cfg: cfg, files: f}, nil
}

// Run serves until ctx ends.
func (s *Server) Run(ctx context.Context) error {
	l, err := (&net.ListenConfig{}).Listen(ctx, "tcp", s.cfg.Listen)
	if err != nil {
		return fmt.Errorf("agent server: %w", err)
	}
	srv := &http.Server{
		Handler:           s.handler(),
		ReadHeaderTimeout: 10 * time.Second,
		IdleTimeout:       90 * time.Second,
		MaxHeaderBytes:    64 << 10,
		BaseContext:       func(net.Listener) context.Context { return ctx },
		ErrorLog:          slog.NewLogLogger(s.cfg.Log.Handler(), slog.LevelDebug),
		// The streams of exec and port-forward take over the connection, which
		// HTTP/2 does not allow.
		TLSNextProto: map[string]func(*http.Server, *tls.Conn, http.Handler){},
	}
	stop := context.AfterFunc(ctx, func() { _ = srv.Close() })
	defer stop()
	err = srv.Serve(tls.NewListener(l, &tls.Config{MinVersion: tls.VersionTLS12, GetConfigForClient: s.files.config, NextProtos: []string{"http/1.1"}}))
	if errors.Is(err, http.ErrServerClosed) {
		return nil
	}
	return fmt.Errorf("agent server: %w", err)
}

func (s *Server) handler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write([]byte("ok")) })
	mux.HandleFunc("GET /pods", s.pods)
	mux.HandleFunc("GET /containerLogs/{ns}/{pod}/{container}", s.logs)
	for _, uid := range []string{"", "/{uid}"} {
		mux.HandleFunc("/exec/{ns}/{pod}"+uid+"/{container}", s.exec)
		mux.HandleFunc("/attach/{ns}/{pod}"+uid+"/{container}", s.attach)
		mux.HandleFunc("/portForward/{ns}/{pod}"+uid, s.portForward)
		mux.HandleFunc("POST /run/{ns}/{pod}"+uid+"/{container}", s.run)
	}
	return authorize(mux)
}

// authorize lets in the API server and administrators.
func authorize(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.TLS == nil || len(r.TLS.VerifiedChains) == 0 {
			http.Error(w, "a client certificate of the cluster is needed", http.StatusUnauthorized)
			return
		}
		if who := r.TLS.VerifiedChains[0][0].Subject; !mayEnter(who.CommonName, who.Organization) {
			http.Error(w, fmt.Sprintf("%q may not speak to the agent; only the API server may", who.CommonName), http.StatusForbidden)
			return
		}
		next.ServeHTTP(w, r)
	})
}

// APIServerName is the common name of the API server's client certificate.
const APIServerName = "meshd-apiserver"

func mayEnter(name string, groups []string) bool {
	return name == APIServerName || slices.Contains(groups, "system:masters")
}

func (s *Server) pods(w http.ResponseWriter, _ *http.Request) {
	list := s.cfg.Pods.PodList()
	list.APIVersion, list.Kind = "v1", "PodList"
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(list)
}

// files are the certificate and the CA on disk.
type files struct {
	cert, key, ca string

	mu     sync.Mutex
	stamps [3]time.Time
	cfg    *tls.Config
}

// config is read anew when a file changed, and stays the old one when the new
// files cannot be read.
func (f *files) config(*tls.ClientHelloInfo) (*tls.Config, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	var stamps [3]time.Time
	for i, path := range []string{f.cert, f.key, f.ca} {
		if st, err := os.Stat(path); err == nil {
			stamps[i] = st.ModTime()
		}
	}
	if f.cfg != nil && stamps == f.stamps {
		return f.cfg, nil
	}
	cfg, err := f.read()
	switch {
	case err == nil:
		f.cfg, f.stamps = cfg, stamps
	case f.cfg == nil:
		return nil, err
	}
	return f.cfg, nil
}

func (f *files) read() (*tls.Config, error) {
	pair, err := tls.LoadX509KeyPair(f.cert, f.key)
	if err != nil {
		return nil, err
	}
	pem, err := os.ReadFile(f.ca)
	if err != nil {
		return nil, err
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(pem) {
		return nil, fmt.Errorf("%s holds no certificate", f.ca)
	}
	return &tls.Config{
		MinVersion: tls.VersionTLS12, Certificates: []tls.Certificate{pair}, NextProtos: []string{"http/1.1"},
		ClientAuth: tls.VerifyClientCertIfGiven, ClientCAs: pool,
	}, nil
}
