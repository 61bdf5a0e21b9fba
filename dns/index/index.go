// Package index holds the DNS records of a cluster: what the services, the
// endpoints and the namespaces of a mesh.State are called
// (github.com/kubernetes/dns, docs/specification.md v1.1.0).
//
// It knows names and addresses, no sockets and no CoreDNS. One writer calls
// Apply and SetNode; any number of readers call Lookup or Answer at any time
// and never wait for the writer. Records are not computed ahead: an answer is
// assembled from the state when it is asked for, so that a node's death is one
// store and not ten thousand.
package index

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/miekg/dns"

	"meshd.dev/pkg/mesh"
)

// SpecVersion is the version of the DNS specification the records follow.
const SpecVersion = "1.1.0"

// MaxZone is the longest zone in octets of its wire format for which every
// name below it still fits into 255: three labels of 63 and "svc" come first.
const MaxZone = 255 - 3*64 - 4

// Config is what an Index needs to know before the first State.
type Config struct {
	// Zone is the cluster domain, "cluster.local" by default.
	Zone string
}

// Index answers questions about one State at a time. Make one with New.
type Index struct {
	zone       string // "cluster.local."
	wire       []byte // zone in wire format
	zoneLabels int

	services    table
	reverse     reverse
	namespaces  atomic.Pointer[map[string]struct{}]
	nameservers atomic.Pointer[[]netip.Addr]
	ready       atomic.Bool
	serial      atomic.Uint32
	turn        atomic.Uint32 // where the next list of endpoints starts

	mu    sync.Mutex // one writer at a time; guards last and nodes
	last  *mesh.State
	nodes nodes
}

// New makes an index that answers NotReady until the first Apply.
func New(c Config) (*Index, error) {
	if c.Zone == "" {
		c.Zone = "cluster.local"
	}
	zone := strings.ToLower(dns.Fqdn(c.Zone))
	wire, err := Fold(nil, zone)
	if err != nil {
		return nil, fmt.Errorf("cluster domain %q: %w", c.Zone, err)
	}
	if len(wire) > MaxZone {
		return nil, fmt.Errorf("cluster domain %q: %d octets, at most %d leave room for the names below it", c.Zone, len(wire), MaxZone)
	}
	if zone == "." {
		return nil, fmt.Errorf("cluster domain %q: want a domain such as cluster.local, not the root", c.Zone)
	}
	x := &Index{zone: zone, wire: wire, zoneLabels: dns.CountLabel(zone)}
	x.nodes.byName = map[string]*node{}
	x.services.init()
	x.reverse.init()
	x.namespaces.Store(&map[string]struct{}{})
	x.nameservers.Store(&[]netip.Addr{})
	// Serials go up across restarts as long as there is less than one change
	// a second on average.
	x.serial.Store(uint32(time.Now().Unix()))
	return x, nil
}

// Zone is the cluster domain in lower case with the dot at the end.
func (x *Index) Zone() string { return x.zone }

// Ready reports whether a State was applied; before, nothing can be said
// about any name.
func (x *Index) Ready() bool { return x.ready.Load() }

// Serial counts the changes; it is the serial of the SOA record.
func (x *Index) Serial() uint32 { return x.serial.Load() }

// Len is the number of services known.
func (x *Index) Len() int { return x.services.len() }

// SetNameservers says on which addresses the zone is served: the addresses of
// ns.dns.<zone>.
func (x *Index) SetNameservers(addrs []netip.Addr) {
	addrs = slices.Clone(addrs)
	x.nameservers.Store(&addrs)
}

// SetNode marks a node as down, or as up again. Endpoints on a node that is
// down are left out of answers as long as the answer has others.
func (x *Index) SetNode(name string, down bool) {
	if name == "" {
		return
	}
	x.mu.Lock()
	defer x.mu.Unlock()
	x.mark(x.nodes.get(name), down)
}

// SetDown marks these nodes as down and all others as up.
func (x *Index) SetDown(names []string) {
	x.mu.Lock()
	defer x.mu.Unlock()
	for _, name := range names {
		x.mark(x.nodes.get(name), true)
	}
	for name, n := range x.nodes.byName {
		x.mark(n, slices.Contains(names, name))
	}
}

func (x *Index) mark(n *node, down bool) {
	if n != nil && n.down.Swap(down) != down {
		x.serial.Add(1)
	}
}

// Apply makes s the state that is answered from. It costs one comparison of
// pointers a service, and work only for those whose pointer changed. A nil
// State is ignored: the last known state is served for ever.
func (x *Index) Apply(s *mesh.State) {
	if s == nil {
		return
	}
	x.mu.Lock()
	defer x.mu.Unlock()
	if s == x.last {
		return
	}
	last := x.last
	if last == nil || x.nodes.crowded(len(s.Nodes)) {
		last = x.restart()
	}
	changes := diff(last.Services, s.Services)
	for i, c := range changes {
		if c.new != nil {
			changes[i].entry = x.compile(c.new)
		}
	}
	x.applyNamespaces(last, s, changes)
	for _, r := range x.services.apply(changes) {
		x.reverse.replace(r)
	}
	x.last = s
	if len(changes) > 0 || !x.ready.Load() {
		x.serial.Add(1)
	}
	x.ready.Store(true)
}

// restart forgets which nodes were ever named, and has every service compiled
// again, without taking any away: the diff that follows starts from a State
// that knows the names and none of the contents.
func (x *Index) restart() *mesh.State {
	x.nodes.forgetUp()
	known := &mesh.State{}
	if x.last != nil {
		for _, s := range x.last.Services {
			known.Services = append(known.Services, &mesh.Service{Namespace: s.Namespace, Name: s.Name})
		}
	}
	return known
}

// applyNamespaces publishes the namespaces of s: those it lists and those its
// services live in, for a service can be seen before its namespace is.
func (x *Index) applyNamespaces(last, s *mesh.State, changes []change) {
	moved := func(c change) bool { return c.old == nil || c.new == nil }
	if x.ready.Load() && slices.Equal(last.Namespaces, s.Namespaces) && !slices.ContainsFunc(changes, moved) {
		return
	}
	names := make(map[string]struct{}, len(s.Namespaces))
	for _, ns := range s.Namespaces {
		names[strings.ToLower(ns)] = struct{}{}
	}
	previous := ""
	for _, svc := range s.Services {
		if svc.Namespace != previous {
			previous = svc.Namespace
			names[strings.ToLower(previous)] = struct{}{}
		}
	}
	x.namespaces.Store(&names)
	x.serial.Add(1)
}

// change is one service of two States: added, replaced or removed.
type change struct {
	old, new *mesh.Service
	entry    *service // new, compiled
}

// diff walks two sorted lists of services and yields the differences by
// pointer, what was removed first.
func diff(old, new []*mesh.Service) []change {
	var removed, rest []change
	for len(old) > 0 || len(new) > 0 {
		switch {
		case len(old) > 0 && len(new) > 0 && old[0] == new[0]:
			old, new = old[1:], new[1:]
		case len(new) == 0 || len(old) > 0 && before(old[0], new[0]):
			removed = append(removed, change{old: old[0]})
			old = old[1:]
		case len(old) == 0 || before(new[0], old[0]):
			rest = append(rest, change{new: new[0]})
			new = new[1:]
		default:
			rest = append(rest, change{old: old[0], new: new[0]})
			old, new = old[1:], new[1:]
		}
	}
	return append(removed, rest...)
}

func before(a, b *mesh.Service) bool {
	if c := strings.Compare(a.Namespace, b.Namespace); c != 0 {
		return c < 0
	}
	return a.Name < b.Name
}
