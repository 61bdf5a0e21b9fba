package rtnl

import (
	"encoding/binary"
	"net/netip"
	"strings"

	"golang.org/x/sys/unix"
)

// Link is a link as the kernel has it.
type Link struct {
	Index int
	// Peer is the other end's index, in whatever namespace that is.
	Peer  int
	Name  string
	Kind  string // "veth", …
	MAC   MAC
	MTU   int
	Up    bool
	Alias string
}

// Link finds a link by name. A missing one is ENODEV.
func (c *Conn) Link(name string) (Link, error) {
	var m message
	m.begin(unix.RTM_GETLINK, 0, ifinfomsg(0, 0, 0)...)
	m.attrString(unix.IFLA_IFNAME, name)
	var l Link
	err := c.dump("link "+name, m, 0, func() {}, func(b []byte) { l = parseLink(b) })
	return l, err
}

// Links are all links of the namespace.
func (c *Conn) Links() ([]Link, error) {
	var m message
	m.begin(unix.RTM_GETLINK, 0, ifinfomsg(0, 0, 0)...)
	var all []Link
	err := c.dump("links", m, unix.NLM_F_DUMP, func() { all = nil }, func(b []byte) { all = append(all, parseLink(b)) })
	return all, err
}

func parseLink(b []byte) Link {
	var l Link
	if len(b) < 16 {
		return l
	}
	l.Index = int(int32(binary.NativeEndian.Uint32(b[4:])))
	l.Up = binary.NativeEndian.Uint32(b[8:])&unix.IFF_UP != 0
	eachAttr(b[16:], func(typ uint16, v []byte) {
		switch typ {
		case unix.IFLA_IFNAME:
			l.Name = text(v)
		case unix.IFLA_IFALIAS:
			l.Alias = text(v)
		case unix.IFLA_ADDRESS:
			copy(l.MAC[:], v)
		case unix.IFLA_LINK:
			l.Peer = int(number(v))
		case unix.IFLA_MTU:
			l.MTU = int(number(v))
		case unix.IFLA_LINKINFO:
			eachAttr(v, func(typ uint16, v []byte) {
				if typ == unix.IFLA_INFO_KIND {
					l.Kind = text(v)
				}
			})
		}
	})
	return l
}

// Addrs are the addresses of a link.
func (c *Conn) Addrs(index int) ([]netip.Prefix, error) {
	var m message
	m.begin(unix.RTM_GETADDR, 0, 0, 0, 0, 0, 0, 0, 0, 0)
	var all []netip.Prefix
	err := c.dump("addresses", m, unix.NLM_F_DUMP, func() { all = nil }, func(b []byte) {
		if p, i := parseAddr(b); i == index && p.IsValid() {
			all = append(all, p)
		}
	})
	return all, err
}

// OwnAddrs are the addresses of all links.
func (c *Conn) OwnAddrs() ([]netip.Addr, error) {
	var m message
	m.begin(unix.RTM_GETADDR, 0, 0, 0, 0, 0, 0, 0, 0, 0)
	var all []netip.Addr
	err := c.dump("addresses", m, unix.NLM_F_DUMP, func() { all = nil }, func(b []byte) {
		if p, _ := parseAddr(b); p.IsValid() {
			all = append(all, p.Addr())
		}
	})
	return all, err
}

func parseAddr(b []byte) (p netip.Prefix, index int) {
	if len(b) < 8 {
		return p, 0
	}
	bits := int(b[1])
	index = int(binary.NativeEndian.Uint32(b[4:]))
	eachAttr(b[8:], func(typ uint16, v []byte) {
		// IFA_ADDRESS is the peer's where there is an IFA_LOCAL, which comes second.
		if typ == unix.IFA_LOCAL || typ == unix.IFA_ADDRESS && !p.IsValid() {
			if a, ok := netip.AddrFromSlice(v); ok {
				p = netip.PrefixFrom(a, bits)
			}
		}
	})
	return p, index
}

// Route is a unicast route of the main table.
type Route struct {
	Dst      netip.Prefix
	Via      netip.Addr
	Index    int
	Protocol byte
}

// Routes are the unicast routes of the main table over a link, or over any
// with index 0.
func (c *Conn) Routes(index int) ([]Route, error) {
	var all []Route
	for _, fam := range []byte{unix.AF_INET, unix.AF_INET6} {
		var m message
		m.begin(unix.RTM_GETROUTE, 0, rtmsg(fam, 0, 0, 0, 0, 0, 0)...)
		start := len(all)
		err := c.dump("routes", m, unix.NLM_F_DUMP, func() { all = all[:start] }, func(b []byte) {
			if r, ok := parseRoute(b); ok && (index == 0 || r.Index == index) {
				all = append(all, r)
			}
		})
		if err != nil {
			return nil, err
		}
	}
	return all, nil
}

func parseRoute(b []byte) (r Route, ok bool) {
	if len(b) < 12 || b[4] != unix.RT_TABLE_MAIN || b[7] != unix.RTN_UNICAST {
		return r, false
	}
	dst := netip.IPv4Unspecified()
	if b[0] == unix.AF_INET6 {
		dst = netip.IPv6Unspecified()
	}
	r.Protocol = b[5]
	eachAttr(b[12:], func(typ uint16, v []byte) {
		switch typ {
		case unix.RTA_DST:
			dst, _ = netip.AddrFromSlice(v)
		case unix.RTA_GATEWAY:
			r.Via, _ = netip.AddrFromSlice(v)
		case unix.RTA_OIF:
			r.Index = int(number(v))
		}
	})
	r.Dst = netip.PrefixFrom(dst, int(b[1]))
	return r, true
}

// Neigh is a neighbour entry.
type Neigh struct {
	Addr      netip.Addr
	MAC       MAC
	Index     int // of its link
	Permanent bool
}

// Neighs are the neighbour entries of a link, or of all with index 0.
func (c *Conn) Neighs(index int) ([]Neigh, error) {
	var m message
	m.begin(unix.RTM_GETNEIGH, 0, ndmsg(0, 0, 0)...)
	var all []Neigh
	err := c.dump("neighbours", m, unix.NLM_F_DUMP, func() { all = nil }, func(b []byte) {
		if n := parseNeigh(b); index == 0 || n.Index == index {
			all = append(all, n)
		}
	})
	return all, err
}

func parseNeigh(b []byte) (n Neigh) {
	if len(b) < 12 {
		return n
	}
	n.Index = int(binary.NativeEndian.Uint32(b[4:]))
	n.Permanent = binary.NativeEndian.Uint16(b[8:])&unix.NUD_PERMANENT != 0
	eachAttr(b[12:], func(typ uint16, v []byte) {
		switch typ {
		case unix.NDA_DST:
			n.Addr, _ = netip.AddrFromSlice(v)
		case unix.NDA_LLADDR:
			copy(n.MAC[:], v)
		}
	})
	return n
}

func text(v []byte) string { return strings.TrimRight(string(v), "\x00") }

func number(v []byte) uint32 {
	if len(v) < 4 {
		return 0
	}
	return binary.NativeEndian.Uint32(v)
}
