package firewall

import (
	"cmp"
	"encoding/binary"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"github.com/google/nftables"

	"meshd.dev/pkg/mesh"
)

// table is the whole nft table, wished or read.
type table struct {
	exists bool
	// chains and sets by name, each with a line that says all about it.
	chains map[string]string
	sets   map[string]string
	// elements by set.
	elements map[string]map[element]string
	// build is what chains are made from; only in a wished one.
	build map[string]chain
}

// element of a set: its key as the kernel has it, in network order.
type element struct {
	key string
	end bool // the end of an interval
}

// setSpec of one of our sets. Values of verdict maps are names of chains.
type setSpec struct {
	name     string
	key      []field
	value    []field
	verdict  bool
	interval bool
	// shared with the CNI plugin, which may have done the change already.
	shared bool
}

// field of a key or value.
type field struct {
	kind nftables.SetDatatype
	show func([]byte) string
}

var (
	addr4Field = field{nftables.TypeIPAddr, showAddr}
	addr6Field = field{nftables.TypeIP6Addr, showAddr}
	protoField = field{nftables.TypeInetProto, func(b []byte) string { return showProto(b[0]) }}
	portField  = field{nftables.TypeInetService, func(b []byte) string { return fmt.Sprint(binary.BigEndian.Uint16(b)) }}
	linkField  = field{nftables.TypeIFName, func(b []byte) string { return strconv.Quote(strings.TrimRight(string(b), "\x00")) }}
	slotField  = field{nftables.TypeMark, func(b []byte) string { return fmt.Sprint(binary.NativeEndian.Uint32(b)) }}
)

func showAddr(b []byte) string { a, _ := netip.AddrFromSlice(b); return a.String() }

func showProto(n byte) string {
	for _, p := range []mesh.Protocol{mesh.TCP, mesh.UDP, mesh.SCTP} {
		if p.Number() == n {
			return strings.ToLower(string(p))
		}
	}
	return fmt.Sprint(n)
}

// specs are all our sets.
var specs = func() []setSpec {
	var all []setSpec
	for f, addr := range map[family]field{"4": addr4Field, "6": addr6Field} {
		n := string(f)
		all = append(all,
			setSpec{name: "own" + n, key: []field{addr}, interval: true},
			setSpec{name: "cluster" + n, key: []field{addr}, interval: true},
			setSpec{name: "direct" + n, key: []field{addr}, interval: true},
			setSpec{name: "svcnet" + n, key: []field{addr}, interval: true},
			setSpec{name: "vip" + n, key: []field{addr}},
			setSpec{name: "self" + n, key: []field{addr, addr}, value: []field{addr}},
			setSpec{name: "svc" + n, key: []field{addr, protoField, portField}, verdict: true},
			setSpec{name: "ep" + n, key: []field{addr, protoField, portField, slotField}, value: []field{addr, portField}},
			setSpec{name: mesh.PodSet + n, key: []field{linkField, addr}, shared: true},
			setSpec{name: mesh.HostPortMap + n, key: []field{addr, protoField, portField}, value: []field{addr, portField}, shared: true},
			setSpec{name: mesh.HairpinSet + n, key: []field{addr, addr}, shared: true},
		)
	}
	slices.SortFunc(all, func(a, b setSpec) int { return cmp.Compare(a.name, b.name) })
	return all
}()

func specOf(name string) (setSpec, bool) {
	i := slices.IndexFunc(specs, func(s setSpec) bool { return s.name == name })
	if i < 0 {
		return setSpec{}, false
	}
	return specs[i], true
}

func (s setSpec) isMap() bool { return s.verdict || len(s.value) > 0 }

func concat(fields []field) nftables.SetDatatype {
	kinds := make([]nftables.SetDatatype, len(fields))
	for i, f := range fields {
		kinds[i] = f.kind
	}
	return nftables.MustConcatSetType(kinds...)
}

func size(fields []field) int {
	n := 0
	for _, f := range fields {
		n += padded(f)
	}
	return n
}

func padded(f field) int { return (int(f.kind.Bytes) + 3) &^ 3 }

// signature says what a set is, as far as it can be read back.
func (s setSpec) signature() string {
	return setSignature(s.isMap(), s.interval, size(s.key))
}

