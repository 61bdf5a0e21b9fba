package path

import (
	"fmt"
	"net/netip"
	"slices"
	"time"

	"meshd.dev/pkg/datapath/wireguard"
	"meshd.dev/pkg/mesh"
)

// Target is a peer to keep a path to. Immutable.
type Target struct {
	Node string
	Key  mesh.Key
	// Remote is the peer's mesh address, to which probes go; invalid: none.
	Remote netip.Addr
	// Endpoints there is a route to, preferred first.
	Endpoints []Endpoint
	// Published are all the peer names as its own.
	Published []netip.AddrPort
}

// Endpoint of a peer, and the largest packet inside the tunnel that the route
// to it allows.
type Endpoint struct {
	Addr netip.AddrPort
	MTU  int
}

// Choice is the path that was chosen to a peer: a direct one, to Endpoint.
// (A path by way of another node would be another kind of Choice.)
type Choice struct {
	// Endpoint, where not valid the first.
	Endpoint netip.AddrPort
	// MTU that was found; 0: as much as the route allows.
	MTU       int
	Keepalive Keepalive
	// Fresh counts the sessions to begin, Anew those of them in place of the
	// one there is: another number, another session.
	Fresh, Anew int
}

// Keepalive says whether an address translator, which forgets, is between us.
type Keepalive int

const (
	// Undecided for a while after a start: what was there before stays.
	Undecided Keepalive = iota
	Off
	On
)

// Report says how a peer fares.
type Report struct {
	// Down says why nothing comes back from the peer; empty while it does.
	Down string
	// Note is worth knowing and no fault.
	Note string
}

const (
	// liveAfter having sent without an answer a peer is asked, and again.
	liveAfter = 400 * time.Millisecond
	// Nothing came back for so long: the peer is silent. One that answered
	// probes before; one that never was heard; one whose firewall drops echo
	// (WireGuard itself says something 10 s after it received something).
	silentEchoes, silentNew, silentMute = time.Second, 3 * time.Second, 15 * time.Second
	// anewAfter so long a session is given up. It may be a machine that has no
	// time for its tunnels, and what it has in its queues then is under the
	// session there was. (WireGuard begins none by itself 5 s after another.)
	anewAfter = 3 * time.Second
	// A rung of the ladder has so long, and twice as long whenever all
	// endpoints had their turn; but in the first minute no longer than
	// rungSoon. A network that comes back finds no session any more, and
	// WireGuard by itself tries only every 5 s.
	rungFirst, rungSoon, rungLast = time.Second, 2 * time.Second, 30 * time.Second
	soon                          = time.Minute
	// natEvery is how often a peer behind an address translator is asked, so
	// that its answer keeps the way open.
	natEvery = 20 * time.Second
	// decided so long after a start both sides must have said where they see
	// each other.
	decided = natEvery + 10*time.Second
	// postAgain so long a probe is taken to wait in the device for a session.
	// It may have gone with what was there before.
	postAgain = 5 * time.Second
	// busy is what is sent between two looks for the MTU to matter.
	busy = 1000
)

// peer is the path to one peer as a function of events and time.
type peer struct {
	target Target
	choice Choice
	mtu    mtu
	rtt    time.Duration

	began  time.Time
	known  bool            // stats were seen
	last   wireguard.Stats // as last seen
	looked time.Time       // when
	roamed bool            // last.Endpoint is where it called from
	caller netip.AddrPort  // where it last called from that it has not published
	echoes bool            // it has answered a probe
	ours   int64           // bytes of probes and answers to probes, not yet in last.Tx
	seen   netip.AddrPort  // how it sees us

	shaken   time.Time // the handshake after which it was last heard
	waiting  time.Time // since when we send and nothing comes back
	hail     bool      // the device forgot a peer that was waited for: ask it again
	lively   time.Time // when it was last asked for being silent
	silent   time.Time // since when it counts as silent; zero: it does not
	rung     int
	nextRung time.Time
	did      string
	natAsked time.Time
	// posted is when the last probe went that has to wait in the device for a
	// session, and the Anew there was; another one would only take room there.
	posted     time.Time
	postedAnew int
}

// newPeer begins with the first endpoint.
func newPeer(t Target, now time.Time) *peer {
	p := &peer{began: now}
	p.set(t, now)
	return p
}

// set takes what may have changed about the peer.
func (p *peer) set(t Target, now time.Time) {
	if p.target.Key != t.Key && p.target.Node != "" {
		p.rekeyed(now)
	}
	p.target = t
	if !slices.Contains(p.candidates(), p.choice.Endpoint) {
		p.choice.Endpoint = netip.AddrPort{}
		if len(t.Endpoints) > 0 {
			p.choice.Endpoint = t.Endpoints[0].Addr
		}
	}
	if top := p.top(); top != p.mtu.top {
		p.mtu.restart(top, now)
		p.settle()
	}
}

