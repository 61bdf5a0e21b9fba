// Package route keeps the addresses of the mesh device, the routes into it,
// the blackholes behind them, and the few sysctls all that needs.
//
// Ours are: every address of global scope on the device, every route of
// protocol mesh.RouteProtocol, the sysctls named in Config. Nothing else is
// touched, except that forwarding is switched on for the whole node (without
// it no pod reaches anything): net.ipv4.ip_forward and, when there is an IPv6
// address, net.ipv6.conf.all.forwarding. The latter makes Linux ignore router
// advertisements on links with accept_ra=1; a node that takes its default
// route from them wants accept_ra=2 there.
package route

import (
	"cmp"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strings"

	"meshd.dev/pkg/mesh"
)

// FloorMetric is the metric of the blackholes: behind everybody's routes.
const FloorMetric = 1 << 24

// Config is all that shall be: nothing less, nothing more.
type Config struct {
	// Device carries Addrs and is what the Routes go into.
	Device string
	// Addrs on Device, each a /32 or /128.
	Addrs []netip.Addr
	// Second device, if there is one. It carries the IPv4 ones of Addrs as
	// well: Linux drops what comes in over a device without an address where
	// the route back is over another.
	Second string
	// Routes into Device, or into Second.
	Routes []Route
	// Floor are prefixes that must not leave the node another way: each gets
	// a blackhole behind every other route to it.
	Floor []netip.Prefix
}

// Route into the device.
type Route struct {
	Dst netip.Prefix
	// Src is the preferred source address; may be invalid.
	Src netip.Addr
	// MTU of the path; 0 means the device's.
	MTU int
	// Second leads it into the second device.
	Second bool
	// Node it leads to, for who reads the list; empty: to none in particular.
	Node string
}

// ErrNoDevice: the floor stands, but the device does not exist yet.
var ErrNoDevice = errors.New("device does not exist")

// SysctlsHold reports whether the kernel's switches are as cfg wants them.
// Of most of them no event tells.
func SysctlsHold(cfg Config) bool {
	for _, s := range sysctls(cfg) {
		if b, err := os.ReadFile(s.path()); err == nil && strings.TrimSpace(string(b)) != s.value {
			return false
		}
	}
	return true
}

// state is what the kernel has, as far as it is ours.
type state struct {
	link   int // index of the device; 0: none
	second int // index of the second one
	up     bool
	addrs  []netip.Prefix
	// addrs2 are those of the second one.
	addrs2  []netip.Prefix
	routes  []entry
	sysctls map[string]string
}

// entry is a route of ours in the main table.
type entry struct {
	dst       netip.Prefix
	blackhole bool
	link      int
	dev       string
	src       netip.Addr
	mtu       int
	metric    int
	// odd: has a gateway, another table or type, anything we never make.
	odd string
}

func (e entry) String() string {
	s := e.dst.String()
	if e.blackhole {
		s = "blackhole " + s
	}
	if e.dev != "" {
		s += " dev " + e.dev
	}
	if e.src.IsValid() {
		s += " src " + e.src.String()
	}
	if e.mtu != 0 {
		s += fmt.Sprintf(" mtu %d", e.mtu)
	}
	if e.metric != 0 {
		s += fmt.Sprintf(" metric %d", e.metric)
	}
	if e.odd != "" {
		s += " " + e.odd
	}
	return s + fmt.Sprintf(" proto %d", mesh.RouteProtocol)
}

// key is what the kernel tells routes apart by.
type key struct {
	dst    netip.Prefix
	metric int
}

func (e entry) key() key { return key{e.dst, e.metric} }

// wanted lists the routes of cfg, in order.
func wanted(cfg Config, have state) []entry {
	var es []entry
	for _, r := range cfg.Routes {
		link, dev := have.link, cfg.Device
		if r.Second {
			link, dev = have.second, cfg.Second
		}
		if link != 0 {
			es = append(es, entry{dst: r.Dst, link: link, dev: dev, src: r.Src, mtu: r.MTU, metric: deviceMetric(r.Dst)})
		}
	}
	for _, p := range cfg.Floor {
		es = append(es, entry{dst: p, blackhole: true, metric: FloorMetric})
	}
	slices.SortFunc(es, compare)
	return slices.Compact(es)
}

// deviceMetric: IPv6 has no metric 0; the kernel would say 1024.
func deviceMetric(p netip.Prefix) int {
	if p.Addr().Is6() {
		return 1024
	}
	return 0
}

func compare(a, b entry) int {
	if c := cmp.Or(a.dst.Addr().Compare(b.dst.Addr()), cmp.Compare(a.dst.Bits(), b.dst.Bits()), cmp.Compare(a.metric, b.metric)); c != 0 {
		return c
	}
	return cmp.Compare(a.String(), b.String())
}

