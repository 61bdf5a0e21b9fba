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
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/miekg/dns"

	mesh "meshd.dev/dns"
	"meshd.dev/dns/index"
	"meshd.dev/pkg/reconcile"
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
	// are read again every few seconds.
	ResolvConf []string
	// Upstreams are asked in place of what ResolvConf says.
	Upstreams []netip.AddrPort
	// TTL of records of the cluster in whole seconds; 5 s unless set.
	TTL time.Duration
	// NoPods leaves out the names of pods.
	NoPods bool

	// Clients are the networks that may ask; others get no answer. All may
	// when it is empty. SetClients changes them.
	Clients []netip.Prefix

	Board *status.Board
	Log   *slog.Logger
}

// The checks on the Board.
const (
	checkListening = "dns/listening"
	checkUpstream  = "dns/upstream"
	checkRecords   = "dns/records"
)

// Server answers DNS questions on the addresses of a node. Make one with New.
type Server struct {
	cfg     Config
	options index.Options
	loop    *reconcile.Loop
	// waiting are the questions over UDP that are in the chain, conns the open
	// connections.
	waiting, conns *clients

	mu     sync.RWMutex
	listen []netip.Addr
	chain  *chain // answers what the index alone cannot; nil before Run

	// clients are the networks that may ask; never nil.
	clients atomic.Pointer[[]netip.Prefix]

	closing sync.WaitGroup // chains that were replaced

	// The rest belongs to the loop.
	sockets   map[netip.Addr]*socket
	upstreams []netip.AddrPort
}

// How many questions may wait for an upstream at a time. More are dropped, and
// their clients ask again.
const (
	maxWaiting          = 1024
	maxWaitingPerClient = 256
)

// New checks c; nothing is opened before Run.
func New(c Config) (*Server, error) {
	if c.Index == nil {
		return nil, errors.New("dns server: no index")
	}
	if c.Zone != "" && strings.ToLower(dns.Fqdn(c.Zone)) != c.Index.Zone() {
		return nil, fmt.Errorf("dns server: cluster domain %s, but the index holds %s", c.Zone, c.Index.Zone())
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	if c.Port == 0 {
		c.Port = 53
	}
	if len(c.ResolvConf) == 0 {
		c.ResolvConf = []string{"/run/systemd/resolve/resolv.conf", "/etc/resolv.conf"}
	}
	if c.TTL == 0 {
		c.TTL = mesh.DefaultTTL * time.Second
	}
	if c.TTL < 0 || c.TTL > time.Hour {
		return nil, fmt.Errorf("dns server: ttl %s: want at most an hour", c.TTL)
	}
	s := &Server{
		cfg:     c,
		options: index.Options{TTL: uint32(c.TTL / time.Second), NoPods: c.NoPods, MaxSize: maxUDP},
		waiting: newClients(maxWaiting, maxWaitingPerClient),
		conns:   newClients(maxConns, maxConnsPerClient),
		sockets: map[netip.Addr]*socket{},
	}
	s.loop = reconcile.New(reconcile.Config{
		Name: "dns", Do: s.reconcile, Resync: 3 * time.Second, Log: c.Log,
	})
	s.SetListen(c.Listen)
	s.SetClients(c.Clients)
	return s, nil
}

// SetClients lets networks ask and no others; all when it is empty.
func (s *Server) SetClients(networks []netip.Prefix) {
	networks = slices.Clone(networks)
	s.clients.Store(&networks)
}

// SetListen makes the server answer on addrs and on no others. Addresses that
// no device has are fine: the server answers there once one has.
func (s *Server) SetListen(addrs []netip.Addr) {
	s.mu.Lock()
	s.listen = slices.Clone(addrs)
	s.mu.Unlock()
	s.cfg.Index.SetNameservers(addrs)
	s.loop.Kick()
}

// serves reports whether a client may ask.
func (s *Server) serves(a netip.Addr) bool {
	networks := *s.clients.Load()
	if len(networks) == 0 {
		return true
	}
	a = a.Unmap().WithZone("")
	return slices.ContainsFunc(networks, func(p netip.Prefix) bool { return p.Contains(a) })
}

func (s *Server) wanted() []netip.Addr {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return slices.Clone(s.listen)
}

// Run answers until ctx ends. When it returns, the sockets are closed and the
// questions that were under way are answered.
func (s *Server) Run(ctx context.Context) error {
	err := s.loop.Run(ctx)
	for addr, sock := range s.sockets {
		sock.close()
		delete(s.sockets, addr)
	}
	s.replace(nil)
	s.closing.Wait()
	return err
}

// reconcile makes upstreams and sockets what they should be. Upstreams come
// first, so that a socket never answers without a chain behind it.
func (s *Server) reconcile(context.Context) error {
	s.reportRecords()
	upstreamErr := s.reconcileUpstreams()
	if s.current() == nil {
		return upstreamErr
	}
	return errors.Join(upstreamErr, s.reconcileSockets())
}

func (s *Server) reportRecords() {
	if s.cfg.Index.Ready() {
		s.cfg.Board.OK(checkRecords)
		return
	}
	s.cfg.Board.Fail(checkRecords, "no state of the cluster was loaded yet; names of the cluster answer SERVFAIL",
		"see whether the API server can be reached from this node")
}
