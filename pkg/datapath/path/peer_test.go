package path

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"meshd.dev/pkg/datapath/wireguard"
	"meshd.dev/pkg/mesh"
)

// world is the way to a peer, and the device's counters, in simulated time.
type world struct {
	now  time.Time
	peer *peer
	own  []netip.AddrPort

	takes   int                     // packets up to this size pass
	lives   map[netip.AddrPort]bool // endpoints behind which the peer is
	lost    bool                    // the peer does not know our session
	mute    bool                    // it answers no echo
	traffic int64                   // bytes sent to it every half second
	answers bool                    // and whether it says something in turn

	at     netip.AddrPort // the device's endpoint
	stats  wireguard.Stats
	fresh  int
	probes int
	log    []string
}

var (
	start   = time.Unix(1700000000, 0)
	one     = netip.MustParseAddrPort("192.0.2.2:51820")
	two     = netip.MustParseAddrPort("[2001:db8::2]:51820")
	roamed  = netip.MustParseAddrPort("203.0.113.9:4444")
	oneOnly = []Endpoint{{one, 1420}}
)

func newWorld(endpoints ...Endpoint) *world {
	w := &world{now: start, takes: 9000, lives: map[netip.AddrPort]bool{one: true, two: true}, traffic: 5000, answers: true}
	t := Target{Node: "b", Key: mesh.Key{2}, Remote: netip.MustParseAddr("10.244.2.1"), Endpoints: endpoints}
	for _, e := range endpoints {
		t.Published = append(t.Published, e.Addr)
	}
	w.peer = newPeer(t, w.now)
	w.at = endpoints[0].Addr
	return w
}

// session: packets reach the peer and it reads them. A new session shakes
// hands with whoever is at the endpoint.
func (w *world) session() bool {
	if w.peer.choice.Fresh != w.fresh {
		w.fresh, w.at = w.peer.choice.Fresh, w.peer.choice.Endpoint
		w.lost = false
	}
	return w.lives[w.at] && !w.lost
}

// run for d, in steps of 10 ms, as Paths and the device would.
func (w *world) run(d time.Duration) {
	for end := w.now.Add(d); w.now.Before(end); w.now = w.now.Add(10 * time.Millisecond) {
		since := w.now.Sub(start)
		if since%(500*time.Millisecond) == 0 {
			w.stats.Tx += w.traffic
			if w.session() {
				if w.stats.Handshake.IsZero() {
					w.stats.Handshake = w.now
				}
				if w.answers {
					w.stats.Rx += 100
				}
			}
			w.stats.Endpoint = w.at
			w.peer.stats(w.stats, w.now)
		}
		if at := w.peer.wake(); at.IsZero() || w.now.Before(at) {
			continue
		}
		for _, size := range w.peer.due(w.now, w.own) {
			w.probes++
			w.peer.counted(size)
			w.stats.Tx += int64((size+15)/16*16 + 32)
			if w.session() && size <= w.takes {
				w.stats.Handshake = w.now
				w.stats.Rx += int64(size)
				if !w.mute {
					w.peer.answered(size, 5*time.Millisecond, w.now)
				}
			}
		}
		w.note()
	}
}

// note logs the choice when it changed.
func (w *world) note() {
	c := w.peer.choice
	s := fmt.Sprintf("mtu %d, session %d, %s", c.MTU, c.Fresh, c.Endpoint)
	if c.Anew > 0 {
		s = fmt.Sprintf("mtu %d, session %d (%d anew), %s", c.MTU, c.Fresh, c.Anew, c.Endpoint)
	}
	if c.Keepalive == On {
		s += ", keepalive"
	}
	if len(w.log) == 0 || !strings.HasSuffix(w.log[len(w.log)-1], ": "+s) {
		w.log = append(w.log, fmt.Sprintf("%5.2f: %s", w.now.Sub(start).Seconds(), s))
	}
}

