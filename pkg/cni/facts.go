package cni

import (
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"meshd.dev/pkg/cni/rtnl"
	"meshd.dev/pkg/mesh"
)

// fact is one thing about a link that holds or does not. Two of the same key
// contradict each other when their values differ, unless a link can have many
// of them.
type fact struct{ key, value string }

func (f fact) String() string { return strings.TrimSpace(f.key + " " + f.value) }

// wanted are the facts that must hold, in the words of facts.
func (a attachment) wanted() (host, pod []fact) {
	host = append(linkFacts(rtnl.Link{Name: a.hostLink, MAC: hostMAC, MTU: a.mtu, Up: true}), a.toPod.facts(a.hostLink)...)
	pod = append(linkFacts(rtnl.Link{Name: a.podLink, MAC: a.podMAC, MTU: a.mtu, Up: true}), a.fromPod.facts(a.podLink)...)
	pod = append(pod, upFact("lo", true))
	if a.has6() {
		pod = append(pod, addrFact(linkLocal(a.podMAC), a.podLink))
	}
	for _, addr := range a.addresses {
		gw, all := gateway(addr)
		host = append(host,
			routeFact(rtnl.Route{Dst: hostPrefix(addr), Protocol: mesh.PodRouteProtocol}, a.hostLink),
			neighFact(rtnl.Neigh{Addr: addr, MAC: a.podMAC, Permanent: true}, a.hostLink))
		pod = append(pod,
			addrFact(hostPrefix(addr), a.podLink),
			neighFact(rtnl.Neigh{Addr: gw, MAC: hostMAC, Permanent: true}, a.podLink))
		if slices.Contains(a.defaults, all) {
			pod = append(pod, routeFact(rtnl.Route{Dst: all, Via: gw, Protocol: unix.RTPROT_BOOT}, a.podLink))
		}
	}
	for _, s := range a.hostFactSysctls() {
		host = append(host, fact{s.name(), s.value})
	}
	if ipv6Exists() {
		for _, s := range a.podSysctls() {
			pod = append(pod, fact{s.name(), s.value})
		}
	}
	return host, pod
}

// hostFactSysctls are hostSysctls and what hostUp sets by netlink.
func (a attachment) hostFactSysctls() []sysctl {
	all := []sysctl{{a.hostLink, ipv4Key + "rp_filter", "1"}, {a.hostLink, ipv4Key + "accept_redirects", "0"},
		{a.hostLink, ipv4Key + "send_redirects", "0"}}
	if a.localnet {
		all = append(all, sysctl{a.hostLink, ipv4Key + "route_localnet", "1"})
	}
	if ipv6Exists() {
		all = append(all, a.hostSysctls()...)
	}
	return all
}

// facts reads all there is about a link, and those sysctls of it that are
// named. A missing link has no facts.
func facts(c *rtnl.Conn, name string, sysctls []sysctl) ([]fact, error) {
	link, err := c.Link(name)
	if isGone(err) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	out := linkFacts(link)
	addrs, err := c.Addrs(link.Index)
	if err != nil {
		return nil, err
	}
	for _, p := range addrs {
		out = append(out, addrFact(p, name))
	}
	routes, err := c.Routes(link.Index)
	if err != nil {
		return nil, err
	}
	for _, r := range routes {
		out = append(out, routeFact(r, name))
	}
	neighs, err := c.Neighs(link.Index)
	if err != nil {
		return nil, err
	}
	for _, n := range neighs {
		out = append(out, neighFact(n, name))
	}
	tbf, ok, err := c.Tbf(link.Index)
	if err != nil {
		return nil, err
	}
	if ok {
		out = append(out, tbfFacts(tbf, name)...)
	}
	for _, s := range sysctls {
		if text, err := os.ReadFile(s.path()); err == nil {
			out = append(out, fact{s.name(), strings.TrimSpace(string(text))})
		}
	}
	return out, nil
}

func (l limit) facts(dev string) []fact {
	if l.Rate == 0 {
		return nil
	}
	return tbfFacts(l.tbf(0, dev), dev)
}

// tbfFacts: the kernel does not tell the burst, but the limit has it inside.
func tbfFacts(t rtnl.Tbf, dev string) []fact {
	return []fact{
		{"qdisc tbf dev " + dev + " rate", fmt.Sprintf("%dbit", t.Rate*8)},
		{"qdisc tbf dev " + dev + " limit", fmt.Sprintf("%db", t.Limit)},
	}
}

func upFact(name string, up bool) fact {
	if up {
		return fact{"link " + name, "up"}
	}
	return fact{"link " + name, "down"}
}

func linkFacts(l rtnl.Link) []fact {
	out := []fact{upFact(l.Name, l.Up), {"link " + l.Name + " address", l.MAC.String()}}
	if l.MTU != 0 {
		out = append(out, fact{"link " + l.Name + " mtu", fmt.Sprint(l.MTU)})
	}
	return out
}

func addrFact(p netip.Prefix, dev string) fact {
	return fact{fmt.Sprintf("addr %s dev %s", p, dev), ""}
}

func routeFact(r rtnl.Route, dev string) fact {
	via := ""
	if r.Via.IsValid() {
		via = "via " + r.Via.String() + " "
	}
	return fact{"route " + r.Dst.String(), fmt.Sprintf("%sdev %s proto %d", via, dev, r.Protocol)}
}

func neighFact(n rtnl.Neigh, dev string) fact {
	state := ""
	if n.Permanent {
		state = " permanent"
	}
	return fact{fmt.Sprintf("neigh %s dev %s", n.Addr, dev), fmt.Sprintf("lladdr %s%s", n.MAC, state)}
}

// lacking lists the wanted facts that do not hold, and what does instead.
func lacking(want, have []fact, where string) []string {
	var out []string
	for _, w := range want {
		if slices.Contains(have, w) {
			continue
		}
		text := w.String() + " (" + where
		if i := slices.IndexFunc(have, func(h fact) bool { return h.key == w.key }); i >= 0 {
			text += "; it is " + have[i].value
		}
		out = append(out, text+")")
	}
	return out
}
