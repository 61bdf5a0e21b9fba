package userspace

import (
	"fmt"
	"log/slog"
	"sync"
	"time"
)

// complaints pass on what the engine complains of, of each kind one at a time:
// a peer that cannot be sent to is a complaint with every packet, and the log
// is in memory.
type complaints struct {
	log *slog.Logger

	mu    sync.Mutex
	kinds map[string]kind // by format; the engine has a few dozen
}

type kind struct {
	said time.Time
	left int // unsaid since
}

// complaintsEvery is the time between two of a kind.
const complaintsEvery = 10 * time.Second

func (c *complaints) errorf(format string, args ...any) {
	c.mu.Lock()
	k, known := c.kinds[format]
	say := !known || time.Since(k.said) >= complaintsEvery
	left := k.left
	if say {
		k = kind{said: time.Now()}
	} else {
		k.left++
	}
	c.kinds[format] = k
	c.mu.Unlock()
	switch {
	case !say:
	case left > 0:
		c.log.Warn(fmt.Sprintf(format, args...), "unsaid", left)
	default:
		c.log.Warn(fmt.Sprintf(format, args...))
	}
}
