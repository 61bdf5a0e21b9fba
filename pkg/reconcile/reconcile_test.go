package reconcile

import (
	"context"
	"errors"
	"slices"
	"testing"
	"testing/synctest"
	"time"
)

func TestLoop(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		start := time.Now()
		var at []time.Duration
		fail := 0
		l := New(Config{Do: func(context.Context) error {
			at = append(at, time.Since(start))
			if fail > 0 {
				fail--
				return errors.New("not yet")
			}
			return nil
		}})
		done := make(chan error)
		go func() { done <- l.Run(ctx) }()
		synctest.Wait() // first call at once

		time.Sleep(time.Second)
		fail = 2
		l.Kick()
		l.Kick() // merges with the first
		time.Sleep(time.Second)
		time.Sleep(40 * time.Second)
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run after cancel: %v", err)
		}
		want := []time.Duration{0,
			time.Second + 5*time.Millisecond,   // kicked, settled
			time.Second + 105*time.Millisecond, // first back-off
			time.Second + 305*time.Millisecond, // doubled
			31*time.Second + 305*time.Millisecond}
		if len(at) != len(want) {
			t.Fatalf("calls at %v, want %v", at, want)
		}
		for i := range want {
			if at[i] != want[i] {
				t.Errorf("call %d at %v, want %v", i, at[i], want[i])
			}
		}
	})
}

// With Rest the first kick is served at once, and those that come soon after
// it together, when the rest is over.
func TestRest(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		start := time.Now()
		var at []time.Duration
		l := New(Config{Rest: 10 * time.Millisecond, Do: func(context.Context) error {
			at = append(at, time.Since(start))
			return nil
		}})
		done := make(chan error)
		go func() { done <- l.Run(ctx) }()
		synctest.Wait()
		time.Sleep(time.Second)
		l.Kick()
		synctest.Wait()
		for range 3 {
			time.Sleep(2 * time.Millisecond)
			l.Kick()
		}
		time.Sleep(time.Second)
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run after cancel: %v", err)
		}
		want := []time.Duration{0, time.Second, time.Second + 10*time.Millisecond}
		if !slices.Equal(at, want) {
			t.Errorf("calls at %v, want %v", at, want)
		}
	})
}
