// Package firewall keeps the nft table "inet meshd": services, masquerade,
// and the rules by which pod traffic is neither spoofed nor sent in clear.
//
// The table is ours whole; no other table is touched, and no port is opened.
// Its chains are fixed; whatever varies sits in sets and maps. The only
// chains that come and go are one per number of endpoints: the map svc4 sends
// a service address to the chain for its number K of endpoints, which appends
// a random slot below K to the key and finds the endpoint in the map ep4. So
// a service costs a map element, an endpoint another, and neither a chain.
//
// Everything goes to the kernel in one transaction over netlink, so there is
// never half a table; nothing is sent when nothing changed.
package firewall

import (
	"context"
	"fmt"
	"log/slog"
	"net/netip"
	"sync"
	"time"

	"meshd.dev/pkg/mesh"
)

// Config is all the table holds.
type Config struct {
	// Device of the tunnels.
	Device string
	// PodLinks is what the names of the pods' host side links start with.
	PodLinks string
	// PodCIDRs of this node, MeshAddrs its addresses in them.
	PodCIDRs  []netip.Prefix
	MeshAddrs []netip.Addr
	// Cluster are the pod CIDRs of all nodes.
	Cluster []netip.Prefix
	// ServiceCIDRs are refused where no service takes the packet.
	ServiceCIDRs []netip.Prefix
	Services     []Service
	// Local are the endpoints of services on this node: pods that may reach
	// themselves through a service.
	Local []netip.Addr
}

// Service is one address and port that stands for Endpoints.
type Service struct {
	// Addr of the service; unspecified (0.0.0.0 or ::) for a node port.
	Addr     netip.Addr
	Protocol mesh.Protocol
	Port     uint16
	// Sticky sends a client address to the same endpoint as long as the
	// endpoints stay the same.
	Sticky bool
	// Endpoints of the family of Addr, sorted. None: the service is refused.
	Endpoints []netip.AddrPort
}

// Table is the firewall of this node. Use New.
type Table struct {
	log *slog.Logger

	mu sync.Mutex
	// known is the table as it was at generation gen of the kernel's rules;
	// it is good as long as the generation is the same.
	known *table
	gen   uint32
	// flows are those to look for again, and when.
	flows   flows
	again   time.Time
	started bool
}

// New makes a Table; nothing happens yet.
func New(log *slog.Logger) *Table {
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	return &Table{log: log}
}

// Apply makes cfg so. When it returns a time, it wants to be called again
// then, to look once more for flows to endpoints that are gone.
func (t *Table) Apply(ctx context.Context, cfg Config) (again time.Time, err error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	want := wish(cfg)
	have, gen, err := t.current()
	if err != nil {
		return again, err
	}
	ops := diff(want, have)
	if len(ops) > 0 {
		t.known = nil
		if err := commit(ops, want); err != nil {
			return again, fmt.Errorf("commit %d changes, the first: %s: %w", len(ops), ops[0], err)
		}
		for _, op := range ops {
			t.log.Debug("firewall", "did", op.String())
		}
		t.log.Info("firewall", "changes", len(ops), "first", ops[0].String())
		if now, err := generation(); err == nil && now == gen+1 { // nobody else's change came between
			t.known, t.gen = want, now
		}
	}
	return t.again, t.sweep(cfg, ops)
}

// Plan lists what Apply would do.
func (t *Table) Plan(cfg Config) ([]string, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	have, _, err := t.current()
	if err != nil {
		return nil, err
	}
	var lines []string
	for _, op := range diff(wish(cfg), have) {
		lines = append(lines, op.String())
	}
	return lines, nil
}

// current is the table in the kernel, read only when the kernel's generation
// says that it may have changed.
func (t *Table) current() (*table, uint32, error) {
	for try := 0; ; try++ {
		gen, err := generation()
		if err != nil {
			return nil, 0, err
		}
		if t.known != nil && t.gen == gen {
			return t.known, gen, nil
		}
		have, err := read()
		after, err2 := generation()
		if err2 != nil {
			return nil, 0, err2
		}
		if after != gen && try < 10 {
			continue // changed while we read
		}
		if err != nil {
			return nil, 0, err
		}
		t.known, t.gen = have, gen
		return have, gen, nil
	}
}
