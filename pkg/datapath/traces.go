package datapath

import (
	"errors"
	"fmt"
	"strings"

	"github.com/vishvananda/netlink"

	"meshd.dev/pkg/datapath/firewall"
	"meshd.dev/pkg/datapath/route"
	"meshd.dev/pkg/mesh"
)

// Trace is something of ours in the kernel. Its text is the command by which
// a person would remove it.
type Trace struct {
	text   string
	remove func() error
}

func (t Trace) String() string { return t.text }

// Remove takes it away; that it is gone already is fine.
func (t Trace) Remove() error { return t.remove() }

// Traces lists what a datapath leaves on the machine when it ends: the devices
// that begin with the name device, our routes, our nft table. Removing a
// device ends the userspace process that serves it. In this order pod traffic
// stays off the underlay until the last of them: the firewall.
func Traces(device string) ([]Trace, error) {
	var traces []Trace
	links, err := netlink.LinkList()
	if err != nil && !errors.Is(err, netlink.ErrDumpInterrupted) {
		return nil, fmt.Errorf("list links: %w", err)
	}
	for _, l := range links {
		if t := l.Type(); strings.HasPrefix(l.Attrs().Name, device) && (t == "wireguard" || t == "tuntap") {
			traces = append(traces, Trace{"ip link delete " + l.Attrs().Name, func() error {
				err := netlink.LinkDel(l)
				if errors.As(err, new(netlink.LinkNotFoundError)) {
					return nil
				}
				return err
			}})
		}
	}
	routes, err := route.Count()
	if err != nil {
		return nil, err
	}
	if routes > 0 {
		traces = append(traces, Trace{fmt.Sprintf("ip route flush table all proto %d; ip -6 route flush table all proto %[1]d", mesh.RouteProtocol), route.Flush})
	}
	there, err := firewall.Exists()
	if err != nil {
		return nil, err
	}
	if there {
		traces = append(traces, Trace{"nft delete table inet " + mesh.FirewallTable, firewall.Remove})
	}
	return traces, nil
}
