package datapath

import (
	"context"
	"fmt"
	"strings"
	"time"

	"meshd.dev/pkg/datapath/firewall"
	"meshd.dev/pkg/mesh"
)

const (
	// passageEvery is how often it is looked whether pods' packets get through.
	passageEvery = 5 * time.Second
	// tooMany packets that begin a connection, and none that arrived: a client
	// sends its first again and again.
	tooMany = 5
)

// passing remembers what was lost since something last got through.
type passing struct {
	seen bool
	last firewall.Passage
	lost uint64
}

// see takes the newest counts and returns how many packets were lost in a row.
// Counts that go back are those of a table that was made anew.
func (p *passing) see(now firewall.Passage) uint64 {
	last := p.last
	anew := !p.seen || now.Began < last.Began || now.Passed < last.Passed || now.Refused < last.Refused
	p.seen, p.last = true, now
	switch {
	case anew, now.Passed > last.Passed:
		p.lost = 0
	default:
		began, refused := now.Began-last.Began, now.Refused-last.Refused
		p.lost += began - min(began, refused)
	}
	return p.lost
}

// watchPassage says when another firewall of this machine cuts pods off. It is
// theirs to change: packets that they drop, no rule of ours brings back.
func (d *Datapath) watchPassage(ctx context.Context) error {
	var from, to passing
	tick := time.NewTicker(passageEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
		out, in, err := firewall.Passages()
		if err != nil {
			continue // datapath/firewall says what is wrong with the table
		}
		d.cfg.Board.Report("datapath/forward", blocked(from.see(out), to.see(in), firewall.Forwarding),
			"it has to accept what is forwarded from and to "+mesh.PodLinkPrefix+"*: iptables -I FORWARD -i "+mesh.PodLinkPrefix+"+ -j ACCEPT; iptables -I FORWARD -o "+mesh.PodLinkPrefix+"+ -j ACCEPT, "+
				"and the same with ip6tables (beside Docker in chain DOCKER-USER, and to stay after a reboot wherever the machine keeps its rules); for firewalld and others see manifests/README.md, Firewalls")
	}
}

// blocked says who may be it.
func blocked(from, to uint64, chains func() ([]string, error)) error {
	var what []string
	if from >= tooMany {
		what = append(what, fmt.Sprintf("of the last %d packets by which pods here begin a connection none got out", from))
	}
	if to >= tooMany {
		what = append(what, fmt.Sprintf("of the last %d packets that begin a connection to pods here none got in", to))
	}
	if len(what) == 0 {
		return nil
	}
	who := "in none of its chains that meshd can see"
	if names, err := chains(); err == nil && len(names) > 0 {
		who = "one of " + strings.Join(names, ", ")
	}
	return fmt.Errorf("another firewall of this machine drops what is forwarded: %s; %s", strings.Join(what, ", "), who)
}
