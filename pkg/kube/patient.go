package kube

import (
	"context"
	"errors"
	"net"
	"net/http"
	"syscall"
	"time"

	"k8s.io/client-go/rest"
)

const (
	// knock is the time between two tries to reach an API that is away.
	knock = 300 * time.Millisecond
	// patience is longer than the time after which client-go forgets that it
	// had to wait, so that its own waits stay short.
	patience = 3 * time.Minute
)

// Patient has watches through config wait at the door of an API that is away
// until it opens. client-go alone asks at intervals that grow to half a
// minute, which a node would stay blind for after the API is back.
//
// Only watches, and lists that begin one, wait, and tell away why; everything
// else fails at once and says so.
func Patient(config *rest.Config, away func(error)) {
	config.Wrap(func(next http.RoundTripper) http.RoundTripper { return patient{next, away} })
}

type patient struct {
	next http.RoundTripper
	away func(error)
}

func (p patient) RoundTrip(req *http.Request) (*http.Response, error) {
	q := req.URL.Query()
	if req.Method != http.MethodGet || !q.Has("watch") && !q.Has("resourceVersion") {
		return p.next.RoundTrip(req)
	}
	for end := time.Now().Add(patience); ; {
		resp, err := p.next.RoundTrip(req)
		if err != nil && nobodyThere(err) {
			p.away(err)
		}
		if err == nil || !nobodyThere(err) || time.Now().After(end) || !pause(req.Context(), knock) {
			return resp, err
		}
	}
}

// nobodyThere tells an API that cannot be reached from one that answered badly.
func nobodyThere(err error) bool {
	var op *net.OpError
	return errors.As(err, &op) && op.Op == "dial" || errors.Is(err, syscall.ECONNREFUSED)
}

// pause is false when ctx ended.
func pause(ctx context.Context, d time.Duration) bool {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-timer.C:
		return true
	}
}