// What is chosen, at which second, as the way to the peer changes.
func TestChoice(t *testing.T) {
	for _, c := range []struct {
		name string
		tell func(*world)
		with []Endpoint
		want []string
	}{
		{"all well", func(w *world) { w.run(60 * time.Second) }, oneOnly, []string{
			" 0.00: mtu 0, session 0, 192.0.2.2:51820"}},
		{"large packets vanish from the start", func(w *world) {
			w.takes = 1350
			w.run(20 * time.Second)
		}, oneOnly, []string{
			" 0.00: mtu 0, session 0, 192.0.2.2:51820",
			" 0.45: mtu 1280, session 0, 192.0.2.2:51820",
			" 0.46: mtu 1344, session 0, 192.0.2.2:51820",
		}},
		{"large packets begin to vanish under way, and pass again later", func(w *world) {
			w.run(5 * time.Second)
			w.takes = 1300
			w.run(10 * time.Second)
			w.takes = 9000
			w.run(40 * time.Second)
		}, oneOnly, []string{
			" 0.00: mtu 0, session 0, 192.0.2.2:51820",
			" 5.45: mtu 1280, session 0, 192.0.2.2:51820",
			" 6.18: mtu 1296, session 0, 192.0.2.2:51820",
			"36.18: mtu 0, session 0, 192.0.2.2:51820",
		}},
		{"jumbo frames are found out", func(w *world) {
			w.takes = 4000
			w.run(20 * time.Second)
		}, []Endpoint{{one, 8920}}, []string{
			" 0.00: mtu 0, session 0, 192.0.2.2:51820",
			" 0.45: mtu 1280, session 0, 192.0.2.2:51820",
			" 0.82: mtu 3184, session 0, 192.0.2.2:51820",
			" 1.19: mtu 3648, session 0, 192.0.2.2:51820",
			" 1.20: mtu 3888, session 0, 192.0.2.2:51820",
			" 1.21: mtu 4000, session 0, 192.0.2.2:51820",
		}},
		{"the session is lost on the other side", func(w *world) {
			w.run(5 * time.Second)
			w.lost = true
			w.run(10 * time.Second)
		}, oneOnly, []string{
			" 0.00: mtu 0, session 0, 192.0.2.2:51820",
			" 6.50: mtu 0, session 1, 192.0.2.2:51820",
		}},
		{"the first endpoint is dead", func(w *world) {
			delete(w.lives, one)
			w.run(10 * time.Second)
		}, []Endpoint{{one, 1420}, {two, 1420}}, []string{
			" 0.00: mtu 0, session 0, 192.0.2.2:51820",
			" 3.50: mtu 0, session 1 (1 anew), [2001:db8::2]:51820",
		}},
		{"the endpoint dies", func(w *world) {
			w.run(5 * time.Second)
			delete(w.lives, one)
			w.run(10 * time.Second)
		}, []Endpoint{{one, 1420}, {two, 1420}}, []string{
			" 0.00: mtu 0, session 0, 192.0.2.2:51820",
			" 6.50: mtu 0, session 1, 192.0.2.2:51820",
			" 7.50: mtu 0, session 2, [2001:db8::2]:51820",
		}},
		{"the peer is off, and comes back", func(w *world) {
			w.run(5 * time.Second)
			clear(w.lives)
			w.run(130 * time.Second)
			w.log = append(w.log[:1], w.log[len(w.log)-2:]...) // two a second, then fewer
			w.lives[one] = true
			w.run(40 * time.Second)
		}, oneOnly, []string{
			" 0.00: mtu 0, session 0, 192.0.2.2:51820",
			"95.50: mtu 0, session 32 (30 anew), 192.0.2.2:51820",
			"125.50: mtu 0, session 33 (31 anew), 192.0.2.2:51820",
		}},
		{"a firewall drops echo: one way traffic is no silence", func(w *world) {
			w.mute = true
			w.run(5 * time.Second)
			w.answers = false
			w.run(5 * time.Second)
			w.answers = true
			w.run(20 * time.Second)
		}, oneOnly, []string{
			" 0.00: mtu 0, session 0, 192.0.2.2:51820"}},
		{"one way traffic, echo is answered", func(w *world) {
			w.answers = false
			w.run(60 * time.Second)
		}, oneOnly, []string{
			" 0.00: mtu 0, session 0, 192.0.2.2:51820"}},
		{"it roams to where nobody published an address", func(w *world) {
			w.run(5 * time.Second)
			w.lives[roamed], w.at = true, roamed
			w.run(5 * time.Second)
			w.traffic, w.probes = 0, 0
			w.run(60 * time.Second)
			w.log = append(w.log, fmt.Sprintf("%d probes in a quiet minute", w.probes))
		}, oneOnly, []string{
			" 0.00: mtu 0, session 0, 192.0.2.2:51820",
			" 5.00: mtu 0, session 0, 192.0.2.2:51820, keepalive",
			"3 probes in a quiet minute",
		}},
		{"it tells us an address of ours we do not know", func(w *world) {
			w.run(time.Second)
			w.own = []netip.AddrPort{netip.MustParseAddrPort("10.0.0.1:51820")}
			w.peer.told(roamed)
			w.run(5 * time.Second)
			w.peer.told(w.own[0])
			w.run(5 * time.Second)
		}, oneOnly, []string{
			" 0.00: mtu 0, session 0, 192.0.2.2:51820",
			" 1.00: mtu 0, session 0, 192.0.2.2:51820, keepalive",
			" 6.00: mtu 0, session 0, 192.0.2.2:51820",
		}},
		{"one that roamed is called where it called from, then where it says it is", func(w *world) {
			w.run(5 * time.Second)
			w.lives[roamed], w.at = true, roamed
			w.run(5 * time.Second)
			w.lost = true
			w.run(5 * time.Second)
			delete(w.lives, roamed)
			w.run(5 * time.Second)
		}, oneOnly, []string{
			" 0.00: mtu 0, session 0, 192.0.2.2:51820",
			" 5.00: mtu 0, session 0, 192.0.2.2:51820, keepalive",
			"11.50: mtu 0, session 1, 203.0.113.9:4444, keepalive",
			"16.50: mtu 0, session 2, 203.0.113.9:4444, keepalive",
			"17.50: mtu 0, session 3, 192.0.2.2:51820, keepalive",
			"18.00: mtu 0, session 3, 192.0.2.2:51820",
		}},
		{"nothing to say, nothing sent", func(w *world) {
			w.run(2 * time.Second)
			w.traffic, w.answers, w.probes = 0, false, 0
			w.run(600 * time.Second)
			w.log = append(w.log, fmt.Sprintf("%d probes in ten quiet minutes", w.probes))
		}, oneOnly, []string{
			" 0.00: mtu 0, session 0, 192.0.2.2:51820", "0 probes in ten quiet minutes"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			w := newWorld(c.with...)
			c.tell(w)
			if diff := cmp.Diff(c.want, w.log); diff != "" {
				t.Errorf("-want +got:\n%s", diff)
			}
		})
	}
}