func setSignature(isMap, interval bool, keyBytes int) string {
	return fmt.Sprintf("map %t interval %t key %d bytes", isMap, interval, keyBytes)
}

// join pads each value to the kernel's registers.
func joinKey(parts ...[]byte) string {
	var b []byte
	for _, p := range parts {
		b = append(b, p...)
		for len(b)%4 != 0 {
			b = append(b, 0)
		}
	}
	return string(b)
}

func show(fields []field, b string) string {
	var parts []string
	for _, f := range fields {
		if len(b) < padded(f) {
			return fmt.Sprintf("%x", b)
		}
		parts = append(parts, f.show([]byte(b[:f.kind.Bytes])))
		b = b[padded(f):]
	}
	return strings.Join(parts, " . ")
}

func (s setSpec) show(e element, value string) string {
	text := show(s.key, e.key)
	if e.end {
		text = "end " + text
	}
	switch {
	case s.verdict:
		return text + " : goto " + value
	case len(s.value) > 0:
		return text + " : " + show(s.value, value)
	}
	return text
}

// signature of a chain: where it hangs, then the comments of its rules.
func (c chain) signature() string {
	where := ""
	if c.hook != nil {
		where = fmt.Sprintf("%s hook %d priority %d policy 1", c.kind, *c.hook, c.prio)
	}
	lines := []string{where}
	for _, r := range c.rules {
		lines = append(lines, r.comment())
	}
	return strings.Join(lines, "\n")
}

func familyOf(a netip.Addr) family {
	if a.Is4() {
		return "4"
	}
	return "6"
}

// addRanges adds prefixes to an interval set: neighbours are merged, since
// the kernel takes no overlaps.
func (t *table) addRanges(name string, ps []netip.Prefix) {
	ps = slices.Clone(ps)
	slices.SortFunc(ps, func(a, b netip.Prefix) int {
		return cmp.Or(a.Masked().Addr().Compare(b.Masked().Addr()), cmp.Compare(a.Bits(), b.Bits()))
	})
	var end netip.Addr // of the range before, not part of it
	var in map[element]string
	for _, p := range ps {
		p = p.Masked()
		start, next := p.Addr(), after(p)
		set := t.elements[name+string(familyOf(start))]
		if in != nil && end.IsValid() && end.Is4() == start.Is4() && start.Compare(end) <= 0 {
			if next.IsValid() && next.Compare(end) <= 0 {
				continue
			}
			delete(in, element{string(end.AsSlice()), true})
		} else {
			set[element{string(start.AsSlice()), false}] = ""
		}
		if next.IsValid() { // else up to the last address
			set[element{string(next.AsSlice()), true}] = ""
		}
		in, end = set, next
	}
}

// after is the first address behind p; not valid behind the last.
func after(p netip.Prefix) netip.Addr {
	b := p.Addr().AsSlice()
	for i := p.Bits(); i < len(b)*8; i++ {
		b[i/8] |= 1 << (7 - i%8)
	}
	last, _ := netip.AddrFromSlice(b)
	return last.Next()
}

// chainName of the chain that picks one of n endpoints.
func chainName(f family, n int, nodePort, sticky bool) string {
	name := "of"
	if nodePort {
		name = "np"
	}
	name += fmt.Sprintf("%s-%d", f, n)
	if sticky {
		name += "-sticky"
	}
	return name
}

// parseChainName is the reverse of chainName.
func parseChainName(name string) (f family, n int, nodePort, sticky bool) {
	name, sticky = strings.CutSuffix(name, "-sticky")
	nodePort = strings.HasPrefix(name, "np")
	kind, count, _ := strings.Cut(name[2:], "-")
	n, _ = strconv.Atoi(count)
	return family(kind), n, nodePort, sticky
}

// dynamic: chains that come and go with the numbers of endpoints.
func dynamic(name string) bool { return strings.HasPrefix(name, "of") || strings.HasPrefix(name, "np") }

// op is one change. All ops of a diff go to the kernel in one transaction.
type op struct {
	verb     string // rebuild, add chain, delete chain, add, delete, flush
	name     string // of the chain or set
	why      string
	elements []pair
}

type pair struct {
	element
	value string
}

