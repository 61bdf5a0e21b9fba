package netlab

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Root is where labs keep their machines' disks and what they need to be
// cleaned up after a crash. It must be a real file system (ext4, xfs, btrfs):
// containerd cannot put its overlays on another overlay.
const Root = "/var/lib/meshd-lab"

// Config says what lab to make.
type Config struct {
	// Name tells labs apart: at most 8 letters and digits. Empty means random.
	Name string
	// Keep leaves the lab to a later program: Sweep does not take it away when
	// this one ends.
	Keep bool
	// Binaries is a folder every machine shows, read-only, as /usr/local/bin.
	Binaries string
	// HostBootID shows every machine the host's boot id instead of a new one at
	// each power cycle. Containers see the host's whatever the machine shows, so
	// daemons in containers need it.
	HostBootID bool
	// Log may be nil.
	Log *slog.Logger
}

// A Lab is an underlay and the machines on it.
type Lab struct {
	log   *slog.Logger
	state state
}

// state is what lab.json holds: enough to take everything away again.
type state struct {
	Name     string      `json:"name"`
	Keep     bool        `json:"keep"`
	Binaries string      `json:"binaries,omitempty"`
	HostBoot bool        `json:"hostBootID,omitempty"`
	Owner    process     `json:"owner"`
	Cgroups  []hierarchy `json:"cgroups"`
	Machines []*machine  `json:"machines"`
}

// New makes the underlay of a lab without machines. It takes away first what a
// dead owner left behind, and fails if a lab of that name is alive.
func New(ctx context.Context, c Config) (*Lab, error) {
	if err := ready(); err != nil {
		return nil, err
	}
	log := c.Log
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	if err := Sweep(ctx); err != nil {
		return nil, fmt.Errorf("clean up after earlier labs: %w", err)
	}
	if c.Name == "" {
		b := make([]byte, 3)
		_, _ = rand.Read(b)
		c.Name = hex.EncodeToString(b)
	}
	if err := checkName(c.Name, 8); err != nil {
		return nil, fmt.Errorf("lab name: %w", err)
	}
	hs, err := hierarchies()
	if err != nil {
		return nil, err
	}
	l := &Lab{log: log, state: state{Name: c.Name, Keep: c.Keep, Binaries: c.Binaries, HostBoot: c.HostBootID, Cgroups: hs, Owner: self()}}
	if err := os.MkdirAll(Root, 0o700); err != nil {
		return nil, err
	}
	if err := os.Mkdir(l.dir(), 0o700); errors.Is(err, fs.ErrExist) {
		return nil, fmt.Errorf("lab %s exists already", c.Name)
	} else if err != nil {
		return nil, err
	}
	if err := l.save(); err != nil {
		return nil, err
	}
	if err := l.makeUnderlay(); err != nil {
		return nil, errors.Join(err, l.Destroy(ctx))
	}
	return l, nil
}

// Open takes over a lab another program made.
func Open(name string) (*Lab, error) {
	l := &Lab{log: slog.New(slog.DiscardHandler), state: state{Name: name}}
	b, err := os.ReadFile(l.file())
	if err != nil {
		return nil, fmt.Errorf("open lab %s: %w", name, err)
	}
	if err := json.Unmarshal(b, &l.state); err != nil {
		return nil, fmt.Errorf("open lab %s: %w", name, err)
	}
	return l, nil
}

// Sweep destroys every lab whose owner is dead and that was not to be kept.
func Sweep(ctx context.Context) error {
	names, err := Names()
	if err != nil {
		return err
	}
	var errs error
	for _, name := range names {
		l, err := Open(name)
		if errors.Is(err, fs.ErrNotExist) {
			continue // being made, or being taken away
		}
		if err != nil {
			errs = errors.Join(errs, err)
			continue
		}
		if !l.state.Keep && !l.state.Owner.alive() {
			errs = errors.Join(errs, l.Destroy(ctx))
		}
	}
	return errs
}

// Names lists the labs on this host.
func Names() ([]string, error) {
	entries, err := os.ReadDir(Root)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	var names []string
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return names, nil
}

// Name of the lab.
func (l *Lab) Name() string { return l.state.Name }

// Machine is the machine of that name, or nil.
func (l *Lab) Machine(name string) *Machine {
	for _, m := range l.state.Machines {
		if m.Name == name {
			return &Machine{lab: l, machine: m}
		}
	}
	return nil
}

// Machines in the order they were added.
func (l *Lab) Machines() []*Machine {
	var ms []*Machine
	for _, m := range l.state.Machines {
		ms = append(ms, &Machine{lab: l, machine: m})
	}
	return ms
}