// The search ends at the largest multiple of 16 that passes, or at the top,
// whatever the path takes.
func TestSearchEndsAtWhatPasses(t *testing.T) {
	for _, top := range []int{1200, 1280, 1420, 1432, 8920, 65455} {
		for takes := 1280; takes < 9100; takes += 7 {
			var m mtu
			now := start
			m.restart(top, now)
			for range 200 {
				now = now.Add(attemptEvery)
				for _, size := range m.due(now, 0) {
					if size <= takes {
						m.answered(size, now)
					}
				}
				if m.trial.size == 0 {
					break
				}
			}
			want := min(top, max(takes/16*16, min(top, 1280)))
			if takes >= top {
				want = top
			}
			if m.use != want || m.trial.size != 0 {
				t.Fatalf("route %d, path %d: settled at %d, want %d; still trying %d", top, takes, m.use, want, m.trial.size)
			}
		}
	}
}

// Without a session nothing large is sent, which would wait in the device, and
// of small probes one each time the session begins anew, every few seconds, or
// when one did not leave; with a session the large one goes at once.
func TestNothingLargeWaits(t *testing.T) {
	w := newWorld(oneOnly...)
	due := func(after time.Duration) []int {
		w.now = w.now.Add(after)
		return w.peer.due(w.now, nil)
	}
	if sizes := due(0); !slices.Equal(sizes, []int{smallSize}) {
		t.Errorf("first it sends %d", sizes)
	}
	w.peer.unsent(smallSize, w.now)
	if sizes := due(attemptEvery); !slices.Equal(sizes, []int{smallSize}) {
		t.Errorf("after it did not leave it sends %d", sizes)
	}
	posted := map[int]time.Time{w.peer.choice.Anew: w.now}
	for range 600 {
		w.stats.Tx += 200
		w.peer.stats(w.stats, w.now)
		anew := w.peer.choice.Anew
		for _, size := range due(100 * time.Millisecond) {
			if before, ok := posted[anew]; size != smallSize || ok && w.now.Sub(before) < postAgain {
				t.Fatalf("after %s without a session it sends %d bytes, with session %d the last at %s", w.now.Sub(start), size, anew, before.Sub(start))
			}
			posted[anew] = w.now
		}
	}
	if len(posted) < 5 {
		t.Errorf("of %d sessions begun these were asked for: %v", w.peer.choice.Anew, posted)
	}
	w.stats.Rx, w.stats.Handshake = 92, w.now
	w.peer.stats(w.stats, w.now)
	if at := w.peer.wake(); at.After(w.now) {
		t.Errorf("it waits for %s yet", at.Sub(w.now))
	}
	if sizes := due(0); !slices.Equal(sizes, []int{1420}) {
		t.Errorf("with a session it sends %d", sizes)
	}
}

