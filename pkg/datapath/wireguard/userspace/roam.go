package userspace

import (
	"context"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"log/slog"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"

	"github.com/tailscale/wireguard-go/device"
)

// roaming follows peers to the address they were last heard on, as section
// 2.1 of the WireGuard paper has it and as the kernel does. The engine leaves
// that to its Bind: it keeps an endpoint until it is told another one, and
// says from whom a packet was when it has proved genuine.
//
// The answer to the first message of a handshake goes back where that came
// from: a peer that lost both session and address is heard by nobody
// otherwise. What follows it is a packet that moves the endpoint.
type roaming struct {
	moved chan move
	// first, if there is one, hears of each first message of a handshake.
	first func(peer device.NoisePublicKey, from place)

	// changes counts changes of at. It spares looking for a packet from where
	// the last one came.
	changes atomic.Uint64

	mu sync.Mutex
	// at is where a peer is, as the engine knows it; wishes counts how often
	// somebody else has told it.
	at     map[[32]byte]place
	wishes int
	// calls are the last handshakes begun by others, a ring; next is the
	// oldest.
	calls [64]call
	next  int
}

// move: the peer with this key was heard from another place.
type move struct {
	peer [32]byte
	place
}

// call is the first message of a handshake: the index its sender gave it, to
// be found in the answer, and where it came from.
type call struct {
	index uint32
	from  *endpoint
}

func newRoaming() *roaming {
	r := &roaming{moved: make(chan move, 16), at: map[[32]byte]place{}}
	r.changes.Store(1) // 0 is never
	return r
}

// roamMark before an endpoint tells our own wishes from those of others.
const roamMark = "roaming:"

// follow tells the engine, through set, of moves until ctx ends.
func (r *roaming) follow(ctx context.Context, set func(uapi string) error, log *slog.Logger) {
	for {
		select {
		case <-ctx.Done():
			return
		case m := <-r.moved:
			r.mu.Lock()
			wishes := r.wishes
			r.mu.Unlock()
			err := set(fmt.Sprintf("public_key=%s\nupdate_only=true\nendpoint=%s\n", hex.EncodeToString(m.peer[:]), mark(m.place)))
			if err != nil {
				log.Warn("follow peer", "to", m.to, "err", err)
				continue
			}
			r.mu.Lock()
			if r.wishes == wishes { // else the next packet tells again
				r.at[m.peer] = m.place
				r.changes.Add(1)
			}
			r.mu.Unlock()
		}
	}
}

// heard notes that a genuine packet of peer came from there, and returns the
// number of the change since which that is known; 0 if it is not. It never
// waits: who changes the engine may be waiting for its caller. What finds no
// room is noted with the next packet.
func (r *roaming) heard(peer [32]byte, from place) (since uint64) {
	r.mu.Lock()
	same := r.at[peer] == from
	since = r.changes.Load()
	r.mu.Unlock()
	if same {
		return since
	}
	select {
	case r.moved <- move{peer, from}:
	default:
	}
	return 0
}

// told notes that somebody set endpoints: none is known for sure any more.
// Peers come and go that way too, so the map does not grow for ever.
func (r *roaming) told() {
	r.mu.Lock()
	defer r.mu.Unlock()
	clear(r.at)
	r.changes.Add(1)
	r.wishes++
}

// called notes the first message of a handshake.
func (r *roaming) called(index uint32, from *endpoint) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.calls[r.next] = call{index, from}
	r.next = (r.next + 1) % len(r.calls)
}

// caller is whom the packet answers, nil if it is no answer. That there is
// one says that the call was genuine.
func (r *roaming) caller(packet []byte) *endpoint {
	if len(packet) != responseSize || packet[0] != responseType {
		return nil
	}
	index := binary.LittleEndian.Uint32(packet[8:]) // after type and the index of ours
	r.mu.Lock()
	defer r.mu.Unlock()
	for i := range r.calls {
		if c := r.calls[i]; c.from != nil && c.index == index {
			r.calls[i] = call{}
			return c.from
		}
	}
	return nil
}

// Types and sizes of handshake messages, from section 5.4 of the paper.
const (
	initiationType, initiationSize = 1, 148
	responseType, responseSize     = 2, 92
)

// source is where a packet came from.
type source struct {
	endpoint
	roaming *roaming
	index   uint32 // of the handshake it begins
	known   atomic.Pointer[knowledge]
}

// knowledge: this peer was known to be here, as of that change.
type knowledge struct {
	peer  [32]byte
	since uint64
}

// FromPeer implements conn.PeerAwareEndpoint.
func (s *source) FromPeer(peer [32]byte) {
	if k := s.known.Load(); k != nil && k.since == s.roaming.changes.Load() && k.peer == peer {
		return
	}
	if since := s.roaming.heard(peer, s.place); since > 0 {
		s.known.Store(&knowledge{peer, since})
	}
}

// InitiationMessagePublicKey implements conn.InitiationAwareEndpoint. The
// message was made for us, by whom is not yet proved.
func (s *source) InitiationMessagePublicKey(peer [32]byte) {
	s.roaming.called(s.index, &s.endpoint)
	if s.roaming.first != nil {
		s.roaming.first(peer, s.place)
	}
}

func beginsHandshake(packet []byte) bool {
	return len(packet) == initiationSize && packet[0] == initiationType
}

// beginning is the source of a packet that begins a handshake.
func (s *source) beginning(packet []byte) *source {
	return &source{endpoint: endpoint{place: s.place}, roaming: s.roaming, index: binary.LittleEndian.Uint32(packet[4:])}
}

// sources remembers where packets come from; one goroutine uses it.
type sources struct {
	roaming *roaming
	last    *source
	recent  map[place]*source
}

// maxSources bounds what anybody can make us remember.
const maxSources = 1024

func (c *sources) of(p place) *source {
	if c.last != nil && c.last.place == p {
		return c.last
	}
	s := c.recent[p]
	if s == nil {
		if c.recent == nil || len(c.recent) >= maxSources {
			c.recent = map[place]*source{}
		}
		s = &source{endpoint: endpoint{place: p}, roaming: c.roaming}
		c.recent[p] = s
	}
	c.last = s
	return s
}

// mark writes a place as an endpoint only unmark understands.
func mark(p place) string {
	s := roamMark + p.to.String()
	if p.from.IsValid() {
		s += "|" + p.from.String()
	}
	return s
}

// unmark says whether an endpoint is one of our own wishes, and which.
func unmark(endpoint string) (p place, ours bool) {
	s, ours := strings.CutPrefix(endpoint, roamMark)
	if !ours {
		return p, false
	}
	to, from, bound := strings.Cut(s, "|")
	var err error
	if p.to, err = netip.ParseAddrPort(to); err != nil {
		return p, false
	}
	if bound {
		p.from, err = netip.ParseAddr(from)
	}
	return p, err == nil
}
