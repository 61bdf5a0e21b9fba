package firewall

import (
	"fmt"
	"net/netip"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"

	"meshd.dev/pkg/mesh"
)

// resolver is the chain that leads pods' questions to this node's own
// resolver, whichever of cfg.Resolver they ask. The resolver has a socket on
// each of these addresses for nothing else than to be found here: when it is
// gone, whatever ended it, the rule does not match, and the question goes on
// to whoever serves the address otherwise.
func resolver(cfg Config) chain {
	c := chain{name: "resolver"}
	for _, to := range cfg.Resolver {
		for _, own := range cfg.MeshAddrs {
			if own.Is4() != to.Is4() {
				continue
			}
			f := familyOf(to)
			for _, proto := range []mesh.Protocol{mesh.UDP, mesh.TCP} {
				c.rules = append(c.rules, newRule("the resolver of this node, while it listens",
					f.is(), f.dnsTo(to.String(), to.AsSlice(), proto.Number()), listening, f.dnatTo(own.String(), own.AsSlice())))
			}
		}
	}
	return c
}

// noHostPort keeps host ports of pods away from where this node's resolver
// listens: else a pod with host port 53 would answer for the cluster's names.
func (f family) noHostPort(meshAddrs []netip.Addr) (rules []rule) {
	for _, a := range meshAddrs {
		if familyOf(a) != f {
			continue
		}
		for _, proto := range []mesh.Protocol{mesh.UDP, mesh.TCP} {
			rules = append(rules, newRule("the resolver of this node", f.is(), f.dnsTo(a.String(), a.AsSlice(), proto.Number()), ret))
		}
	}
	return rules
}

func (f family) dnsTo(text string, addr []byte, proto byte) part {
	return part{fmt.Sprintf("%s daddr %s %s dport 53", f.ip(), text, showProto(proto)), []expr.Any{
		f.load(true, 1), cmpEq(addr), loadProto(1), cmpEq([]byte{proto}), loadPort(1), cmpEq([]byte{0, 53})}}
}

// listening matches when a socket is bound to exactly the packet's
// destination; one bound to every address does not count.
var listening = part{"socket wildcard 0", []expr.Any{
	&expr.Socket{Key: expr.SocketKeyWildcard, Register: 1}, cmpEq([]byte{0})}}

func (f family) dnatTo(text string, addr []byte) part {
	return part{fmt.Sprintf("dnat %s to %s", f.ip(), text), []expr.Any{
		&expr.Immediate{Register: 1, Data: addr},
		&expr.NAT{Type: expr.NATTypeDestNAT, Family: uint32(f.nfproto()), RegAddrMin: 1}}}
}

// beforeOthers is the priority of our destination NAT: ahead of kube-proxy's
// and everybody else's, of which only the first that matches counts.
var beforeOthers = *nftables.ChainPriorityNATDest - 1
