package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"time"

	"k8s.io/client-go/rest"

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
	// ClusterDNS gives the resolver pods use, at the time a pod starts.
	ClusterDNS func() []netip.Addr
	// ClusterDomain defaults to cluster.local.
	ClusterDomain string
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
	if c.ClusterDNS == nil {
		c.ClusterDNS = func() []netip.Addr { return nil }
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
	cfg Config
}

// New checks cfg and makes an Agent; Run starts it.
func New(cfg Config) (*Agent, error) {
	cfg.defaults()
	if err := cfg.validate(); err != nil {
		return nil, err
	}
	return &Agent{cfg: cfg}, nil
}

// Run keeps the node registered and its pods running until ctx ends. Pods go
// on running when it returns; the next Run adopts them.
func (a *Agent) Run(ctx context.Context) error {
	<-ctx.Done()
	return nil
}
