package cni

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"

	"golang.org/x/sys/unix"

	"meshd.dev/pkg/cni/rtnl"
	"meshd.dev/pkg/mesh"
)

// The pod's default routes go through these. Nobody has them: permanent
// neighbour entries give them the MAC of the host's end.
var (
	gateway4 = netip.MustParseAddr("169.254.1.1")
	gateway6 = netip.MustParseAddr("fe80::1")

	default4 = netip.PrefixFrom(netip.IPv4Unspecified(), 0)
	default6 = netip.PrefixFrom(netip.IPv6Unspecified(), 0)
)

// hostMAC is the same on every host's end. The links are not bridged, and so
// nothing ever compares two.
var hostMAC = rtnl.MAC{0x0a, 'm', 'e', 's', 'h', 1}

// attachment is everything there is to one pod's interface, as a value: what
// ADD makes and CHECK looks for.
type attachment struct {
	hostLink  string
	podLink   string
	podMAC    rtnl.MAC
	mtu       int
	addresses []netip.Addr
	// defaults are the default routes to add: those the pod has not got
	// already through another interface.
	defaults []netip.Prefix
	alias    string
}

func (a attachment) has6() bool { return slices.ContainsFunc(a.addresses, netip.Addr.Is6) }

func hostPrefix(a netip.Addr) netip.Prefix { return netip.PrefixFrom(a, a.BitLen()) }

func gateway(a netip.Addr) (netip.Addr, netip.Prefix) {
	if a.Is4() {
		return gateway4, default4
	}
	return gateway6, default6
}

func (a attachment) veth(netnsFD int) rtnl.VethAdd {
	return rtnl.VethAdd{
		Name: a.hostLink, PeerName: a.podLink,
		MAC: hostMAC, PeerMAC: a.podMAC,
		MTU: a.mtu, PeerNetns: netnsFD,
	}
}

// hostUp makes the host's end deaf to what is not for it, then ready.
func (a attachment) hostUp(index int) []rtnl.Op {
	return []rtnl.Op{
		rtnl.LinkSet{Index: index, Name: a.hostLink, NoLinkLocal: true, StrictIPv4: true, Alias: a.alias},
		rtnl.LinkSet{Index: index, Name: a.hostLink, Up: true},
	}
}

const loopback = 1 // LOOPBACK_IFINDEX, in every namespace

// pod is everything inside the pod's namespace. The link-local address is
// added by hand, because the kernel's own takes a second to be usable.
func (a attachment) pod(index int) []rtnl.Op {
	ops := []rtnl.Op{
		rtnl.LinkSet{Index: loopback, Name: "lo", Up: true},
		rtnl.LinkSet{Index: index, Name: a.podLink, NoLinkLocal: a.has6()},
		rtnl.LinkSet{Index: index, Name: a.podLink, Up: true},
	}
	if a.has6() {
		ops = append(ops, rtnl.AddrAdd{Prefix: linkLocal(a.podMAC), Index: index, Name: a.podLink})
	}
	for _, addr := range a.addresses {
		gw, all := gateway(addr)
		ops = append(ops,
			rtnl.AddrAdd{Prefix: hostPrefix(addr), Index: index, Name: a.podLink},
			rtnl.NeighAdd{Addr: gw, MAC: hostMAC, Index: index, Name: a.podLink})
		if slices.Contains(a.defaults, all) {
			ops = append(ops, rtnl.RouteAdd{Dst: all, Via: gw, Index: index, Name: a.podLink, Protocol: unix.RTPROT_BOOT})
		}
	}
	return ops
}

// reach makes the pod reachable. It comes last: a host route means that
// everything before it stands.
func (a attachment) reach(index int) []rtnl.Op {
	var neighs, routes []rtnl.Op
	for _, addr := range a.addresses {
		neighs = append(neighs, rtnl.NeighAdd{Addr: addr, MAC: a.podMAC, Index: index, Name: a.hostLink})
		routes = append(routes, rtnl.RouteAdd{Dst: hostPrefix(addr), Index: index, Name: a.hostLink, Protocol: mesh.PodRouteProtocol})
	}
	return append(neighs, routes...)
}

// linkLocal is the address the kernel would make of a MAC (RFC 4291 appendix A).
func linkLocal(m rtnl.MAC) netip.Prefix {
	return netip.PrefixFrom(netip.AddrFrom16([16]byte{
		0: 0xfe, 1: 0x80,
		8: m[0] ^ 2, 9: m[1], 10: m[2], 11: 0xff, 12: 0xfe, 13: m[3], 14: m[4], 15: m[5],
	}), 64)
}

// sysctl is one file below /proc/sys/net/ipv6/conf.
type sysctl struct{ link, key, value string }

func (s sysctl) String() string {
	return fmt.Sprintf("sysctl net.ipv6.conf.%s.%s=%s", s.link, s.key, s.value)
}

const ipv6Conf = "/proc/sys/net/ipv6/conf/"

// ipv6Exists is false when the kernel runs without IPv6.
func ipv6Exists() bool {
	_, err := os.Stat(ipv6Conf)
	return err == nil
}

// hostSysctls are for the host's end, while it is down. IPv4's are in hostUp;
// IPv6 has no netlink for them.
func (a attachment) hostSysctls() []sysctl {
	s := []sysctl{
		{a.hostLink, "accept_ra", "0"},
		{a.hostLink, "accept_redirects", "0"},
	}
	if a.has6() {
		return append(s, sysctl{a.hostLink, "disable_ipv6", "0"})
	}
	return append(s, sysctl{a.hostLink, "disable_ipv6", "1"})
}

func (a attachment) podSysctls() []sysctl {
	if !a.has6() {
		return nil
	}
	return []sysctl{
		{a.podLink, "accept_ra", "0"},
		{a.podLink, "disable_ipv6", "0"},
	}
}

