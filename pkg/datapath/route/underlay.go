package route

import (
	"errors"
	"math"
	"net"
	"net/netip"
	"slices"
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
	u.hangUp()
}

// hangUp has the next question open a socket of its own. The caller holds mu.
func (u *Underlay) hangUp() {
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
	if mtu, known := u.paths[addr]; known {
		return mtu
	}
	for range 2 {
		mtu, err := u.pathMTU(addr)
		if err == nil {
			u.paths[addr] = mtu
			return mtu
		}
		u.hangUp() // the socket may be what is broken
	}
	return 0 // as good as no route, and asked again with the next question
}

// noRoute are the kernel's answers to a question that it has understood, or is
// about a family that it has not got.
var noRoute = []error{unix.ENETUNREACH, unix.EHOSTUNREACH, unix.EACCES, unix.EINVAL, unix.EOPNOTSUPP, unix.EAFNOSUPPORT}

func (u *Underlay) pathMTU(addr netip.Addr) (int, error) {
	if u.handle == nil {
		h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
		if err != nil {
			return 0, err
		}
		u.handle = h
	}
	routes, err := u.handle.RouteGetWithOptions(addr.AsSlice(), &netlink.RouteGetOptions{FIBMatch: addr.Is4()})
	if isNoRoute := func(e error) bool { return errors.Is(err, e) }; slices.ContainsFunc(noRoute, isNoRoute) || err == nil && len(routes) == 0 {
		return 0, nil
	} else if err != nil {
		return 0, err
	}
	r := routes[0]
	if r.Type == unix.RTN_LOCAL || r.Type == unix.RTN_BLACKHOLE {
		return 0, nil
	}
	links := []int{r.LinkIndex}
	if len(r.MultiPath) > 0 { // instead of one link
		links = nil
		for _, hop := range r.MultiPath {
			links = append(links, hop.LinkIndex)
		}
	}
	mtu := math.MaxInt
	for _, l := range links {
		m, err := u.linkMTU(l)
		if err != nil {
			return 0, err
		}
		mtu = min(mtu, m)
	}
	if r.MTU > 0 {
		mtu = min(r.MTU, mtu)
	}
	return mtu, nil
}

func (u *Underlay) linkMTU(index int) (int, error) {
	if mtu, known := u.links[index]; known {
		return mtu, nil
	}
	link, err := u.handle.LinkByIndex(index)
	mtu := 0
	switch {
	case errors.As(err, new(netlink.LinkNotFoundError)): // gone meanwhile
	case err != nil:
		return 0, err
	case link.Attrs().Name != u.device:
		mtu = link.Attrs().MTU
	}
	u.links[index] = mtu
	return mtu, nil
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
