package firewall

import (
	"encoding/binary"
	"fmt"
	"hash/fnv"
	"net/netip"
	"strings"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"meshd.dev/pkg/mesh"
)

// A part is a piece of a rule: as nft(8) writes it, and as the kernel takes
// it.
type part struct {
	text  string
	exprs []expr.Any
}

// rule is what a chain is made of. Why goes into its comment, with a hash of
// what the kernel was given, by which a changed rule is recognised.
type rule struct {
	why   string
	text  string
	exprs []expr.Any
}

func newRule(why string, parts ...part) rule {
	r := rule{why: why}
	texts := make([]string, len(parts))
	for i, p := range parts {
		texts[i] = p.text
		r.exprs = append(r.exprs, p.exprs...)
	}
	r.text = strings.Join(texts, " ")
	return r
}

func (r rule) comment() string {
	h := fnv.New32a()
	for _, e := range r.exprs {
		b, err := expr.Marshal(unix.NFPROTO_INET, e)
		if err != nil {
			panic(fmt.Sprintf("rule %q: %v", r.text, err)) // a constant of ours; any test finds it
		}
		h.Write(b)
	}
	return fmt.Sprintf("%s %08x", r.why, h.Sum32())
}

// chain with a hook is entered from there; without, from other chains.
type chain struct {
	name  string
	kind  nftables.ChainType
	hook  *nftables.ChainHook
	prio  nftables.ChainPriority
	rules []rule
}

// The kernel's 4-byte registers: a concatenated key is built in neighbours.
const reg = unix.NFT_REG32_00

func cmpEq(data []byte) *expr.Cmp  { return &expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: data} }
func cmpNeq(data []byte) *expr.Cmp { return &expr.Cmp{Op: expr.CmpOpNeq, Register: 1, Data: data} }

// linkName compares like nft: a name ending in * is a prefix.
func linkName(keyword string, key expr.MetaKey, name string, not bool) part {
	data, quoted := append([]byte(name), make([]byte, 16-len(name))...), name
	if p, ok := strings.CutSuffix(name, "*"); ok {
		data = []byte(p)
	}
	c, op := cmpEq(data), " "
	if not {
		c, op = cmpNeq(data), " != "
	}
	return part{fmt.Sprintf("%s%s%q", keyword, op, quoted), []expr.Any{&expr.Meta{Key: key, Register: 1}, c}}
}

func iifname(name string) part    { return linkName("iifname", expr.MetaKeyIIFNAME, name, false) }
func iifnameNot(name string) part { return linkName("iifname", expr.MetaKeyIIFNAME, name, true) }
func oifname(name string) part    { return linkName("oifname", expr.MetaKeyOIFNAME, name, false) }
func oifnameNot(name string) part { return linkName("oifname", expr.MetaKeyOIFNAME, name, true) }

// family of addresses in a rule: "4" or "6", as in the names of sets.
type family string

func (f family) ip() string {
	if f == "4" {
		return "ip"
	}
	return "ip6"
}

// size of an address.
func (f family) size() uint32 {
	if f == "4" {
		return 4
	}
	return 16
}

func (f family) nfproto() byte {
	if f == "4" {
		return unix.NFPROTO_IPV4
	}
	return unix.NFPROTO_IPV6
}

// is matches packets of the family; every look at an address needs it first.
func (f family) is() part {
	name := map[family]string{"4": "ipv4", "6": "ipv6"}[f]
	return part{"meta nfproto " + name, []expr.Any{&expr.Meta{Key: expr.MetaKeyNFPROTO, Register: 1}, cmpEq([]byte{f.nfproto()})}}
}

func (f family) load(dest bool, register uint32) expr.Any {
	offset := map[family]uint32{"4": 12, "6": 8}[f]
	if dest {
		offset += f.size()
	}
	return &expr.Payload{Base: expr.PayloadBaseNetworkHeader, Offset: offset, Len: f.size(), DestRegister: register}
}

