package rtnl

import (
	"fmt"
	"net"
	"net/netip"
	"strings"

	"golang.org/x/sys/unix"
)

// MAC is an Ethernet address.
type MAC [6]byte

func (m MAC) String() string { return net.HardwareAddr(m[:]).String() }

// VethAdd makes a veth pair: one end here, the other in PeerNetns, both down.
// Each end has one queue a direction. Left to itself the kernel makes one for
// each CPU there could ever be, with files in /sys, and then takes all but one
// out of use and their files away again: on two CPUs a third of the time that
// making the pair takes.
type VethAdd struct {
	Name, PeerName string
	MAC, PeerMAC   MAC
	// MTU of both ends; 0 leaves the kernel's default.
	MTU int
	// PeerNetns is an open namespace file.
	PeerNetns int
}

func (o VethAdd) String() string {
	return fmt.Sprintf("ip link add %s address %s%s numtxqueues 1 numrxqueues 1 type veth peer name %s address %s%s numtxqueues 1 numrxqueues 1 netns <pod>",
		o.Name, o.MAC, mtuText(o.MTU), o.PeerName, o.PeerMAC, mtuText(o.MTU))
}

func mtuText(mtu int) string {
	if mtu == 0 {
		return ""
	}
	return fmt.Sprintf(" mtu %d", mtu)
}

// vethInfoPeer is VETH_INFO_PEER of linux/veth.h.
const vethInfoPeer = 1

func (o VethAdd) encode(m *message) {
	m.begin(unix.RTM_NEWLINK, unix.NLM_F_CREATE|unix.NLM_F_EXCL, ifinfomsg(0, 0, 0)...)
	o.end(m, o.Name, o.MAC)
	m.nest(unix.IFLA_LINKINFO, func() {
		m.attr(unix.IFLA_INFO_KIND, []byte("veth"))
		m.nest(unix.IFLA_INFO_DATA, func() {
			m.nest(vethInfoPeer, func() {
				m.b = append(m.b, ifinfomsg(0, 0, 0)...)
				o.end(m, o.PeerName, o.PeerMAC)
				m.attrUint32(unix.IFLA_NET_NS_FD, uint32(o.PeerNetns))
			})
		})
	})
}

func (o VethAdd) end(m *message, name string, mac MAC) {
	m.attrString(unix.IFLA_IFNAME, name)
	m.attr(unix.IFLA_ADDRESS, mac[:])
	m.attrUint32(unix.IFLA_NUM_TX_QUEUES, 1)
	m.attrUint32(unix.IFLA_NUM_RX_QUEUES, 1)
	if o.MTU != 0 {
		m.attrUint32(unix.IFLA_MTU, uint32(o.MTU))
	}
}

// LinkSet changes a link. What is left zero stays.
type LinkSet struct {
	Index int    // 0: find it by name
	Name  string // else for String only
	Up    bool
	Down  bool
	// NoLinkLocal keeps the kernel from making an IPv6 link-local address
	// (and from detecting duplicates of it, for a second).
	NoLinkLocal bool
	// StrictIPv4 drops what comes in with a source address that is not routed
	// back here (rp_filter=1), and redirects, and sends none: before a packet
	// goes back out of the link it came by (a pod that reaches itself through
	// a service), Linux would tell the pod to do without us, and for a second
	// after that tell it of no error.
	StrictIPv4 bool
	// LocalNet lets packets from and to 127.0.0.0/8 over the link. With
	// StrictIPv4 only.
	LocalNet bool
	Alias    string
}

func (o LinkSet) String() string {
	s := "ip link set dev " + o.Name
	if o.Up {
		s += " up"
	}
	if o.Down {
		s += " down"
	}
	if o.NoLinkLocal {
		s += " addrgenmode none"
	}
	if o.Alias != "" {
		s += fmt.Sprintf(" alias %q", o.Alias)
	}
	if o.StrictIPv4 {
		s += fmt.Sprintf("; sysctl net.ipv4.conf.%[1]s.rp_filter=1 net.ipv4.conf.%[1]s.accept_redirects=0 net.ipv4.conf.%[1]s.send_redirects=0", o.Name)
	}
	if o.LocalNet {
		s += fmt.Sprintf(" net.ipv4.conf.%s.route_localnet=1", o.Name)
	}
	return s
}

// Numbers of linux/ip.h (IPV4_DEVCONF_*) and linux/if_link.h.
const (
	devconfAcceptRedirects = 4
	devconfSendRedirects   = 6
	devconfRPFilter        = 8
	devconfRouteLocalnet   = 26
	inetConf               = 1 // IFLA_INET_CONF
	inet6AddrGenMode       = 8 // IFLA_INET6_ADDR_GEN_MODE
	addrGenModeNone        = 1 // IN6_ADDR_GEN_MODE_NONE
)

