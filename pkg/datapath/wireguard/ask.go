package wireguard

import (
	"errors"
	"fmt"
	"sync"
	"time"
)

// answerTimeout is how long whatever serves a device may take to answer.
const answerTimeout = 5 * time.Second

var errSilent = errors.New("it does not answer on its control socket")

// questions to whatever serves a device, one at a time. A userspace process
// that stands still never answers, and wgctrl would wait for it; so the question
// stays under way, in order, and whoever asked goes on.
type questions struct {
	slot sync.Mutex // held by the question under way

	mu    sync.Mutex
	since time.Time // when that began; zero: none is
}

// ask a question, which may end long after this returned with errSilent.
func ask[T any](q *questions, device string, question func() (T, error)) (T, error) {
	type answer struct {
		what T
		err  error
	}
	var nothing T
	silent := fmt.Errorf("%w: does its process stand still (`kill -CONT $(cat %s)`)?", errSilent, LockPath(device))
	if q.stuck() {
		return nothing, silent
	}
	said := make(chan answer, 1)
	go func() {
		q.slot.Lock()
		defer q.slot.Unlock()
		q.begin(time.Now())
		defer q.begin(time.Time{})
		a, err := question()
		said <- answer{a, err}
	}()
	timer := time.NewTimer(answerTimeout)
	defer timer.Stop()
	select {
	case a := <-said:
		return a.what, a.err
	case <-timer.C:
		return nothing, silent
	}
}

func (q *questions) begin(at time.Time) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.since = at
}

// stuck: a question has had no answer for too long, so another gets none.
func (q *questions) stuck() bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	return !q.since.IsZero() && time.Since(q.since) > answerTimeout
}
