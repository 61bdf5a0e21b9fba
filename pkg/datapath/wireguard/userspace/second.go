package userspace

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net"
	"strings"
	"sync"
	"time"

	"meshd.dev/pkg/datapath/wireguard"
	"meshd.dev/pkg/mesh"
)

// second is the second device of a key change, served by the process of the
// first one when it is asked to (see wireguard.AskPath), as often as that
// happens. It goes when its link is deleted, and with the first one.
type second struct {
	name  string
	run   func(context.Context) error
	there func() bool

	socket control
	cancel func()
	runs   sync.WaitGroup

	mu sync.Mutex // held by who asks
	// ended is what became of the last run, once; nil before the first.
	ended chan error
}

// serveSecond returns nil where nobody is to ask, or can.
func (cfg Config) serveSecond(ctx context.Context) *second {
	if !cfg.Second {
		return nil
	}
	path := wireguard.AskPath(cfg.Device)
	cfg.Device, cfg.TakeOver, cfg.Second = cfg.Device+mesh.SecondSuffix, false, false
	s := &second{name: cfg.Device, there: func() bool { return serves(cfg.Device) }}
	s.run = func(ctx context.Context) error {
		err := cfg.run(ctx)
		cfg.Log.Info("second device ended", "device", cfg.Device, "why", err)
		return err
	}
	if err := s.open(ctx, path); err != nil {
		cfg.Log.Warn("meshd will start the second device of a key change itself", "err", err)
		return nil
	}
	return s
}

func (s *second) open(ctx context.Context, path string) error {
	ctx, s.cancel = context.WithCancel(ctx)
	s.socket = control{path: path, handle: func(c net.Conn) { s.answer(ctx, c) }}
	err := s.socket.open()
	if err != nil {
		s.cancel()
	}
	return err
}

func (s *second) check() error {
	if s == nil {
		return nil
	}
	return s.socket.check()
}

func (s *second) close() {
	if s == nil {
		return
	}
	s.cancel()
	s.socket.close()
	s.runs.Wait()
}

func (s *second) answer(ctx context.Context, conn net.Conn) {
	defer conn.Close()
	_ = conn.SetDeadline(time.Now().Add(2 * patience))
	asked, err := bufio.NewReader(io.LimitReader(conn, 64)).ReadString('\n')
	if err != nil {
		return
	}
	text := wireguard.Answered
	if name := strings.TrimSuffix(asked, "\n"); name != s.name {
		text = fmt.Sprintf("%q is not served here, only %s", name, s.name)
	} else if err := s.start(ctx); err != nil {
		text = strings.ReplaceAll(err.Error(), "\n", "; ")
	}
	_, _ = fmt.Fprintln(conn, text)
}

// start returns when the device is there. One that is just ending is waited for.
func (s *second) start(ctx context.Context) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	waiting, cancel := context.WithTimeout(ctx, patience) // the device lives longer
	defer cancel()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for begun := false; !s.there(); {
		if s.ended == nil {
			s.begin(ctx)
			begun = true
		}
		select {
		case err := <-s.ended:
			s.ended = nil
			if begun {
				return fmt.Errorf("it ended at once: %v", err)
			}
		case <-waiting.Done():
			return fmt.Errorf("it does not answer: %w", waiting.Err())
		case <-tick.C:
		}
	}
	return nil
}

func (s *second) begin(ctx context.Context) {
	ended := make(chan error, 1)
	s.ended = ended
	s.runs.Go(func() { ended <- s.run(ctx) })
}

// serves reports whether a device has a link and answers: one that is ending
// has no link any more.
func serves(device string) bool {
	if _, err := net.InterfaceByName(device); err != nil {
		return false
	}
	conn, err := net.Dial("unix", wireguard.SocketPath(device))
	if err != nil {
		return false
	}
	conn.Close()
	return true
}
