package exchange

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"

	"meshd.dev/pkg/mesh"
	"meshd.dev/pkg/reconcile"
	"meshd.dev/pkg/status"
)

// Config of an Exchange. All but Listen, Board and Log is required.
type Config struct {
	Node string
	// Dir is the state folder: exchange.key and psk/ are in it.
	Dir string
	// Port to listen on, TCP; another one while somebody has it.
	Port int
	// Moved is called when Published changed. It must not block. Optional.
	Moved func()
	// State of the cluster, nil while it is not known.
	State func() *mesh.State
	// Keys of this node, the next one zero unless it changes its key.
	Keys func() (current, next mesh.Key)
	// Sends says to which key of a node this one sends.
	Sends func(node string) (Sending, bool)
	// Heard is told to which key of this node another sends, while this one
	// changes its key, and when it was asked.
	Heard func(node string, s Sending, asked time.Time)
	// Changed is called when PSK has another answer for a node. It must not
	// block.
	Changed func(node string)
	Board   *status.Board
	Log     *slog.Logger
}

const (
	// patience of the first contact: so long two nodes that never had a
	// preshared key wait for one.
	patience = 5 * time.Second
	// recheck is how often two nodes look whether they have the same.
	recheck = 10 * time.Minute
	// ask is how often a node that changes its key asks the others.
	ask = 200 * time.Millisecond
	// maxBackoff between two tries to reach a node.
	maxBackoff = time.Minute
	// maxVisits at once that have to call first: a handshake takes some 100 KB.
	maxVisits = 32
	// regainEvery is how often a port that somebody had is tried again.
	regainEvery = time.Minute
	// minBackoff is short: mostly the other has not heard of a key yet.
	minBackoff = 100 * time.Millisecond
)

// Exchange with all other nodes. Use New.
type Exchange struct {
	cfg   Config
	id    Identity
	store *Store
	loop  *reconcile.Loop
	work  sync.WaitGroup // visits under way
	slots chan struct{}  // of visits without a connection yet
	first net.Listener   // for serve; nil where that was not possible yet
	again time.Duration  // regainEvery
	// published port.
	published atomic.Int32
	free      chan struct{} // of callers' connections, at all ports
	counts    *counts

	mu    sync.Mutex
	peers map[string]*peer
	timer *time.Timer
}

// peer is what is remembered of a node.
type peer struct {
	uid   string
	since time.Time // first heard of
	busy  bool      // somebody talks with it
	conn  *conn     // kept while it is asked often
	// checked pairs, and when.
	checked  map[Pair]time.Time
	failures int
	retry    time.Time
	missed   time.Time // last heard that it has no preshared key
	err      error
}

// New loads the identity and the preshared keys, and opens the port.
func New(cfg Config) (*Exchange, error) {
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	id, err := LoadIdentity(filepath.Join(cfg.Dir, "exchange.key"))
	if err != nil {
		return nil, err
	}
	store, err := OpenStore(filepath.Join(cfg.Dir, "psk"))
	if err != nil {
		return nil, err
	}
	for _, path := range store.setAside {
		cfg.Log.Error("preshared keys could not be read; they are agreed anew", "moved to", path)
	}
	x := &Exchange{cfg: cfg, id: id, store: store, peers: map[string]*peer{}, slots: make(chan struct{}, maxVisits),
		again: regainEvery, free: make(chan struct{}, maxConns), counts: &counts{of: map[string]int{}}}
	x.loop = reconcile.New(reconcile.Config{Name: "exchange", Do: x.round, Resync: recheck, Log: cfg.Log})
	x.timer = time.AfterFunc(time.Hour, x.loop.Kick)
	x.choosePort()
	return x, nil
}

// Published is what others have to know of this node.
func (x *Exchange) Published() mesh.Exchange {
	return mesh.Exchange{Port: uint16(x.port()), Pin: x.id.Pin}
}

// Kick says that keys or nodes changed. It never blocks.
func (x *Exchange) Kick() { x.loop.Kick() }

// Run answers the others and asks them until ctx ends.
func (x *Exchange) Run(ctx context.Context) error {
	defer x.timer.Stop()
	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error { return x.serve(ctx) })
	group.Go(func() error { return x.loop.Run(ctx) })
	err := group.Wait()
	x.work.Wait()
	x.mu.Lock()
	defer x.mu.Unlock()
	for _, p := range x.peers {
		p.hangUp()
	}
	return err
}

// Agreement on the preshared key of two WireGuard keys.
type Agreement struct {
	PSK Secret
	// Wait says why there is none yet; empty with one, and where there shall
	// be none.
	Wait string
	// Firm: rather no session than one without it. Otherwise one that is there
	// may go on.
	Firm bool
}