// rekeyed: the same node with another key is another peer to the device, whose
// counters begin anew. The path to it is what it was.
func (p *peer) rekeyed(now time.Time) {
	*p = peer{began: now, target: p.target, choice: p.choice, mtu: p.mtu, rtt: p.rtt, caller: p.caller, echoes: p.echoes, seen: p.seen}
}

// candidates are the endpoints to try, in order.
func (p *peer) candidates() []netip.AddrPort {
	var list []netip.AddrPort
	for _, e := range p.target.Endpoints {
		list = append(list, e.Addr)
	}
	if p.caller.IsValid() && !slices.Contains(list, p.caller) {
		list = append(list, p.caller)
	}
	return list
}

func (p *peer) index(a netip.AddrPort) (int, bool) {
	i := slices.IndexFunc(p.target.Endpoints, func(e Endpoint) bool { return e.Addr == a })
	return i, i >= 0
}

// top is what the route to the endpoint in use allows; where that is not
// known, what the best route does.
func (p *peer) top() int {
	for _, a := range []netip.AddrPort{p.last.Endpoint, p.choice.Endpoint} {
		if i, ok := p.index(a); ok {
			return p.target.Endpoints[i].MTU
		}
	}
	most := 0
	for _, e := range p.target.Endpoints {
		most = max(most, e.MTU)
	}
	return most
}

// settle has the choice say what the mtu found.
func (p *peer) settle() {
	p.choice.MTU = 0
	if p.mtu.use < p.mtu.top {
		p.choice.MTU = p.mtu.use
	}
}

// behind says that the peer is reached by an address it does not know of, or
// we by one we do not know of.
func (p *peer) behind(own []netip.AddrPort) (them, us bool) {
	them = p.roamed && p.last.Endpoint.IsValid() && !slices.Contains(p.target.Published, p.last.Endpoint)
	us = p.seen.IsValid() && len(own) > 0 && !slices.Contains(own, p.seen)
	return them, us
}

// stats takes the device's counters.
func (p *peer) stats(s wireguard.Stats, now time.Time) {
	old, known := p.last, p.known
	p.last, p.known, p.looked = s, true, now
	if !known || s.Tx < old.Tx || s.Rx < old.Rx { // new, or the device began anew
		if known && s.Handshake.IsZero() { // what waited there is gone as well
			p.hail = p.hail || !p.waiting.IsZero() || !p.silent.IsZero()
			p.posted = time.Time{}
			p.mtu.heard(now)
		}
		old.Tx, old.Rx, p.waiting = s.Tx, s.Rx, time.Time{}
		p.roamed = !s.Handshake.IsZero()
	}
	heard := s.Rx != old.Rx
	if s.Endpoint != old.Endpoint {
		p.roamed = p.roamed && !known || heard
		if top := p.top(); known && old.Endpoint.IsValid() || top != p.mtu.top {
			p.mtu.restart(top, now)
			p.settle()
		}
	}
	if them, _ := p.behind(nil); them {
		p.caller = s.Endpoint
	}
	if _, ok := p.index(s.Endpoint); ok && !known && !s.Handshake.IsZero() {
		p.choice.Endpoint = s.Endpoint // it works, whoever chose it
	}
	switch {
	case heard:
		p.heard(now)
	case s.Tx != old.Tx && p.waiting.IsZero():
		p.waiting = now
	}
	traffic := s.Tx - old.Tx - p.ours
	p.ours = max(0, -traffic)
	if traffic >= busy {
		p.mtu.doubt(now)
	}
}

// counted: a probe left, or the answer to one of the peer's; the device will
// count it as it counts traffic.
func (p *peer) counted(size int) {
	const overhead = 32 // of a data message, sections 5.4.6 of the WireGuard paper
	p.ours += int64((size+step-1)/step*step + overhead)
}

func (p *peer) heard(now time.Time) {
	if !p.silent.IsZero() || !p.last.Handshake.Equal(p.shaken) { // not each time: it may never answer probes
		p.mtu.heard(now)
	}
	p.shaken = p.last.Handshake
	p.waiting, p.silent, p.rung, p.nextRung = time.Time{}, time.Time{}, 0, time.Time{}
}

// patience is how long nothing may come back.
func (p *peer) patience() time.Duration {
	switch {
	case p.echoes:
		return silentEchoes
	case p.last.Handshake.IsZero():
		return silentNew
	}
	return silentMute
}

