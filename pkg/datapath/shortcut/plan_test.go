package shortcut

import (
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/google/go-cmp/cmp"
)

// Ours is program 7.
func TestDiff(t *testing.T) {
	on := func(n int, programs ...ebpf.ProgramID) podLink {
		return podLink{name: "mshp" + string(rune('0'+n)), index: 10 + n, addrs: []netip.Addr{addr4(n), addr6(n)}, short: true, programs: programs}
	}
	off := func(n int, programs ...ebpf.ProgramID) podLink {
		l := on(n, programs...)
		l.short, l.why = false, "it has a queue (tbf)"
		return l
	}
	known := func(ns ...int) map[netip.Addr]int {
		m := map[netip.Addr]int{}
		for _, n := range ns {
			m[addr4(n)], m[addr6(n)] = 10+n, 10+n
		}
		return m
	}
	for _, c := range []struct {
		name string
		have state
		want string
	}{
		{"nothing", state{}, ""},
		{"as it has to be", state{links: []podLink{on(2, 7), on(3, 7), off(4)}, addrs: known(2, 3)}, ""},
		{"a pod came", state{links: []podLink{on(2, 7), on(3)}, addrs: known(2)}, `
bpftool net attach tcx_ingress name meshd_shortcut dev mshp3
bpftool map update name meshd_pods4 key hex 0a f4 01 03 value hex 0d 00 00 00 # 10.244.1.3 is behind mshp3
bpftool map update name meshd_pods6 key hex fd 00 00 10 02 44 00 01 00 00 00 00 00 00 00 03 value hex 0d 00 00 00 # fd00:10:244:1::3 is behind mshp3`},
		{"a pod went", state{links: []podLink{on(2, 7)}, addrs: known(2, 3)}, `
bpftool map delete name meshd_pods4 key hex 0a f4 01 03 # 10.244.1.3
bpftool map delete name meshd_pods6 key hex fd 00 00 10 02 44 00 01 00 00 00 00 00 00 00 03 # fd00:10:244:1::3`},
		{"an address moved", state{links: []podLink{{name: "mshnew", index: 20, addrs: []netip.Addr{addr4(2)}, short: true}}, addrs: map[netip.Addr]int{addr4(2): 12}}, `
bpftool net attach tcx_ingress name meshd_shortcut dev mshnew
bpftool map update name meshd_pods4 key hex 0a f4 01 02 value hex 14 00 00 00 # 10.244.1.2 is behind mshnew`},
		{"a pod got a queue", state{links: []podLink{on(2, 7), off(3, 7)}, addrs: known(2, 3)}, `
bpftool map delete name meshd_pods4 key hex 0a f4 01 03 # 10.244.1.3
bpftool map delete name meshd_pods6 key hex fd 00 00 10 02 44 00 01 00 00 00 00 00 00 00 03 # fd00:10:244:1::3
conntrack -D -p tcp -s 10.244.1.3; conntrack -D -p tcp -d 10.244.1.3; conntrack -D -p tcp -s fd00:10:244:1::3; conntrack -D -p tcp -d fd00:10:244:1::3
bpftool net detach tcx_ingress id 7 dev mshp3`},
		{"another meshd's", state{links: []podLink{on(2, 5), on(3, 4, 7, 5)}, addrs: known(2, 3)}, `
bpftool net attach tcx_ingress name meshd_shortcut dev mshp2 # in the place of id 5
bpftool net detach tcx_ingress id 4 dev mshp3
bpftool net detach tcx_ingress id 5 dev mshp3`},
		{"one with another meshd's program, one without, one that leaves", state{links: []podLink{on(2, 5), on(3), off(4, 5)}, addrs: known(4)}, `
bpftool map delete name meshd_pods4 key hex 0a f4 01 04 # 10.244.1.4
bpftool map delete name meshd_pods6 key hex fd 00 00 10 02 44 00 01 00 00 00 00 00 00 00 04 # fd00:10:244:1::4
conntrack -D -p tcp -s 10.244.1.4; conntrack -D -p tcp -d 10.244.1.4; conntrack -D -p tcp -s fd00:10:244:1::4; conntrack -D -p tcp -d fd00:10:244:1::4
bpftool net detach tcx_ingress id 5 dev mshp4
bpftool map update name meshd_pods4 key hex 0a f4 01 02 value hex 0c 00 00 00 # 10.244.1.2 is behind mshp2
bpftool map update name meshd_pods6 key hex fd 00 00 10 02 44 00 01 00 00 00 00 00 00 00 02 value hex 0c 00 00 00 # fd00:10:244:1::2 is behind mshp2
bpftool net attach tcx_ingress name meshd_shortcut dev mshp2 # in the place of id 5
bpftool net attach tcx_ingress name meshd_shortcut dev mshp3
bpftool map update name meshd_pods4 key hex 0a f4 01 03 value hex 0d 00 00 00 # 10.244.1.3 is behind mshp3
bpftool map update name meshd_pods6 key hex fd 00 00 10 02 44 00 01 00 00 00 00 00 00 00 03 value hex 0d 00 00 00 # fd00:10:244:1::3 is behind mshp3`},
		{"a link that lost the program and may not have it", state{links: []podLink{off(2)}, addrs: known(2)}, `
bpftool map delete name meshd_pods4 key hex 0a f4 01 02 # 10.244.1.2
bpftool map delete name meshd_pods6 key hex fd 00 00 10 02 44 00 01 00 00 00 00 00 00 00 02 # fd00:10:244:1::2
conntrack -D -p tcp -s 10.244.1.2; conntrack -D -p tcp -d 10.244.1.2; conntrack -D -p tcp -s fd00:10:244:1::2; conntrack -D -p tcp -d fd00:10:244:1::2`},
		{"off", state{links: []podLink{off(2, 5)}}, `
conntrack -D -p tcp -s 10.244.1.2; conntrack -D -p tcp -d 10.244.1.2; conntrack -D -p tcp -s fd00:10:244:1::2; conntrack -D -p tcp -d fd00:10:244:1::2
bpftool net detach tcx_ingress id 5 dev mshp2`},
	} {
		c.have.program = 7
		var lines []string
		for _, o := range diff(c.have) {
			lines = append(lines, o.String())
		}
		if d := cmp.Diff(strings.TrimSpace(c.want), strings.Join(lines, "\n")); d != "" {
			t.Errorf("%s (-want +got):\n%s", c.name, d)
		}
	}
}

