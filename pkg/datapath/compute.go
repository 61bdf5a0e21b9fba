package datapath

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
	"time"

	"meshd.dev/pkg/datapath/firewall"
	"meshd.dev/pkg/datapath/path"
	"meshd.dev/pkg/datapath/route"
	"meshd.dev/pkg/datapath/wireguard"
	"meshd.dev/pkg/mesh"
)

// Options of Compute: what is not cluster state.
type Options struct {
	Device     string
	ListenPort int
	Services   bool
	// ServiceCIDRs and PodCIDRs of the whole cluster; empty: what the state
	// says.
	ServiceCIDRs, PodCIDRs []netip.Prefix
	// Direct: see Config.
	Direct []netip.Prefix
	// ClusterDNS are the addresses of the cluster's resolver that this node's
	// own one stands in for.
	ClusterDNS []netip.Addr
	Keepalive  time.Duration
	// PathMTU of the underlay route to an address; 0: no route.
	PathMTU func(netip.Addr) int
	// OwnAddresses are all of this machine's.
	OwnAddresses []netip.Addr
	// LinkMTU of the underlay, for when there is no peer.
	LinkMTU int
	// Paths that were chosen, by node.
	Paths map[string]path.Choice
	// Keys of this node; Second is the device that has the next one.
	Keys   wireguard.Keys
	Second string
	// OverSecond are the nodes to send to over the second device.
	OverSecond map[string]bool
	// PSK of two keys, ours and a node's. Nil: no pair has one.
	PSK func(node mesh.Node, own, peer mesh.Key) PSK
	// OnDevice reports whether a key is a peer of the device now.
	OnDevice func(mesh.Key) bool

	memo *memo
}

// PSK is the preshared key of two keys.
type PSK struct {
	Secret wireguard.Secret
	// Wait says why there shall be no tunnel between the keys yet.
	Wait string
	// Firm: not even the one that is there, without a preshared key.
	Firm bool
}

// Wish is what the kernel of one node shall look like.
type Wish struct {
	// PodCIDRs of this node.
	PodCIDRs  []netip.Prefix
	WireGuard wireguard.Config
	// Keys of the devices.
	Keys wireguard.Keys
	// Second device; nil: it shall not be there.
	Second   *wireguard.Config
	Route    route.Config
	Firewall firewall.Config
	// Targets are the peers to find paths to, Own the endpoints of this node.
	Targets []path.Target
	Own     []netip.AddrPort
	// Problems with single nodes, which are left out or have no tunnel; the
	// rest of the wish stands without them.
	Problems []Problem
}

// Problem with one node.
type Problem struct {
	Node, Reason, Next string
}

// Compute says what the kernel of node self shall look like for state. It is
// pure if opts.PathMTU is. It fails only when nothing sensible can be done:
// when the ranges of the cluster or of this very node cannot be.
//
// Two nodes may not have overlapping pod CIDRs or the same key. The later one
// is refused whole: self comes first, then the order of names.
func Compute(state *mesh.State, self string, opts Options) (Wish, error) {
	c, err := compute(state, self, opts)
	return c.wish, err
}

func compute(state *mesh.State, self string, opts Options) (computation, error) {
	me, _ := state.Node(self) // not there yet: a node without pod CIDRs
	c := computation{opts: opts, me: me, self: self, mtus: map[string]int{}, widths: map[int]int{}}
	if len(opts.ServiceCIDRs) == 0 {
		c.opts.ServiceCIDRs = state.ServiceCIDRs
	}
	if err := c.own(); err != nil {
		return computation{}, err
	}
	sound := c.sound(state)
	c.ranges(sound)
	nodes := c.accepted(state, sound)
	c.refused = len(c.wish.Problems) > 0
	c.settleSecond(nodes)
	for _, n := range nodes {
		c.addPeer(n)
	}
	c.settleMTU(c.widest())
	c.addOwn()
	c.addFirewall(state)
	return c, nil
}

type computation struct {
	opts    Options
	self    string
	me      mesh.Node
	cluster []netip.Prefix // pod CIDRs
	inside  []netip.Prefix // and service CIDRs
	refused bool           // a node clashes with another
	links   []link
	mtus    map[string]int // of the links, by node
	widths  map[int]int    // how many links have an MTU
	wish    Wish
}

