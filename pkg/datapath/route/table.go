package route

import (
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"

	"github.com/mdlayher/netlink"

	"meshd.dev/pkg/mesh"
)

// Table keeps what is ours in the kernel as a Config wants it. Use New. Its
// methods may be called from any goroutine.
type Table struct {
	log  *slog.Logger
	port atomic.Uint32 // of conn; 0 without one

	mu   sync.Mutex
	conn *netlink.Conn // opened with the first change; closed by Close
	// known is what Apply read last, without the routes.
	known state
}

// New makes a Table; nothing is read or changed yet.
func New(log *slog.Logger) *Table {
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	return &Table{log: log}
}

// Apply makes cfg so and says what it did. Without the device it lays the
// floor and returns ErrNoDevice.
func (t *Table) Apply(cfg Config) (did []string, err error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	actual, err := read(cfg)
	if err != nil {
		return nil, err
	}
	t.known = actual
	t.known.routes = nil
	did, err = t.do(diff(cfg, actual))
	if actual.link == 0 {
		err = errors.Join(err, fmt.Errorf("%s: %w", cfg.Device, ErrNoDevice))
	}
	return did, err
}

// Part of a Config.
type Part struct {
	Routes []Route
	Floor  []netip.Prefix
}

// Follow takes away a part of what the last Apply or Follow made so, adds
// another, and says what it did. It reads nothing: what it costs depends on
// the parts alone.
func (t *Table) Follow(cfg Config, gone, added Part) (did []string, err error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.known.link == 0 {
		return nil, fmt.Errorf("%s: %w", cfg.Device, ErrNoDevice)
	}
	of := func(p Part) []entry {
		cfg.Routes, cfg.Floor = p.Routes, p.Floor
		return wanted(cfg, t.known)
	}
	return t.do(between(of(gone), of(added)))
}

// between two lists of routes, of which the kernel has the first.
func between(have, want []entry) (ops []op) {
	twin := func(es []entry, e entry) int {
		return slices.IndexFunc(es, func(o entry) bool { return o.key() == e.key() })
	}
	for _, w := range want {
		if i := twin(have, w); i < 0 || have[i] != w {
			ops = append(ops, routeOp{verb: verbOf(i), entry: w})
		}
	}
	for _, h := range have {
		if twin(want, h) < 0 {
			ops = append(ops, routeOp{verb: "del", entry: h})
		}
	}
	return ops
}

// do the ops in order, routes that follow each other in one go.
func (t *Table) do(ops []op) (did []string, err error) {
	var errs []error
	note := func(o op, err error) {
		if err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", o, err))
			return
		}
		did = append(did, o.String())
		t.log.Info("route", "did", o.String())
	}
	for len(ops) > 0 {
		var run []routeOp
		for _, o := range ops {
			r, ok := o.(routeOp)
			if !ok || !r.plain() || len(run) == batch {
				break
			}
			run = append(run, r)
		}
		if len(run) == 0 {
			note(ops[0], ops[0].do())
			ops = ops[1:]
			continue
		}
		for i, err := range t.change(run) {
			note(run[i], err)
		}
		ops = ops[len(run):]
	}
	return did, errors.Join(errs...)
}

// Plan lists what Apply would do.
func (t *Table) Plan(cfg Config) ([]string, error) {
	actual, err := read(cfg)
	if err != nil {
		return nil, err
	}
	if actual.link == 0 { // it will be there by then
		actual.link = -1
	}
	if actual.second == 0 && slices.ContainsFunc(cfg.Routes, func(r Route) bool { return r.Second }) {
		actual.second = -2
	}
	var lines []string
	for _, op := range diff(cfg, actual) {
		lines = append(lines, op.String())
	}
	return lines, nil
}

// Echo reports whether an event of rtnetlink tells of a route that the Table
// itself has changed; port is what its header says.
func (t *Table) Echo(port uint32) bool {
	return port != 0 && t.port.Load() == port // 0: the kernel by itself
}

// Close gives back what Follow and Apply keep open.
func (t *Table) Close() error {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.hangUp()
}

// LayFloor adds blackholes for the ranges, where there are none, and touches
// nothing else.
func LayFloor(ranges []netip.Prefix) (did []string, err error) {
	cfg := Config{Device: mesh.Device, Floor: ranges}
	actual, err := read(cfg)
	if err != nil {
		return nil, err
	}
	t := New(nil)
	var ops []op
	for _, e := range wanted(cfg, actual) {
		if !slices.Contains(actual.routes, e) {
			ops = append(ops, routeOp{verb: "add", entry: e})
		}
	}
	did, err = t.do(ops)
	return did, errors.Join(err, t.Close())
}