// machine is a kernel in memory with four pods' links.
type machine struct {
	state
	refuses map[string]bool // links that do not take the program
	fails   map[string]bool // verbs
	forgot  []netip.Addr
}

// look as read does.
func (m *machine) look(refused map[int]string) state {
	have := state{program: m.program, addrs: maps.Clone(m.addrs)}
	for _, l := range m.links {
		l.programs = slices.Clone(l.programs)
		l.short = l.why == "" && refused[l.index] == ""
		have.links = append(have.links, l)
	}
	return have
}

func (m *machine) do(o op) error {
	i := slices.IndexFunc(m.links, func(l podLink) bool { return l.index == o.link.index })
	switch {
	case m.fails[o.verb], o.verb == "attach" && m.refuses[o.link.name]:
		return errors.New("no")
	case o.verb == "map":
		m.addrs[o.addr] = o.link.index
	case o.verb == "unmap":
		delete(m.addrs, o.addr)
	case o.verb == "forget":
		m.forgot = append(m.forgot, o.leaving...)
	case o.verb == "attach" && o.program != 0:
		m.links[i].programs[slices.Index(m.links[i].programs, o.program)] = m.program
	case o.verb == "attach":
		m.links[i].programs = append(m.links[i].programs, m.program)
	case o.verb == "detach":
		m.links[i].programs = slices.DeleteFunc(m.links[i].programs, func(p ebpf.ProgramID) bool { return p == o.program })
	}
	return nil
}

// rounds of a hand on the machine, as apply has them.
func (m *machine) round(t *testing.T, h *hand) (err error) {
	t.Helper()
	h.refused = map[int]string{}
	for again, n := true, 0; again; n++ {
		if n > len(m.links) {
			t.Fatal("a round that does not end")
		}
		var err2 error
		again, err2 = h.carryOut(diff(m.look(h.refused)))
		err = errors.Join(err, err2)
	}
	return err
}