func setSysctls(all []sysctl) error {
	for _, s := range all {
		if err := s.set(); err != nil {
			return fmt.Errorf("%s: %w", s, err)
		}
	}
	return nil
}

// set writes past package os, which would ask the poller about each file.
func (s sysctl) set() error {
	fd, err := unix.Open(ipv6Conf+s.link+"/"+s.key, unix.O_WRONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	_, err = unix.Write(fd, []byte(s.value))
	return err
}

// errNameTaken: there is an interface of that name, on the host or in the pod.
var errNameTaken = errors.New("interface exists")

// attach makes the kernel hold a. host is a socket in the host's namespace.
// What it leaves behind when it ends early is the host's link, or nothing.
func (a *attachment) attach(host *rtnl.Conn, ns *netns) error {
	ipv6 := ipv6Exists()
	var pod *rtnl.Conn
	var podIndex int
	err := ns.visit(func() (err error) {
		if pod, err = rtnl.Open(); err != nil {
			return err
		}
		if a.defaults, err = missingDefaults(pod, a.addresses); err != nil {
			return err
		}
		if err := host.Do(a.veth(int(ns.f.Fd()))); errors.Is(err, unix.EEXIST) {
			return fmt.Errorf("%w: %w", errNameTaken, err)
		} else if err != nil {
			return err
		}
		link, err := pod.Link(a.podLink)
		if err != nil {
			return err
		}
		podIndex = link.Index
		if ipv6 {
			return setSysctls(a.podSysctls())
		}
		return nil
	})
	if pod != nil {
		defer pod.Close()
	}
	if err != nil {
		return err
	}
	link, err := host.Link(a.hostLink)
	if err != nil {
		return err
	}
	if ipv6 {
		if err := setSysctls(a.hostSysctls()); err != nil {
			return err
		}
	}
	if err := host.Do(a.hostUp(link.Index)...); err != nil {
		return err
	}
	if err := pod.Do(a.pod(podIndex)...); err != nil {
		return fmt.Errorf("in the pod: %w", err)
	}
	return host.Do(a.reach(link.Index)...)
}

// missingDefaults are the default routes of the addresses' families that the
// pod has not got from an earlier interface.
func missingDefaults(pod *rtnl.Conn, addresses []netip.Addr) ([]netip.Prefix, error) {
	have, err := pod.Routes(0)
	if err != nil {
		return nil, err
	}
	var missing []netip.Prefix
	for _, addr := range addresses {
		_, all := gateway(addr)
		if !slices.ContainsFunc(have, func(r rtnl.Route) bool { return r.Dst == all }) {
			missing = append(missing, all)
		}
	}
	return missing, nil
}

// wanted are the facts that must hold, a line each, in the words of facts.
func (a attachment) wanted(host, pod string) (hostFacts, podFacts []string) {
	hostFacts = append(hostFacts, linkFacts(rtnl.Link{Name: host, MAC: hostMAC, MTU: a.mtu, Up: true})...)
	podFacts = append(podFacts, linkFacts(rtnl.Link{Name: pod, MAC: a.podMAC, MTU: a.mtu, Up: true})...)
	for _, addr := range a.addresses {
		gw, all := gateway(addr)
		hostFacts = append(hostFacts,
			routeFact(rtnl.Route{Dst: hostPrefix(addr), Protocol: mesh.PodRouteProtocol}, host),
			neighFact(rtnl.Neigh{Addr: addr, MAC: a.podMAC, Permanent: true}, host))
		podFacts = append(podFacts,
			addrFact(hostPrefix(addr), pod),
			neighFact(rtnl.Neigh{Addr: gw, MAC: hostMAC, Permanent: true}, pod))
		if slices.Contains(a.defaults, all) {
			podFacts = append(podFacts, routeFact(rtnl.Route{Dst: all, Via: gw, Protocol: unix.RTPROT_BOOT}, pod))
		}
	}
	return hostFacts, podFacts
}

// facts reads all there is about a link. A missing link has no facts.
func facts(c *rtnl.Conn, name string) ([]string, error) {
	link, err := c.Link(name)
	if isGone(err) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	out := linkFacts(link)
	addrs, err := c.Addrs(link.Index)
	if err != nil {
		return nil, err
	}
	for _, p := range addrs {
		out = append(out, addrFact(p, name))
	}
	routes, err := c.Routes(link.Index)
	if err != nil {
		return nil, err
	}
	for _, r := range routes {
		out = append(out, routeFact(r, name))
	}
	neighs, err := c.Neighs(link.Index)
	if err != nil {
		return nil, err
	}
	for _, n := range neighs {
		out = append(out, neighFact(n, name))
	}
	return out, nil
}

func linkFacts(l rtnl.Link) []string {
	state := "down"
	if l.Up {
		state = "up"
	}
	out := []string{
		fmt.Sprintf("link %s %s", l.Name, state),
		fmt.Sprintf("link %s address %s", l.Name, l.MAC),
	}
	if l.MTU != 0 {
		out = append(out, fmt.Sprintf("link %s mtu %d", l.Name, l.MTU))
	}
	return out
}

func addrFact(p netip.Prefix, dev string) string { return fmt.Sprintf("addr %s dev %s", p, dev) }

func routeFact(r rtnl.Route, dev string) string {
	via := ""
	if r.Via.IsValid() {
		via = " via " + r.Via.String()
	}
	return fmt.Sprintf("route %s%s dev %s proto %d", r.Dst, via, dev, r.Protocol)
}

func neighFact(n rtnl.Neigh, dev string) string {
	state := ""
	if n.Permanent {
		state = " permanent"
	}
	return fmt.Sprintf("neigh %s lladdr %s dev %s%s", n.Addr, n.MAC, dev, state)
}
