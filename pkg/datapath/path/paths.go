// Package path finds and keeps the path to every peer: which of its endpoints,
// how large a packet, whether an address translator is to be kept awake, and
// when a session has to begin anew.
//
// What is decided is a value a peer, a Choice; peer.go and mtu.go decide it
// as functions of events and time. This file sends the probes: ICMP echo
// through the tunnel, to the peer's mesh address, which its kernel answers.
// So nothing relies on ICMP of the underlay, and nothing has to listen on the
// other side. A peer whose firewall drops echo keeps the MTU of its route,
// and counts as silent later.
//
// Probes cost nothing where nothing is sent: one of full size when a peer or
// its endpoint is new, then at most two a second to a peer that is sent
// something; small ones to a peer that does not answer, less and less often,
// and every 20 s to one behind an address translator.
package path

import (
	"context"
	"log/slog"
	"maps"
	"math/rand/v2"
	"net/netip"
	"slices"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"meshd.dev/pkg/datapath/wireguard"
	"meshd.dev/pkg/mesh"
)

// Config of Paths.
type Config struct {
	// Changed is called when a Choice may have; it must not block.
	Changed func()
	// Repaired is called when a peer that was silent is heard again.
	Repaired func(node, what string)
	Log      *slog.Logger
}

// Paths to all peers. Use New. Its methods may be called from any goroutine.
type Paths struct {
	cfg  Config
	id   uint16
	kick chan struct{}

	mu    sync.Mutex
	peers map[string]*peer
	// remotes are names by mesh address.
	remotes map[netip.Addr]string
	order   []string // of names; probing goes round
	turn    int
	own     []netip.AddrPort
	told    map[string]Choice // as last announced
	toldAt  time.Time
	seq     uint16
	sent    map[uint16]sent
	conns   [2]*conn
}

// sent is a probe under way.
type sent struct {
	node string
	size int
	at   time.Time
}

const (
	// No more than burst probes every pause, whatever happens. So many small
	// ones, read at once, fit into 2 KB (see mtu.postpone).
	burst, pause = 8, 25 * time.Millisecond
	// maxSent bounds the probes remembered.
	maxSent = 4096
	// tellEvery is the least time between two calls of Changed: most of what
	// one costs is the same for one peer and for thirty, and who has a thousand
	// silent ones has other things to do as well.
	tellEvery = 100 * time.Millisecond
)

// New makes Paths without peers.
func New(cfg Config) *Paths {
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	return &Paths{cfg: cfg, id: uint16(rand.Uint32()), kick: make(chan struct{}, 1), peers: map[string]*peer{}, sent: map[uint16]sent{}}
}

// Set says who the peers are, and which endpoints we call our own.
func (p *Paths) Set(targets []Target, own []netip.AddrPort) {
	p.mu.Lock()
	defer p.mu.Unlock()
	now := time.Now()
	p.own = own
	keep := make(map[string]*peer, len(targets))
	p.order, p.remotes = p.order[:0], make(map[netip.Addr]string, len(targets))
	for _, t := range targets {
		old := p.peers[t.Node]
		if old == nil {
			old = newPeer(t, now)
		} else {
			old.set(t, now)
		}
		keep[t.Node] = old
		p.order = append(p.order, t.Node)
		p.remotes[t.Remote] = t.Node
	}
	p.peers = keep
	p.announce(now)
	p.poke()
}

// Stats takes the counters of the device.
func (p *Paths) Stats(stats map[mesh.Key]wireguard.Stats) {
	p.mu.Lock()
	defer p.mu.Unlock()
	now := time.Now()
	for _, peer := range p.peers {
		if s, ok := stats[peer.target.Key]; ok {
			p.watch(peer, now, func() { peer.stats(s, now) })
		}
	}
	p.announce(now)
	p.poke()
}

// watch tells of a silent peer that f has found to be heard again.
func (p *Paths) watch(peer *peer, now time.Time, f func()) {
	since, did := peer.silent, peer.did
	f()
	if !since.IsZero() && peer.silent.IsZero() && p.cfg.Repaired != nil {
		p.cfg.Repaired(peer.target.Node, "heard nothing for "+now.Sub(since).Round(10*time.Millisecond).String()+": "+did)
	}
}

// Choices by node. The map is the caller's.
func (p *Paths) Choices() map[string]Choice {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.choices()
}

func (p *Paths) choices() map[string]Choice {
	m := make(map[string]Choice, len(p.peers))
	for name, peer := range p.peers {
		m[name] = peer.choice
	}
	return m
}

// Report of a node.
func (p *Paths) Report(node string) Report {
	p.mu.Lock()
	defer p.mu.Unlock()
	if peer := p.peers[node]; peer != nil {
		return peer.report(time.Now(), p.own)
	}
	return Report{}
}

