package cni

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strings"

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
	// localnet lets the machine's own loopback reach the pod's host ports.
	localnet bool
	// toPod and fromPod limit the rate, if they have one.
	toPod, fromPod limit
}

// attachment is what ADD makes of r.
func (r Record) attachment(mtu int) attachment {
	mac, _ := parseMAC(r.MAC)
	return attachment{
		hostLink: r.HostLink, podLink: r.IfName, podMAC: mac, mtu: mtu, addresses: r.Addresses, alias: r.alias(),
		localnet: len(r.HostPorts) > 0, toPod: r.ToPod, fromPod: r.FromPod,
	}
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
	ops := []rtnl.Op{
		rtnl.LinkSet{Index: index, Name: a.hostLink, NoLinkLocal: true, StrictIPv4: true, LocalNet: a.localnet, Alias: a.alias},
		rtnl.LinkSet{Index: index, Name: a.hostLink, Up: true},
	}
	if a.toPod.Rate > 0 {
		ops = append(ops, a.toPod.tbf(index, a.hostLink))
	}
	return ops
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
	if a.fromPod.Rate > 0 { // shaped where it is sent: the pod's own sockets wait
		ops = append(ops, a.fromPod.tbf(index, a.podLink))
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

// reach makes the pod reachable.
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

// sysctl is one file below /proc/sys/net/ipv6/conf, or of IPv4's.
type sysctl struct{ link, key, value string }

func (s sysctl) String() string { return s.name() + "=" + s.value }

func (s sysctl) name() string {
	if key, ok := strings.CutPrefix(s.key, ipv4Key); ok {
		return fmt.Sprintf("sysctl net.ipv4.conf.%s.%s", s.link, key)
	}
	return fmt.Sprintf("sysctl net.ipv6.conf.%s.%s", s.link, s.key)
}

const (
	ipv6Conf = "/proc/sys/net/ipv6/conf/"
	ipv4Conf = "/proc/sys/net/ipv4/conf/"
	ipv4Key  = "ipv4/" // before the key of one of IPv4's
)

func (s sysctl) path() string {
	if key, ok := strings.CutPrefix(s.key, ipv4Key); ok {
		return ipv4Conf + s.link + "/" + key
	}
	return ipv6Conf + s.link + "/" + s.key
}

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
	fd, err := unix.Open(s.path(), unix.O_WRONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	_, err = unix.Write(fd, []byte(s.value))
	return err
}

// errNameTaken: there is an interface of that name, on the host or in the pod.
var errNameTaken = errors.New("interface exists")

// site is where an attachment is made: sockets on the host and in the pod, and
// the pod's namespace.
type site struct {
	host, pod *rtnl.Conn
	ns        *netns
}

// attach makes the kernel hold a. What it leaves behind when it ends early is
// the host's link, or nothing. Routes to the pod come last, after admit: a host
// route means that everything before it stands.
func (a *attachment) attach(at site, admit func() error) error {
	if err := at.host.Do(a.veth(int(at.ns.f.Fd()))); errors.Is(err, unix.EEXIST) {
		return fmt.Errorf("%w: %w", errNameTaken, err)
	} else if err != nil {
		return err
	}
	inPod, err := at.pod.Link(a.podLink)
	if err != nil {
		return err
	}
	link, err := at.host.Link(a.hostLink)
	if err != nil {
		return err
	}
	if ipv6Exists() {
		if err := at.ns.visit(func() error { return setSysctls(a.podSysctls()) }); err != nil {
			return err
		}
		if err := setSysctls(a.hostSysctls()); err != nil {
			return err
		}
	}
	if err := at.host.Do(a.hostUp(link.Index)...); err != nil {
		return err
	}
	if err := at.pod.Do(a.pod(inPod.Index)...); err != nil {
		return fmt.Errorf("in the pod: %w", err)
	}
	if err := admit(); err != nil {
		return err
	}
	return at.host.Do(a.reach(link.Index)...)
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
