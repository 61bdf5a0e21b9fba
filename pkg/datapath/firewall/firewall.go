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
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"meshd.dev/pkg/mesh"
)

// Config is all the table holds.
type Config struct {
	// Device of the tunnels. Whatever else begins with its name counts as one.
	Device string
	// PodLinks is what the names of the pods' host side links start with.
	PodLinks string
	// PodCIDRs of this node, MeshAddrs its addresses in them.
	PodCIDRs  []netip.Prefix
	MeshAddrs []netip.Addr
	// Cluster are the pod CIDRs of all nodes.
	Cluster []netip.Prefix
	// Direct are ranges outside of the cluster that see pods' own addresses,
	// not this node's.
	Direct []netip.Prefix
	// ServiceCIDRs are refused where no service takes the packet.
	ServiceCIDRs []netip.Prefix
	// Resolver are addresses on whose port 53 pods shall meet the resolver of
	// this node, which listens on its MeshAddrs, and for as long as it also
	// has a socket bound to the address itself.
	Resolver []netip.Addr
	// Groups of services, in a stable order. One that did not change keeps
	// its pointer: that is how a change costs what changed, not what there is.
	Groups []*Group
}

// Group is what belongs together and changes together: all that one
// Kubernetes service stands for. Immutable.
type Group struct {
	Services []Service
	// Local are the endpoints on this node: pods that may reach themselves
	// through a service.
	Local []netip.Addr
	// pod of this node, in groups the Table itself makes.
	pod *mesh.LocalPod
}

// services of all groups.
func (c Config) services(yield func(Service) bool) {
	for _, g := range c.Groups {
		for _, s := range g.Services {
			if !yield(s) {
				return
			}
		}
	}
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
	log  *slog.Logger
	pods *localPods

	port atomic.Uint32 // of the socket; 0 without one

	mu     sync.Mutex
	socket *socket // opened at first use; nil after an error
	// known is the table as it was at generation gen of the kernel's rules;
	// it is good as long as the generation is the same.
	known *table
	gen   uint32
	// last is the wish that became known, when it was ours.
	last *wish
	// flows are those to look for again, and when.
	flows   flows
	again   time.Time
	started bool
	// did is what the last Apply did, in one line, groups those it had.
	did    string
	groups []*Group
}

// Did says what the last Apply did with the same services and pods as the one
// before; empty for nothing.
func (t *Table) Did() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.did
}

// New makes a Table; nothing happens yet. pods, if not nil, lists the pods
// attached on this node, those that were attached first first: no other pod
// sends or receives a packet. It is asked each time after the rules were read.
func New(log *slog.Logger, pods func() ([]mesh.LocalPod, error)) *Table {
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	return &Table{log: log, pods: &localPods{read: pods}}
}

// Apply makes cfg so. When it returns a time, it wants to be called again
// then, to look once more for flows to endpoints that are gone.
func (t *Table) Apply(ctx context.Context, cfg Config) (again time.Time, err error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.did = ""
	defer func() {
		if err != nil {
			t.hangUp()
		}
	}()
	gen, err := t.refresh()
	if err != nil {
		return again, err
	}
	if cfg.Groups, err = t.pods.join(cfg.Groups); err != nil {
		return again, err
	}
	same := slices.Equal(cfg.Groups, t.groups)
	t.groups = cfg.Groups
	want, ops, err := t.changes(cfg)
	if err != nil {
		return again, err
	}
	if len(ops) > 0 {
		t.known, t.last = nil, nil // until it is known how this ends
		if err := t.socket.commit(ops, want.table); err != nil {
			return again, fmt.Errorf("commit %d changes, the first: %s: %w", len(ops), ops[0], err)
		}
		t.report(ops)
		if same {
			t.did = fmt.Sprintf("%d changes to table inet meshd, the first: %s", len(ops), short(ops[0].String()))
		}
		now, err := t.socket.generation()
		if err != nil {
			return again, err
		}
		if now == gen+1 { // nobody else's change came between
			t.known, t.gen, t.last = want.table, now, want
		}
	} else {
		t.known, t.last = want.table, want
	}
	return t.again, t.sweep(cfg, ops)
}

// changes from what is known to cfg. When the last wish is still true, only
// groups that differ are looked at.
func (t *Table) changes(cfg Config) (*wish, []op, error) {
	if t.last != nil && t.last.canFollow(cfg) {
		ops := t.last.follow(cfg)
		if !t.last.contested {
			return t.last, ops, nil
		}
		t.known, t.last = nil, nil // the two share a table, which is half changed now
		if _, err := t.refresh(); err != nil {
			return nil, nil, err
		}
	}
	want := newWish(cfg)
	return want, diff(want.table, t.known), nil
}

func (t *Table) report(ops []op) {
	for _, op := range ops {
		if t.log.Enabled(context.Background(), slog.LevelDebug) {
			t.log.Debug("firewall", "did", op.String())
		}
	}
	t.log.Info("firewall", "changes", len(ops), "first", short(ops[0].String()))
}

func short(s string) string {
	if len(s) > 200 {
		return s[:200] + "..."
	}
	return s
}

// Plan lists what Apply would do.
func (t *Table) Plan(cfg Config) ([]string, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if _, err := t.refresh(); err != nil {
		t.hangUp()
		return nil, err
	}
	groups, err := t.pods.join(cfg.Groups)
	if err != nil {
		return nil, err
	}
	cfg.Groups = groups
	var lines []string
	for _, op := range diff(newWish(cfg).table, t.known) {
		lines = append(lines, op.String())
	}
	return lines, nil
}

// refresh makes known true: the table is read only when the kernel's
// generation says that it may have changed.
func (t *Table) refresh() (gen uint32, err error) {
	if t.socket == nil {
		if t.socket, err = dial(); err != nil {
			return 0, err
		}
		t.port.Store(t.socket.port())
	}
	for try := 0; ; try++ {
		if gen, err = t.socket.generation(); err != nil {
			return 0, err
		}
		if t.known != nil && t.gen == gen {
			return gen, nil
		}
		t.last = nil
		have, err := t.socket.read()
		after, err2 := t.socket.generation()
		if err2 != nil {
			return 0, err2
		}
		if after != gen && try < 10 {
			continue // changed while we read
		}
		if err != nil {
			return 0, err
		}
		t.known, t.gen = have, gen
		return gen, nil
	}
}

// Echo reports whether an event of nfnetlink tells of what the Table itself
// has changed; port is what its header says.
func (t *Table) Echo(port uint32) bool {
	return port != 0 && t.port.Load() == port // 0: the kernel by itself
}

// Close gives back what Apply and Plan keep open.
func (t *Table) Close() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.hangUp()
}

func (t *Table) hangUp() {
	if t.socket != nil {
		t.port.Store(0)
		t.socket.close()
		t.socket = nil
	}
}