// kernelDevice begins a handshake when a packet wants one and never by itself;
// a new session is a new peer, some time after it was chosen, and what the old
// one had is gone: packets, counters, the last handshake.
type kernelDevice struct {
	there   bool // the peer was set
	alive   bool // it can be reached
	session bool
	queued  bool
	fresh   int
	since   time.Time // when a new one was chosen
	stats   wireguard.Stats
}

func (d *kernelDevice) step(p *peer, now time.Time) {
	if p.choice.Fresh != d.fresh && d.since.IsZero() {
		d.since = now
	}
	if !d.since.IsZero() && now.Sub(d.since) >= 50*time.Millisecond {
		*d = kernelDevice{there: d.there, alive: d.alive, fresh: p.choice.Fresh}
	}
	if d.queued && !d.session {
		d.stats.Tx += 148
		if d.alive {
			d.session, d.queued, d.stats.Handshake = true, false, now
			d.stats.Rx += 92
		}
	}
}

func (d *kernelDevice) send(p *peer, size int, now time.Time) {
	if !d.there {
		p.unsent(size, now)
		return
	}
	p.counted(size)
	if d.queued = !d.session; d.session {
		d.stats.Tx += int64(size)
		if d.alive {
			d.stats.Rx += int64(size)
			p.answered(size, time.Millisecond, now)
		}
	}
}

