package firewall

import (
	"fmt"
	"os"
	"slices"
	"strings"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"meshd.dev/pkg/mesh"
)

// What another firewall of the machine drops, an accept of ours does not save.
// So packets that begin a connection are counted where nobody has seen them
// yet and where all others are done with them: when none of many arrives, pods
// are cut off by somebody, in whatever way that is written.

// entering sees what is forwarded before everybody else.
const entering = "entering"

var counted = part{"counter", []expr.Any{&expr.Counter{}}}

// counters of what begins, by way: from pods, and to pods from other nodes.
func counters(cfg Config) []rule {
	pods, device := cfg.PodLinks+"*", cfg.Device+"*"
	return []rule{
		newRule("begins at a pod", begins, iifname(pods), counted),
		newRule("begins elsewhere, to a pod", begins, iifname(device), oifname(pods), counted),
	}
}

// refusedCounter of those that we ourselves do not let through.
func refusedCounter(cfg Config) rule {
	return newRule("refused to a pod", begins, iifname(cfg.PodLinks+"*"), counted)
}

// Passage counts packets that begin a connection of pods, since the table was made.
type Passage struct {
	// Began were to be forwarded, Refused those of them that we refused, and
	// Passed came through.
	Began, Refused, Passed uint64
}

// Passages from pods of this node, and to them from other nodes.
func Passages() (from, to Passage, err error) {
	s, err := dial()
	if err != nil {
		return from, to, err
	}
	defer s.close()
	read := func(chain string, into ...*uint64) {
		if err != nil {
			return
		}
		var rules []*nftables.Rule
		if rules, err = s.nft.GetRules(ours, &nftables.Chain{Name: chain, Table: ours}); err != nil {
			err = fmt.Errorf("read chain %s: %w", chain, err)
			return
		}
		for i := range min(len(rules), len(into)) {
			for _, e := range rules[i].Exprs {
				if n, ok := e.(*expr.Counter); ok {
					*into[i] = n.Packets
				}
			}
		}
	}
	// Began first: what comes between two looks is not missing then.
	read(entering, &from.Began, &to.Began)
	read("refuse", &from.Refused)
	read(mesh.LeavingChain, &from.Passed, &to.Passed)
	return from, to, err
}

// Forwarding names the chains of others that see what is forwarded, those first
// that drop what no rule of theirs takes.
func Forwarding() ([]string, error) { return once(forwarding) }

func forwarding(s *socket) ([]string, error) {
	var dropping, others []string
	for _, f := range []struct {
		number byte
		name   string
	}{{unix.NFPROTO_IPV4, "ip"}, {unix.NFPROTO_IPV6, "ip6"}, {unix.NFPROTO_INET, "inet"}} {
		msgs, err := s.ask(unix.NFT_MSG_GETCHAIN, netlink.Dump, f.number)
		if err != nil {
			return nil, fmt.Errorf("read chains: %w", err)
		}
		for _, m := range msgs {
			c, err := readChain(m)
			switch {
			case err != nil || !c.hooked || c.hook != unix.NF_INET_FORWARD || c.table == mesh.FirewallTable:
			case c.policy == uint32(nftables.ChainPolicyDrop):
				dropping = append(dropping, fmt.Sprintf("%s of table %s %s (policy drop)", c.name, f.name, c.table))
			default:
				others = append(others, fmt.Sprintf("%s of table %s %s", c.name, f.name, c.table))
			}
		}
	}
	for cmd, file := range map[string]string{"iptables-legacy": "/proc/thread-self/net/ip_tables_names", "ip6tables-legacy": "/proc/thread-self/net/ip6_tables_names"} {
		b, _ := os.ReadFile(file) // none: nothing of it is loaded
		if slices.Contains(strings.Fields(string(b)), "filter") {
			others = append(others, "FORWARD of "+cmd)
		}
	}
	slices.Sort(others)
	return append(dropping, others...), nil
}