func (o op) String() string {
	switch o.verb {
	case "rebuild":
		return "nft delete table inet meshd; nft -f <the whole table> # " + o.why
	case "add chain":
		return fmt.Sprintf("nft add chain inet meshd %s '{ %s; }'", o.name, o.why)
	case "delete chain":
		return "nft delete chain inet meshd " + o.name
	case "flush":
		return "nft flush set inet meshd " + o.name
	}
	spec, _ := specOf(o.name)
	texts := make([]string, len(o.elements))
	for i, e := range o.elements {
		texts[i] = spec.show(e.element, e.value)
	}
	return fmt.Sprintf("nft %s element inet meshd %s '{ %s }'", o.verb, o.name, strings.Join(texts, ", "))
}

// diff: whatever is fixed and not as it must be means the whole table again;
// otherwise chains and elements by themselves. Within the transaction a
// changed element is deleted and added.
func diff(want, have *table) []op {
	if why := broken(want, have); why != "" {
		return rebuild(want, why)
	}
	var first, adds, last []op
	for _, name := range sorted(want.chains) {
		if _, ok := have.chains[name]; !ok {
			first = append(first, op{verb: "add chain", name: name, why: want.build[name].rules[0].text})
		}
	}
	for _, name := range sorted(have.chains) {
		if _, ok := want.chains[name]; !ok {
			last = append(last, op{verb: "delete chain", name: name})
		}
	}
	for _, s := range specs {
		d, a := diffSet(s, want.elements[s.name], have.elements[s.name])
		first, adds = append(first, d...), append(adds, a...)
	}
	return slices.Concat(first, adds, last)
}

func diffSet(s setSpec, want, have map[element]string) (deletes, adds []op) {
	var gone, added []pair
	for e, v := range have {
		if w, ok := want[e]; !ok || w != v {
			gone = append(gone, pair{e, v})
		}
	}
	for e, v := range want {
		if h, ok := have[e]; !ok || h != v {
			added = append(added, pair{e, v})
		}
	}
	if s.interval && len(gone)+len(added) > 0 { // halves of intervals cannot be moved one by one
		deletes = append(deletes, op{verb: "flush", name: s.name})
		gone, added = nil, pairs(want)
	}
	if len(gone) > 0 {
		deletes = append(deletes, op{verb: "delete", name: s.name, elements: sortPairs(gone)})
	}
	if len(added) > 0 {
		adds = append(adds, op{verb: "add", name: s.name, elements: sortPairs(added)})
	}
	return deletes, adds
}

// broken says what makes the table useless as a whole, or nothing.
func broken(want, have *table) string {
	if !have.exists {
		return "there is none"
	}
	for _, name := range sorted(want.sets) {
		if have.sets[name] != want.sets[name] {
			return "set " + name + " is not as it should be"
		}
	}
	for _, name := range sorted(have.sets) {
		if _, ok := want.sets[name]; !ok {
			return "set " + name + " is not ours"
		}
	}
	for _, name := range sorted(want.chains) {
		if sig, ok := have.chains[name]; sig != want.chains[name] && (ok || !dynamic(name)) {
			return "chain " + name + " is not as it should be"
		}
	}
	for _, name := range sorted(have.chains) {
		if _, ok := want.chains[name]; !ok && !dynamic(name) {
			return "chain " + name + " is not ours"
		}
	}
	return ""
}

func rebuild(want *table, why string) []op {
	ops := []op{{verb: "rebuild", why: why}}
	for _, s := range specs {
		if len(want.elements[s.name]) > 0 {
			ops = append(ops, op{verb: "add", name: s.name, elements: pairs(want.elements[s.name])})
		}
	}
	return ops
}

func pairs(m map[element]string) []pair {
	list := make([]pair, 0, len(m))
	for e, v := range m {
		list = append(list, pair{e, v})
	}
	return sortPairs(list)
}

func sortPairs(list []pair) []pair {
	slices.SortFunc(list, func(a, b pair) int {
		switch {
		case a.key != b.key:
			return cmp.Compare(a.key, b.key)
		case a.end != b.end && a.end: // an interval ends before the next one begins
			return -1
		case a.end != b.end:
			return 1
		}
		return 0
	})
	return list
}

func sorted(m map[string]string) []string { return slices.Sorted(maps.Keys(m)) }