// link to a peer.
type link struct {
	mtu       int             // of the underlay route to its endpoint; 0: no route
	found     int             // what may pass inside the tunnel, as was found; 0: as much as the route allows
	endpoints []path.Endpoint // with MTUs of the underlay
	routes    []route.Route
}

func (c *computation) problem(node, reason, next string) {
	c.wish.Problems = append(c.wish.Problems, Problem{node, reason, next})
}

// own says what is wrong with the configured ranges and with this node's.
func (c *computation) own() error {
	for _, p := range slices.Concat(c.opts.PodCIDRs, c.me.PodCIDRs) {
		if why := c.misplaced(p, c.me.Addresses, "this node"); why != "" {
			return fmt.Errorf("%s: choose pod CIDRs outside of services and of the machines' own network", why)
		}
	}
	return nil
}

// misplaced says why pods cannot have addresses out of p.
func (c *computation) misplaced(p netip.Prefix, machine []netip.Addr, name string) string {
	for _, s := range c.opts.ServiceCIDRs {
		if s.Overlaps(p) {
			return fmt.Sprintf("pod CIDR %s and service CIDR %s overlap: an address in both cannot be told apart", p, s)
		}
	}
	for _, a := range machine {
		if p.Contains(a) {
			return fmt.Sprintf("pod CIDR %s contains %s, the address of %s", p, a, name)
		}
	}
	return ""
}

// sound are the nodes whose pod CIDRs can be. Another node's that cannot is
// that node's own trouble, and shall not become everybody's.
func (c *computation) sound(state *mesh.State) []mesh.Node {
	sound := make([]mesh.Node, 0, len(state.Nodes))
	for _, n := range state.Nodes {
		why := ""
		for _, p := range n.PodCIDRs {
			why = cmp.Or(why, c.misplaced(p, n.Addresses, "that node"), c.misplaced(p, c.me.Addresses, "this one"))
		}
		if why != "" && n.Name != c.self {
			c.problem(n.Name, why, "delete its Node object, so that it gets another pod CIDR, and correct the range they are given from")
			continue
		}
		sound = append(sound, n)
	}
	return sound
}

// ranges are the pod CIDRs of the cluster: the configured ones and whatever
// nodes have outside of them.
func (c *computation) ranges(nodes []mesh.Node) {
	all := slices.Clone(c.opts.PodCIDRs)
	for _, n := range nodes {
		all = append(all, n.PodCIDRs...)
	}
	c.cluster = outermost(all)
	c.inside = slices.Concat(c.cluster, c.opts.ServiceCIDRs)
}

// claim of a node to a pod CIDR.
type claim struct {
	prefix netip.Prefix
	node   string
}

// accepted lists the other nodes that do not clash with an earlier one.
func (c *computation) accepted(state *mesh.State, sound []mesh.Node) []mesh.Node {
	var claims []claim
	keys, clash := c.owners(state), clashes(sound)
	accept := func(n mesh.Node) bool {
		if other, ok := twin(keys, n); ok {
			c.problem(n.Name, fmt.Sprintf("has the same public key as node %s", other),
				"one of the two machines is a copy of the other: delete wireguard.key in the state folder of the copy and restart meshd there")
			return false
		}
		if !clash {
			return true
		}
		for _, p := range n.PodCIDRs {
			for _, cl := range claims {
				if cl.prefix.Overlaps(p) {
					c.problem(n.Name, fmt.Sprintf("pod CIDR %s overlaps %s of node %s", p, cl.prefix, cl.node),
						"delete the Node object of one of the two, so that it gets another pod CIDR")
					return false
				}
			}
		}
		for _, p := range n.PodCIDRs {
			claims = append(claims, claim{p, n.Name})
		}
		return true
	}
	accept(c.me)
	var nodes []mesh.Node
	for _, n := range sound {
		if n.Name != c.self && accept(n) {
			nodes = append(nodes, n)
		}
	}
	return nodes
}

// clashes reports whether any two pod CIDRs overlap. Hardly ever: comparing
// each with each is left to when they do.
func clashes(nodes []mesh.Node) bool {
	var all []netip.Prefix
	for _, n := range nodes {
		all = append(all, n.PodCIDRs...)
	}
	slices.SortFunc(all, comparePrefix)
	for i := 1; i < len(all); i++ {
		if all[i-1].Overlaps(all[i]) {
			return true
		}
	}
	return false
}