func (m *machine) String() string {
	var lines []string
	for _, l := range m.links {
		known := 0
		for _, a := range l.addrs {
			if m.addrs[a] == l.index {
				known++
			}
		}
		lines = append(lines, fmt.Sprintf("%s %v known by %d", l.name, l.programs, known))
	}
	return strings.Join(lines, "\n")
}

// p2 has nothing, p3 another meshd's program, p4 got a queue, p5 is as it has
// to be, and what is ours is program 7.
func newMachine() *machine {
	m := &machine{state: state{program: 7, addrs: map[netip.Addr]int{}}, refuses: map[string]bool{}, fails: map[string]bool{}}
	for n, programs := range [][]ebpf.ProgramID{2: nil, 3: {5}, 4: {7}, 5: {7}} {
		if n < 2 {
			continue
		}
		l := podLink{name: fmt.Sprintf("mshp%d", n), index: 10 + n, addrs: []netip.Addr{addr4(n), addr6(n)}, programs: programs}
		if n == 4 {
			l.why = "it has a queue (tbf)"
		}
		if n >= 4 {
			m.addrs[addr4(n)], m.addrs[addr6(n)] = l.index, l.index
		}
		m.links = append(m.links, l)
	}
	return m
}

// A link that does not take the program harms no other, and is left without a
// trace of it: packets to it must not take another way than those from it.
func TestOneLinkRefuses(t *testing.T) {
	for _, c := range []struct {
		refuses []string
		want    string
	}{
		{nil, "mshp2 [7] known by 2\nmshp3 [7] known by 2\nmshp4 [] known by 0\nmshp5 [7] known by 2"},
		{[]string{"mshp2"}, "mshp2 [] known by 0\nmshp3 [7] known by 2\nmshp4 [] known by 0\nmshp5 [7] known by 2"},
		{[]string{"mshp3"}, "mshp2 [7] known by 2\nmshp3 [] known by 0\nmshp4 [] known by 0\nmshp5 [7] known by 2"},
		{[]string{"mshp2", "mshp3"}, "mshp2 [] known by 0\nmshp3 [] known by 0\nmshp4 [] known by 0\nmshp5 [7] known by 2"},
	} {
		m := newMachine()
		for _, name := range c.refuses {
			m.refuses[name] = true
		}
		h := &hand{do: m.do}
		for range 2 { // the second time changes nothing
			if err := m.round(t, h); err != nil {
				t.Error(err)
			}
			if d := cmp.Diff(c.want, m.String()); d != "" {
				t.Errorf("refused by %v (-want +got):\n%s", c.refuses, d)
			}
		}
		if !slices.Contains(m.forgot, addr4(4)) || slices.Contains(c.refuses, "mshp3") != slices.Contains(m.forgot, addr6(3)) {
			t.Errorf("refused by %v: forgotten are %v", c.refuses, m.forgot)
		}
	}
}

// Conntrack that does not forget is given a few chances, in which packets
// already go the long way; then the program goes all the same.
func TestConntrackDoesNotForget(t *testing.T) {
	m := newMachine()
	m.fails["forget"] = true
	h := &hand{do: m.do}
	for n := 1; n <= patience; n++ {
		if err := m.round(t, h); err == nil {
			t.Error("no error")
		}
		want := "mshp4 [7] known by 0"
		if n == patience {
			want = "mshp4 [] known by 0"
		}
		if got := m.String(); !strings.Contains(got, want) || !strings.Contains(got, "mshp2 [7] known by 2") {
			t.Errorf("after %d rounds:\n%s\nwant %s", n, got, want)
		}
	}
	if err := m.round(t, h); err != nil {
		t.Error(err)
	}
}

// What fails of those that enter keeps nobody from leaving.
func TestNothingCanEnter(t *testing.T) {
	m := newMachine()
	m.fails["map"] = true
	if err := m.round(t, &hand{do: m.do}); err == nil {
		t.Error("no error")
	}
	if got := m.String(); !strings.Contains(got, "mshp4 [] known by 0") {
		t.Errorf("p4 stays:\n%s", got)
	}
}
