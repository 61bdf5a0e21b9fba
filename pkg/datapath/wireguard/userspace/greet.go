package userspace

import (
	"bytes"
	"context"
	"encoding/hex"
	"fmt"
	"log/slog"
	"net"
	"slices"
	"strings"
	"sync"

	"github.com/tailscale/wireguard-go/device"
)

// greeter begins a handshake with every peer that this process is told of,
// once. A peer that had a session with a process before this one goes on
// sending what nobody can open any more, and would notice by its timers only
// after 15 seconds (section 6.5 of the WireGuard paper).
//
// A peer whose endpoint is told again is greeted again: that is how whoever
// drives the device begins a session beside the one there is. (What lines set
// on the way, by the peer's own moves, come from this process.)
//
// It also gives a peer of which nobody knows where it is the place it first
// calls from: the engine answers nobody who has none.
type greeter struct {
	dev  *device.Device
	log  *slog.Logger
	wake chan struct{}

	mu sync.Mutex
	// placed: whether a peer we were told of has an endpoint.
	placed map[device.NoisePublicKey]bool
	next   []device.NoisePublicKey // to be greeted
}

func newGreeter(log *slog.Logger) *greeter {
	return &greeter{log: log, wake: make(chan struct{}, 1), placed: map[device.NoisePublicKey]bool{}}
}

// told notes what has been done with peers.
func (g *greeter) told(peers []mention) {
	g.mu.Lock()
	defer g.mu.Unlock()
	for _, p := range peers {
		switch {
		case p.removed:
			delete(g.placed, p.key)
		case p.placed:
			g.placed[p.key] = true
			if !slices.Contains(g.next, p.key) {
				g.next = append(g.next, p.key)
			}
		default:
			g.placed[p.key] = g.placed[p.key] // known now
		}
	}
}

// kick has greetings sent that can be sent now.
func (g *greeter) kick() {
	select {
	case g.wake <- struct{}{}:
	default:
	}
}

// run sends them, until ctx ends. ready says whether packets can be sent.
func (g *greeter) run(ctx context.Context, ready func() bool) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-g.wake:
		}
		if !ready() {
			continue // opening the sockets kicks again
		}
		_ = g.dev.Up() // waits for what else an engine does on its way up
		g.mu.Lock()
		next := g.next
		g.next = nil
		g.mu.Unlock()
		for _, key := range next {
			if p, ok := g.dev.LookupActivePeer(key); ok {
				_ = p.SendHandshakeInitiation(false) // the engine logs why not
			}
		}
	}
}

// called hears that somebody who may be this peer begins a handshake from
// there. Should it be a lie, the first true packet says better.
func (g *greeter) called(key device.NoisePublicKey, from place) {
	g.mu.Lock()
	placed, known := g.placed[key]
	if known {
		g.placed[key] = true
	}
	g.mu.Unlock()
	if !known || placed {
		return
	}
	if err := g.dev.IpcSet(fmt.Sprintf("public_key=%x\nupdate_only=true\nendpoint=%s\n", key[:], mark(from))); err != nil {
		g.log.Warn("place peer", "at", from.to, "err", err)
	}
}

// mention of a peer in a configuration.
type mention struct {
	key             device.NoisePublicKey
	placed, removed bool
}

// mentions of peers in lines of the control socket's protocol.
func mentions(lines string) (all []mention) {
	for line := range strings.Lines(lines) {
		all = hear(all, []byte(strings.TrimSuffix(line, "\n")))
	}
	return all
}

// hear adds what one line says.
func hear(all []mention, line []byte) []mention {
	name, value, _ := bytes.Cut(line, []byte("="))
	switch last := len(all) - 1; string(name) {
	case "public_key":
		var m mention
		if len(value) == 2*len(m.key) {
			_, _ = hex.Decode(m.key[:], value) // the engine refuses what is no key
		}
		return append(all, m)
	case "endpoint":
		if last >= 0 {
			all[last].placed = true
		}
	case "remove":
		if last >= 0 {
			all[last].removed = true
		}
	}
	return all
}

// listen passes what is said on the control socket through, and hears of
// peers.
func (g *greeter) listen(c net.Conn) net.Conn { return &listener{Conn: c, greeter: g} }

// listener is a connection to the control socket, with the peers mentioned and
// the line begun since the last answer.
type listener struct {
	net.Conn
	greeter *greeter
	line    []byte
	peers   []mention
}

// maxLine is more than any line of the protocol has.
const maxLine = 256

func (l *listener) Read(b []byte) (int, error) {
	n, err := l.Conn.Read(b)
	for _, c := range b[:n] {
		if c != '\n' {
			if len(l.line) < maxLine {
				l.line = append(l.line, c)
			}
			continue
		}
		l.peers = hear(l.peers, l.line)
		l.line = l.line[:0]
	}
	return n, err
}

// Write is the answer: what was said is done.
func (l *listener) Write(b []byte) (int, error) {
	if len(l.peers) > 0 {
		l.greeter.told(l.peers)
		l.peers = nil
		l.greeter.kick()
	}
	return l.Conn.Write(b)
}
