package kube

import (
	"context"
	"errors"
	"net"
	"net/http"
	"syscall"
	"testing"
	"testing/synctest"
	"time"
)

// away refuses until the time comes, then answers.
type away struct{ until time.Time }

func (a away) RoundTrip(*http.Request) (*http.Response, error) {
	if time.Now().Before(a.until) {
		return nil, &net.OpError{Op: "dial", Err: syscall.ECONNREFUSED}
	}
	return &http.Response{StatusCode: http.StatusOK}, nil
}

func TestPatient(t *testing.T) {
	for _, c := range []struct {
		name, method, url string
		away, deadline    time.Duration
		fails             bool
		after             time.Duration // at most
	}{
		{"a watch waits for the API", "GET", "/api/v1/pods?watch=true", time.Minute, 0, false, time.Minute + knock},
		{"so does the list before it", "GET", "/api/v1/pods?resourceVersion=0", time.Minute, 0, false, time.Minute + knock},
		{"not for ever", "GET", "/api/v1/pods?watch=true", time.Hour, 0, true, patience + knock},
		{"not longer than its caller", "GET", "/api/v1/pods?watch=true", time.Hour, time.Second, true, time.Second},
		{"a get fails at once", "GET", "/api/v1/namespaces/x", time.Minute, 0, true, 0},
		{"so does a write", "POST", "/api/v1/pods?watch=true", time.Minute, 0, true, 0},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				start := time.Now()
				ctx := context.Background()
				if c.deadline > 0 {
					var cancel context.CancelFunc
					ctx, cancel = context.WithTimeout(ctx, c.deadline)
					defer cancel()
				}
				req, err := http.NewRequestWithContext(ctx, c.method, "https://api"+c.url, nil)
				if err != nil {
					t.Fatal(err)
				}
				told := 0
				_, err = patient{away{start.Add(c.away)}, func(error) { told++ }}.RoundTrip(req)
				if waits := c.after > 0; (told > 0) != waits {
					t.Errorf("told %d times why it waits; it waits: %t", told, waits)
				}
				if (err != nil) != c.fails || c.fails && !errors.Is(err, syscall.ECONNREFUSED) {
					t.Errorf("error %v; want one: %t", err, c.fails)
				}
				if took := time.Since(start); took > c.after {
					t.Errorf("took %s, want at most %s", took, c.after)
				}
			})
		})
	}
}
