package apiserver

import (
	"context"
	"errors"

	"k8s.io/client-go/rest"
)

// Server is one API server.
type Server struct {
	cfg      Config
	ready    chan struct{}
	loopback *rest.Config
}

// New reads the files cfg names, opens the store and the port, and builds the
// server. Nothing is answered before Run.
func New(ctx context.Context, cfg Config) (*Server, error) {
	cfg.Defaults()
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	return &Server{cfg: cfg, ready: make(chan struct{})}, nil
}

// Run serves until ctx ends, then closes the port and the store. It may be
// called once.
func (s *Server) Run(ctx context.Context) error {
	return errors.New("apiserver: not built yet")
}

// Ready is closed when /readyz says yes.
func (s *Server) Ready() <-chan struct{} { return s.ready }

// Loopback is the configuration of a client with all rights, over HTTPS to
// this server. The caller gets a copy.
func (s *Server) Loopback() *rest.Config { return rest.CopyConfig(s.loopback) }
