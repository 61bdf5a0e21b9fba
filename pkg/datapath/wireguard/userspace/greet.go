package userspace

import (
	"bytes"
	"context"
	"encoding/hex"
	"net"
	"strings"
	"sync"

	"github.com/tailscale/wireguard-go/device"
)

// greeter begins a handshake with every peer that this process is told of,
// once. A peer that had a session with a process before this one goes on
// sending what nobody can open any more, and would notice by its timers only
// after 15 seconds (section 6.5 of the WireGuard paper); and a peer behind a
// translator of addresses is not reached at all until it has called.
type greeter struct {
	wake chan struct{}

	mu sync.Mutex
	// known peers, with those still to be greeted.
	known map[device.NoisePublicKey]bool
	next  []device.NoisePublicKey
}

func newGreeter() *greeter {
	return &greeter{wake: make(chan struct{}, 1), known: map[device.NoisePublicKey]bool{}}
}

// maxKnown bounds what is remembered of peers that are gone.
const maxKnown = 1 << 16

// told notes a peer that has an endpoint.
func (g *greeter) told(key device.NoisePublicKey) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.known[key] {
		return
	}
	if len(g.known) == maxKnown {
		clear(g.known)
	}
	g.known[key] = true
	g.next = append(g.next, key)
}

// toldAll notes the peers in lines of the control socket's protocol.
func (g *greeter) toldAll(config string) {
	l := &listener{greeter: g}
	for line := range strings.Lines(config) {
		l.heard([]byte(strings.TrimSuffix(line, "\n")))
	}
	g.kick()
}

// kick has greetings sent that can be sent now.
func (g *greeter) kick() {
	select {
	case g.wake <- struct{}{}:
	default:
	}
}

// run sends them, until ctx ends. ready says whether packets can be sent.
func (g *greeter) run(ctx context.Context, dev *device.Device, ready func() bool) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-g.wake:
		}
		if !ready() {
			continue // opening the sockets kicks again
		}
		_ = dev.Up() // waits for what else an engine does on its way up
		g.mu.Lock()
		next := g.next
		g.next = nil
		g.mu.Unlock()
		for _, key := range next {
			if p, ok := dev.LookupActivePeer(key); ok {
				_ = p.SendHandshakeInitiation(false) // the engine logs why not
			}
		}
	}
}

// listen passes what is said on the control socket through, and hears of
// peers.
func (g *greeter) listen(c net.Conn) net.Conn { return &listener{Conn: c, greeter: g} }

// listener is a connection to the control socket, and what of its lines has
// been read so far.
type listener struct {
	net.Conn
	greeter *greeter
	line    []byte
	key     device.NoisePublicKey
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
		l.heard(l.line)
		l.line = l.line[:0]
	}
	return n, err
}

func (l *listener) heard(line []byte) {
	name, value, _ := bytes.Cut(line, []byte("="))
	switch string(name) {
	case "public_key":
		if n, err := hex.Decode(l.key[:], value[:min(len(value), 2*len(l.key))]); err != nil || n != len(l.key) {
			l.key = device.NoisePublicKey{}
		}
	case "endpoint":
		l.greeter.told(l.key)
	}
}

// Write is the answer: what was said is done.
func (l *listener) Write(b []byte) (int, error) {
	l.greeter.kick()
	return l.Conn.Write(b)
}
