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

	"github.com/tailscale/wireguard-go/conn"
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

	mu sync.Mutex
	// at is where a peer is, as the engine knows it; wishes counts how often
	// somebody else has told it.
	at     map[[32]byte]netip.AddrPort
	wishes int
	// calls are the last handshakes begun by others, a ring; next is the
	// oldest.
	calls [64]call
	next  int
}

// move: the peer with this key was heard from another address.
type move struct {
	peer [32]byte
	to   netip.AddrPort
}

// call is the first message of a handshake: the index its sender gave it, to
// be found in the answer, and where it came from.
type call struct {
	index uint32
	from  conn.Endpoint
}

func newRoaming() *roaming {
	return &roaming{moved: make(chan move, 16), at: map[[32]byte]netip.AddrPort{}}
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
			err := set(fmt.Sprintf("public_key=%s\nupdate_only=true\nendpoint=%s%s\n", hex.EncodeToString(m.peer[:]), roamMark, m.to))
			if err != nil {
				log.Warn("follow peer", "to", m.to, "err", err)
				continue
			}
			r.mu.Lock()
			if r.wishes == wishes { // else the next packet tells again
				r.at[m.peer] = m.to
			}
			r.mu.Unlock()
		}
	}
}

// heard notes that a genuine packet of peer came from there. It never waits:
// who changes the engine may be waiting for its caller. What finds no room is
// noted with the next packet.
func (r *roaming) heard(peer [32]byte, from netip.AddrPort) {
	r.mu.Lock()
	same := r.at[peer] == from
	r.mu.Unlock()
	if same {
		return
	}
	select {
	case r.moved <- move{peer, from}:
	default:
	}
}

// told notes that somebody set endpoints: none is known for sure any more.
// Peers come and go that way too, so the map does not grow for ever.
func (r *roaming) told() {
	r.mu.Lock()
	defer r.mu.Unlock()
	clear(r.at)
	r.wishes++
}

// called notes the first message of a handshake.
func (r *roaming) called(index uint32, from conn.Endpoint) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.calls[r.next] = call{index, from}
	r.next = (r.next + 1) % len(r.calls)
}

// caller is whom the packet answers, nil if it is no answer. That there is
// one says that the call was genuine.
func (r *roaming) caller(packet []byte) conn.Endpoint {
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

// source is the endpoint of a packet that came in.
type source struct {
	conn.Endpoint
	roaming *roaming
	index   uint32 // of the handshake it begins
}

// FromPeer implements conn.PeerAwareEndpoint.
func (s *source) FromPeer(peer [32]byte) {
	if std, ok := s.Endpoint.(*conn.StdNetEndpoint); ok {
		s.roaming.heard(peer, std.AddrPort)
	}
}

// InitiationMessagePublicKey implements conn.InitiationAwareEndpoint. The
// message was made for us, by whom is not yet proved.
func (s *source) InitiationMessagePublicKey([32]byte) { s.roaming.called(s.index, s.Endpoint) }

// receive wraps fn so that the engine tells where genuine packets came from.
func (r *roaming) receive(fn conn.ReceiveFunc) conn.ReceiveFunc {
	return func(slab []byte, packets []conn.ReceivedPacket) (int, error) {
		n, err := fn(slab, packets)
		sources := make([]source, n)
		for i := range sources {
			p := &packets[i]
			sources[i] = source{Endpoint: p.Endpoint, roaming: r}
			if b := p.Bytes(slab); len(b) == initiationSize && b[0] == initiationType {
				sources[i].index = binary.LittleEndian.Uint32(b[4:])
			}
			p.Endpoint = &sources[i]
		}
		return n, err
	}
}

// unmark says whether an endpoint is one of our own wishes.
func unmark(endpoint string) (string, bool) { return strings.CutPrefix(endpoint, roamMark) }