// addr matches when the source or destination is in a set (or not).
func (f family) addr(what, set string, not bool) part {
	op := ""
	if not {
		op = "!= "
	}
	return part{fmt.Sprintf("%s %s %s@%s", f.ip(), what, op, set), []expr.Any{
		f.load(what == "daddr", 1), &expr.Lookup{SourceRegister: 1, SetName: set, Invert: not}}}
}

func (f family) saddrIn(set string) part    { return f.addr("saddr", set, false) }
func (f family) saddrNotIn(set string) part { return f.addr("saddr", set, true) }
func (f family) daddrIn(set string) part    { return f.addr("daddr", set, false) }
func (f family) daddrNotIn(set string) part { return f.addr("daddr", set, true) }

// dispatch by destination, protocol and port.
func (f family) serviceMap(set string) part {
	next := reg + f.size()/4
	return part{fmt.Sprintf("%s daddr . meta l4proto . th dport vmap @%s", f.ip(), set), []expr.Any{
		f.load(true, reg), loadProto(next), loadPort(next + 1),
		&expr.Lookup{SourceRegister: reg, SetName: set, IsDestRegSet: true}}} // register 0: the verdict
}

func loadProto(register uint32) expr.Any {
	return &expr.Meta{Key: expr.MetaKeyL4PROTO, Register: register}
}

func loadPort(register uint32) expr.Any {
	return &expr.Payload{Base: expr.PayloadBaseTransportHeader, Offset: 2, Len: 2, DestRegister: register}
}

// nodePortMap dispatches by protocol and port; its key starts with the
// unspecified address.
func (f family) nodePortMap(set string) part {
	next := reg + f.size()/4
	return part{fmt.Sprintf("%s . meta l4proto . th dport vmap @%s", f.unspecified(), set), append(f.loadUnspecified(),
		loadProto(next), loadPort(next+1),
		&expr.Lookup{SourceRegister: reg, SetName: set, IsDestRegSet: true})}
}

func (f family) unspecified() string { return map[family]string{"4": "0.0.0.0", "6": "::"}[f] }

func (f family) loadUnspecified() []expr.Any {
	var es []expr.Any
	for i := range f.size() / 4 {
		es = append(es, &expr.Immediate{Register: reg + i, Data: make([]byte, 4)})
	}
	return es
}

// pick is the rule of a chain for n endpoints: the endpoint of a slot below
// n. nft(8) has no words for a number generator inside a concatenation; the
// kernel writes it straight into the register behind the rest of the key.
func (f family) pick(n int, nodePort, sticky bool) rule {
	proto := reg + f.size()/4
	port, slot := proto+1, proto+2
	target := slot + 1
	key, es := f.ip()+" daddr", []expr.Any{f.load(true, reg)}
	if nodePort {
		key, es = f.unspecified(), f.loadUnspecified()
	}
	es = append(es, loadProto(proto), loadPort(port))
	how := fmt.Sprintf("numgen random mod %d", n)
	if sticky {
		how = fmt.Sprintf("jhash %s saddr mod %d", f.ip(), n)
		es = append(es, f.load(false, target),
			&expr.Hash{SourceRegister: target, DestRegister: slot, Length: f.size(), Modulus: uint32(n), Type: expr.HashTypeJenkins, Seed: 77})
	} else {
		es = append(es, &expr.Numgen{Register: slot, Modulus: uint32(n), Type: unix.NFT_NG_RANDOM})
	}
	es = append(es,
		&expr.Lookup{SourceRegister: reg, DestRegister: target, IsDestRegSet: true, SetName: "ep" + string(f)},
		&expr.NAT{Type: expr.NATTypeDestNAT, Family: uint32(f.nfproto()), RegAddrMin: target, RegProtoMin: target + f.size()/4})
	return newRule("one of the endpoints", part{
		fmt.Sprintf("dnat %s to %s . meta l4proto . th dport . %s map @ep%s", f.ip(), key, how, f), es})
}

