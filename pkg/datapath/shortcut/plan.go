package shortcut

import (
	"encoding/binary"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"

	"github.com/cilium/ebpf"
)

// podLink is the host's end of a pod, as the kernel has it.
type podLink struct {
	name  string
	index int
	// programs of ours at its ingress, whoever put them there.
	programs []ebpf.ProgramID
	// short: its packets may take the shortcut; else why says why not.
	short bool
	why   string
	addrs []netip.Addr
}

// state of the kernel. addrs are what the maps of program hold: the link, by
// its index, behind each address.
type state struct {
	links   []podLink
	addrs   map[netip.Addr]int
	program ebpf.ProgramID
}

// op is one change.
type op struct {
	verb    string // map, attach, unmap, forget, detach
	link    podLink
	addr    netip.Addr
	program ebpf.ProgramID // to detach; to replace, 0 for none
	// leaving is what conntrack is to forget.
	leaving []netip.Addr
}

// String is the command a person would type.
func (o op) String() string {
	switch o.verb {
	case "map":
		return fmt.Sprintf("bpftool map update name %s key %s value %s # %s is behind %s", mapName(o.addr), hex(o.addr.AsSlice()), hex(native(o.link.index)), o.addr, o.link.name)
	case "unmap":
		return fmt.Sprintf("bpftool map delete name %s key %s # %s", mapName(o.addr), hex(o.addr.AsSlice()), o.addr)
	case "attach":
		instead := ""
		if o.program != 0 {
			instead = fmt.Sprintf(" # in the place of id %d", o.program)
		}
		return fmt.Sprintf("bpftool net attach tcx_ingress name %s dev %s%s", programName, o.link.name, instead)
	case "detach":
		return fmt.Sprintf("bpftool net detach tcx_ingress id %d dev %s", o.program, o.link.name)
	}
	var commands []string
	for _, a := range o.leaving {
		commands = append(commands, fmt.Sprintf("conntrack -D -p tcp -s %s; conntrack -D -p tcp -d %[1]s", a))
	}
	return strings.Join(commands, "; ")
}

func mapName(a netip.Addr) string {
	if a.Is4() {
		return pods4Name
	}
	return pods6Name
}

func hex(b []byte) string { return fmt.Sprintf("hex % x", b) }

func native(index int) []byte { return binary.NativeEndian.AppendUint32(nil, uint32(index)) }

// diff says how to get from have to the program on each link that may have it,
// and on no other. What is added comes first. A connection leaves the shortcut
// in this order: its packets no longer take it, conntrack forgets it, and only
// then goes the program, by which one who starts in between sees that there is
// something to forget.
func diff(have state) (ops []op) {
	want := map[netip.Addr]podLink{}
	var attach, detach []op
	leaving := map[netip.Addr]bool{}
	for _, l := range have.links {
		if !l.short {
			for _, p := range l.programs {
				detach = append(detach, op{verb: "detach", link: l, program: p})
			}
			if len(l.programs) > 0 {
				add(leaving, l.addrs)
			}
			continue
		}
		for _, a := range l.addrs {
			want[a] = l
		}
		a, d := placeOn(l, have.program)
		attach, detach = append(attach, a...), append(detach, d...)
	}
	for _, a := range slices.SortedFunc(maps.Keys(want), netip.Addr.Compare) {
		if index, ok := have.addrs[a]; !ok || index != want[a].index {
			ops = append(ops, op{verb: "map", addr: a, link: want[a]})
		}
	}
	ops = append(ops, attach...)
	for _, a := range slices.SortedFunc(maps.Keys(have.addrs), netip.Addr.Compare) {
		if _, ok := want[a]; !ok {
			ops = append(ops, op{verb: "unmap", addr: a})
		}
	}
	if len(leaving) > 0 {
		ops = append(ops, op{verb: "forget", leaving: slices.SortedFunc(maps.Keys(leaving), netip.Addr.Compare)})
	}
	return append(ops, detach...)
}

// placeOn a link exactly one program, ours; in place of another it comes
// without a moment in between.
func placeOn(l podLink, program ebpf.ProgramID) (attach, detach []op) {
	others := slices.DeleteFunc(slices.Clone(l.programs), func(p ebpf.ProgramID) bool { return p == program })
	if len(others) == len(l.programs) {
		o := op{verb: "attach", link: l}
		if len(others) > 0 {
			o.program, others = others[0], others[1:]
		}
		attach = append(attach, o)
	}
	for _, p := range others {
		detach = append(detach, op{verb: "detach", link: l, program: p})
	}
	return attach, detach
}

func add(set map[netip.Addr]bool, addrs []netip.Addr) {
	for _, a := range addrs {
		set[a] = true
	}
}
