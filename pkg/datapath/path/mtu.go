package path

import "time"

// Sizes are of whole packets inside the tunnel, with their IP header.
const (
	// smallSize passes wherever a tunnel stands at all.
	smallSize = 96
	// minMTU is what IPv6 needs; nothing below it is looked for.
	minMTU = 1280
	// step: WireGuard fills packets up to a multiple of it, so sizes between
	// two multiples tell nothing.
	step = 16
)

const (
	// verifyEvery so often the size in use is tried again while it is used.
	verifyEvery = 450 * time.Millisecond
	// attemptEvery is the time between two attempts. The last has twice the
	// round trip, but no more than lastWait: that of a full queue is none.
	attemptEvery = 100 * time.Millisecond
	lastWait     = 400 * time.Millisecond
	// attempts without an answer, while small packets are answered, prove a
	// size too large. More of them before one in use is given up: queues that
	// overflow lose large packets too.
	attemptsInUse, attemptsAbove = 4, 3
	// A larger size is looked for again after raiseFirst, and later and later
	// up to raiseLast (RFC 8899 has ten minutes).
	raiseFirst, raiseLast = 30 * time.Second, 10 * time.Minute
	// retryLast bounds the wait for a peer that answers nothing at all.
	retryLast = 30 * time.Second
)

// mtu finds the largest packet a path takes, as RFC 8899 has it: by probes
// that are answered or not, without a word from the routers between. It starts
// with what the route allows and looks for less only when that does not pass.
//
// It is a function of events and time; nothing here waits or sends. The zero
// mtu knows no size and sends nothing.
type mtu struct {
	top int // what the route allows
	use int // what packets may have now
	// low passed or is the floor (0: nothing tried), high did not pass (top+1:
	// not tried).
	low, high int
	trial     trial
	verified  time.Time // when use last passed, or was last doubted in vain
	raise     time.Time // when to look for more than use
	raised    time.Duration
}

// trial of one size; size 0 is none.
type trial struct {
	size, attempts int
	next           time.Time // of the next attempt, or the verdict
	doubt          bool      // of the size in use; no step of the search
	small          bool      // a small one that went along was answered
	vain           int       // trials that ended without any answer
}

func floorOf(top int) int { return min(top, minMTU) }

// restart begins from the top: the path is another one.
func (m *mtu) restart(top int, now time.Time) {
	*m = mtu{top: top, use: top, high: top + 1}
	m.begin(now)
}

// doubt has the size in use tried, if that was not done just now.
func (m *mtu) doubt(now time.Time) {
	if m.top > minMTU && m.trial.size == 0 && now.Sub(m.verified) >= verifyEvery {
		m.trial = trial{size: m.use, next: now, doubt: true}
	}
}

// heard: the peer lives, so a trial that waits need not.
func (m *mtu) heard(now time.Time) {
	if m.trial.vain > 0 {
		m.trial = trial{size: m.trial.size, next: now, doubt: m.trial.doubt}
	}
}

// postpone a trial that is due until the peer is heard: without a session
// packets wait in the device, and large ones, a few at a time, take 128 KB
// there. It reports whether there was one.
func (m *mtu) postpone(now time.Time) bool {
	if m.trial.size == 0 || now.Before(m.trial.next) {
		return false
	}
	m.vain(now)
	return true
}

// vain ends a trial without any answer.
func (m *mtu) vain(now time.Time) {
	t := m.trial
	m.trial = trial{size: t.size, doubt: t.doubt, vain: t.vain + 1, next: now.Add(min(time.Second<<min(t.vain, 10), retryLast))}
}

// sooner has a trial that waits go on at that time.
func (m *mtu) sooner(at time.Time) {
	if m.trial.size != 0 && at.Before(m.trial.next) {
		m.trial.next = at
	}
}

// begin tries the next size, or comes to rest: the top first, then halfway
// between what passed and what did not.
func (m *mtu) begin(now time.Time) {
	m.trial = trial{}
	size := m.top
	if m.high <= m.top {
		if size = (m.low + m.high) / 2 / step * step; size <= m.low {
			size = m.low/step*step + step
		}
	}
	if m.low >= m.top || size >= m.high {
		m.rest(now)
		return
	}
	m.trial = trial{size: size, next: now}
}

func (m *mtu) rest(now time.Time) {
	m.raise, m.verified = time.Time{}, now
	if m.use < m.top {
		m.raised = min(max(2*m.raised, raiseFirst), raiseLast)
		m.raise = now.Add(m.raised)
	}
}

// wake is when due has something to do; zero for never.
func (m *mtu) wake() time.Time {
	if m.trial.size != 0 {
		return m.trial.next
	}
	return m.raise
}

// due says which sizes to send now.
func (m *mtu) due(now time.Time, rtt time.Duration) []int {
	if m.trial.size == 0 && !m.raise.IsZero() && !now.Before(m.raise) {
		m.low, m.high, m.raise = m.use, m.top+1, time.Time{}
		m.begin(now)
	}
	t := &m.trial
	if t.size == 0 || now.Before(t.next) {
		return nil
	}
	limit := attemptsAbove
	if t.size <= m.use {
		limit = attemptsInUse
	}
	if t.attempts >= limit {
		m.verdict(now)
		return nil
	}
	t.attempts++
	t.next = now.Add(attemptEvery)
	if t.attempts == limit {
		t.next = now.Add(max(3*attemptEvery/2, min(2*rtt, lastWait)))
	}
	if t.attempts == 1 {
		return []int{t.size}
	}
	return []int{t.size, smallSize}
}

// unsent takes back an attempt that never left.
func (m *mtu) unsent() { m.trial.attempts = max(0, m.trial.attempts-1) }

// verdict on a size that was not answered.
func (m *mtu) verdict(now time.Time) {
	t := &m.trial
	switch {
	case !t.small: // nothing is answered, so this says nothing
		m.vain(now)
		return
	case t.size <= m.use: // a black hole
		m.low, m.high, m.use = floorOf(m.top), t.size, floorOf(m.top)
		m.raised = 0
	default:
		m.high = t.size
	}
	m.begin(now)
}

// answered: a probe of that size came back.
func (m *mtu) answered(size int, now time.Time) {
	if size > m.top {
		return
	}
	if size >= m.use {
		m.use, m.verified = size, now
	}
	m.low = max(m.low, size)
	switch t := &m.trial; {
	case t.size == 0:
	case size < t.size:
		t.small = true
	case t.doubt:
		m.trial = trial{}
	default:
		m.begin(now)
	}
}