// owners of keys: of two nodes with the same the first, and of a next key the
// node that has it as its current one.
func (c *computation) owners(state *mesh.State) map[mesh.Key]string {
	keys := map[mesh.Key]string{c.opts.Keys.Current: c.self, c.opts.Keys.Next: c.self, c.me.PublicKey: c.self}
	for _, of := range []func(mesh.Node) mesh.Key{func(n mesh.Node) mesh.Key { return n.PublicKey }, func(n mesh.Node) mesh.Key { return n.NextKey }} {
		for _, n := range state.Nodes {
			if _, taken := keys[of(n)]; !taken {
				keys[of(n)] = n.Name
			}
		}
	}
	return keys
}

// twin is another node that has one of the keys of n.
func twin(keys map[mesh.Key]string, n mesh.Node) (node string, found bool) {
	for _, k := range []mesh.Key{n.PublicKey, n.NextKey} {
		if other, ok := keys[k]; ok && !k.IsZero() && other != n.Name {
			return other, true
		}
	}
	return "", false
}

func (c *computation) addPeer(n mesh.Node) {
	c.wish.Route.Floor = append(c.wish.Route.Floor, n.PodCIDRs...)
	switch {
	case n.PublicKey.IsZero():
		c.problem(n.Name, "has not published a public key", "start meshd on it, or look there why it does not run")
		return
	case len(n.PodCIDRs) == 0:
		c.problem(n.Name, "has no pod CIDR yet", "look at the controller that assigns them: the range may be used up")
		return
	}
	choice := c.opts.Paths[n.Name]
	l, why := c.link(n, choice.Endpoint)
	if why != "" {
		c.problem(n.Name, why, "look at annotation "+mesh.AnnotationEndpoints+" of its Node object and at the routes of this machine")
	}
	peer := wireguard.Peer{Name: n.Name, Key: n.PublicKey, AllowedIPs: n.PodCIDRs, Keepalive: c.opts.Keepalive, Fresh: choice.Fresh, Anew: choice.Anew}
	if i := l.chosen(choice.Endpoint); i >= 0 {
		peer.Endpoint, l.mtu = l.endpoints[i].Addr, l.endpoints[i].MTU
	}
	if peer.Keepalive == 0 {
		peer.Keepalive = keepalives[choice.Keepalive]
	}
	second := c.addTunnels(n, peer)
	target := path.Target{Node: n.Name, Key: n.PublicKey, Published: n.Endpoints}
	if second {
		target.Key = newest(n)
	}
	for _, p := range n.PodCIDRs {
		src := c.source(p)
		l.routes = append(l.routes, route.Route{Dst: p, Src: src, Second: second, Node: n.Name})
		if src.IsValid() && !target.Remote.IsValid() {
			target.Remote = mesh.MeshAddr(p)
		}
	}
	l.found = choice.MTU
	c.links, c.wish.Targets = append(c.links, l), append(c.wish.Targets, target)
	c.mtus[n.Name] = l.mtu
	c.widths[l.mtu]++
}

// keepalives: behind address translators what the inventors of WireGuard
// recommend.
var keepalives = map[path.Keepalive]time.Duration{path.Undecided: wireguard.KeepaliveAsIs, path.Off: 0, path.On: 25 * time.Second}

// link to n: the endpoints there is a route to.
// Addresses inside the mesh are never endpoints: no tunnel in the tunnel.
func (c *computation) link(n mesh.Node, chosen netip.AddrPort) (l link, why string) {
	if len(n.Endpoints) == 0 {
		why = "has not published an endpoint"
	}
	candidates := n.Endpoints
	if chosen.IsValid() && !slices.Contains(candidates, chosen) { // where it called from
		candidates = append([]netip.AddrPort{chosen}, candidates...)
	}
	for _, e := range candidates {
		if p, ok := covering(c.inside, e.Addr()); ok {
			why = cmp.Or(why, fmt.Sprintf("endpoint %s is inside the cluster's own range %s", e, p))
		} else if mtu := c.opts.PathMTU(e.Addr()); mtu > 0 {
			l.endpoints = append(l.endpoints, path.Endpoint{Addr: e, MTU: mtu})
		} else {
			why = cmp.Or(why, fmt.Sprintf("no route to endpoint %s", e))
		}
	}
	if len(l.endpoints) == 0 {
		return l, why
	}
	return l, ""
}

