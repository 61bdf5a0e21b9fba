package index

import (
	"net/netip"
	"slices"

	"meshd.dev/pkg/mesh"
)

// service is one mesh.Service made ready for answering. There are as many
// endpoints as there are pods, so it keeps no more of them than their numbers
// in Service.Endpoints.
type service struct {
	*mesh.Service
	fqdn   string // "web.shop.svc.cluster.local."
	target string // of an ExternalName, "" when that is not a name

	vips4, vips6   []netip.Addr
	ready4, ready6 []int32 // endpoints that take traffic, each address once
	nodes          []*node // of Service.Endpoints, one each
}

func (x *Index) compile(s *mesh.Service) *service {
	c := &service{Service: s, fqdn: fqdn(s, x.zone), target: externalTarget(s.ExternalName)}
	for _, a := range s.ClusterIPs {
		if a = a.Unmap(); a.Is4() {
			c.vips4 = append(c.vips4, a)
		} else if a.IsValid() {
			c.vips6 = append(c.vips6, a)
		}
	}
	c.nodes = make([]*node, len(s.Endpoints))
	order := make([]int32, 0, len(s.Endpoints))
	for i, e := range s.Endpoints {
		c.nodes[i] = x.nodes.get(e.Node)
		if e.Ready && e.Addr.IsValid() {
			order = append(order, int32(i))
		}
	}
	slices.SortStableFunc(order, func(a, b int32) int { return c.addr(a).Compare(c.addr(b)) })
	order = slices.CompactFunc(order, func(a, b int32) bool { return c.addr(a) == c.addr(b) })
	// Addresses of four octets sort before those of sixteen.
	six := 0
	for six < len(order) && c.addr(order[six]).Is4() {
		six++
	}
	order = slices.Clone(order)
	c.ready4, c.ready6 = order[:six:six], order[six:]
	return c
}

func fqdn(s *mesh.Service, zone string) string { return s.Name + "." + s.Namespace + ".svc." + zone }

// count of endpoints, ready or not.
func (s *service) count() int32 { return int32(len(s.Endpoints)) }

// addr is the address of endpoint i as it stands in a record.
func (s *service) addr(i int32) netip.Addr { return s.Endpoints[i].Addr.Unmap().WithZone("") }

// up reports whether the node of endpoint i is not down.
func (s *service) up(i int32) bool { return s.nodes[i].up() }

// ready reports whether any endpoint is.
func (s *service) ready() bool { return len(s.ready4)+len(s.ready6) > 0 }

// isNamed reports whether label names endpoint i: its hostname, or its
// address with dashes when it has none. dashed is the address label spells,
// if any.
func (s *service) isNamed(i int32, label []byte, dashed netip.Addr) bool {
	e := &s.Endpoints[i]
	if !e.Ready || !e.Addr.IsValid() {
		return false
	}
	if isLabel(e.Hostname) {
		return equalFold(label, e.Hostname)
	}
	return dashed.IsValid() && s.addr(i) == dashed
}

// endpointName is the fully qualified name of endpoint i.
func (s *service) endpointName(i int32) string {
	var buf [160]byte
	name := buf[:0]
	if e := &s.Endpoints[i]; isLabel(e.Hostname) {
		name = append(name, e.Hostname...)
	} else {
		name = appendDashed(name, s.addr(i))
	}
	name = append(append(name, '.'), s.fqdn...)
	return string(name)
}
