package shortcut

import (
	"net/netip"
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
bpftool map update name meshd_pods4 key hex 0a f4 01 03 value hex 0d 00 00 00 # 10.244.1.3 is behind mshp3
bpftool map update name meshd_pods6 key hex fd 00 00 10 02 44 00 01 00 00 00 00 00 00 00 03 value hex 0d 00 00 00 # fd00:10:244:1::3 is behind mshp3
bpftool net attach tcx_ingress name meshd_shortcut dev mshp3`},
		{"a pod went", state{links: []podLink{on(2, 7)}, addrs: known(2, 3)}, `
bpftool map delete name meshd_pods4 key hex 0a f4 01 03 # 10.244.1.3
bpftool map delete name meshd_pods6 key hex fd 00 00 10 02 44 00 01 00 00 00 00 00 00 00 03 # fd00:10:244:1::3`},
		{"an address moved", state{links: []podLink{{name: "mshnew", index: 20, addrs: []netip.Addr{addr4(2)}, short: true}}, addrs: map[netip.Addr]int{addr4(2): 12}}, `
bpftool map update name meshd_pods4 key hex 0a f4 01 02 value hex 14 00 00 00 # 10.244.1.2 is behind mshnew
bpftool net attach tcx_ingress name meshd_shortcut dev mshnew`},
		{"a pod got a queue", state{links: []podLink{on(2, 7), off(3, 7)}, addrs: known(2, 3)}, `
bpftool map delete name meshd_pods4 key hex 0a f4 01 03 # 10.244.1.3
bpftool map delete name meshd_pods6 key hex fd 00 00 10 02 44 00 01 00 00 00 00 00 00 00 03 # fd00:10:244:1::3
conntrack -D -p tcp -s 10.244.1.3; conntrack -D -p tcp -d 10.244.1.3; conntrack -D -p tcp -s fd00:10:244:1::3; conntrack -D -p tcp -d fd00:10:244:1::3
bpftool net detach tcx_ingress id 7 dev mshp3`},
		{"another meshd's", state{links: []podLink{on(2, 5), on(3, 4, 7, 5)}, addrs: known(2, 3)}, `
bpftool net attach tcx_ingress name meshd_shortcut dev mshp2 # in the place of id 5
bpftool net detach tcx_ingress id 4 dev mshp3
bpftool net detach tcx_ingress id 5 dev mshp3`},
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