// chosen is the index of the endpoint to use: the one named, else the first;
// -1 without any.
func (l link) chosen(a netip.AddrPort) int {
	i := slices.IndexFunc(l.endpoints, func(e path.Endpoint) bool { return e.Addr == a })
	return min(max(i, 0), len(l.endpoints)-1)
}

// source is our mesh address of the family of p.
func (c *computation) source(p netip.Prefix) netip.Addr {
	for _, a := range c.me.MeshAddrs() {
		if a.Is4() == p.Addr().Is4() {
			return a
		}
	}
	return netip.Addr{}
}

// widest of the paths; 0: none.
func (c *computation) widest() int {
	widest := 0
	for mtu, links := range c.widths {
		if links > 0 {
			widest = max(widest, mtu)
		}
	}
	return widest
}

// settleMTU: the device takes what fits the widest path, each route what fits
// its own; IPv6 allows nothing below 1280.
func (c *computation) settleMTU(widest int) {
	device := max(cmp.Or(widest, c.opts.LinkMTU, 1500)-mesh.TunnelOverhead, mesh.MinMTU)
	c.wish.WireGuard.MTU = device
	if c.wish.Second != nil {
		c.wish.Second.MTU = device
	}
	fit := func(underlay int) int {
		mtu := underlay - mesh.TunnelOverhead
		if underlay == 0 || mtu >= device {
			return device
		}
		return max(mtu/16*16, 576) // packets are filled up to a multiple of 16 as long as the device takes it
	}
	for i, l := range c.links {
		mtu := fit(l.mtu)
		if l.found > 0 {
			mtu = min(mtu, l.found)
		}
		for _, r := range l.routes {
			r.MTU = mtu
			if r.Dst.Addr().Is6() {
				r.MTU = max(mtu, mesh.MinMTU)
			}
			c.wish.Route.Routes = append(c.wish.Route.Routes, r)
		}
		for _, e := range l.endpoints {
			if slices.Contains(c.wish.Targets[i].Published, e.Addr) {
				c.wish.Targets[i].Endpoints = append(c.wish.Targets[i].Endpoints, path.Endpoint{Addr: e.Addr, MTU: fit(e.MTU)})
			}
		}
	}
}

func (c *computation) addOwn() {
	c.wish.PodCIDRs = c.me.PodCIDRs
	c.wish.Own = slices.Clone(c.me.Endpoints)
	for _, a := range c.opts.OwnAddresses {
		c.wish.Own = append(c.wish.Own, netip.AddrPortFrom(a, uint16(c.opts.ListenPort)))
	}
	c.wish.WireGuard.ListenPort, c.wish.Keys = c.opts.ListenPort, c.opts.Keys
	r := &c.wish.Route
	r.Device, r.Second = c.opts.Device, c.opts.Second
	r.Addrs = c.me.MeshAddrs()
	r.Floor = append(r.Floor, c.me.PodCIDRs...)
	r.Floor = append(r.Floor, c.cluster...)
	slices.SortFunc(r.Floor, comparePrefix)
	r.Floor = slices.Compact(r.Floor)
	if !c.opts.Services {
		return
	}
	for _, p := range c.opts.ServiceCIDRs {
		if src := c.source(p); src.IsValid() {
			r.Routes = append(r.Routes, route.Route{Dst: p, Src: src, MTU: c.wish.WireGuard.MTU})
		}
	}
}

func (c *computation) addFirewall(state *mesh.State) {
	f := &c.wish.Firewall
	f.Device, f.PodLinks = c.opts.Device, mesh.PodLinkPrefix
	f.PodCIDRs, f.MeshAddrs, f.Cluster = c.me.PodCIDRs, c.me.MeshAddrs(), c.cluster
	f.Direct, f.Resolver = c.opts.Direct, c.opts.ClusterDNS
	if !c.opts.Services {
		return
	}
	f.ServiceCIDRs = c.opts.ServiceCIDRs
	f.Groups = c.opts.memo.groups(state.Services, func(s *mesh.Service) *firewall.Group { return groupOf(s, c.self) })
}

// memo keeps the groups of services that did not change, which a State says
// by keeping their pointers. A nil memo keeps nothing.
type memo struct {
	services []*mesh.Service
	made     []*firewall.Group
}

