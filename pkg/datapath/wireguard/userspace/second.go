package userspace

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"meshd.dev/pkg/datapath/wireguard"
	"meshd.dev/pkg/mesh"
)

// ServeSecond serves the second device of cfg.Device in this process too, when
// it is asked to (see wireguard.AskPath), as often as that happens, until ctx
// ends. The device goes when its link is deleted.
func ServeSecond(ctx context.Context, cfg Config) error {
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	path := wireguard.AskPath(cfg.Device)
	cfg.Device, cfg.TakeOver = cfg.Device+mesh.SecondSuffix, false
	s := &second{name: cfg.Device, log: cfg.Log, run: func(ctx context.Context) error { return Run(ctx, cfg) }, there: func() bool { return answersOn(cfg.Device) }}
	return s.serve(ctx, path)
}

type second struct {
	name  string
	run   func(context.Context) error
	there func() bool
	log   *slog.Logger

	// ended is what became of the last run, once; nil before the first.
	ended chan error
}

func (s *second) serve(ctx context.Context, path string) error {
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("serve %s when asked: %w", s.name, err)
	}
	old := unix.Umask(0o077)
	l, err := net.Listen("unix", path)
	unix.Umask(old)
	if err != nil {
		return fmt.Errorf("serve %s when asked: %w", s.name, err)
	}
	var all sync.WaitGroup
	defer all.Wait()
	defer l.Close()
	stop := context.AfterFunc(ctx, func() { l.Close() })
	defer stop()
	for { // one asks at a time
		conn, err := l.Accept()
		if ctx.Err() != nil {
			return nil
		}
		if err != nil {
			return fmt.Errorf("serve %s when asked: %w", s.name, err)
		}
		s.answer(ctx, conn, &all)
	}
}

func (s *second) answer(ctx context.Context, conn net.Conn, all *sync.WaitGroup) {
	defer conn.Close()
	_ = conn.SetDeadline(time.Now().Add(patience + time.Second))
	asked, err := bufio.NewReader(io.LimitReader(conn, 64)).ReadString('\n')
	if err != nil {
		return
	}
	text := wireguard.Answered
	if name := strings.TrimSuffix(asked, "\n"); name != s.name {
		text = fmt.Sprintf("%q is not served here, only %s", name, s.name)
	} else if err := s.start(ctx, all); err != nil {
		text = strings.ReplaceAll(err.Error(), "\n", "; ")
		s.log.Warn("asked for a second device", "device", s.name, "err", err)
	}
	_, _ = fmt.Fprintln(conn, text)
}

// start returns when the device is there.
func (s *second) start(ctx context.Context, all *sync.WaitGroup) error {
	if s.ended == nil || len(s.ended) > 0 {
		ended := make(chan error, 1)
		s.ended = ended
		all.Go(func() {
			err := s.run(ctx)
			s.log.Info("second device ended", "device", s.name, "why", err)
			ended <- err
		})
	}
	waiting, cancel := context.WithTimeout(ctx, patience) // the device lives longer
	defer cancel()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for !s.there() {
		if len(s.ended) > 0 {
			return fmt.Errorf("serve %s: it ended at once; the log says why", s.name)
		}
		select {
		case <-waiting.Done():
			return fmt.Errorf("serve %s: it does not answer: %w", s.name, waiting.Err())
		case <-tick.C:
		}
	}
	return nil
}

// answersOn reports whether the control socket of a device is served.
func answersOn(device string) bool {
	conn, err := net.Dial("unix", socketPath(device))
	if err != nil {
		return false
	}
	conn.Close()
	return true
}
