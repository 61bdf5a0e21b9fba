package route

import (
	"net"
	"net/netip"
	"sync"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Underlay answers what the tunnels run over. It asks the kernel once and
// remembers until Forget, for there is a question for each endpoint of each
// peer. Use NewUnderlay. Its methods may be called from any goroutine.
type Underlay struct {
	device string

	mu     sync.Mutex
	handle *netlink.Handle // opened with the first question
	paths  map[netip.Addr]int
	links  map[int]int // MTU by index, 0 for device and for what is gone
	mtu    *int        // DefaultMTU
	own    []netip.Addr
}

// NewUnderlay of the tunnel device called so.
func NewUnderlay(device string) *Underlay {
	u := &Underlay{device: device}
	u.Forget()
	return u
}

// Forget what was asked: links, addresses or routes have changed, or may have.
func (u *Underlay) Forget() {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.paths, u.links, u.mtu, u.own = map[netip.Addr]int{}, map[int]int{}, nil, nil
}

// Close gives back what is kept open.
func (u *Underlay) Close() {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.handle != nil {
		u.handle.Close()
		u.handle = nil
	}
}

// PathMTU is the MTU of the underlay route to an address; 0 when there is
// none, or when it would go through the device (a tunnel in the tunnel) or to
// ourselves.
//
// Over IPv4 that is what routes and links say, not what the kernel remembers of
// a path: anybody who reaches this machine with one ICMP message has it
// remember 552 bytes for ten minutes. Over IPv6 nothing below 1280 is
// remembered, and a path of less than 1280 + mesh.TunnelOverhead needs it:
// routers there do not split what IPv6 in the tunnel may not be smaller than.
func (u *Underlay) PathMTU(addr netip.Addr) int {
	u.mu.Lock()
	defer u.mu.Unlock()
	mtu, known := u.paths[addr]
	if !known {
		mtu = u.pathMTU(addr)
		u.paths[addr] = mtu
	}
	return mtu
}

func (u *Underlay) pathMTU(addr netip.Addr) int {
	if u.handle == nil {
		h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
		if err != nil {
			return 0 // as good as no route
		}
		u.handle = h
	}
	routes, err := u.handle.RouteGetWithOptions(addr.AsSlice(), &netlink.RouteGetOptions{FIBMatch: addr.Is4()})
	if err != nil || len(routes) == 0 {
		return 0
	}
	r := routes[0]
	if r.Type == unix.RTN_LOCAL || r.Type == unix.RTN_BLACKHOLE {
		return 0
	}
	mtu := u.linkMTU(r.LinkIndex)
	for i, hop := range r.MultiPath { // instead of one link
		if m := u.linkMTU(hop.LinkIndex); i == 0 || m < mtu {
			mtu = m
		}
	}
	if r.MTU > 0 {
		return min(r.MTU, mtu)
	}
	return mtu
}

func (u *Underlay) linkMTU(index int) int {
	if mtu, known := u.links[index]; known {
		return mtu
	}
	u.links[index] = 0
	if link, err := u.handle.LinkByIndex(index); err == nil && link.Attrs().Name != u.device {
		u.links[index] = link.Attrs().MTU
	}
	return u.links[index]
}

// DefaultMTU is the smallest MTU of the links of the default routes; 0 when
// there is none.
func (u *Underlay) DefaultMTU() int {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.mtu == nil {
		u.mtu = new(defaultMTU(u.device))
	}
	return *u.mtu
}

func defaultMTU(device string) int {
	mtu := 0
	for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
		routes, err := dump(func() ([]netlink.Route, error) {
			return netlink.RouteListFiltered(family, &netlink.Route{}, netlink.RT_FILTER_DST)
		})
		if err != nil {
			continue // as good as none
		}
		for _, r := range routes {
			link, err := netlink.LinkByIndex(r.LinkIndex)
			if err != nil || link.Attrs().Name == device || link.Attrs().Flags&net.FlagLoopback != 0 {
				continue
			}
			if mtu == 0 || link.Attrs().MTU < mtu {
				mtu = link.Attrs().MTU
			}
		}
	}
	return mtu
}

// OwnAddresses are all addresses of this machine. The list is not the
// caller's.
func (u *Underlay) OwnAddresses() []netip.Addr {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.own != nil {
		return u.own
	}
	list, _ := dump(func() ([]netlink.Addr, error) { return netlink.AddrList(nil, netlink.FAMILY_ALL) })
	u.own = []netip.Addr{}
	for _, a := range list {
		if p, ok := prefix(a.IPNet); ok {
			u.own = append(u.own, p.Addr())
		}
	}
	return u.own
}