// diff: sysctls, addresses (routes name them as source), routes; then what is
// no longer wanted, routes before the addresses they name: the kernel changes
// or removes routes whose source goes.
func diff(cfg Config, have state) []op {
	var ops, last, goneAddrs []op
	for _, s := range sysctls(cfg) {
		if v, ok := have.sysctls[s.path()]; ok && v != s.value {
			ops = append(ops, s)
		}
	}
	for _, d := range []struct {
		name string
		link int
		have []netip.Prefix
		want []netip.Addr
	}{{cfg.Device, have.link, have.addrs, cfg.Addrs}, {cfg.Second, have.second, have.addrs2, only4(cfg.Addrs)}} {
		if d.link != 0 {
			add, del := diffAddrs(d.name, d.have, d.want)
			ops, goneAddrs = append(ops, add...), append(goneAddrs, del...)
		}
	}
	have.routes = once(have.routes)
	want := wanted(cfg, have)
	ours := map[key][]entry{}
	for _, e := range have.routes {
		ours[e.key()] = append(ours[e.key()], e)
	}
	for _, w := range want {
		twins := ours[w.key()]
		i := slices.Index(twins, w)
		if i < 0 { // change a route of ours in place, or add one
			if i = slices.IndexFunc(twins, func(e entry) bool { return e.odd == "" }); i < 0 {
				for _, e := range twins { // ours, but in the way
					ops = append(ops, routeOp{verb: "del", entry: e})
				}
				twins = nil
				delete(ours, w.key())
			}
			ops = append(ops, routeOp{verb: verbOf(i), entry: w})
		}
		if i >= 0 {
			ours[w.key()] = slices.Delete(twins, i, i+1)
		}
	}
	for _, e := range have.routes { // in the kernel's order, for a stable plan
		if left := ours[e.key()]; slices.Contains(left, e) {
			last = append(last, routeOp{verb: "del", entry: e})
		}
	}
	return slices.Concat(ops, last, goneAddrs)
}

func only4(addrs []netip.Addr) []netip.Addr {
	return slices.DeleteFunc(slices.Clone(addrs), netip.Addr.Is6)
}

// once leaves out what the kernel told twice: a list of IPv6 routes that is
// read while the table changes begins anew in the middle, without a word. The
// kernel never has two equal ones; taken for a second one, it would be deleted
// and with it the first. Of IPv4 routes there may be two that look equal here.
func once(routes []entry) []entry {
	seen := make(map[entry]bool, len(routes))
	return slices.DeleteFunc(slices.Clone(routes), func(e entry) bool {
		twice := seen[e] && e.dst.Addr().Is6()
		seen[e] = true
		return twice
	})
}

// diffAddrs of one device.
func diffAddrs(dev string, have []netip.Prefix, want []netip.Addr) (add, del []op) {
	kept := map[netip.Prefix]bool{}
	for _, a := range want {
		p := netip.PrefixFrom(a, a.BitLen())
		kept[p] = true
		if slices.Contains(have, p) {
			continue
		}
		for _, twin := range have { // IPv6 has an address once, whatever its length
			if a.Is6() && twin.Addr() == a {
				add = append(add, addrOp{addr: twin, dev: dev})
				kept[twin] = true // dealt with
			}
		}
		add = append(add, addrOp{add: true, addr: p, dev: dev})
	}
	for _, p := range have {
		if !kept[p] {
			del = append(del, addrOp{addr: p, dev: dev})
		}
	}
	return add, del
}

// verbOf: a route of somebody else with the same destination and metric is
// never replaced, adding ours beside it fails instead.
func verbOf(ours int) string {
	if ours < 0 {
		return "add"
	}
	return "replace"
}

// sysctl is a wish and the op that fulfils it.
type sysctl struct{ name, value string }

func sysctls(cfg Config) []sysctl {
	s := []sysctl{
		{"net/ipv4/ip_forward", "1"},
		// Loose: what comes in was checked against the peer's allowed IPs.
		{"net/ipv4/conf/" + cfg.Device + "/rp_filter", "2"},
		// A redirect has a pod told of no error for a second. The one for all
		// links outweighs those of the pods' links; alone it switches off none.
		{"net/ipv4/conf/all/send_redirects", "0"},
		{"net/ipv4/conf/" + cfg.Device + "/send_redirects", "0"},
		{"net/ipv6/conf/" + cfg.Device + "/accept_ra", "0"},
	}
	if cfg.Second != "" {
		s = append(s, sysctl{"net/ipv4/conf/" + cfg.Second + "/rp_filter", "2"}, sysctl{"net/ipv6/conf/" + cfg.Second + "/accept_ra", "0"},
			sysctl{"net/ipv6/conf/" + cfg.Second + "/disable_ipv6", "0"})
	}
	if slices.ContainsFunc(cfg.Addrs, netip.Addr.Is6) {
		s = append(s, sysctl{"net/ipv6/conf/" + cfg.Device + "/disable_ipv6", "0"},
			sysctl{"net/ipv6/conf/all/forwarding", "1"})
	}
	return s
}

// op is one change, printed as the command a person would type.
type op interface {
	String() string
	do() error
}

type addrOp struct {
	add  bool
	addr netip.Prefix
	dev  string
}

func (o addrOp) String() string {
	if !o.add {
		return fmt.Sprintf("ip address del %s dev %s", o.addr, o.dev)
	}
	return fmt.Sprintf("ip address add %s dev %s", o.addr, o.dev)
}

type routeOp struct {
	verb  string // add, replace, del
	entry entry
}

func (o routeOp) String() string { return "ip route " + o.verb + " " + o.entry.String() }
