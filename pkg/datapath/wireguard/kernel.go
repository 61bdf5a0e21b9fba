package wireguard

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
	"golang.zx2c4.com/wireguard/wgctrl"
	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	"meshd.dev/pkg/datapath/internal/sysctl"
	"meshd.dev/pkg/mesh"
)

// tunFile is opened by a userspace device. A test has another.
var tunFile = "/dev/net/tun"

// InKernel reports whether this kernel has WireGuard, built in or as a module
// that it loads when asked.
func InKernel() bool {
	_, err := netlink.GenlFamilyGet("wireguard")
	return err == nil
}

func (d *Device) read() (state, error) {
	name := d.opts.Name
	link, err := netlink.LinkByName(name)
	if errors.As(err, new(netlink.LinkNotFoundError)) {
		return state{}, nil
	}
	if err != nil {
		return state{}, fmt.Errorf("look for link %s: %w", name, err)
	}
	// Opened here, in the caller's network namespace: the question may be asked
	// by another thread. What a question that is not asked leaves open is closed
	// when it is collected.
	wg, err := wgctrl.New()
	if err != nil {
		return state{}, fmt.Errorf("open wireguard control: %w", err)
	}
	dev, err := ask(&d.questions, name, func() (*wgtypes.Device, error) {
		defer wg.Close()
		return wg.Device(name)
	})
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ECONNREFUSED) {
		if link.Type() == "tuntap" && d.processGone() {
			return state{}, nil // about to vanish with its process, or held for the next
		}
		return state{}, fmt.Errorf("link %s (%s) exists, but nothing answers for it on %s", name, link.Type(), SocketPath(name))
	}
	if err != nil {
		return state{}, fmt.Errorf("ask device %s: %w", name, err)
	}
	return stateOf(dev, link), nil
}

func stateOf(dev *wgtypes.Device, link netlink.Link) state {
	s := state{
		backend: Userspace, up: link.Attrs().Flags&net.FlagUp != 0, mtu: link.Attrs().MTU,
		key: dev.PrivateKey, port: dev.ListenPort, mark: dev.FirewallMark, peers: map[mesh.Key]peer{},
	}
	if dev.Type == wgtypes.LinuxKernel {
		s.backend = Kernel
	}
	for _, p := range dev.Peers {
		q := peer{keepalive: p.PersistentKeepaliveInterval, psk: Secret(p.PresharedKey)}
		q.Handshake, q.Rx, q.Tx = p.LastHandshakeTime, p.ReceiveBytes, p.TransmitBytes
		if q.Handshake.Unix() <= 0 {
			q.Handshake = time.Time{}
		}
		if p.Endpoint != nil {
			ap := p.Endpoint.AddrPort()
			q.Endpoint = netip.AddrPortFrom(ap.Addr().Unmap(), ap.Port())
		}
		for _, a := range p.AllowedIPs {
			ip, _ := netip.AddrFromSlice(a.IP)
			bits, size := a.Mask.Size()
			if size == 32 {
				ip = ip.Unmap()
			}
			q.allowed = append(q.allowed, netip.PrefixFrom(ip, bits))
		}
		s.peers[mesh.Key(p.PublicKey)] = q
	}
	return s
}

func (o createOp) do(ctx context.Context, d *Device) error {
	if _, ok := d.holder.link(o.name); ok {
		return d.spawn(ctx) // its process died
	}
	d.hangUp() // the kernel may learn WireGuard by this
	attrs := netlink.NewLinkAttrs()
	attrs.Name, attrs.MTU = o.name, o.mtu
	err := netlink.LinkAdd(&netlink.Wireguard{LinkAttrs: attrs})
	if err == nil || !errors.Is(err, unix.EOPNOTSUPP) {
		return err
	}
	if len(o.spawn) == 0 {
		return fmt.Errorf("this kernel has no WireGuard, and nothing serves %s yet: does `meshd wireguard %[1]s` run (DaemonSet meshd-wireguard)? %w", o.name, err)
	}
	if d.opts.Served {
		if asked, err := d.askForSecond(ctx); asked {
			if err == nil {
				d.opts.Log.Info("the second device is served where the first one is", "device", o.name)
			}
			return err
		}
	}
	return d.spawn(ctx)
}

func (o identityOp) do(_ context.Context, d *Device) error {
	err := d.configure(wgtypes.Config{PrivateKey: o.key, ListenPort: o.port, FirewallMark: o.mark})
	if err == nil && o.key != nil && o.old {
		d.keyed = time.Now()
	}
	return err
}

