package shortcut

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"github.com/cilium/ebpf"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"meshd.dev/pkg/mesh"
	"meshd.dev/pkg/reconcile"
	"meshd.dev/pkg/status"
)

// Config of a Shortcut.
type Config struct {
	// Off takes the shortcut away wherever it is.
	Off bool
	// Pods attached on this node; nil: none.
	Pods  func() ([]mesh.LocalPod, error)
	Board *status.Board
	Log   *slog.Logger
}

// Shortcut keeps the program on the links of this node's pods. Use New. Its
// methods may be called from any goroutine.
type Shortcut struct {
	cfg  Config
	loop *reconcile.Loop
	// begun: the firewall stands, and with it conntrack.
	begun atomic.Bool

	mu sync.Mutex
	// program, when it could be loaded; else why not, and when to try again.
	program *loaded
	why     string
	leaving bool // with a program that is to go from all links
	again   time.Time
	hand    hand
}

const (
	// check is the name on the board.
	check = "datapath/shortcut"
	// settle is how long a pod has been there before its link is looked at, so
	// that its start is not slowed.
	settle = 500 * time.Millisecond
	resync = 30 * time.Second
	// retry is how soon the program is loaded again that the kernel refused: it
	// costs tens of milliseconds, and mostly stays so.
	retry = 10 * time.Minute
)

// New makes a Shortcut; nothing happens yet.
func New(cfg Config) *Shortcut {
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	if cfg.Pods == nil {
		cfg.Pods = func() ([]mesh.LocalPod, error) { return nil, nil }
	}
	s := &Shortcut{cfg: cfg}
	s.hand.do = s.do
	s.loop = reconcile.New(reconcile.Config{Name: "shortcut", Do: s.apply, Settle: settle, Resync: resync, MaxBackoff: resync, Log: cfg.Log,
		Report: func(err error) {
			if err != nil {
				cfg.Board.Note(check, "packets between pods of this machine may take the long way: "+err.Error())
			}
		}})
	return s
}

// Kick says that the firewall stands, and that pods may have come or gone. It
// never blocks.
func (s *Shortcut) Kick() {
	s.begun.Store(true)
	s.loop.Kick()
}

// Run keeps the program where it has to be, from the first Kick until ctx
// ends. It stays where it is then, and goes with the links.
func (s *Shortcut) Run(ctx context.Context) error {
	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error { return watch(ctx, s.loop.Kick) })
	group.Go(func() error { return s.loop.Run(ctx) })
	err := group.Wait()
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.program != nil {
		s.program.close()
		s.program = nil
	}
	return err
}

// Plan lists what the next round would do. The first one is not foretold: it
// puts this process' program where another's was.
func (s *Shortcut) Plan() ([]string, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.program == nil && s.why == "" {
		return nil, nil
	}
	have, err := s.look()
	if err != nil {
		return nil, err
	}
	var lines []string
	for _, o := range diff(have) {
		lines = append(lines, o.String())
	}
	return lines, nil
}

func (s *Shortcut) look() (have state, err error) {
	pods, err := s.cfg.Pods()
	if err != nil {
		return have, fmt.Errorf("read which pods are attached here: %w", err)
	}
	have, err = read(pods, s.program, s.hand.refused)
	for i := range have.links {
		if l := &have.links[i]; s.leaving {
			l.short, l.why = false, s.why
		}
	}
	return have, err
}

// apply is one round.
func (s *Shortcut) apply(context.Context) error {
	if !s.begun.Load() {
		return nil
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.ready()
	s.hand.refused = map[int]string{}
	var errs []error
	for again := true; again; { // each time with fewer links that are not refused
		have, err := s.look()
		if err != nil {
			return errors.Join(append(errs, err)...)
		}
		again, err = s.hand.carryOut(diff(have))
		if errs = append(errs, err); !again {
			if err == nil {
				s.left()
			}
			s.note(have)
		}
	}
	return errors.Join(errs...)
}

// do one change.
func (s *Shortcut) do(o op) error {
	err := s.program.do(o)
	s.cfg.Log.Debug("shortcut", "did", o.String(), "err", err)
	return err
}

// ready loads the program, or says why there is none.
func (s *Shortcut) ready() {
	s.leaving = !s.cfg.Off && !loose()
	switch {
	case s.cfg.Off:
		s.why = "off: --shortcut=off"
	case s.leaving:
		s.why = "off: net.netfilter.nf_conntrack_tcp_loose is 0, so no connection could come back from it"
	case s.program != nil, time.Now().Before(s.again):
	default:
		s.again = time.Now().Add(retry)
		s.load()
	}
}

// left closes the program that no link has any more, and no connection uses.
func (s *Shortcut) left() {
	if s.leaving && s.program != nil {
		s.program.close()
		s.program, s.again = nil, time.Time{}
	}
}

func (s *Shortcut) load() {
	err := haveTCX()
	if errors.Is(err, ebpf.ErrNotSupported) {
		s.why = "off: this kernel has no tcx (Linux 6.6)"
		return
	}
	if err == nil {
		s.program, err = load()
	}
	switch {
	case errors.Is(err, unix.EPERM):
		s.why = "off: this process may load no programs into the kernel (CAP_BPF, CAP_PERFMON, CAP_SYS_ADMIN)"
	case err != nil:
		s.why = "off: " + err.Error()
		s.cfg.Log.Info("no shortcut between pods of this machine", "why", err)
	}
}

// note how it is on the board.
func (s *Shortcut) note(have state) {
	on, off, example := 0, 0, ""
	text := s.why
	for _, l := range have.links {
		if l.short {
			on++
		} else {
			off, example = off+1, l.name+": "+l.why
		}
		if l.unseen {
			text = fmt.Sprintf("%s; but %s: %s. If that is a shortcut, root can take it away: bpftool net detach tcx_ingress name %s dev %[2]s", s.why, l.name, l.foreign, programName)
		}
	}
	if s.program == nil || s.leaving {
		s.cfg.Board.Note(check, text)
		return
	}
	text = fmt.Sprintf("on for %d pods of this machine, %d packets so far", on, s.program.packets())
	if off > 0 {
		text += fmt.Sprintf("; not for %d, as %s", off, example)
	}
	s.cfg.Board.Note(check, text)
}
