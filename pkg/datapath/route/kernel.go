package route

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	kernelset "meshd.dev/pkg/datapath/internal/sysctl"
	"meshd.dev/pkg/mesh"
)

// dump repeats a netlink dump that the kernel cut short.
func dump[T any](f func() ([]T, error)) ([]T, error) {
	for try := 0; ; try++ {
		list, err := f()
		if !errors.Is(err, netlink.ErrDumpInterrupted) || try == 30 {
			return list, err
		}
	}
}

func read(cfg Config) (state, error) {
	device := cfg.Device
	s := state{sysctls: map[string]string{}}
	for _, c := range sysctls(Config{Device: device, Second: cfg.Second, Addrs: []netip.Addr{netip.IPv6Unspecified()}}) {
		if b, err := os.ReadFile(c.path()); err == nil {
			s.sysctls[c.path()] = strings.TrimSpace(string(b))
		}
	}
	link, err := netlink.LinkByName(device)
	switch {
	case errors.As(err, new(netlink.LinkNotFoundError)):
	case err != nil:
		return s, fmt.Errorf("look for link %s: %w", device, err)
	default:
		s.link, s.up = link.Attrs().Index, link.Attrs().Flags&net.FlagUp != 0
		if s.addrs, err = addrsOf(link); err != nil {
			return s, err
		}
	}
	if cfg.Second != "" {
		link, err := netlink.LinkByName(cfg.Second)
		if err == nil {
			s.second = link.Attrs().Index
			if s.addrs2, err = addrsOf(link); err != nil {
				return s, err
			}
		} else if !errors.As(err, new(netlink.LinkNotFoundError)) {
			return s, fmt.Errorf("look for link %s: %w", cfg.Second, err)
		}
	}
	names := map[int]string{s.link: device, s.second: cfg.Second}
	for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
		filter := &netlink.Route{Protocol: mesh.RouteProtocol, Table: unix.RT_TABLE_UNSPEC}
		routes, err := dump(func() ([]netlink.Route, error) {
			return netlink.RouteListFiltered(family, filter, netlink.RT_FILTER_PROTOCOL|netlink.RT_FILTER_TABLE)
		})
		if err != nil {
			return s, fmt.Errorf("list routes: %w", err)
		}
		for _, r := range routes {
			if e, ok := fromKernel(r, names, family); ok {
				s.routes = append(s.routes, e)
			}
		}
	}
	return s, nil
}

// addrsOf a link, of global scope.
func addrsOf(link netlink.Link) (ps []netip.Prefix, err error) {
	addrs, err := dump(func() ([]netlink.Addr, error) { return netlink.AddrList(link, netlink.FAMILY_ALL) })
	if err != nil {
		return nil, fmt.Errorf("list addresses of %s: %w", link.Attrs().Name, err)
	}
	for _, a := range addrs {
		if p, ok := prefix(a.IPNet); ok && a.Scope == unix.RT_SCOPE_UNIVERSE {
			ps = append(ps, p)
		}
	}
	return ps, nil
}

func fromKernel(r netlink.Route, names map[int]string, family int) (entry, bool) {
	e := entry{blackhole: r.Type == unix.RTN_BLACKHOLE, metric: r.Priority, mtu: r.MTU}
	var ok bool
	if e.dst, ok = prefix(r.Dst); !ok {
		e.dst = netip.PrefixFrom(netip.IPv4Unspecified(), 0)
		if family == netlink.FAMILY_V6 {
			e.dst = netip.PrefixFrom(netip.IPv6Unspecified(), 0)
		}
	}
	if a, ok := netip.AddrFromSlice(r.Src); ok {
		e.src = a.Unmap()
	}
	if !e.blackhole { // the kernel says dev lo for IPv6 blackholes
		e.link = r.LinkIndex
		e.dev = cmp.Or(names[e.link], fmt.Sprintf("if%d", e.link))
	}
	if r.Gw != nil {
		e.odd += " via " + r.Gw.String()
	}
	if len(r.MultiPath) > 0 {
		e.odd += " nexthops"
	}
	if r.Type != unix.RTN_UNICAST && !e.blackhole {
		e.odd += fmt.Sprintf(" type %d", r.Type)
	}
	if r.Table != unix.RT_TABLE_MAIN {
		e.odd += fmt.Sprintf(" table %d", r.Table)
	}
	if r.Tos != 0 {
		e.odd += fmt.Sprintf(" tos %d", r.Tos)
	}
	e.odd = strings.TrimSpace(e.odd)
	return e, true
}

func prefix(n *net.IPNet) (netip.Prefix, bool) {
	if n == nil {
		return netip.Prefix{}, false
	}
	a, ok := netip.AddrFromSlice(n.IP)
	bits, size := n.Mask.Size()
	if !ok {
		return netip.Prefix{}, false
	}
	if size == 32 {
		a = a.Unmap()
	}
	return netip.PrefixFrom(a, bits), true
}

func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}

func (s sysctl) path() string { return kernelset.Path(s.name) }
func (s sysctl) String() string {
	return "sysctl -w " + strings.ReplaceAll(s.name, "/", ".") + "=" + s.value
}
func (s sysctl) do() error { return kernelset.Set(s.name, s.value) }

func (o addrOp) do() error {
	link, err := netlink.LinkByName(o.dev)
	if err != nil {
		return err
	}
	a := &netlink.Addr{IPNet: ipNet(o.addr), Flags: unix.IFA_F_NODAD}
	if o.addr.Addr().Is4() {
		a.Flags = 0
	}
	if !o.add {
		return gone(netlink.AddrDel(link, a))
	}
	err = netlink.AddrAdd(link, a)
	if errors.Is(err, unix.EEXIST) {
		return nil
	}
	return err
}

// do is for routes that are not plain, which are only ever taken away.
func (o routeOp) do() error { return gone(o.del()) }

// del takes away exactly the route that was read, whatever it was.
func (o routeOp) del() error {
	family := netlink.FAMILY_V4
	if o.entry.dst.Addr().Is6() {
		family = netlink.FAMILY_V6
	}
	filter := &netlink.Route{Protocol: mesh.RouteProtocol, Table: unix.RT_TABLE_UNSPEC}
	routes, err := dump(func() ([]netlink.Route, error) {
		return netlink.RouteListFiltered(family, filter, netlink.RT_FILTER_PROTOCOL|netlink.RT_FILTER_TABLE)
	})
	if err != nil {
		return err
	}
	for _, have := range routes {
		e, _ := fromKernel(have, map[int]string{o.entry.link: o.entry.dev}, family)
		if e == o.entry {
			return netlink.RouteDel(&have)
		}
	}
	return nil
}

// gone: taking away what is not there is success.
func gone(err error) error {
	if errors.Is(err, unix.ESRCH) || errors.Is(err, unix.EADDRNOTAVAIL) || errors.Is(err, unix.ENODEV) || errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}