// However a probe got lost on the way to a session: nobody sends anything, and
// yet there is one soon after there can be.
func TestSessionWithoutTraffic(t *testing.T) {
	for _, c := range []struct {
		name          string
		there, alive  time.Duration // from when on
		breaks, mends time.Duration
		soon          time.Duration
	}{
		{"at once", 0, 0, 0, 0, time.Second},
		{"its preshared key takes a while", 3 * time.Second, 0, 0, 0, time.Second},
		{"a long while", 50 * time.Second, 0, 0, 0, time.Second},
		{"it starts later", 0, 20 * time.Second, 0, 0, 10 * time.Second},
		{"cut for a moment", 0, 0, 20 * time.Second, 25 * time.Second, 10 * time.Second},
		{"cut for a minute", 0, 0, 20 * time.Second, 80 * time.Second, 35 * time.Second},
		{"cut for ten", 0, 0, 20 * time.Second, 620 * time.Second, 35 * time.Second},
	} {
		w := newWorld(Endpoint{one, 1420}, Endpoint{two, 1420})
		d, pod := &kernelDevice{}, c.breaks > 0
		begin := max(c.there, c.alive, c.mends)
		for ; ; w.now = w.now.Add(10 * time.Millisecond) {
			since := w.now.Sub(start)
			if since > begin+c.soon {
				t.Errorf("%s: no session after %s; %+v, %+v", c.name, c.soon, w.peer.choice, *d)
				break
			}
			d.there, d.alive = since >= c.there, since >= c.alive && (since < c.breaks || since >= c.mends)
			if pod && since == c.breaks+time.Second { // one packet, that somebody notices
				d.send(w.peer, 1000, w.now)
				d.stats.Tx += 1000
			}
			d.step(w.peer, w.now)
			if d.session && d.alive && since >= begin && d.stats.Rx > 1000 {
				break
			}
			if since%(100*time.Millisecond) == 0 && d.there {
				w.peer.stats(d.stats, w.now)
			}
			if at := w.peer.wake(); !at.IsZero() && !w.now.Before(at) {
				for _, size := range w.peer.due(w.now, nil) {
					d.send(w.peer, size, w.now)
				}
			}
		}
	}
}

func TestEcho(t *testing.T) {
	for _, to := range []netip.Addr{netip.MustParseAddr("10.244.2.1"), netip.MustParseAddr("fd00:10:244:2::1")} {
		for _, seen := range []netip.AddrPort{{}, one, two} {
			want := echo{id: 7, seq: 9, seen: seen, size: 1420}
			b := encodeEcho(want, to)
			if to.Is4() && checksum(b) != 0 {
				t.Errorf("checksum of %x", b)
			}
			got, err := decodeEcho(b, to)
			if err != nil || got != want {
				t.Errorf("%+v became %+v, %v", want, got, err)
			}
		}
	}
}

// What anybody may send makes no work: not a stranger's message, and not the
// same one of a peer again.
func TestMessagesMakeNoWork(t *testing.T) {
	p := New(Config{})
	remote := netip.MustParseAddr("10.244.2.1")
	p.Set([]Target{{Node: "b", Key: mesh.Key{2}, Remote: remote, Endpoints: oneOnly}}, nil)
	<-p.kick
	for _, c := range []struct {
		from string
		seen netip.AddrPort
		work bool
	}{{"10.244.2.9", two, false}, {"10.244.2.1", two, true}, {"10.244.2.1", two, false}, {"10.244.2.1", netip.AddrPort{}, false}, {"10.244.2.1", roamed, true}} {
		p.received(echo{seen: c.seen, size: smallSize}, netip.MustParseAddr(c.from))
		if work := len(p.kick) > 0; work != c.work {
			t.Errorf("%s says %s: work %t, want %t", c.from, c.seen, work, c.work)
		} else if work {
			<-p.kick
		}
	}
	if seen := p.peers["b"].seen; seen != roamed {
		t.Errorf("b sees us at %s, want %s", seen, roamed)
	}
}

func FuzzDecodeEcho(f *testing.F) {
	from := netip.MustParseAddr("10.244.2.1")
	f.Add(encodeEcho(echo{id: 7, seq: 9, seen: one, size: smallSize}, from))
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, b []byte) {
		e, err := decodeEcho(b, from)
		if err == nil && !e.reply {
			if again, err := decodeEcho(encodeEcho(e, from), from); err != nil || again != e {
				t.Errorf("%+v became %+v, %v", e, again, err)
			}
		}
	})
}
