package cni

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"golang.org/x/sys/unix"

	"meshd.dev/pkg/cni/rtnl"
	"meshd.dev/pkg/mesh"
)

// Repair puts back what somebody else took from the host's ends of pods: a link
// that was set down, the routes and neighbours by which pods are reached. It
// returns what it did as commands. Pods whose link is gone, and those an ADD or
// DEL works on, it leaves alone. Call it in the host's network namespace.
func Repair(dataDir string) (did []string, err error) {
	bootID, err := readBootID()
	if err != nil {
		return nil, err
	}
	host, err := rtnl.Open()
	if err != nil {
		return nil, err
	}
	defer host.Close()
	have, err := readReach(host)
	if err != nil {
		return nil, err
	}
	err = eachRecord(dataDir, func(s store, n recordName, r Record, err error) error {
		if err != nil || r.BootID != bootID || r.HostLocal != "" {
			return nil // the sweep says what is wrong with it
		}
		ops := have.lacking(r.attachment(0))
		if len(ops) == 0 {
			return nil
		}
		h, err := s.hold(n, unix.LOCK_EX|unix.LOCK_NB)
		if errors.Is(err, errBusy) || errors.Is(err, errGone) {
			return nil
		}
		if err != nil {
			return err
		}
		defer h.release()
		for _, op := range ops {
			err := host.Do(op)
			if errors.Is(err, unix.EEXIST) || isGone(err) {
				continue // it came, or the pod went, since we looked
			}
			if err != nil {
				return fmt.Errorf("pod %s/%s: %w", r.Pod.Namespace, r.Pod.Name, err)
			}
			did = append(did, op.String())
		}
		return nil
	})
	return did, err
}

// reached is what leads to pods, by link.
type reached struct {
	links  map[string]rtnl.Link
	routes map[int][]netip.Prefix
	neighs map[int][]netip.Addr
}

func readReach(host *rtnl.Conn) (reached, error) {
	have := reached{map[string]rtnl.Link{}, map[int][]netip.Prefix{}, map[int][]netip.Addr{}}
	links, err := ourLinks(host)
	if err != nil || len(links) == 0 {
		return have, err
	}
	for _, l := range links {
		have.links[l.Name] = l
	}
	routes, err := host.Routes(0)
	if err != nil {
		return have, err
	}
	for _, r := range routes {
		if r.Protocol == mesh.PodRouteProtocol {
			have.routes[r.Index] = append(have.routes[r.Index], r.Dst)
		}
	}
	neighs, err := host.Neighs(0)
	for _, n := range neighs {
		if n.Permanent {
			have.neighs[n.Index] = append(have.neighs[n.Index], n.Addr)
		}
	}
	return have, err
}

// lacking makes whole what ADD made of the host's end. A link that was down has
// lost everything.
func (have reached) lacking(a attachment) []rtnl.Op {
	link, ok := have.links[a.hostLink]
	if !ok {
		return nil
	}
	if !link.Up {
		return append([]rtnl.Op{
			rtnl.LinkSet{Index: link.Index, Name: a.hostLink, NoLinkLocal: true, StrictIPv4: true, LocalNet: a.localnet},
			rtnl.LinkSet{Index: link.Index, Name: a.hostLink, Up: true},
		}, a.reach(link.Index)...)
	}
	return slices.DeleteFunc(a.reach(link.Index), func(op rtnl.Op) bool {
		switch op := op.(type) {
		case rtnl.NeighAdd:
			return slices.Contains(have.neighs[link.Index], op.Addr)
		case rtnl.RouteAdd:
			return slices.Contains(have.routes[link.Index], op.Dst)
		}
		return false
	})
}
