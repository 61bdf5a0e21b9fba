package shortcut

import (
	"encoding/binary"
	"errors"
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
	// foreign says what else is at its hooks, or may be: a program of somebody
	// else, or one that cannot be looked at.
	foreign string
	// unseen: it is the latter, which may be ours.
	unseen bool
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
	// local are the addresses of all pods of this machine.
	local map[netip.Addr]bool
}

// op is one change.
type op struct {
	verb    string // map, attach, unmap, forget, detach
	link    podLink
	addr    netip.Addr
	program ebpf.ProgramID // to detach; to replace, 0 for none
	// leaving is what conntrack is to forget.
	leaving []netip.Addr
	local   map[netip.Addr]bool // those may be at the other end
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
// and on no other: first who leaves the shortcut, then who enters it.
func diff(have state) []op {
	want := map[netip.Addr]podLink{}
	for _, l := range have.links {
		if l.short {
			for _, a := range l.addrs {
				want[a] = l
			}
		}
	}
	return append(leave(have, want), enter(have, want)...)
}

// leave in this order: the packets of a connection no longer take the
// shortcut, conntrack forgets it, and only then goes the program, by which one
// who starts in between sees that there is something to forget.
func leave(have state, want map[netip.Addr]podLink) (ops []op) {
	for _, a := range slices.SortedFunc(maps.Keys(have.addrs), netip.Addr.Compare) {
		if _, ok := want[a]; !ok {
			ops = append(ops, op{verb: "unmap", addr: a})
		}
	}
	leaving := map[netip.Addr]bool{}
	var detach []op
	for _, l := range have.links {
		if l.short {
			continue
		}
		for _, a := range l.addrs {
			if len(l.programs) > 0 || have.addrs[a] == l.index {
				leaving[a] = true
			}
		}
		for _, p := range l.programs {
			detach = append(detach, op{verb: "detach", link: l, program: p})
		}
	}
	if len(leaving) > 0 {
		ops = append(ops, op{verb: "forget", local: have.local, leaving: slices.SortedFunc(maps.Keys(leaving), netip.Addr.Compare)})
	}
	return append(ops, detach...)
}

// enter so that both directions of a connection do it at once, for conntrack
// takes acknowledgements of what it has not seen for invalid. A link without
// the program gets it first, which does nothing without the address; one with
// that of another meshd is known to ours before that takes its place.
func enter(have state, want map[netip.Addr]podLink) (ops []op) {
	var places, news, extra []op
	for _, a := range slices.SortedFunc(maps.Keys(want), netip.Addr.Compare) {
		l := want[a]
		index, ok := have.addrs[a]
		switch {
		case ok && index == l.index:
		case len(l.programs) > 0:
			ops = append(ops, op{verb: "map", addr: a, link: l})
		default:
			news = append(news, op{verb: "map", addr: a, link: l})
		}
	}
	for _, l := range have.links {
		if l.short {
			a, d := placeOn(l, have.program)
			places, extra = append(places, a...), append(extra, d...)
		}
	}
	return slices.Concat(ops, places, news, extra)
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

// hand carries out what is planned.
type hand struct {
	do func(op) error
	// refused are links, by index, that the kernel did not let have the
	// program, and why. Nothing more is done to them until there is a new plan.
	refused map[int]string
	// unforgotten counts the times in a row that conntrack did not forget.
	unforgotten int
}

// patience is how often conntrack may fail to forget connections until they
// leave without that: some may be held up then, but no program stays for ever
// where it must not be.
const patience = 3

// carryOut ops, each as far as those before it that it builds upon went well.
// again is whether a link was refused, and the rest of the plan is another.
func (h *hand) carryOut(ops []op) (again bool, err error) {
	var errs []error
	waits, now := false, map[int]bool{}
	for _, o := range ops {
		if now[o.link.index] || waits && o.verb == "detach" {
			continue
		}
		err := h.do(o)
		switch {
		case err != nil && o.verb == "attach":
			h.refused[o.link.index], now[o.link.index], again = "it cannot have the program: "+err.Error(), true, true
		case err != nil:
			errs = append(errs, fmt.Errorf("%s: %w", o, err))
		}
		if o.verb == "forget" {
			if h.unforgotten++; err == nil {
				h.unforgotten = 0
			}
			waits = h.unforgotten > 0 && h.unforgotten < patience
		}
	}
	return again, errors.Join(errs...)
}

func add(set map[netip.Addr]bool, addrs []netip.Addr) {
	for _, a := range addrs {
		set[a] = true
	}
}