// podIn matches when link . address is one of our pods (or not). key says
// which link.
func (f family) podIn(link string, key expr.MetaKey, what string, not bool) part {
	op := ""
	if not {
		op = "!= "
	}
	return part{fmt.Sprintf("%s . %s %s %s@%s%s", link, f.ip(), what, op, mesh.PodSet, f), []expr.Any{
		&expr.Meta{Key: key, Register: reg}, f.load(what == "daddr", reg+linkRegisters),
		&expr.Lookup{SourceRegister: reg, SetName: mesh.PodSet + string(f), Invert: not}}}
}

// linkRegisters is how many an interface name fills.
const linkRegisters = 4

// hostPort leads to the pod whose port of this node it is, opened on this
// address, or on all.
func (f family) hostPort(all bool) part {
	proto := reg + f.size()/4
	target := proto + 2
	key, es := f.ip()+" daddr", []expr.Any{f.load(true, reg)}
	if all {
		key, es = f.unspecified(), f.loadUnspecified()
	}
	return part{fmt.Sprintf("dnat %s to %s . meta l4proto . th dport map @%s%s", f.ip(), key, mesh.HostPortMap, f), append(es,
		loadProto(proto), loadPort(proto+1),
		&expr.Lookup{SourceRegister: reg, DestRegister: target, IsDestRegSet: true, SetName: mesh.HostPortMap + string(f)},
		&expr.NAT{Type: expr.NATTypeDestNAT, Family: uint32(f.nfproto()), RegAddrMin: target, RegProtoMin: target + f.size()/4})}
}

// comesBack matches a pod that reaches itself through a host port.
func (f family) comesBack() part {
	return part{fmt.Sprintf("%s saddr . %[1]s daddr @%[2]s%[3]s", f.ip(), mesh.HairpinSet, f), []expr.Any{
		f.load(false, reg), f.load(true, reg+f.size()/4),
		&expr.Lookup{SourceRegister: reg, SetName: mesh.HairpinSet + string(f)}}}
}

// hairpin gives a pod that reaches itself another source, or it would drop
// its own packet.
func (f family) hairpin() part {
	second := reg + f.size()/4
	target := second + f.size()/4
	return part{fmt.Sprintf("snat %s to %[1]s saddr . %[1]s daddr map @self%s", f.ip(), f), []expr.Any{
		f.load(false, reg), f.load(true, second),
		&expr.Lookup{SourceRegister: reg, DestRegister: target, IsDestRegSet: true, SetName: "self" + string(f)},
		&expr.NAT{Type: expr.NATTypeSourceNAT, Family: uint32(f.nfproto()), RegAddrMin: target}}}
}

func verdict(text string, kind expr.VerdictKind, to string) part {
	return part{strings.TrimSpace(text + " " + to), []expr.Any{&expr.Verdict{Kind: kind, Chain: to}}}
}

func jump(to string) part { return verdict("jump", expr.VerdictJump, to) }

var (
	drop   = verdict("drop", expr.VerdictDrop, "")
	accept = verdict("accept", expr.VerdictAccept, "")
	ret    = verdict("return", expr.VerdictReturn, "")

	masquerade = part{"masquerade fully-random", []expr.Any{&expr.Masq{FullyRandom: true}}}

	// toUs: to an address of this machine.
	toUs = part{"fib daddr type local", []expr.Any{
		&expr.Fib{Register: 1, ResultADDRTYPE: true, FlagDADDR: true}, cmpEq(native(unix.RTN_LOCAL))}}

	isTCP = part{"meta l4proto tcp", []expr.Any{&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: 1}, cmpEq([]byte{unix.IPPROTO_TCP})}}
	isSYN = part{"tcp flags & (syn | rst) == syn", []expr.Any{
		&expr.Payload{Base: expr.PayloadBaseTransportHeader, Offset: 13, Len: 1, DestRegister: 1},
		&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 1, Mask: []byte{0x06}, Xor: []byte{0}}, cmpEq([]byte{0x02})}}
	clampMSS = part{"tcp option maxseg size set rt mtu", []expr.Any{
		&expr.Rt{Register: 1, Key: expr.RtTCPMSS},
		&expr.Byteorder{SourceRegister: 1, DestRegister: 1, Op: expr.ByteorderHton, Len: 2, Size: 2},
		&expr.Exthdr{SourceRegister: 1, Type: 2, Offset: 2, Len: 2, Op: expr.ExthdrOpTcpopt}}}
	rejectTCP = part{"reject with tcp reset", []expr.Any{&expr.Reject{Type: unix.NFT_REJECT_TCP_RST}}}
	rejectAny = part{"reject with icmpx port-unreachable", []expr.Any{
		&expr.Reject{Type: unix.NFT_REJECT_ICMPX_UNREACH, Code: unix.NFT_REJECT_ICMPX_PORT_UNREACH}}}
)

