// Package reconcile is the one loop of the tree: something marks the world
// dirty (Kick), the loop lets the dust settle, makes the world right (Do),
// tries again with back-off when that failed, and looks again after Resync
// even when nobody said a word. Every part that applies state runs in one.
package reconcile

import (
	"context"
	"log/slog"
	"time"
)

// Config of a Loop. Do is required; zero durations take the defaults.
type Config struct {
	Name string
	// Do makes the world right. It must be safe to call again at any time.
	Do func(context.Context) error
	// Settle is how long the loop waits after a kick for more of them.
	// Default 5 ms.
	Settle time.Duration
	// Rest, when set, takes the place of Settle: a kick is served at once,
	// unless the last Do ended less than Rest ago, and then when it did.
	Rest time.Duration
	// Resync is the longest time between two calls of Do. Default 30 s.
	Resync time.Duration
	// MinBackoff and MaxBackoff bound the wait after a failure, which doubles.
	// Defaults 100 ms and 10 s. A kick does not shorten it below MinBackoff.
	MinBackoff, MaxBackoff time.Duration
	// Report, when set, is told the outcome of every Do.
	Report func(error)
	Log    *slog.Logger
}

// Loop calls Do when kicked. Use New.
type Loop struct {
	cfg  Config
	kick chan struct{}
}

// New makes a Loop; Run starts it.
func New(cfg Config) *Loop {
	set := func(d *time.Duration, v time.Duration) {
		if *d == 0 {
			*d = v
		}
	}
	set(&cfg.Settle, 5*time.Millisecond)
	set(&cfg.Resync, 30*time.Second)
	set(&cfg.MinBackoff, 100*time.Millisecond)
	set(&cfg.MaxBackoff, 10*time.Second)
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	return &Loop{cfg: cfg, kick: make(chan struct{}, 1)}
}

// Kick marks the world dirty. It never blocks; kicks merge.
func (l *Loop) Kick() {
	select {
	case l.kick <- struct{}{}:
	default:
	}
}

// Run calls Do once at the start and then as kicked until ctx ends. It
// returns nil then: a loop that was asked to stop did not fail.
func (l *Loop) Run(ctx context.Context) error {
	backoff := time.Duration(0)
	for {
		err := l.cfg.Do(ctx)
		if ctx.Err() != nil {
			return nil
		}
		if l.cfg.Report != nil {
			l.cfg.Report(err)
		}
		wait := l.cfg.Resync
		if err != nil {
			backoff = min(max(2*backoff, l.cfg.MinBackoff), l.cfg.MaxBackoff)
			wait = backoff
			l.cfg.Log.Warn("retrying", "part", l.cfg.Name, "after", wait, "err", err)
		} else {
			backoff = 0
		}
		if !l.wait(ctx, wait, err != nil) {
			return nil
		}
	}
}

// wait returns true when it is time to call Do again, false when ctx ended.
func (l *Loop) wait(ctx context.Context, d time.Duration, failed bool) bool {
	ended := time.Now()
	timer := time.NewTimer(d)
	defer timer.Stop()
	settle := l.cfg.Settle
	if failed {
		settle = l.cfg.MinBackoff
	}
	select {
	case <-ctx.Done():
		return false
	case <-timer.C:
		return true
	case <-l.kick:
	}
	if l.cfg.Rest > 0 && !failed {
		settle = time.Until(ended.Add(l.cfg.Rest))
	}
	if settle <= 0 {
		return true
	}
	timer.Reset(settle)
	select {
	case <-ctx.Done():
		return false
	case <-timer.C:
	}
	select { // the kicks that came while settling are covered by this Do
	case <-l.kick:
	default:
	}
	return true
}
