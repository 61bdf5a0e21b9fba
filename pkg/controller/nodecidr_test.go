package controller

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// A node is written as "name" or "name cidr cidr"; they are created in order.
func cidrNodes(lines ...string) []*corev1.Node {
	var nodes []*corev1.Node
	for i, l := range lines {
		w := strings.Fields(l)
		n := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: w[0], CreationTimestamp: metav1.NewTime(time.Unix(int64(i), 0))}}
		n.Spec.PodCIDRs = w[1:]
		nodes = append(nodes, n)
	}
	return nodes
}

func prefixes(s string) []netip.Prefix {
	var out []netip.Prefix
	for _, f := range strings.Fields(s) {
		out = append(out, netip.MustParsePrefix(f))
	}
	return out
}

func TestAssignPodCIDRs(t *testing.T) {
	const dual = "10.244.0.0/16 fd00:10:244::/48"
	for _, tc := range []struct {
		name, ranges string
		mask4        int
		nodes        []string
		want         []string
	}{
		{"dual stack, in order of creation", dual, 24, []string{"b", "a"},
			[]string{"b 10.244.0.0/24 fd00:10:244::/64", "a 10.244.1.0/24 fd00:10:244:1::/64"}},
		{"around what is taken", dual, 24, []string{"a 10.244.0.0/24 fd00:10:244::/64", "b", "c 10.244.1.0/24 fd00:10:244:2::/64", "d"},
			[]string{"b 10.244.2.0/24 fd00:10:244:1::/64", "d 10.244.3.0/24 fd00:10:244:3::/64"}},
		{"nobody needs anything", dual, 24, []string{"a 10.244.0.0/24"}, nil},
		{"a larger part than ours is taken as a whole", "10.244.0.0/16", 24, []string{"a 10.244.0.0/22", "b"}, []string{"b 10.244.4.0/24"}},
		{"a smaller part takes all of ours", "10.244.0.0/16", 24, []string{"a 10.244.0.128/28", "b"}, []string{"b 10.244.1.0/24"}},
		{"one that covers everything", "10.244.0.0/16", 24, []string{"a 10.0.0.0/8", "b"},
			[]string{"b: no part of pod CIDR 10.244.0.0/16 is left (256 of /24 in use): delete nodes that are gone or choose a larger range"}},
		{"elsewhere does not matter", "10.244.0.0/16", 24, []string{"a 192.168.7.0/24", "b"}, []string{"b 10.244.0.0/24"}},
		{"exhausted", "10.244.0.0/23", 24, []string{"a", "b", "c"},
			[]string{"a 10.244.0.0/24", "b 10.244.1.0/24", "c: no part of pod CIDR 10.244.0.0/23 is left (2 of /24 in use): delete nodes that are gone or choose a larger range"}},
		{"one family exhausted: none of the other either", "10.244.0.0/24 fd00::/48", 24, []string{"a 10.244.0.0/24", "b"},
			[]string{"b: no part of pod CIDR 10.244.0.0/24 is left (1 of /24 in use): delete nodes that are gone or choose a larger range"}},
		{"odd lengths", "10.244.0.0/14", 27, []string{"a 10.244.0.0/27", "b"}, []string{"b 10.244.0.32/27"}},
		{"unreadable: nothing is given", "10.244.0.0/16", 24, []string{"a 10.244.0.0", "b"},
			[]string{`error node a: pod CIDR: netip.ParsePrefix("10.244.0.0"): no '/'`}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			gifts, errs := assignPodCIDRs(cidrNodes(tc.nodes...), podRanges(prefixes(tc.ranges), tc.mask4, 64))
			var got []string
			for _, g := range gifts {
				if g.err != nil {
					got = append(got, g.node.Name+": "+g.err.Error())
					continue
				}
				line := g.node.Name
				for _, p := range g.cidrs {
					line += " " + p.String()
				}
				got = append(got, line)
			}
			for _, e := range errs {
				got = append(got, "error "+e.Error())
			}
			if g, w := strings.Join(got, "\n"), strings.Join(tc.want, "\n"); g != w {
				t.Errorf("\n got %s\nwant %s", g, w)
			}
		})
	}
}