func (m *memo) groups(services []*mesh.Service, of func(*mesh.Service) *firewall.Group) []*firewall.Group {
	var old memo
	if m != nil {
		old = *m
	}
	made := make([]*firewall.Group, len(services))
	same := func(i, j int) bool {
		if services[i] != old.services[j] {
			return false
		}
		made[i] = old.made[j]
		return true
	}
	from, to, oldTo := 0, len(services), len(old.services)
	for from < min(to, oldTo) && same(from, from) {
		from++
	}
	for to > from && oldTo > from && same(to-1, oldTo-1) {
		to, oldTo = to-1, oldTo-1
	}
	rest := make(map[*mesh.Service]*firewall.Group, oldTo-from)
	for j := from; j < oldTo; j++ {
		rest[old.services[j]] = old.made[j]
	}
	for i := from; i < to; i++ {
		if made[i] = rest[services[i]]; made[i] == nil {
			made[i] = of(services[i])
		}
	}
	if m != nil {
		*m = memo{services, made}
	}
	return made
}

// groupOf a service: what stands for it on this node.
func groupOf(s *mesh.Service, self string) *firewall.Group {
	g := &firewall.Group{}
	if len(s.ClusterIPs) == 0 {
		return g
	}
	usable := usableOf(s, self)
	for _, port := range s.Ports {
		backends := targets(usable, port)
		for _, ip := range s.ClusterIPs {
			add := func(addr netip.Addr, number uint16) {
				g.Services = append(g.Services, firewall.Service{
					Addr: addr, Protocol: port.Protocol, Port: number, Sticky: s.AffinityTimeout > 0, Endpoints: sameFamily(backends, ip)})
			}
			add(ip, port.Port)
			if port.NodePort != 0 && ip.Is4() {
				add(netip.IPv4Unspecified(), port.NodePort)
			} else if port.NodePort != 0 {
				add(netip.IPv6Unspecified(), port.NodePort)
			}
		}
	}
	for _, e := range usable {
		if e.Node == self {
			g.Local = append(g.Local, e.Addr)
		}
	}
	return g
}

// usableOf lists the endpoints to use: the ready ones; without any, those that still answer
// while they terminate (KEP-1669). internalTrafficPolicy Local takes only
// this node's, and none of them means the service is refused here.
func usableOf(s *mesh.Service, self string) []mesh.Endpoint {
	var ready, serving []mesh.Endpoint
	for _, e := range s.Endpoints {
		if s.LocalOnly && e.Node != self {
			continue
		}
		switch {
		case e.Ready:
			ready = append(ready, e)
		case e.Serving && e.Terminating:
			serving = append(serving, e)
		}
	}
	if len(ready) > 0 {
		return ready
	}
	return serving
}

// targets are the addresses and ports behind one port of a service.
func targets(endpoints []mesh.Endpoint, port mesh.ServicePort) []netip.AddrPort {
	var list []netip.AddrPort
	for _, e := range endpoints {
		for _, p := range e.Ports {
			if p.Name == port.Name && p.Protocol == port.Protocol && p.Port != 0 {
				list = append(list, netip.AddrPortFrom(e.Addr, p.Port))
			}
		}
	}
	slices.SortFunc(list, netip.AddrPort.Compare)
	return slices.Compact(list)
}

func sameFamily(list []netip.AddrPort, as netip.Addr) []netip.AddrPort {
	var out []netip.AddrPort
	for _, t := range list {
		if t.Addr().Is4() == as.Is4() {
			out = append(out, t)
		}
	}
	return out
}

// outermost sorts ps and drops those inside another.
func outermost(ps []netip.Prefix) []netip.Prefix {
	ps = slices.Clone(ps)
	for i, p := range ps {
		ps[i] = p.Masked()
	}
	slices.SortFunc(ps, comparePrefix)
	var out []netip.Prefix
	for _, p := range ps {
		if n := len(out); n > 0 && out[n-1].Overlaps(p) {
			continue // sorted: the wider one came first
		}
		out = append(out, p)
	}
	return out
}

func comparePrefix(a, b netip.Prefix) int {
	return cmp.Or(a.Addr().Compare(b.Addr()), cmp.Compare(a.Bits(), b.Bits()))
}

func covering(ps []netip.Prefix, a netip.Addr) (netip.Prefix, bool) {
	for _, p := range ps {
		if p.Contains(a) {
			return p, true
		}
	}
	return netip.Prefix{}, false
}