// Seen are the addresses by which peers see us and that we do not call our
// own, sorted.
func (p *Paths) Seen() []netip.AddrPort {
	p.mu.Lock()
	defer p.mu.Unlock()
	var seen []netip.AddrPort
	for _, peer := range p.peers {
		if _, us := peer.behind(p.own); us {
			seen = append(seen, peer.seen)
		}
	}
	slices.SortFunc(seen, netip.AddrPort.Compare)
	return slices.Compact(seen)
}

// announce calls Changed if something is to be told, and returns how long that
// has to wait if it was told of something just now.
func (p *Paths) announce(now time.Time) (wait time.Duration) {
	choices := p.choices()
	if p.told != nil && !maps.Equal(choices, p.told) && p.cfg.Changed != nil {
		if wait = p.toldAt.Add(tellEvery).Sub(now); wait > 0 {
			return wait
		}
		p.toldAt = now
		p.cfg.Changed()
	}
	p.told = choices
	return 0
}

func (p *Paths) poke() {
	select {
	case p.kick <- struct{}{}:
	default:
	}
}

// Run probes until ctx ends.
func (p *Paths) Run(ctx context.Context) error {
	group, ctx := errgroup.WithContext(ctx)
	for i, open := range []func() (*conn, error){open4, open6} {
		c, err := open()
		if err != nil { // a machine without the family, or a sandbox
			p.cfg.Log.Debug("no probes", "err", err)
			continue
		}
		p.mu.Lock()
		p.conns[i] = c
		p.mu.Unlock()
		stop := context.AfterFunc(ctx, c.close)
		defer stop()
		group.Go(func() error { c.receive(p.received); return nil })
	}
	group.Go(func() error { return p.send(ctx) })
	err := group.Wait()
	p.mu.Lock()
	p.conns = [2]*conn{}
	p.mu.Unlock()
	return err
}

func (p *Paths) send(ctx context.Context) error {
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-timer.C:
		case <-p.kick:
		}
		timer.Reset(p.round(time.Now()))
	}
}

// round sends what is due and returns when to come again.
func (p *Paths) round(now time.Time) time.Duration {
	p.mu.Lock()
	defer p.mu.Unlock()
	count, wait := 0, time.Hour
	for i := range p.order {
		k := (p.turn + i) % len(p.order)
		peer := p.peers[p.order[k]]
		if count >= burst {
			p.turn, wait = k, pause
			break
		}
		was := peer.choice
		sizes := peer.due(now, p.own)
		for _, size := range sizes {
			p.probe(peer, size, now)
		}
		if count += len(sizes); len(sizes) == 0 && peer.choice != was {
			count++ // to do something about many at once is no less
		}
		if at := peer.wake(); !at.IsZero() {
			wait = min(wait, max(at.Sub(now), pause/5))
		}
	}
	if later := p.announce(now); later > 0 {
		wait = min(wait, later)
	}
	return wait
}

func (p *Paths) probe(peer *peer, size int, now time.Time) {
	to := peer.target.Remote
	if !to.IsValid() {
		return
	}
	c := p.conns[0]
	if to.Is6() {
		c = p.conns[1]
	}
	if c == nil {
		return
	}
	p.seq++
	err := c.send(encodeEcho(echo{id: p.id, seq: p.seq, seen: peer.last.Endpoint, size: size}, to), to)
	if err != nil {
		p.cfg.Log.Debug("probe", "node", peer.target.Node, "size", size, "err", err)
		peer.unsent(size, now)
		return
	}
	peer.counted(size)
	if len(p.sent) >= maxSent {
		maps.DeleteFunc(p.sent, func(_ uint16, s sent) bool { return now.Sub(s.at) > 10*time.Second })
	}
	if len(p.sent) < maxSent {
		p.sent[p.seq] = sent{peer.target.Node, size, now}
	}
}

// received handles a message that came in for us.
func (p *Paths) received(e echo, from netip.Addr) {
	p.mu.Lock()
	defer p.mu.Unlock()
	now := time.Now()
	if !e.reply {
		peer := p.peers[p.remotes[from]]
		if peer == nil {
			return // anybody may send that, as often as he likes
		}
		peer.counted(e.size)
		if e.seen.IsValid() && e.seen != peer.seen {
			peer.told(e.seen)
			p.poke()
		}
		return
	}
	s, ok := p.sent[e.seq]
	peer := p.peers[s.node]
	if !ok || e.id != p.id || peer == nil || peer.target.Remote != from || s.size != e.size {
		return
	}
	delete(p.sent, e.seq)
	p.watch(peer, now, func() { peer.answered(e.size, now.Sub(s.at), now) })
	p.announce(now)
	p.poke()
}
