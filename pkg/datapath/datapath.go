// Package datapath makes this node's kernel carry pod traffic: tunnels to the
// other nodes, routes into them, and the firewall with the services.
//
// Compute turns cluster state into a Wish, purely. A Datapath makes the wish
// true and keeps it true: it looks at the kernel, compares, and does only the
// difference. The packages below it do one subsystem each: wireguard, route,
// firewall.
//
// Order of an Apply: firewall first (it fails closed), then the blackhole
// routes, then the device and its peers, then addresses and routes into it.
// Nothing is taken away when the daemon stops; a starting one adopts what it
// finds.
package datapath

import (
	"cmp"
	"context"
	"errors"
	"log/slog"
	"net/netip"
	"time"

	"meshd.dev/pkg/mesh"
	"meshd.dev/pkg/status"
)

// Source of cluster state. State is nil until it is known in full.
type Source interface {
	State() *mesh.State
}

// Config of a Datapath. Node, StateDir and Source are required.
type Config struct {
	// Node is the name of this node.
	Node string
	// StateDir holds wireguard.key, the private key of this node.
	StateDir string
	// RunDir holds the log of the userspace process.
	RunDir string
	// Device of the tunnels. Default mesh.Device.
	Device string
	// ListenPort of the tunnels, UDP. Default mesh.ListenPort.
	ListenPort int
	// Services makes this node translate service addresses.
	Services bool
	// ServiceCIDRs, when known, are routed to Device so that service
	// addresses work on nodes without a default route and never leave in
	// clear. Optional.
	ServiceCIDRs []netip.Prefix
	// PodCIDRs of the whole cluster; empty: the union of the nodes'.
	PodCIDRs []netip.Prefix
	// Keepalive of every peer; 0 sends none. Needed by nodes behind NAT.
	Keepalive time.Duration
	// SpawnUserspace is the command that serves a userspace device; the name
	// of the device is appended: {"/usr/local/bin/meshd", "wireguard"}. Used
	// where the kernel has no WireGuard. Empty: kernel only.
	SpawnUserspace []string
	Source         Source
	// OnReady is called when device, routes and firewall stand and this node
	// has pod CIDRs, and again whenever the Network changes. An error is
	// retried.
	OnReady func(Network) error
	Board   *status.Board
	Log     *slog.Logger
}

// Network is what the CNI plugin of this node needs to attach pods.
type Network struct {
	PodCIDRs []netip.Prefix
	MTU      int
}

func (c *Config) setDefaults() error {
	c.Device = cmp.Or(c.Device, mesh.Device)
	c.ListenPort = cmp.Or(c.ListenPort, mesh.ListenPort)
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	switch {
	case c.Node == "":
		return errors.New("datapath: no node name")
	case c.StateDir == "":
		return errors.New("datapath: no state folder")
	case c.Source == nil:
		return errors.New("datapath: no source of state")
	}
	return nil
}

// Datapath keeps this node's kernel as the cluster state wants it. Use New.
type Datapath struct {
	cfg Config
}

// New loads or makes the private key; nothing in the kernel changes yet.
func New(cfg Config) (*Datapath, error) {
	if err := cfg.setDefaults(); err != nil {
		return nil, err
	}
	return &Datapath{cfg: cfg}, nil
}

// Kick says that the state changed. It never blocks.
func (d *Datapath) Kick() {}

// Run applies the state, again on every Kick and whenever somebody else
// changes what is ours, until ctx ends. The device and all rules stay.
func (d *Datapath) Run(ctx context.Context) error { <-ctx.Done(); return nil }

// PublicKey of this node; others need it before they can talk to us.
func (d *Datapath) PublicKey() mesh.Key { return mesh.Key{} }

// MTU of the device as last applied; 0 before.
func (d *Datapath) MTU() int { return 0 }

// Tunnels as they are now, a line a peer, sorted by name.
func (d *Datapath) Tunnels() []status.Tunnel { return nil }

// Plan lists what Run would do now, as the commands a person would type.
// Nothing changes.
func (d *Datapath) Plan() ([]string, error) { return nil, nil }