// PSK of one of our keys and one of n's.
func (x *Exchange) PSK(n mesh.Node, own, key mesh.Key) Agreement {
	e, ok, had := x.store.get(n, own, key)
	switch {
	case ok:
		return Agreement{PSK: Secret(e.PSK)}
	case had && n.Exchange.Port == 0:
		return Agreement{Wait: "it had a preshared key, and does not say any more how to agree on one", Firm: true}
	case had:
		return Agreement{Wait: x.why(n, "the preshared key of its new key is not agreed yet"), Firm: true}
	case n.Exchange.Port == 0:
		return Agreement{}
	}
	x.mu.Lock()
	defer x.mu.Unlock()
	left := time.Until(x.peer(n).since.Add(patience))
	if left <= 0 {
		return Agreement{}
	}
	time.AfterFunc(left+time.Millisecond, func() { x.cfg.Changed(n.Name) })
	return Agreement{Wait: "its preshared key is being agreed"}
}

func (x *Exchange) why(n mesh.Node, text string) string {
	x.mu.Lock()
	defer x.mu.Unlock()
	if err := x.peer(n).err; err != nil {
		return text + ": " + err.Error()
	}
	return text
}

// Status of the preshared key of two keys, for people: since when, or why not.
func (x *Exchange) Status(n mesh.Node, own, key mesh.Key) (made time.Time, why string) {
	e, ok, _ := x.store.get(n, own, key)
	switch {
	case ok:
		return e.Made, ""
	case n.Exchange.Port == 0:
		return time.Time{}, "it does not say how to agree on one"
	}
	return time.Time{}, x.why(n, "not agreed yet")
}

// peer of a node; another Node object is another one. The caller holds mu.
func (x *Exchange) peer(n mesh.Node) *peer {
	p := x.peers[n.Name]
	if p == nil || p.uid != n.UID {
		if p != nil {
			p.hangUp()
		}
		p = &peer{uid: n.UID, since: time.Now(), checked: map[Pair]time.Time{}}
		x.peers[n.Name] = p
	}
	return p
}

func (p *peer) hangUp() {
	if p.conn != nil {
		p.conn.Close()
		p.conn = nil
	}
}

// keys that a tunnel to n is for: on the first device of each, and on the
// second while one of the two changes its key.
func (x *Exchange) keys(n mesh.Node) [][2]mesh.Key {
	current, next := x.cfg.Keys()
	if current.IsZero() || n.PublicKey.IsZero() {
		return nil
	}
	list := [][2]mesh.Key{{current, n.PublicKey}}
	if !next.IsZero() || !n.NextKey.IsZero() {
		own, theirs := current, n.PublicKey
		if !next.IsZero() {
			own = next
		}
		if !n.NextKey.IsZero() {
			theirs = n.NextKey
		}
		if second := [2]mesh.Key{own, theirs}; second != list[0] {
			list = append(list, second)
		}
	}
	return list
}

// useful reports whether two keys may have a tunnel.
func (x *Exchange) useful(n mesh.Node) func(own, peer mesh.Key) bool {
	current, next := x.cfg.Keys()
	return func(own, peer mesh.Key) bool {
		return !own.IsZero() && !peer.IsZero() && (own == current || own == next) && (peer == n.PublicKey || peer == n.NextKey)
	}
}

// usefulNow is useful of what n has published by now, and not when n was
// looked at first: others agree on keys with it as well.
func (x *Exchange) usefulNow(n mesh.Node) func(own, peer mesh.Key) bool {
	if state := x.cfg.State(); state != nil {
		if now, ok := state.Node(n.Name); ok && now.UID == n.UID {
			n = now
		}
	}
	return x.useful(n)
}

// begins reports whether we are the one of the two that begins.
func (x *Exchange) begins(node string) bool { return x.cfg.Node < node }

func (x *Exchange) pair(node string, own, theirs mesh.Key) Pair {
	if x.begins(node) {
		return Pair{own, theirs}
	}
	return Pair{theirs, own}
}

// round starts a visit to every node that has to be talked with.
func (x *Exchange) round(ctx context.Context) error {
	state := x.cfg.State()
	if state == nil {
		return nil
	}
	_, next := x.cfg.Keys()
	changing := !next.IsZero()
	x.mu.Lock()
	defer x.mu.Unlock()
	now, wait := time.Now(), recheck
	for _, n := range state.Nodes {
		if n.Name == x.cfg.Node || n.Exchange.Port == 0 {
			continue
		}
		p := x.peer(n)
		todo := x.todo(n, p, now)
		switch {
		case p.busy:
		case len(todo) == 0 && !changing:
			p.hangUp()
		case now.Before(p.retry):
			wait = min(wait, p.retry.Sub(now))
		default:
			p.busy = true
			x.work.Go(func() { x.visit(ctx, n, p, todo, changing) })
		}
		x.report(n, p, now)
	}
	if changing {
		wait = min(wait, ask)
	}
	x.timer.Reset(max(wait, 10*time.Millisecond))
	return x.forget(state)
}

