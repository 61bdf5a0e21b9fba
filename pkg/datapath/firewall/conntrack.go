package firewall

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"meshd.dev/pkg/mesh"
)

// A UDP flow has no end that the kernel could see: as long as the client
// sends, its conntrack entry keeps translating to an endpoint that may be
// gone. Those entries are deleted, and no others. The rules change first, but
// a packet may have passed the old ones and make its entry afterwards; hence
// a second look.
const secondLook = time.Second

// flows of services whose endpoints changed: where they may still lead.
type flows map[netip.AddrPort][]netip.AddrPort

// sweep deletes the entries of UDP services that ops touched, of those of the
// sweep before when its second look is due, and of all at the first call.
func (t *Table) sweep(cfg Config, ops []op) error {
	now := time.Now()
	due := flows{}
	if !t.again.IsZero() && !now.Before(t.again) {
		due, t.flows, t.again = t.flows, nil, time.Time{}
	}
	touched := touchedBy(ops)
	if !t.started {
		touched = append(touched, udpServices(cfg)...)
		t.started = true
	}
	if len(touched)+len(due) == 0 {
		return nil
	}
	if t.flows == nil {
		t.flows = flows{}
	}
	current := currentTargets(cfg)
	for _, service := range touched {
		t.flows[service] = nil
		due[service] = nil
		t.again = now.Add(secondLook)
	}
	for service := range due {
		due[service] = current[service]
	}
	return due.delete()
}

// touchedBy lists the UDP services that lost an endpoint.
func touchedBy(ops []op) []netip.AddrPort {
	var list []netip.AddrPort
	for _, o := range ops {
		if o.verb != "delete" || (o.name != "ep4" && o.name != "ep6") {
			continue
		}
		addr := 4
		if o.name == "ep6" {
			addr = 16
		}
		for _, e := range o.elements {
			a, _ := netip.AddrFromSlice([]byte(e.key[:addr]))
			if e.key[addr] == unix.IPPROTO_UDP {
				list = append(list, netip.AddrPortFrom(a, uint16(e.key[addr+4])<<8|uint16(e.key[addr+5])))
			}
		}
	}
	slices.SortFunc(list, netip.AddrPort.Compare)
	return slices.Compact(list)
}

func udpServices(cfg Config) []netip.AddrPort {
	var list []netip.AddrPort
	for s := range cfg.services {
		if s.Protocol == mesh.UDP && !s.Addr.IsUnspecified() {
			list = append(list, netip.AddrPortFrom(s.Addr, s.Port))
		}
	}
	return list
}

func currentTargets(cfg Config) flows {
	m := flows{}
	for s := range cfg.services {
		if s.Protocol == mesh.UDP {
			m[netip.AddrPortFrom(s.Addr, s.Port)] = s.Endpoints
		}
	}
	return m
}

// MatchConntrackFlow: a translated UDP flow to one of the services whose
// answers come from somewhere that is no endpoint any more.
func (f flows) MatchConntrackFlow(c *netlink.ConntrackFlow) bool {
	if c.Forward.Protocol != unix.IPPROTO_UDP {
		return false
	}
	to, from := addrPort(c.Forward.DstIP, c.Forward.DstPort), addrPort(c.Reverse.SrcIP, c.Reverse.SrcPort)
	if to == from {
		return false // not translated
	}
	targets, ok := f[to]
	if !ok { // a node port?
		any := netip.IPv4Unspecified()
		if to.Addr().Is6() {
			any = netip.IPv6Unspecified()
		}
		if targets, ok = f[netip.AddrPortFrom(any, to.Port())]; !ok {
			return false
		}
	}
	return !slices.Contains(targets, from)
}

func addrPort(ip []byte, port uint16) netip.AddrPort {
	a, _ := netip.AddrFromSlice(ip)
	return netip.AddrPortFrom(a.Unmap(), port)
}

func (f flows) delete() error {
	var errs []error
	for _, family := range []netlink.InetFamily{unix.AF_INET, unix.AF_INET6} {
		for try := 0; ; try++ {
			_, err := netlink.ConntrackDeleteFilters(netlink.ConntrackTable, family, f)
			if errors.Is(err, netlink.ErrDumpInterrupted) && try < 10 {
				continue
			}
			if err != nil && !errors.Is(err, unix.ENOENT) {
				errs = append(errs, fmt.Errorf("delete flows to endpoints that are gone: %w", err))
			}
			break
		}
	}
	return errors.Join(errs...)
}
