package userspace

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"time"

	"meshd.dev/pkg/datapath/wireguard/userspace/link"
	"meshd.dev/pkg/datapath/wireguard/userspace/trial"
)

// useOffloads tries out what the kernel can, and has link and sockets use it.
// That takes a moment, during which packets already flow.
func useOffloads(ctx context.Context, l *link.Device, b *bind, log *slog.Logger) {
	use := func(o trial.Offloads) {
		b.setOffload(o.Sockets)
		used, err := l.SetOffloads(o.Link)
		if err != nil {
			log.Warn("offloads of the link", "err", err)
			return
		}
		log.Info("offloads", "link", used, "sockets", o.Sockets)
	}
	findOffloads(ctx, trial.Run, use, log)
}

// retrials is how often offloads are tried again that took too long, after
// retrialFirst and then twice as late each time.
const (
	retrials     = 6
	retrialFirst = 30 * time.Second
)

// findOffloads uses what try finds to work. What took too long may only have
// met a busy machine, at boot more than ever, so it is tried again later; not
// for ever, since packets a kernel loses do not come either.
func findOffloads(ctx context.Context, try func() (trial.Offloads, error), use func(trial.Offloads), log *slog.Logger) {
	var last trial.Offloads
	for n := 0; ; n++ {
		o, err := try()
		if n == 0 || o != last {
			use(o)
		}
		last = o
		if err == nil {
			return
		}
		if !errors.Is(err, os.ErrDeadlineExceeded) || n == retrials {
			log.Warn("some offloads do not work here; it will be slower", "err", err)
			return
		}
		wait := retrialFirst << n
		log.Warn("some offloads took too long to try; it will be slower until they are tried again", "after", wait, "err", err)
		timer := time.NewTimer(wait)
		select {
		case <-ctx.Done():
			timer.Stop()
			return
		case <-timer.C:
		}
	}
}
