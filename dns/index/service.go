package index

import (
	"net/netip"
	"slices"

	"meshd.dev/pkg/mesh"
)

// service is one mesh.Service made ready for answering.
type service struct {
	*mesh.Service
	fqdn   string // "web.shop.svc.cluster.local."
	target string // of an ExternalName, "" when that is not a name

	vips4, vips6           []netip.Addr
	endpoints4, endpoints6 []endpoint // ready, in order of address, each once
	nodes                  []*node    // of Service.Endpoints, one each
}

// endpoint is an address that takes traffic, and where it runs.
type endpoint struct {
	addr netip.Addr
	node *node
}

func (x *Index) compile(s *mesh.Service) *service {
	c := &service{Service: s, fqdn: fqdn(s, x.zone), target: externalTarget(s.ExternalName)}
	c.nodes = make([]*node, len(s.Endpoints))
	for _, a := range s.ClusterIPs {
		if a = a.Unmap(); a.Is4() {
			c.vips4 = append(c.vips4, a)
		} else if a.IsValid() {
			c.vips6 = append(c.vips6, a)
		}
	}
	for i, e := range s.Endpoints {
		c.nodes[i] = x.nodes.get(e.Node)
		if !e.Ready || !e.Addr.IsValid() {
			continue
		}
		if a := e.Addr.Unmap(); a.Is4() {
			c.endpoints4 = append(c.endpoints4, endpoint{a, c.nodes[i]})
		} else {
			c.endpoints6 = append(c.endpoints6, endpoint{a.WithZone(""), c.nodes[i]})
		}
	}
	c.endpoints4, c.endpoints6 = unique(c.endpoints4), unique(c.endpoints6)
	return c
}

func fqdn(s *mesh.Service, zone string) string { return s.Name + "." + s.Namespace + ".svc." + zone }

func unique(eps []endpoint) []endpoint {
	slices.SortStableFunc(eps, func(a, b endpoint) int { return a.addr.Compare(b.addr) })
	return slices.Clip(slices.CompactFunc(eps, func(a, b endpoint) bool { return a.addr == b.addr }))
}

// ready reports whether any endpoint is.
func (s *service) ready() bool { return len(s.endpoints4)+len(s.endpoints6) > 0 }

// isNamed reports whether label names endpoint i: its hostname, or its
// address with dashes when it has none. dashed is the address label spells,
// if any.
func (s *service) isNamed(i int, label []byte, dashed netip.Addr) bool {
	e := &s.Endpoints[i]
	if !e.Ready || !e.Addr.IsValid() {
		return false
	}
	if isLabel(e.Hostname) {
		return equalFold(label, e.Hostname)
	}
	return dashed.IsValid() && e.Addr.Unmap().WithZone("") == dashed
}

// endpointName is the fully qualified name of endpoint i.
func (s *service) endpointName(i int) string {
	var buf [160]byte
	name := buf[:0]
	if e := &s.Endpoints[i]; isLabel(e.Hostname) {
		name = append(name, e.Hostname...)
	} else {
		name = appendDashed(name, e.Addr.Unmap().WithZone(""))
	}
	name = append(append(name, '.'), s.fqdn...)
	return string(name)
}
