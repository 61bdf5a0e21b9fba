package cni

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"time"

	"github.com/containernetworking/cni/pkg/types"

	"meshd.dev/pkg/mesh"
)

// Error codes of our own; the specification leaves 100 and up to plugins.
const (
	// CodeExhausted: every address is taken.
	CodeExhausted uint = 100
	// CodeAddressTaken: a requested address belongs to another attachment.
	CodeAddressTaken uint = 101
	// CodeAttached: the attachment exists already.
	CodeAttached uint = 102
	// CodeDrift: CHECK found something other than ADD made.
	CodeDrift uint = 103
	// CodePortTaken: a host port belongs to another attachment.
	CodePortTaken uint = 104
)

// pool is all there is to know for choosing addresses.
type pool struct {
	ranges   []span
	reserved []netip.Addr
	// held says which attachment has an address.
	held map[netip.Addr]recordName
	// freed says when an address was last given back.
	freed map[netip.Addr]time.Duration
	// quarantine is how long an address rests after that.
	quarantine time.Duration
	now        time.Duration
	// noted: what is requested is the wish of the pod's author.
	noted bool

	// names of the records, of temporary files, of what was given back, and
	// of what was given back before and whose file is in use again.
	names      []recordName
	stale      []string
	freedFiles []string
	freedLog   []string
}

// choose picks one address a family, IPv4 first: the requested ones, else one
// that was never used, else the one that was given back first.
func (p pool) choose(requested []netip.Addr) ([]netip.Addr, error) {
	var chosen []netip.Addr
	for _, is4 := range []bool{true, false} {
		ranges := p.of(is4)
		i := slices.IndexFunc(requested, func(a netip.Addr) bool { return a.Is4() == is4 })
		switch {
		case i >= 0:
			if err := p.mayRequest(requested[i]); err != nil {
				return nil, err
			}
			chosen = append(chosen, requested[i])
		case len(ranges) > 0:
			a, err := p.next(ranges)
			if err != nil {
				return nil, err
			}
			chosen = append(chosen, a)
		}
	}
	return chosen, nil
}

func (p pool) of(is4 bool) []span {
	var out []span
	for _, r := range p.ranges {
		if r.prefix.Addr().Is4() == is4 {
			out = append(out, r)
		}
	}
	return out
}

// mayRequest: a runtime may ask for an address in quarantine by name; whoever
// does wants that one back. A pod's author may not: for as long as it rests,
// what was meant for the pod before still comes, and that may be another
// tenant's.
func (p pool) mayRequest(a netip.Addr) error {
	in := slices.IndexFunc(p.ranges, func(r span) bool { return r.contains(a) })
	if in < 0 {
		return types.NewError(types.ErrInvalidNetworkConfig, "invalid requested address",
			fmt.Sprintf("%s is in none of the ranges %v", a, p.ranges))
	}
	if !p.ranges[in].usable(a) || slices.Contains(p.reserved, a) {
		return types.NewError(types.ErrInvalidNetworkConfig, "invalid requested address",
			fmt.Sprintf("%s is reserved in %s", a, p.ranges[in]))
	}
	if by, taken := p.held[a]; taken {
		return types.NewError(CodeAddressTaken, "requested address is taken",
			fmt.Sprintf("%s belongs to %s of container %s", a, by.ifName, by.containerID))
	}
	if at, was := p.freed[a]; was && p.noted {
		if rest := p.rest(at); rest > 0 {
			return types.NewError(types.ErrTryAgainLater, "requested address rests",
				fmt.Sprintf("%s was another pod's a moment ago; it can be used again in %s", a, rest.Round(time.Millisecond)))
		}
	}
	return nil
}

// rest is how long an address is still in quarantine.
func (p pool) rest(freed time.Duration) time.Duration { return p.quarantine - (p.now - freed) }

func (p pool) next(ranges []span) (netip.Addr, error) {
	for _, r := range ranges {
		if a, ok := p.neverUsed(r); ok {
			return a, nil
		}
	}
	a, at, ok := p.firstFreed(ranges)
	if !ok {
		return a, types.NewError(CodeExhausted, "no free address",
			fmt.Sprintf("all addresses of %v are taken: delete pods or give the node a larger pod CIDR", ranges))
	}
	if rest := p.rest(at); rest > 0 {
		return a, types.NewError(types.ErrTryAgainLater, "no free address yet",
			fmt.Sprintf("all free addresses of %v were given back a moment ago; the first can be used again in %s", ranges, rest.Round(time.Millisecond)))
	}
	return a, nil
}

// neverUsed finds the lowest address that is neither held nor known from
// before. It looks at no more addresses than those are.
func (p pool) neverUsed(r span) (netip.Addr, bool) {
	for a := r.start(); r.usable(a); a = a.Next() {
		_, held := p.held[a]
		_, freed := p.freed[a]
		if !held && !freed && !slices.Contains(p.reserved, a) {
			return a, true
		}
	}
	return netip.Addr{}, false
}

func (p pool) firstFreed(ranges []span) (first netip.Addr, at time.Duration, ok bool) {
	for a, t := range p.freed {
		if _, held := p.held[a]; held || slices.Contains(p.reserved, a) {
			continue
		}
		if ok && (t > at || t == at && first.Less(a)) {
			continue
		}
		if slices.ContainsFunc(ranges, func(r span) bool { return r.usable(a) }) {
			first, at, ok = a, t, true
		}
	}
	return first, at, ok
}

// span is addresses to choose from: those of a prefix, or of a part of it.
type span struct {
	prefix netip.Prefix
	// first and last address, if not all are meant.
	first, last netip.Addr
}

func (s span) String() string {
	if !s.first.IsValid() && !s.last.IsValid() {
		return s.prefix.String()
	}
	return fmt.Sprintf("%s from %s to %s", s.prefix, ends(s.first), ends(s.last))
}

func (s span) sameFamily(o span) bool { return s.prefix.Addr().Is4() == o.prefix.Addr().Is4() }

func ends(a netip.Addr) string {
	if !a.IsValid() {
		return "its end"
	}
	return a.String()
}

func (s span) start() netip.Addr {
	start := mesh.MeshAddr(s.prefix).Next()
	if s.first.IsValid() && start.Less(s.first) {
		return s.first
	}
	return start
}

func (s span) contains(a netip.Addr) bool {
	return s.prefix.Contains(a) && !(s.first.IsValid() && a.Less(s.first)) && !(s.last.IsValid() && s.last.Less(a))
}

// usable says whether a pod can have the address: not the network's own, not
// the node's (mesh.MeshAddr), not IPv4's broadcast.
func (s span) usable(a netip.Addr) bool {
	return s.contains(a) && a != s.prefix.Addr() && a != mesh.MeshAddr(s.prefix) && (a.Is6() || s.prefix.Contains(a.Next()))
}

func validateRange(p netip.Prefix) error {
	switch {
	case !p.IsValid():
		return errors.New("not a prefix: want one like 10.244.1.0/24")
	case p.Addr().Is4In6():
		return errors.New("an IPv4 prefix written as IPv6: want one like 10.244.1.0/24")
	case p != p.Masked():
		return errors.New("address bits set behind the prefix: want " + p.Masked().String())
	case p.Addr().BitLen()-p.Bits() < 2:
		return errors.New("too small to take addresses from: want at least /30 or /126")
	}
	return nil
}