func (o LinkSet) encode(m *message) {
	var flags, change uint32
	if o.Up || o.Down {
		change = unix.IFF_UP
	}
	if o.Up {
		flags = unix.IFF_UP
	}
	m.begin(unix.RTM_NEWLINK, 0, ifinfomsg(o.Index, flags, change)...)
	if o.Index == 0 {
		m.attrString(unix.IFLA_IFNAME, o.Name)
	}
	if o.Alias != "" {
		m.attr(unix.IFLA_IFALIAS, []byte(o.Alias))
	}
	if !o.NoLinkLocal && !o.StrictIPv4 {
		return
	}
	m.nest(unix.IFLA_AF_SPEC, func() {
		if o.StrictIPv4 {
			m.nest(unix.AF_INET, func() {
				m.nest(inetConf, func() {
					m.attrUint32(devconfAcceptRedirects, 0)
					m.attrUint32(devconfSendRedirects, 0)
					m.attrUint32(devconfRPFilter, 1)
					if o.LocalNet {
						m.attrUint32(devconfRouteLocalnet, 1)
					}
				})
			})
		}
		if o.NoLinkLocal {
			m.nest(unix.AF_INET6, func() { m.attr(inet6AddrGenMode, []byte{addrGenModeNone}) })
		}
	})
}

// LinkDel deletes a link, and with it all that hangs on it.
type LinkDel struct{ Name string }

func (o LinkDel) String() string { return "ip link del dev " + o.Name }

func (o LinkDel) encode(m *message) {
	m.begin(unix.RTM_DELLINK, 0, ifinfomsg(0, 0, 0)...)
	m.attrString(unix.IFLA_IFNAME, o.Name)
}

// AddrAdd gives a link an address, without duplicate address detection.
type AddrAdd struct {
	Prefix netip.Prefix
	Index  int
	Name   string // for String only
}

func (o AddrAdd) String() string {
	nodad := ""
	if o.Prefix.Addr().Is6() {
		nodad = " nodad"
	}
	return fmt.Sprintf("ip addr add %s dev %s%s", o.Prefix, o.Name, nodad)
}

func (o AddrAdd) encode(m *message) {
	a := o.Prefix.Addr()
	scope := byte(unix.RT_SCOPE_UNIVERSE)
	if a.IsLinkLocalUnicast() {
		scope = unix.RT_SCOPE_LINK
	}
	flags := byte(0)
	if a.Is6() {
		flags = unix.IFA_F_NODAD
	}
	m.begin(unix.RTM_NEWADDR, unix.NLM_F_CREATE|unix.NLM_F_EXCL, ifaddrmsg(o.Prefix, flags, scope, o.Index)...)
	m.attrAddr(unix.IFA_LOCAL, a)
	m.attrAddr(unix.IFA_ADDRESS, a)
}

// NeighAdd makes a permanent neighbour entry.
type NeighAdd struct {
	Addr  netip.Addr
	MAC   MAC
	Index int
	Name  string // for String only
}

func (o NeighAdd) String() string {
	return fmt.Sprintf("ip neigh replace %s lladdr %s dev %s nud permanent", o.Addr, o.MAC, o.Name)
}

func (o NeighAdd) encode(m *message) {
	m.begin(unix.RTM_NEWNEIGH, unix.NLM_F_CREATE|unix.NLM_F_REPLACE, ndmsg(family(o.Addr), o.Index, unix.NUD_PERMANENT)...)
	m.attrAddr(unix.NDA_DST, o.Addr)
	m.attr(unix.NDA_LLADDR, o.MAC[:])
}

// RouteAdd adds a unicast route to the main table. It takes the place of no
// other route.
type RouteAdd struct {
	Dst   netip.Prefix
	Via   netip.Addr // zero: directly on the link
	Index int
	Name  string // for String only
	// Protocol marks who owns the route.
	Protocol byte
}

func (o RouteAdd) String() string { return "ip route add " + o.text() }

func (o RouteAdd) text() string {
	var b strings.Builder
	b.WriteString(o.Dst.String())
	if o.Via.IsValid() {
		fmt.Fprintf(&b, " via %s", o.Via)
	}
	fmt.Fprintf(&b, " dev %s proto %d", o.Name, o.Protocol)
	if o.Via.IsValid() {
		b.WriteString(" onlink")
	} else if o.Dst.Addr().Is4() {
		b.WriteString(" scope link")
	}
	return b.String()
}

func (o RouteAdd) encode(m *message) {
	o.route(m, unix.RTM_NEWROUTE, unix.NLM_F_CREATE|unix.NLM_F_EXCL)
}

func (o RouteAdd) route(m *message, typ, flags uint16) {
	scope, rtFlags := byte(unix.RT_SCOPE_UNIVERSE), uint32(0)
	switch {
	case o.Via.IsValid():
		rtFlags = unix.RTNH_F_ONLINK
	case o.Dst.Addr().Is4():
		scope = unix.RT_SCOPE_LINK
	}
	m.begin(unix.RTM_NEWROUTE, unix.NLM_F_CREATE|unix.NLM_F_EXCL, rtmsg(family(o.Dst.Addr()), byte(o.Dst.Bits()), unix.RT_TABLE_MAIN, o.Protocol, scope, unix.RTN_UNICAST, rtFlags)...)
	if o.Dst.Bits() > 0 {
		m.attrAddr(unix.RTA_DST, o.Dst.Addr())
	}
	if o.Via.IsValid() {
		m.attrAddr(unix.RTA_GATEWAY, o.Via)
	}
	m.attrUint32(unix.RTA_OIF, uint32(o.Index))
}
