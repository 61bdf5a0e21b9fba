package datapath

import (
	"net/netip"
	"slices"

	"meshd.dev/pkg/datapath/route"
)

// maxEndpoints is how many a node publishes; peers read a few more.
const maxEndpoints = 8

// Endpoints this node shall publish: those named first, then the port of the
// tunnels at every address by which others may reach this machine. Never an
// address of the cluster's own ranges.
func (d *Datapath) Endpoints(first ...netip.AddrPort) []netip.AddrPort {
	own, err := route.UnderlayAddresses()
	if err != nil {
		d.cfg.Log.Warn("addresses of this machine", "err", err)
	}
	var inside []netip.Prefix
	if w := d.wished.Load(); w != nil {
		inside = slices.Concat(w.Firewall.Cluster, w.Firewall.ServiceCIDRs)
	}
	return endpoints(first, own, slices.Concat(inside, d.cfg.PodCIDRs, d.cfg.ServiceCIDRs), d.cfg.ListenPort)
}

func endpoints(first []netip.AddrPort, own []netip.Addr, inside []netip.Prefix, port int) []netip.AddrPort {
	list := slices.Clone(first)
	for _, a := range own {
		e := netip.AddrPortFrom(a, uint16(port))
		if _, ours := covering(inside, a); !ours && !slices.Contains(list, e) {
			list = append(list, e)
		}
	}
	return list[:min(len(list), maxEndpoints)]
}

// movedAway calls OnEndpoints when the addresses of this machine are others.
func (d *Datapath) movedAway() {
	if d.cfg.OnEndpoints == nil {
		return
	}
	if now := d.Endpoints(); !slices.Equal(now, d.endpoints) {
		d.endpoints = now
		d.cfg.OnEndpoints()
	}
}