// Whoever came and went in whatever order, no two nodes ever overlap.
func TestPodCIDRsNeverTwice(t *testing.T) {
	ranges := podRanges(prefixes("10.244.0.0/18 fd00:10:244::/58"), 24, 64)
	nodes := map[string]*corev1.Node{}
	for round := range 200 {
		name := fmt.Sprintf("n%d", (round*7919)%90)
		if nodes[name] != nil {
			delete(nodes, name)
			continue
		}
		nodes[name] = cidrNodes(name)[0]
		var list []*corev1.Node
		for _, n := range nodes {
			list = append(list, n)
		}
		gifts, errs := assignPodCIDRs(list, ranges)
		if len(errs) > 0 {
			t.Fatal(errs)
		}
		for _, g := range gifts {
			for _, p := range g.cidrs {
				nodes[g.node.Name].Spec.PodCIDRs = append(nodes[g.node.Name].Spec.PodCIDRs, p.String())
			}
		}
		if err := clashes(list); err != nil {
			t.Fatalf("round %d: %v", round, err)
		}
	}
}

// Whatever an administrator writes into a Node, the parts given away overlap
// nothing that can be read.
func FuzzAssignPodCIDRs(f *testing.F) {
	for _, s := range []string{"10.244.0.0/24", "10.0.0.0/8", "10.244.255.255/32", "fd00:10:244::/49", "::/0", "::ffff:10.244.0.0/120", "10.244.0.0", ""} {
		f.Add(s, 16, 24)
	}
	f.Fuzz(func(t *testing.T, cidr string, all, part int) {
		whole, err := netip.MustParseAddr("10.244.0.0").Prefix(all)
		if err != nil || validateRanges([]netip.Prefix{whole}, part, 64) != nil {
			return
		}
		nodes := cidrNodes("a", "b", "c")
		nodes[0].Spec.PodCIDRs = []string{cidr}
		gifts, _ := assignPodCIDRs(nodes, podRanges([]netip.Prefix{whole}, part, 64))
		for _, g := range gifts {
			for _, p := range g.cidrs {
				if taken, err := netip.ParsePrefix(cidr); err == nil && taken.Overlaps(p) || !whole.Overlaps(p) || p.Bits() != part {
					t.Errorf("%s of %s was given while %s was taken", p, whole, cidr)
				}
				g.node.Spec.PodCIDRs = append(g.node.Spec.PodCIDRs, p.String())
			}
		}
		if err := clashes(nodes[1:]); err != nil {
			t.Error(err)
		}
	})
}

func TestClashes(t *testing.T) {
	err := clashes(cidrNodes("a 10.244.0.0/24", "b 10.244.1.0/24", "c 10.244.0.0/25"))
	want := "pod CIDR 10.244.0.0/24 of node a overlaps 10.244.0.0/25 of node c: delete one of the nodes and let it join again"
	if err == nil || err.Error() != want {
		t.Errorf("got %v, want %s", err, want)
	}
}

func TestConfigValidate(t *testing.T) {
	for _, tc := range []struct {
		name string
		edit func(*Config)
		want string
	}{
		{"two of a family", func(c *Config) { c.PodCIDRs = prefixes("10.1.0.0/16 10.2.0.0/16") }, "pod CIDR 10.2.0.0/16: second one of its family, want at most one IPv4 and one IPv6"},
		{"part larger than the whole", func(c *Config) { c.NodeMaskIPv4 = 12 }, "pod CIDR 10.244.0.0/16: a /12 a node does not fit, want a length between 16 and 30"},
		{"no room in a part", func(c *Config) { c.NodeMaskIPv4 = 31 }, "pod CIDR 10.244.0.0/16: a /31 a node does not fit, want a length between 16 and 30"},
		{"too many parts", func(c *Config) { c.PodCIDRs = prefixes("fd00::/40") }, "pod CIDR fd00::/40: parts of /64 are more than 65536 nodes, want a shorter range or larger parts"},
		{"services inside", func(c *Config) { c.ServiceCIDRs = prefixes("10.244.8.0/24") }, "pod CIDR 10.244.0.0/16 overlaps service CIDR 10.244.8.0/24: want ranges apart"},
		{"grace shorter than a renewal", func(c *Config) { c.NodeGracePeriod = time.Millisecond }, "node grace period 1ms: agents renew about each second, want at least 500ms"},
		{"no client", func(c *Config) { c.Client = nil }, "no API client"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			c := Config{Client: restConfig(), PodCIDRs: prefixes("10.244.0.0/16")}
			tc.edit(&c)
			if _, err := New(c); err == nil || err.Error() != "controllers: "+tc.want {
				t.Errorf("\n got %v\nwant controllers: %s", err, tc.want)
			}
		})
	}
	if _, err := New(Config{Client: restConfig(), PodCIDRs: prefixes("10.244.0.0/16 fd00:10:244::/48"), ServiceCIDRs: prefixes("10.96.0.0/16")}); err != nil {
		t.Errorf("the defaults are refused: %v", err)
	}
}