// Possible says why there can be no such device here: the kernel has neither
// WireGuard nor what a userspace device stands on. It changes nothing.
func (d *Device) Possible() error {
	if there, err := d.exists(); there || err != nil {
		return err
	}
	if InKernel() {
		return nil
	}
	if len(d.opts.SpawnUserspace) == 0 {
		return errors.New("this kernel has no WireGuard")
	}
	f, err := os.OpenFile(tunFile, os.O_RDWR, 0)
	if err != nil { // ENODEV, ENXIO: the file is there and the module is not
		return fmt.Errorf("this kernel has neither WireGuard nor TUN, and a tunnel needs one of them (`modprobe wireguard` or `modprobe tun`): %w", err)
	}
	return f.Close()
}

// exists reports whether there is a link of the device's name.
func (d *Device) exists() (bool, error) {
	_, err := netlink.LinkByName(d.opts.Name)
	if errors.As(err, new(netlink.LinkNotFoundError)) {
		return false, nil
	}
	return err == nil, err
}

// do takes the link away; a userspace process ends with it.
func (o deleteOp) do(context.Context, *Device) error {
	link, err := netlink.LinkByName(o.name)
	if errors.As(err, new(netlink.LinkNotFoundError)) {
		return nil
	}
	if err != nil {
		return err
	}
	return netlink.LinkDel(link)
}

func (o mtuOp) do(context.Context, *Device) error {
	link, err := netlink.LinkByName(o.name)
	if err != nil {
		return err
	}
	return netlink.LinkSetMTU(link, o.mtu)
}

// do also keeps IPv6 from making up an address and from asking for routers, and
// IPv4 from refusing packets before there is a route back: a peer may send as
// soon as it has a session.
func (o upOp) do(context.Context, *Device) error {
	conf := "net/ipv6/conf/" + o.name
	_ = sysctl.Set(conf+"/addr_gen_mode", "1") // no IPv6: no file
	_ = sysctl.Set(conf+"/accept_ra", "0")
	_ = sysctl.Set("net/ipv4/conf/"+o.name+"/rp_filter", "2")
	link, err := netlink.LinkByName(o.name)
	if err != nil {
		return err
	}
	for _, a := range o.addrs {
		ip := &net.IPNet{IP: a.AsSlice(), Mask: net.CIDRMask(a.BitLen(), a.BitLen())}
		if err := netlink.AddrReplace(link, &netlink.Addr{IPNet: ip}); err != nil {
			return fmt.Errorf("address %s: %w", a, err)
		}
	}
	return netlink.LinkSetUp(link)
}

func (o peerOp) do(_ context.Context, d *Device) error {
	p := wgtypes.PeerConfig{PublicKey: wgtypes.Key(o.key), UpdateOnly: !o.added, PersistentKeepaliveInterval: o.keepalive, AllowedIPs: ipNets(o.allow)}
	if o.endpoint.IsValid() {
		p.Endpoint = net.UDPAddrFromAddrPort(o.endpoint)
	}
	if o.psk != nil {
		p.PresharedKey = (*wgtypes.Key)(o.psk)
	}
	peers := []wgtypes.PeerConfig{p}
	if o.again {
		peers = []wgtypes.PeerConfig{{PublicKey: p.PublicKey, Remove: true}, p}
	}
	return d.configure(wgtypes.Config{Peers: peers})
}

func (o strayOp) do(_ context.Context, d *Device) error {
	secret, err := wgtypes.GeneratePrivateKey()
	if err != nil {
		return err
	}
	throwaway := secret.PublicKey()
	return d.configure(wgtypes.Config{Peers: []wgtypes.PeerConfig{
		{PublicKey: throwaway, AllowedIPs: ipNets(o.stray)},
		{PublicKey: throwaway, Remove: true},
	}})
}

func (o removeOp) do(_ context.Context, d *Device) error {
	return d.configure(wgtypes.Config{Peers: []wgtypes.PeerConfig{{PublicKey: wgtypes.Key(o.key), Remove: true}}})
}

// do waits until something was sent: a userspace device is up a moment after
// its link is.
func (o knockOp) do(ctx context.Context, d *Device) error {
	if err := d.configure(o.keepalives(func(Peer) time.Duration { return time.Second })); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for ctx.Err() == nil {
		if have, err := d.read(); err == nil && have.peers[o.peers[0].Key].Tx > 0 {
			break
		}
		select {
		case <-ctx.Done():
		case <-tick.C:
		}
	}
	return d.configure(o.keepalives(func(p Peer) time.Duration { return max(0, p.Keepalive) }))
}

func (o knockOp) keepalives(every func(Peer) time.Duration) wgtypes.Config {
	var cfg wgtypes.Config
	for _, p := range o.peers {
		interval := every(p)
		cfg.Peers = append(cfg.Peers, wgtypes.PeerConfig{PublicKey: wgtypes.Key(p.Key), UpdateOnly: true, PersistentKeepaliveInterval: &interval})
	}
	return cfg
}

func ipNets(ps []netip.Prefix) []net.IPNet {
	nets := make([]net.IPNet, len(ps))
	for i, p := range ps {
		nets[i] = net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
	}
	return nets
}
