package cluster

import (
	"context"
	"errors"
	"fmt"
	"time"
)

// Final is an error that waiting does not mend.
type Final struct{ Err error }

func (f Final) Error() string { return f.Err.Error() }
func (f Final) Unwrap() error { return f.Err }

// pause between two looks at the world.
const pause = 20 * time.Millisecond

// Until calls ok until it returns nil; when ctx ends, its last error says what
// was still missing.
func Until(ctx context.Context, ok func(context.Context) error) error {
	for {
		err := ok(ctx)
		var f Final
		if err == nil || errors.As(err, &f) {
			return err
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%w (%w)", err, context.Cause(ctx))
		case <-time.After(pause):
		}
	}
}

// Short is a duration as a person reads it.
func Short(d time.Duration) string {
	switch {
	case d < 10*time.Millisecond:
		return d.Round(10 * time.Microsecond).String()
	case d < time.Second:
		return d.Round(time.Millisecond).String()
	}
	return d.Round(10 * time.Millisecond).String()
}
