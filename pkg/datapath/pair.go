package datapath

import (
	"net/netip"
	"slices"
	"time"

	"meshd.dev/pkg/datapath/wireguard"
	"meshd.dev/pkg/mesh"
)

// Two nodes have one tunnel, on the first device of each. While one of them
// changes its key they have a second one, between the second devices, of the
// newest key of each. Both accept on both; over which one a node sends is told
// by its routes.

// knock is the keepalive of a tunnel that shall be there before anybody
// sends. The node whose peer changes its key knocks: it is the one that hears
// of the key when the other is ready already.
const knock = 5 * time.Second

// newest key of a node.
func newest(n mesh.Node) mesh.Key {
	if n.NextKey.IsZero() {
		return n.PublicKey
	}
	return n.NextKey
}

// tunnel is a peer of a device and the key of ours it is for.
type tunnel struct {
	wireguard.Peer
	own mesh.Key
}

// addTunnels adds the tunnels to n, of which first is the usual one, and
// reports whether to send over the second. When that in use is silent its
// session begins anew, and the other one's, which may do, does not.
func (c *computation) addTunnels(n mesh.Node, first wireguard.Peer) (second bool) {
	if wireguard.StageOf(n.PublicKey, n.NextKey) == wireguard.Returning {
		first.Keepalive = knock
	}
	if c.wish.Second != nil && hasSecond(c.opts.Keys, n) {
		t := c.second(n, first.Endpoint)
		if c.opts.OverSecond[n.Name] {
			t.Fresh, t.Anew = first.Fresh, first.Anew
		}
		if second = c.addTunnel(c.wish.Second, n, t) == "" && c.opts.OverSecond[n.Name]; second {
			first.Fresh = wireguard.FreshAsIs
		}
	}
	if why := c.addTunnel(&c.wish.WireGuard, n, tunnel{first, c.opts.Keys.Current}); why != "" {
		c.problem(n.Name, why, "does it answer on its TCP port for keys (annotation "+mesh.AnnotationKeyExchange+" of its Node object)? `meshctl keys` says how far it is")
	}
	return second
}

// second tunnel to n. A node that changes its key says its port; of another it
// is the one behind the first, and it calls anyway.
func (c *computation) second(n mesh.Node, endpoint netip.AddrPort) tunnel {
	t := tunnel{wireguard.Peer{Name: n.Name, Key: newest(n), AllowedIPs: n.PodCIDRs, Fresh: wireguard.FreshAsIs}, c.opts.Keys.Current}
	if !c.opts.Keys.Next.IsZero() {
		t.own = c.opts.Keys.Next
	}
	port := endpoint.Port() + 1
	if !n.NextKey.IsZero() {
		t.Keepalive, port = knock, n.NextPort
	}
	if endpoint.IsValid() && port != 0 {
		t.Endpoint = netip.AddrPortFrom(endpoint.Addr(), port)
	}
	return t
}

// hasSecond reports whether there is a second tunnel to n.
func hasSecond(own wireguard.Keys, n mesh.Node) bool {
	return !own.Next.IsZero() || !n.NextKey.IsZero()
}

// settleSecond says whether there is a second device.
func (c *computation) settleSecond(nodes []mesh.Node) {
	need := !c.opts.Keys.Next.IsZero()
	for _, n := range nodes {
		need = need || !n.NextKey.IsZero()
	}
	if need && c.opts.Second != "" {
		c.wish.Second = &wireguard.Config{ListenPort: c.opts.ListenPort + 1, Addrs: slices.DeleteFunc(c.me.MeshAddrs(), netip.Addr.Is6)}
	}
}

// addTunnel says why there is no tunnel yet: the two keys do not have the
// preshared key they need.
func (c *computation) addTunnel(cfg *wireguard.Config, n mesh.Node, t tunnel) (why string) {
	if c.opts.PSK != nil {
		psk := c.opts.PSK(n, t.own, t.Key)
		goesOn := !psk.Firm && cfg == &c.wish.WireGuard && c.opts.OnDevice != nil && c.opts.OnDevice(t.Key)
		if psk.Wait != "" && !goesOn {
			return psk.Wait
		}
		t.PSK = psk.Secret
	}
	cfg.Peers = append(cfg.Peers, t.Peer)
	return ""
}
