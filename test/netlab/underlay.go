package netlab

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"runtime"
	"slices"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// The underlay's address plan (see the package comment).
var (
	Underlay4 = netip.MustParsePrefix("172.31.77.0/24")
	Underlay6 = netip.MustParsePrefix("fd31:77::/64")
	gateway4  = netip.MustParseAddr("172.31.77.254")
	gateway6  = netip.MustParseAddr("fd31:77::fe")
)

const (
	bridgeName = "br0"
	linkName   = "eth0" // in the machine
)

// makeUnderlay makes the network namespace of the underlay and its bridge.
func (l *Lab) makeUnderlay() error {
	err := onThread(func() error { // NewNamed moves the thread it runs on
		h, err := netns.NewNamed("ml-" + l.state.Name)
		if err != nil {
			return fmt.Errorf("make underlay namespace: %w", err)
		}
		return h.Close()
	})
	if err != nil {
		return err
	}
	return l.inUnderlay(func(h *netlink.Handle) error {
		if err := setUp(h, "lo"); err != nil {
			return err
		}
		attrs := netlink.NewLinkAttrs()
		attrs.Name = bridgeName
		if err := h.LinkAdd(&netlink.Bridge{LinkAttrs: attrs}); err != nil {
			return fmt.Errorf("make bridge: %w", err)
		}
		return setUp(h, bridgeName)
	})
}

// removeUnderlay deletes the namespace and with it the bridge and all links.
func (l *Lab) removeUnderlay() error {
	if _, err := os.Lstat(l.netns()); err != nil {
		return nil
	}
	if err := unix.Unmount(l.netns(), unix.MNT_DETACH); err != nil && !errors.Is(err, unix.EINVAL) {
		return fmt.Errorf("unmount %s: %w", l.netns(), err)
	}
	return os.Remove(l.netns())
}

// plug makes the machine's link: vN on the bridge, eth0 in the machine.
func (l *Lab) plug(m *machine) error {
	err := l.inUnderlay(func(h *netlink.Handle) error {
		br, err := h.LinkByName(bridgeName)
		if err != nil {
			return fmt.Errorf("find bridge: %w", err)
		}
		attrs := netlink.NewLinkAttrs()
		attrs.Name, attrs.MasterIndex = m.link(), br.Attrs().Index
		veth := &netlink.Veth{LinkAttrs: attrs, PeerName: linkName,
			PeerHardwareAddr: m.mac(), PeerNamespace: netlink.NsPid(m.First.Pid)}
		if err := h.LinkAdd(veth); err != nil {
			return fmt.Errorf("make link of %s: %w", m.Name, err)
		}
		return setUp(h, m.link())
	})
	if err != nil || m.System != nil {
		return err
	}
	return inNetNS(fmt.Sprintf("/proc/%d/ns/net", m.First.Pid), func(h *netlink.Handle) error { return configureLink(h, m) })
}

// configureLink gives eth0 its addresses and default routes. IPv6 duplicate
// detection is off: it would cost a second, and nobody else has the address.
func configureLink(h *netlink.Handle, m *machine) error {
	eth0, err := h.LinkByName(linkName)
	if err != nil {
		return fmt.Errorf("find eth0 of %s: %w", m.Name, err)
	}
	for _, a := range []netip.Prefix{netip.PrefixFrom(m.IPv4(), Underlay4.Bits()), netip.PrefixFrom(m.IPv6(), Underlay6.Bits())} {
		addr := &netlink.Addr{IPNet: ipNet(a), Flags: unix.IFA_F_NODAD}
		if a.Addr().Is4() {
			addr.Flags = 0
		}
		if err := h.AddrAdd(eth0, addr); err != nil {
			return fmt.Errorf("add address %s of %s: %w", a, m.Name, err)
		}
	}
	if err := h.LinkSetUp(eth0); err != nil {
		return fmt.Errorf("set eth0 of %s up: %w", m.Name, err)
	}
	for _, gw := range []netip.Addr{gateway4, gateway6} {
		all := netip.PrefixFrom(netip.IPv6Unspecified(), 0)
		if gw.Is4() {
			all = netip.PrefixFrom(netip.IPv4Unspecified(), 0)
		}
		r := &netlink.Route{LinkIndex: eth0.Attrs().Index, Dst: ipNet(all), Gw: gw.AsSlice()}
		if err := h.RouteAdd(r); err != nil {
			return fmt.Errorf("add default route of %s: %w", m.Name, err)
		}
	}
	return nil
}

// unplug removes the machine's link. The kernel would do so too, but only
// some time after the machine's namespace has died.
func (l *Lab) unplug(m *machine) error {
	if _, err := os.Lstat(l.netns()); err != nil {
		return nil
	}
	return l.inUnderlay(func(h *netlink.Handle) error {
		link, err := h.LinkByName(m.link())
		if errors.As(err, &netlink.LinkNotFoundError{}) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("find link of %s: %w", m.Name, err)
		}
		if err := h.LinkDel(link); err != nil && !errors.Is(err, unix.ENODEV) {
			return fmt.Errorf("remove link of %s: %w", m.Name, err)
		}
		return nil
	})
}

// loopbackUp sets lo of the calling process's network namespace up.
func loopbackUp() error {
	h, err := netlink.NewHandle()
	if err != nil {
		return err
	}
	defer h.Close()
	return setUp(h, "lo")
}

func setUp(h *netlink.Handle, name string) error {
	link, err := h.LinkByName(name)
	if err != nil {
		return fmt.Errorf("find %s: %w", name, err)
	}
	if err := h.LinkSetUp(link); err != nil {
		return fmt.Errorf("set %s up: %w", name, err)
	}
	return nil
}

func (l *Lab) inUnderlay(do func(*netlink.Handle) error) error { return inNetNS(l.netns(), do) }

// inNetNS calls do with a netlink socket of the network namespace at path.
func inNetNS(path string, do func(*netlink.Handle) error) error {
	ns, err := netns.GetFromPath(path)
	if err != nil {
		return fmt.Errorf("open network namespace %s: %w", path, err)
	}
	defer ns.Close()
	h, err := netlink.NewHandleAt(ns)
	if err != nil {
		return fmt.Errorf("netlink in %s: %w", path, err)
	}
	defer h.Close()
	return do(h)
}

// onThread runs do on a thread of its own that is thrown away afterwards, with
// whatever namespaces do left it in.
func onThread(do func() error) error {
	err := make(chan error)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends with the goroutine
		err <- do()
	}()
	return <-err
}

// inNamespace runs do on a thread inside the network namespace at path.
func inNamespace(path string, do func() error) error {
	return onThread(func() error {
		fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err != nil {
			return fmt.Errorf("open network namespace %s: %w", path, err)
		}
		defer unix.Close(fd)
		if err := unix.Setns(fd, unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("enter network namespace %s: %w", path, err)
		}
		return do()
	})
}

func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}

// nth is the address n after the network address of p, n below 256.
func nth(p netip.Prefix, n int) netip.Addr {
	b := slices.Clone(p.Masked().Addr().AsSlice())
	b[len(b)-1] += byte(n)
	a, _ := netip.AddrFromSlice(b)
	return a
}