// meshSource makes this node's mesh address the source. Not masquerade, where
// there is an address: that kills connections whose route moves from one
// device of ours to the other.
func (f family) meshSource(addrs []netip.Addr) part {
	for _, a := range addrs {
		if familyOf(a) == f {
			return part{fmt.Sprintf("snat %s to %s fully-random", f.ip(), a), []expr.Any{
				&expr.Immediate{Register: reg, Data: a.AsSlice()},
				&expr.NAT{Type: expr.NATTypeSourceNAT, Family: uint32(f.nfproto()), RegAddrMin: reg, FullyRandom: true}}}
		}
	}
	return masquerade
}

var (
	// begins: no part of a connection that is there already.
	begins = part{"ct state != { established, related }", []expr.Any{
		&expr.Ct{Key: expr.CtKeySTATE, Register: 1},
		&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 4, Mask: native(ctEstablished | ctRelated), Xor: native(0)}, cmpEq(native(0))}}
	// notTranslated: to where its sender said, not to what a service or port
	// of this machine stands for.
	notTranslated = part{"ct status & dnat == 0", []expr.Any{
		&expr.Ct{Key: expr.CtKeySTATUS, Register: 1},
		&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 4, Mask: native(ctDNAT), Xor: native(0)}, cmpEq(native(0))}}
)

// Bits of linux/netfilter/nf_conntrack_common.h; those of the state are as
// NF_CT_STATE_BIT makes them.
const (
	ctEstablished, ctRelated = 1 << 1, 1 << 2
	ctDNAT                   = 1 << 5
)

// icmpv6 matches one type.
func icmpv6(name string, typ byte) part {
	return part{"icmpv6 type " + name, []expr.Any{
		&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: 1}, cmpEq([]byte{unix.IPPROTO_ICMPV6}),
		&expr.Payload{Base: expr.PayloadBaseTransportHeader, Offset: 0, Len: 1, DestRegister: 1}, cmpEq([]byte{typ})}}
}

// fragNeeded is an error by which routers tell the path's MTU.
var fragNeeded = part{"icmp type destination-unreachable icmp code frag-needed", []expr.Any{
	&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: 1}, cmpEq([]byte{unix.IPPROTO_ICMP}),
	&expr.Payload{Base: expr.PayloadBaseTransportHeader, Offset: 0, Len: 2, DestRegister: 1}, cmpEq([]byte{3, 4})}}

// linkLocalSource matches fe80::/10.
var linkLocalSource = part{"ip6 saddr fe80::/10", []expr.Any{
	&expr.Payload{Base: expr.PayloadBaseNetworkHeader, Offset: 8, Len: 2, DestRegister: 1},
	&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 2, Mask: []byte{0xff, 0xc0}, Xor: []byte{0, 0}}, cmpEq([]byte{0xfe, 0x80})}}

func native(v uint32) []byte { return binary.NativeEndian.AppendUint32(nil, v) }

// loopbackSource is 127.0.0.0/8.
var loopbackSource = part{"ip saddr 127.0.0.0/8", []expr.Any{
	&expr.Payload{Base: expr.PayloadBaseNetworkHeader, Offset: 12, Len: 1, DestRegister: 1}, cmpEq([]byte{127})}}

