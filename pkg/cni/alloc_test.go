package cni

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"
)

// state describes a pool as a person would: "held 10.0.0.2; freed 10.0.0.3@5".
func parsePool(t *testing.T, ranges, state string) pool {
	t.Helper()
	p := pool{held: map[netip.Addr]recordName{}, freed: map[netip.Addr]time.Duration{}, quarantine: 10 * time.Second, now: 100 * time.Second}
	for _, r := range strings.Fields(ranges) {
		p.ranges = append(p.ranges, span{prefix: netip.MustParsePrefix(r)})
	}
	for part := range strings.SplitSeq(state, ";") {
		fields := strings.Fields(part)
		p.noted = p.noted || slices.Contains(fields, "noted")
		for _, f := range fields[min(1, len(fields)):] {
			addr, at, _ := strings.Cut(f, "@")
			a := netip.MustParseAddr(addr)
			switch fields[0] {
			case "held":
				p.held[a] = recordName{containerID: "other", ifName: "eth0"}
			case "reserved":
				p.reserved = append(p.reserved, a)
			case "freed":
				var sec int
				if _, err := fmt.Sscan(at, &sec); err != nil {
					t.Fatal(err)
				}
				p.freed[a] = time.Duration(sec) * time.Second
			}
		}
	}
	return p
}

func TestChoose(t *testing.T) {
	for _, c := range []struct {
		name, ranges, state, asked, want string
	}{
		{"first of an empty range", "10.0.0.0/24", "", "", "10.0.0.2"},
		{"both families", "fd00::/64 10.0.0.0/24", "", "", "10.0.0.2 fd00::2"},
		{"lowest gap", "10.0.0.0/24", "held 10.0.0.2 10.0.0.4", "", "10.0.0.3"},
		{"never used before freed", "10.0.0.0/24", "freed 10.0.0.2@1", "", "10.0.0.3"},
		{"reserved", "10.0.0.0/24", "reserved 10.0.0.2", "", "10.0.0.3"},
		{"freed first comes first", "10.0.0.0/29", "held 10.0.0.2 10.0.0.3; freed 10.0.0.4@30 10.0.0.5@20 10.0.0.6@40", "", "10.0.0.5"},
		{"freed and held again is held", "10.0.0.0/29", "held 10.0.0.2 10.0.0.3 10.0.0.5; freed 10.0.0.4@30 10.0.0.5@20 10.0.0.6@40", "", "10.0.0.4"},
		{"quarantine is not yet over", "10.0.0.0/30", "freed 10.0.0.2@91", "", "no free address yet"},
		{"quarantine is over", "10.0.0.0/30", "freed 10.0.0.2@90", "", "10.0.0.2"},
		{"exhausted", "10.0.0.0/30", "held 10.0.0.2", "", "no free address"},
		{"second range of a family", "10.0.0.0/30 10.9.0.0/24", "held 10.0.0.2", "", "10.9.0.2"},
		{"a broadcast address is nobody's", "10.0.0.0/30", "held 10.0.0.2", "10.0.0.3", "reserved in 10.0.0.0/30"},
		{"IPv6 has no broadcast", "fd00::/126", "held fd00::2", "", "fd00::3"},
		{"one family exhausted is an error", "10.0.0.0/30 fd00::/64", "held 10.0.0.2", "", "no free address"},
		{"asked", "10.0.0.0/24", "", "10.0.0.99", "10.0.0.99"},
		{"asked for one of two", "10.0.0.0/24 fd00::/64", "", "fd00::99", "10.0.0.2 fd00::99"},
		{"asked from quarantine", "10.0.0.0/24", "freed 10.0.0.9@99", "10.0.0.9", "10.0.0.9"},
		{"noted from quarantine", "10.0.0.0/24", "noted; freed 10.0.0.9@95", "10.0.0.9", "10.0.0.9 was another pod's a moment ago; it can be used again in 5s"},
		{"noted after it", "10.0.0.0/24", "noted; freed 10.0.0.9@90", "10.0.0.9", "10.0.0.9"},
		{"noted and never used", "10.0.0.0/24", "noted", "10.0.0.9", "10.0.0.9"},
		{"asked and taken", "10.0.0.0/24", "held 10.0.0.9", "10.0.0.9", "belongs to eth0 of container other"},
		{"asked from elsewhere", "10.0.0.0/24", "", "192.0.2.1", "none of the ranges"},
		{"asked for a family there is not", "10.0.0.0/24", "", "fd00::9", "none of the ranges"},
		{"asked for the node's", "10.0.0.0/24", "", "10.0.0.1", "reserved"},
		{"freed in a range that is gone", "10.0.0.0/30", "held 10.0.0.2; freed 10.7.0.2@1", "", "no free address"},
		{"the last addresses there are", "255.255.255.252/30", "", "", "255.255.255.254"},
	} {
		t.Run(c.name, func(t *testing.T) {
			var asked []netip.Addr
			for _, s := range strings.Fields(c.asked) {
				asked = append(asked, netip.MustParseAddr(s))
			}
			got, err := parsePool(t, c.ranges, c.state).choose(asked)
			text := strings.Trim(fmt.Sprint(got), "[]")
			if err != nil {
				text = err.Error()
			}
			if err == nil && text != c.want || !strings.Contains(text, c.want) {
				t.Errorf("got %q, want %q", text, c.want)
			}
		})
	}
}
