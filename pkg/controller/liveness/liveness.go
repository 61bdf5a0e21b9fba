// Package liveness decides from lease renewals which nodes are lost. It is
// arithmetic only: every function takes the moment it speaks of, nothing reads
// a clock, and what happened is told to it in events.
//
// Silence is the one number everything follows from. It does not grow with
// the clock but with Echo: the observer renews a lease of its own and sees it
// come back through the same server, the same watch and the same process as
// those of the nodes. Each echo adds the time since the one before to the
// silence of everyone who was not heard meanwhile. So neither an API server
// that is away, nor a stalled disk under it, nor a pause of the observer
// itself makes a node look silent; and the clocks of the nodes, written in
// their leases, are never compared with anything.
package liveness

import (
	"maps"
	"slices"
	"time"
)

// Config of a Ledger; zero values take the defaults.
type Config struct {
	// Grace is the silence after which a node is lost. Default 4 s: with
	// renewals each second that is three lost in a row and a late fourth.
	// Random loss alone practically never does that, because renewals travel
	// over TCP; what does is a pause of the machine (swap, a full disk, a live
	// migration), most of which are shorter. And being wrong is cheap at this
	// point: endpoints leave services and come back with the next renewal.
	// Half of it would save two seconds and turn such pauses into alarms.
	Grace time.Duration
	// Beat is the interval at which the observer is to renew its own lease.
	// Default an eighth of Grace: the resolution of every decision.
	Beat time.Duration
	// Window is the time within which nodes count as lost together. Default
	// 10 s.
	Window time.Duration
}

func (c *Config) defaults() {
	if c.Grace == 0 {
		c.Grace = 4 * time.Second
	}
	if c.Beat == 0 {
		c.Beat = c.Grace / 8
	}
	if c.Window == 0 {
		c.Window = 10 * time.Second
	}
}

// StormNodes is the size of cluster from which losing more than half of the
// nodes at once is taken for a fault of the observer's own.
const StormNodes = 3

// Ledger knows when each node was last heard. Not safe for concurrent use.
type Ledger struct {
	cfg   Config
	nodes map[string]*entry
	echo  time.Time
	// storm holds the nodes that were lost together; nil when there is none.
	storm map[string]bool
}

type entry struct {
	stamp   string
	silence time.Duration
	// heard is set once a renewal came in during the life of the Ledger.
	heard bool
	lost  time.Time
}

// New returns a Ledger that knows nobody.
func New(cfg Config) *Ledger {
	cfg.defaults()
	return &Ledger{cfg: cfg, nodes: map[string]*entry{}}
}

// Beat is the interval at which Echo is to come.
func (l *Ledger) Beat() time.Duration { return l.cfg.Beat }

// Expect sets the nodes that exist. New ones begin without silence; those not
// named are forgotten.
func (l *Ledger) Expect(names []string) {
	have := make(map[string]bool, len(names))
	for _, n := range names {
		have[n] = true
		if l.nodes[n] == nil {
			l.nodes[n] = &entry{}
		}
	}
	maps.DeleteFunc(l.nodes, func(n string, _ *entry) bool { return !have[n] })
	maps.DeleteFunc(l.storm, func(n string, _ bool) bool { return !have[n] })
}

// Renewed tells that the lease of node was seen with stamp, its renew time or
// anything else that changes with each renewal. A stamp seen before is no sign
// of life, nor is the first one: it may be years old.
func (l *Ledger) Renewed(node, stamp string) {
	e := l.nodes[node]
	if e == nil {
		e = &entry{}
		l.nodes[node] = e
	}
	switch {
	case e.stamp == "":
		e.stamp = stamp
	case e.stamp != stamp:
		*e = entry{stamp: stamp, heard: true}
	}
}

// Echo tells that the observer's own renewal came back at now. A first echo,
// and one after an outage longer than Grace, starts everyone's silence anew:
// the nodes may need a moment to find the way back to the server.
func (l *Ledger) Echo(now time.Time) {
	gap := now.Sub(l.echo)
	outage := l.echo.IsZero() || gap >= l.cfg.Grace
	l.echo = now
	for _, e := range l.nodes {
		switch {
		case outage && e.lost.IsZero():
			e.silence = 0
		case outage:
			e.silence = l.cfg.Grace
		default:
			e.silence += min(gap, 2*l.cfg.Beat)
		}
		if e.silence >= l.cfg.Grace && e.lost.IsZero() {
			e.lost = now
		}
	}
	l.brake(now)
}

// brake looks for a storm. One begins when more than half of at least
// StormNodes nodes are lost within the window; it ends when at most half of
// them all are still lost.
func (l *Ledger) brake(now time.Time) {
	together, lost := map[string]bool{}, map[string]bool{}
	for n, e := range l.nodes {
		if e.lost.IsZero() {
			continue
		}
		lost[n] = true
		if now.Sub(e.lost) <= l.cfg.Window {
			together[n] = true
		}
	}
	half := func(n int) bool { return len(l.nodes) >= StormNodes && 2*n > len(l.nodes) }
	switch {
	case l.storm != nil && half(len(lost)):
		l.storm = lost
	case half(len(together)):
		l.storm = lost
	default:
		l.storm = nil
	}
}

// State of a node.
type State int

const (
	// Unproven: neither heard nor silent for long; leave things as they are.
	Unproven State = iota
	// Alive: heard within the grace period.
	Alive
	// Lost: silent for longer than that.
	Lost
)

// Verdict on one node.
type Verdict struct {
	State State
	// For is how long a lost node has been lost, in silence.
	For time.Duration
}

// Judge returns the verdict on node.
func (l *Ledger) Judge(node string) Verdict {
	e := l.nodes[node]
	switch {
	case e == nil:
		return Verdict{}
	case !e.lost.IsZero():
		return Verdict{State: Lost, For: e.silence - l.cfg.Grace}
	case e.heard:
		return Verdict{State: Alive}
	}
	return Verdict{}
}

// Storm names the nodes that are lost while so many vanished together that
// nothing irreversible must follow from it; empty when there is no storm.
func (l *Ledger) Storm() []string { return slices.Sorted(maps.Keys(l.storm)) }

// Blind is how long ago the last echo was, seen from now: while it is longer
// than a few beats, verdicts stand still.
func (l *Ledger) Blind(now time.Time) time.Duration {
	if l.echo.IsZero() {
		return 0
	}
	return now.Sub(l.echo)
}