// forget nodes that are not in the cluster, once it is known who is.
func (x *Exchange) forget(state *mesh.State) error {
	if _, ok := state.Node(x.cfg.Node); !ok {
		return nil
	}
	for name, p := range x.peers {
		if n, ok := state.Node(name); !ok || n.UID != p.uid {
			p.hangUp()
			delete(x.peers, name)
			x.cfg.Board.Clear("psk/" + name)
		}
	}
	return x.store.keep(state)
}

// todo are the pairs of keys to talk about with n. The caller holds mu.
func (x *Exchange) todo(n mesh.Node, p *peer, now time.Time) (todo [][2]mesh.Key) {
	for _, k := range x.keys(n) {
		_, ok, _ := x.store.get(n, k[0], k[1])
		checked := now.Sub(p.checked[x.pair(n.Name, k[0], k[1])]) < recheck
		if !ok || x.begins(n.Name) && !checked {
			todo = append(todo, k)
		}
	}
	return todo
}

// report says on the board which node has no preshared key.
func (x *Exchange) report(n mesh.Node, p *peer, now time.Time) {
	check := "psk/" + n.Name
	for _, k := range x.keys(n)[:min(1, len(x.keys(n)))] {
		if _, ok, _ := x.store.get(n, k[0], k[1]); ok || !n.Ready || now.Sub(p.since) < 2*patience {
			break
		}
		why := "no preshared key was agreed yet"
		if p.err != nil {
			why += ": " + p.err.Error()
		}
		x.cfg.Board.Fail(check, why, fmt.Sprintf("what is sent to %s is encrypted, but what is recorded may be read by a later quantum computer: let this machine reach TCP port %d of it", n.Name, n.Exchange.Port))
		return
	}
	x.cfg.Board.OK(check)
}

// visit talks with one node.
func (x *Exchange) visit(ctx context.Context, n mesh.Node, p *peer, todo [][2]mesh.Key, changing bool) {
	x.mu.Lock()
	c := p.conn
	p.conn = nil
	x.mu.Unlock()
	if c == nil { // those that are asked often do not wait for the silent
		select {
		case x.slots <- struct{}{}:
			defer func() { <-x.slots }()
		case <-ctx.Done():
			return
		}
	}
	ctx, cancel := context.WithTimeout(ctx, visitTimeout)
	defer cancel()
	c, err := x.talk(ctx, c, n, p, todo, changing)
	x.mu.Lock()
	p.busy = false
	if p.err = err; err != nil {
		p.failures++
		p.retry = time.Now().Add(min(minBackoff<<min(p.failures, 12), maxBackoff))
		if changing {
			p.retry = time.Now().Add(min(time.Until(p.retry), time.Second))
		}
		if c != nil {
			c.Close()
		}
	} else {
		p.failures, p.retry = 0, time.Now().Add(ask)
		p.conn = c
	}
	x.mu.Unlock()
	if err != nil && ctx.Err() == nil {
		x.cfg.Log.Debug("key exchange", "node", n.Name, "err", err)
	}
	x.loop.Kick()
}

const visitTimeout = 10 * time.Second

func (x *Exchange) talk(ctx context.Context, c *conn, n mesh.Node, p *peer, todo [][2]mesh.Key, changing bool) (*conn, error) {
	if c == nil {
		var err error
		if c, err = x.dial(ctx, n); err != nil {
			return nil, err
		}
	}
	stop := context.AfterFunc(ctx, func() { c.Close() })
	defer stop()
	var errs []error
	for _, k := range todo {
		errs = append(errs, x.settle(c, n, p, k[0], k[1]))
	}
	if changing {
		errs = append(errs, x.hear(c, n))
	}
	return c, errors.Join(errs...)
}

// hear asks to which key of ours n sends.
func (x *Exchange) hear(c *conn, n mesh.Node) error {
	asked := time.Now()
	resp, err := c.ask(request{Op: opSends, From: x.cfg.Node, To: n.Name})
	if err != nil {
		return err
	}
	if resp.Sends != nil {
		x.cfg.Heard(n.Name, *resp.Sends, asked)
	}
	return nil
}