// Destroy takes everything of the lab away: processes, namespaces, links,
// mounts, cgroups, files. It carries on past what it cannot remove and says so.
func (l *Lab) Destroy(ctx context.Context) error {
	if _, err := os.Lstat(l.dir()); errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	var errs error
	for _, m := range l.Machines() {
		errs = errors.Join(errs, m.PowerOff(ctx))
	}
	errs = errors.Join(errs, l.removeUnderlay(), l.unmountAll(),
		removeGroups(l.state.Cgroups, l.group()))
	if errs == nil { // only now: lab.json is what a second try needs
		errs = os.RemoveAll(l.dir())
		_ = os.Remove(Root) // the last one out
	}
	if errs != nil {
		return fmt.Errorf("destroy lab %s: %w", l.Name(), errs)
	}
	return nil
}

// Traces lists whatever on this host still carries the lab's name; after
// Destroy there must be nothing.
func (l *Lab) Traces() []string {
	var traces []string
	for _, path := range []string{l.dir(), l.netns()} {
		if _, err := os.Lstat(path); err == nil {
			traces = append(traces, "file "+path)
		}
	}
	for _, h := range l.state.Cgroups {
		dir := filepath.Join(h.Path, l.group())
		if _, err := os.Lstat(dir); err == nil {
			traces = append(traces, "cgroup "+dir)
		}
	}
	for _, m := range mountsBelow(l.dir()) {
		traces = append(traces, "mount "+m)
	}
	for _, m := range l.state.Machines {
		if m.First.alive() {
			traces = append(traces, fmt.Sprintf("process %d", m.First.Pid))
		}
	}
	return traces
}

// The names under which the lab is known to the host.
func (l *Lab) dir() string   { return filepath.Join(Root, l.state.Name) }
func (l *Lab) file() string  { return filepath.Join(l.dir(), "lab.json") }
func (l *Lab) group() string { return "ml-" + l.state.Name }
func (l *Lab) netns() string { return "/run/netns/ml-" + l.state.Name }

// save writes lab.json so that a crash at any moment leaves a whole one.
func (l *Lab) save() error {
	b, err := json.MarshalIndent(l.state, "", "  ")
	if err != nil {
		return err
	}
	if err := os.WriteFile(l.file()+".new", b, 0o600); err != nil {
		return err
	}
	return os.Rename(l.file()+".new", l.file())
}

// unmountAll lets go of mounts below the lab's folder, deepest first. There are
// none unless something went wrong, and then removing files would be worse.
func (l *Lab) unmountAll() error {
	var errs error
	mounts := mountsBelow(l.dir())
	for i := len(mounts) - 1; i >= 0; i-- {
		if err := unix.Unmount(mounts[i], unix.MNT_DETACH); err != nil {
			errs = errors.Join(errs, fmt.Errorf("unmount %s: %w", mounts[i], err))
		}
	}
	return errs
}

func mountsBelow(dir string) []string {
	b, _ := os.ReadFile("/proc/self/mountinfo")
	var mounts []string
	for line := range strings.Lines(string(b)) {
		if f := strings.Fields(line); len(f) > 4 && strings.HasPrefix(f[4], dir+"/") {
			mounts = append(mounts, f[4])
		}
	}
	return mounts
}

// ready says whether this host can hold a lab, and what is missing if not.
func ready() error {
	if os.Geteuid() != 0 {
		return errors.New("a lab needs root: run as root")
	}
	if err := os.MkdirAll(Root, 0o700); err != nil {
		return err
	}
	var fs unix.Statfs_t
	if err := unix.Statfs(Root, &fs); err != nil {
		return fmt.Errorf("look at %s: %w", Root, err)
	}
	if fs.Type == unix.OVERLAYFS_SUPER_MAGIC || fs.Type == unix.TMPFS_MAGIC {
		return fmt.Errorf("%s must lie on a real file system (ext4, xfs): mount one there", Root)
	}
	return nil
}

func checkName(name string, most int) error {
	if name == "" || len(name) > most {
		return fmt.Errorf("%q: want 1 to %d letters and digits", name, most)
	}
	for _, c := range name {
		if (c < 'a' || c > 'z') && (c < '0' || c > '9') {
			return fmt.Errorf("%q: want small letters and digits", name)
		}
	}
	return nil
}

// until calls ok until it says yes or ctx ends.
func until(ctx context.Context, ok func() bool) error {
	for !ok() {
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-time.After(10 * time.Millisecond):
		}
	}
	return nil
}
