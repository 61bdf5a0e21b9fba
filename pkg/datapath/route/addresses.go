package route

import (
	"cmp"
	"net"
	"net/netip"
	"slices"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// UnderlayAddresses are those of this machine's addresses by which others may
// reach it from outside: of links to the outside, that are its own and stay.
// Not the addresses of other overlays, of bridges of containers, of virtual
// machines or of services.
func UnderlayAddresses() ([]netip.Addr, error) {
	links, err := dump(netlink.LinkList)
	if err != nil {
		return nil, err
	}
	addrs, err := dump(func() ([]netlink.Addr, error) { return netlink.AddrList(nil, netlink.FAMILY_ALL) })
	if err != nil {
		return nil, err
	}
	return underlay(links, addrs), nil
}

// overlayKinds of links are tunnels, or lead nowhere.
var overlayKinds = map[string]bool{
	"wireguard": true, "vxlan": true, "geneve": true, "gre": true, "gretap": true, "ip6gre": true, "ip6gretap": true,
	"erspan": true, "ipip": true, "ip6tnl": true, "sit": true, "vti": true, "vti6": true, "xfrm": true, "tuntap": true, "tun": true,
	"dummy": true, "ifb": true, "nlmon": true, "bareudp": true, "l2tpeth": true, "netkit": true,
}

// overlayNames are what names of links begin with that others make for
// containers, virtual machines and overlays.
var overlayNames = []string{"docker", "br-", "cni", "flannel", "cali", "tunl", "cilium", "lxc", "lxd", "weave", "kube-", "nodelocaldns",
	"antrea", "ovn", "genev", "virbr", "vmnet", "vboxnet", "podman", "tailscale", "zt", "wt", "nebula", "netmaker", "nm-", "wg", "mesh", "msh"}

func underlay(links []netlink.Link, addrs []netlink.Addr) []netip.Addr {
	fit := map[int]bool{}
	for _, l := range links {
		fit[l.Attrs().Index] = outside(l, links)
	}
	lasting := map[int]bool{} // links with an address of a subnet
	for _, a := range addrs {
		p, ok := prefix(a.IPNet)
		lasting[a.LinkIndex] = lasting[a.LinkIndex] || ok && p.Addr().Is4() && p.Bits() < 32
	}
	var list []netip.Addr
	for _, a := range addrs {
		p, ok := prefix(a.IPNet)
		if !ok || !fit[a.LinkIndex] || !p.Addr().IsGlobalUnicast() || a.Scope != unix.RT_SCOPE_UNIVERSE {
			continue
		}
		// One that wanders between machines is added as a second one, or alone.
		if p.Addr().Is4() && (a.Flags&unix.IFA_F_SECONDARY != 0 || p.Bits() == 32 && lasting[a.LinkIndex]) {
			continue
		}
		if a.Flags&(unix.IFA_F_TENTATIVE|unix.IFA_F_DADFAILED|unix.IFA_F_DEPRECATED) != 0 || p.Addr().Is6() && a.Flags&unix.IFA_F_TEMPORARY != 0 {
			continue
		}
		list = append(list, p.Addr())
	}
	slices.SortFunc(list, func(a, b netip.Addr) int { return cmp.Or(cmp.Compare(a.BitLen(), b.BitLen()), a.Compare(b)) })
	return slices.Compact(list)
}

// outside reports whether a link leads out of this machine.
func outside(l netlink.Link, all []netlink.Link) bool {
	a := l.Attrs()
	if a.Flags&net.FlagUp == 0 || a.Flags&net.FlagLoopback != 0 || overlayKinds[l.Type()] ||
		slices.ContainsFunc(overlayNames, func(p string) bool { return strings.HasPrefix(a.Name, p) }) {
		return false
	}
	if l.Type() != "bridge" {
		return true
	}
	// A bridge with a port that is no end of a pair leads out.
	return slices.ContainsFunc(all, func(port netlink.Link) bool {
		return port.Attrs().MasterIndex == a.Index && port.Type() != "veth" && !overlayKinds[port.Type()]
	})
}