// due says which probes to send now, and climbs the ladder.
func (p *peer) due(now time.Time, own []netip.AddrPort) []int {
	var sizes []int
	if p.last.Handshake.IsZero() && p.mtu.postpone(now) {
		sizes = []int{smallSize} // it also begins the handshake
	} else {
		sizes = p.mtu.due(now, p.rtt)
	}
	them, us := p.behind(own)
	switch {
	case them || us:
		p.choice.Keepalive = On
	case p.choice.Keepalive == On || now.Sub(p.began) >= decided:
		p.choice.Keepalive = Off
	}
	ask, anew := p.hail, p.choice.Anew
	p.hail = false
	if them && now.Sub(p.natAsked) >= natEvery {
		p.natAsked, ask = now, true
	}
	if !p.waiting.IsZero() {
		if now.Sub(p.waiting) >= liveAfter && now.Sub(p.lively) >= min(max(liveAfter, p.rungTime()/4), rungLast) {
			p.lively, ask = now, true
		}
		p.climb(now)
	}
	if ask && len(sizes) == 0 {
		sizes = []int{smallSize}
	}
	p.settle()
	if len(sizes) > 0 && p.last.Handshake.IsZero() {
		if p.postedAnew == anew && now.Sub(p.posted) < max(postAgain, p.rungTime()) {
			return nil
		}
		p.posted, p.postedAnew = now, anew
	}
	return sizes
}

// unsent: a probe did not even leave.
func (p *peer) unsent(size int, now time.Time) {
	if size != smallSize {
		p.mtu.unsent()
	} else if p.last.Handshake.IsZero() {
		p.mtu.sooner(now.Add(attemptEvery))
	}
	p.posted = time.Time{}
}

func (p *peer) rungTime() time.Duration {
	return min(rungFirst<<min(max(0, p.rung-1)/max(1, len(p.candidates())), 10), rungLast)
}

// climb does something about a silent peer: first a new session, if there was
// one, then the other endpoints in turn; later each time without the session
// there was.
func (p *peer) climb(now time.Time) {
	// What was not looked at is not silent: the machine may be busy.
	if p.looked.Sub(p.waiting) < p.patience() || now.Before(p.nextRung) {
		return
	}
	if p.silent.IsZero() {
		p.silent = p.waiting
	}
	p.rung++
	wait := p.rungTime()
	if now.Sub(p.silent) < soon {
		wait = min(wait, rungSoon)
	}
	p.nextRung = now.Add(wait)
	p.choice.Fresh++
	if p.last.Handshake.IsZero() || now.Sub(p.silent) >= anewAfter {
		p.choice.Anew++
	}
	p.did = "began a new session"
	list := p.candidates()
	if len(list) == 0 {
		return
	}
	at := p.choice.Endpoint
	if slices.Contains(list, p.last.Endpoint) {
		at = p.last.Endpoint
	}
	if p.rung > 1 || p.last.Handshake.IsZero() {
		at = list[(slices.Index(list, at)+1)%len(list)]
	}
	p.choice.Endpoint = at
	p.did += " with " + at.String()
}

// wake is when due has something to do; zero for never.
func (p *peer) wake() time.Time {
	at := p.mtu.wake()
	sooner := func(t time.Time) {
		if at.IsZero() || t.Before(at) {
			at = t
		}
	}
	if p.hail {
		sooner(p.looked)
	}
	if p.choice.Keepalive == Undecided {
		sooner(p.began.Add(decided))
	}
	if p.roamed && !slices.Contains(p.target.Published, p.last.Endpoint) && p.last.Endpoint.IsValid() {
		sooner(p.natAsked.Add(natEvery))
	}
	if !p.waiting.IsZero() {
		ask := p.waiting.Add(liveAfter)
		if again := p.lively.Add(min(max(liveAfter, p.rungTime()/4), rungLast)); again.After(ask) {
			ask = again
		}
		sooner(ask)
		switch climb := p.waiting.Add(p.patience()); {
		case p.looked.Before(climb): // looking wakes us
		case climb.After(p.nextRung):
			sooner(climb)
		default:
			sooner(p.nextRung)
		}
	}
	return at
}

// answered: a probe came back after rtt.
func (p *peer) answered(size int, rtt time.Duration, now time.Time) {
	p.echoes = true
	if p.rtt == 0 {
		p.rtt = rtt
	}
	p.rtt += (rtt - p.rtt) / 8
	p.heard(now)
	p.mtu.answered(size, now)
	p.settle()
}

// told: the peer sees us by that address.
func (p *peer) told(seen netip.AddrPort) { p.seen = seen }

func (p *peer) report(now time.Time, own []netip.AddrPort) Report {
	var r Report
	if !p.silent.IsZero() {
		r.Down = fmt.Sprintf("sends and hears nothing for %s; %s", now.Sub(p.silent).Round(100*time.Millisecond), p.did)
	}
	if p.mtu.use < p.mtu.top {
		r.Note = fmt.Sprintf("packets of more than %d bytes get lost, though the route allows %d", p.mtu.use, p.mtu.top)
	}
	switch them, us := p.behind(own); {
	case them:
		r.Note = join(r.Note, "it is behind an address translator, at "+p.last.Endpoint.String())
	case us:
		r.Note = join(r.Note, "we are behind an address translator, at "+p.seen.String())
	}
	return r
}

func join(a, b string) string {
	if a == "" {
		return b
	}
	return a + "; " + b
}