// loopbackDest is 127.0.0.0/8, or ::1.
func (f family) loopbackDest() part {
	if f == "4" {
		return part{"ip daddr 127.0.0.0/8", []expr.Any{
			&expr.Payload{Base: expr.PayloadBaseNetworkHeader, Offset: 16, Len: 1, DestRegister: 1}, cmpEq([]byte{127})}}
	}
	one := make([]byte, 16)
	one[15] = 1
	return part{"ip6 daddr ::1", []expr.Any{f.load(true, 1), cmpEq(one)}}
}

var notLocalhost = part{"ip daddr != 127.0.0.1", []expr.Any{family("4").load(true, 1), cmpNeq([]byte{127, 0, 0, 1})}}

var families = []family{"4", "6"}

// fixedChains are those that are always there, for a configuration.
func fixedChains(cfg Config) []chain {
	pods, device := cfg.PodLinks+"*", cfg.Device+"*"
	services := chain{name: "services"}
	nodePorts := chain{name: "nodeports"}
	pod := chain{name: mesh.PodChain, rules: []rule{
		newRule("no router advertisements from pods", family("6").is(), icmpv6("nd-router-advert", 134), drop),
		newRule("no redirects from pods", family("6").is(), icmpv6("nd-redirect", 137), drop),
		newRule("no router solicitations from pods", family("6").is(), icmpv6("nd-router-solicit", 133), drop),
		// The kernel believes it of anybody and of any destination: one packet to
		// whichever node would shrink its way to another for ten minutes.
		newRule("pods are no routers: nothing is too big", family("4").is(), fragNeeded, drop),
		newRule("pods are no routers: nothing is too big", family("6").is(), icmpv6("packet-too-big", 2), drop),
		newRule("neighbour discovery on the link itself", family("6").is(), linkLocalSource, icmpv6("nd-neighbor-solicit", 135), ret),
		newRule("neighbour discovery on the link itself", family("6").is(), linkLocalSource, icmpv6("nd-neighbor-advert", 136), ret),
		// A pod with a host port has route_localnet on its link.
		newRule("the machine's loopback is not for pods", family("4").is(), family("4").loopbackDest(), drop),
		newRule("an admitted pod under its own address", family("4").is(), family("4").podIn("iifname", expr.MetaKeyIIFNAME, "saddr", false), ret),
		newRule("an admitted pod under its own address", family("6").is(), family("6").podIn("iifname", expr.MetaKeyIIFNAME, "saddr", false), ret),
		newRule("spoofed source, or not admitted", drop),
	}}
	hostPorts := chain{name: "hostports"}
	raw := chain{name: mesh.AntispoofChain, kind: nftables.ChainTypeFilter, hook: nftables.ChainHookPrerouting, prio: *nftables.ChainPriorityRaw,
		rules: []rule{newRule("", iifname(pods), jump(mesh.PodChain))}}
	forward := chain{name: "forward", kind: nftables.ChainTypeFilter, hook: nftables.ChainHookForward, prio: *nftables.ChainPriorityFilter,
		rules: []rule{
			newRule("peers reach pods here, and nothing behind this machine", iifname(device), oifnameNot(pods), begins, notTranslated, drop),
			newRule("fit the tunnel", oifname(device), isTCP, isSYN, clampMSS),
			newRule("fit the tunnel", iifname(device), isTCP, isSYN, clampMSS)}}
	output := chain{name: "output", kind: nftables.ChainTypeFilter, hook: nftables.ChainHookOutput, prio: *nftables.ChainPriorityFilter}
	// Not in output: a packet whose destination was just translated there, by
	// whatever service proxy, is still said to leave by its old link.
	leaving := chain{name: mesh.LeavingChain, kind: nftables.ChainTypeFilter, hook: nftables.ChainHookPostrouting, prio: *nftables.ChainPriorityFilter,
		rules: counters(cfg)}
	source := chain{name: "source", kind: nftables.ChainTypeNAT, hook: nftables.ChainHookPostrouting, prio: *nftables.ChainPriorityNATSource}
	fromNode := chain{name: "nat-output", kind: nftables.ChainTypeNAT, hook: nftables.ChainHookOutput, prio: beforeOthers}
	for _, f := range families {
		n := string(f)
		raw.rules = append(raw.rules, newRule("pod source from the underlay",
			f.is(), f.saddrIn("cluster"+n), iifnameNot(device), iifnameNot(pods), iifnameNot("lo"), drop))
		services.rules = append(services.rules, newRule("", f.is(), f.serviceMap("svc"+n)))
		hostPorts.rules = append(hostPorts.rules, f.noHostPort(cfg.MeshAddrs)...)
		hostPorts.rules = append(hostPorts.rules, newRule("a pod's port of this node", f.is(), f.hostPort(false)))
		if f == "4" { // 127.0.0.53 is systemd-resolved's
			hostPorts.rules = append(hostPorts.rules, newRule("of loopback only 127.0.0.1", f.is(), f.loopbackDest(), notLocalhost, ret))
		}
		hostPorts.rules = append(hostPorts.rules, newRule("a pod's port of this node", f.is(), f.hostPort(true)))
		nodePorts.rules = append(nodePorts.rules, newRule("", f.is(), f.nodePortMap("svc"+n)))
		if f == "6" { // the kernel lets no packet from ::1 out of lo
			fromNode.rules = append(fromNode.rules, newRule("not on loopback", f.is(), f.loopbackDest(), ret))
		}
		notAdmitted := newRule("to a pod that is not admitted", f.is(), oifname(pods), f.podIn("oifname", expr.MetaKeyOIFNAME, "daddr", true), drop)
		inClear := newRule("pod traffic in clear", f.is(), f.daddrIn("cluster"+n), oifnameNot(device), oifnameNot(pods), oifnameNot("lo"), drop)
		refused := newRule("nobody behind this service address", f.is(), f.daddrIn("vip"+n), jump("refuse"))
		refusedNet := newRule("no such service address", f.is(), f.daddrIn("svcnet"+n), jump("refuse"))
		leaving.rules = append(leaving.rules, inClear, notAdmitted)
		forward.rules = append(forward.rules, refused, refusedNet)
		output.rules = append(output.rules, refused, refusedNet)
		source.rules = append(source.rules,
			newRule("peers take only our pods' range", f.is(), oifname(device), f.saddrNotIn("own"+n), f.meshSource(cfg.MeshAddrs)),
			newRule("to itself through a service", f.is(), iifname(pods), oifname(pods), f.hairpin()),
			newRule("to itself through a host port", f.is(), iifname(pods), oifname(pods), f.comesBack(), masquerade),
			newRule("out of the cluster", f.is(), f.saddrIn("own"+n), f.daddrNotIn("cluster"+n), f.daddrNotIn("direct"+n),
				oifnameNot(device), oifnameNot(pods), oifnameNot("lo"), masquerade))
	}
	source.rules = append(source.rules, newRule("from loopback to a host port", family("4").is(), oifname(pods), loopbackSource, masquerade))
	fromNode.rules = append(fromNode.rules, newRule("", toUs, jump("hostports")),
		newRule("not on loopback", family("4").is(), family("4").loopbackDest(), ret),
		newRule("", jump("services")), newRule("", toUs, jump("nodeports")))
	return []chain{
		{name: "refuse", rules: []rule{refusedCounter(cfg), newRule("", isTCP, rejectTCP), newRule("", rejectAny)}},
		{name: entering, kind: nftables.ChainTypeFilter, hook: nftables.ChainHookForward, prio: *nftables.ChainPriorityConntrackDefrag, rules: counters(cfg)},
		pod, services, hostPorts, nodePorts, raw,
		{name: "nat-prerouting", kind: nftables.ChainTypeNAT, hook: nftables.ChainHookPrerouting, prio: beforeOthers,
			rules: []rule{newRule("", iifname(pods), jump("resolver")), newRule("", toUs, jump("hostports")),
				newRule("", iifname(pods), jump("services")), newRule("", toUs, jump("nodeports"))}},
		resolver(cfg), fromNode, forward, output, leaving, source,
	}
}
