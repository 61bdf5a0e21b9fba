package cni

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"iter"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// maxFreed bounds how many freed attachments are remembered. An address that
// drops out counts as never used, which is what the one freed longest ago is
// next to.
const maxFreed = 256

// logSlack is how far the log grows beyond that before it is cut, and
// maxResting how far if all of it rests: with a quarantine of an hour, say.
const logSlack, maxResting = 64, 2048

// free gives the addresses back. They rest in quarantine. Nothing is synced:
// a power cut that undoes the rename also ends the boot the record is of.
func (h *held) free() error {
	to := filepath.Join(h.store.dir, freedDir, fmt.Sprintf("%020d,%s", uptime(), h.name))
	err := os.Rename(h.store.path(h.name.String()), to)
	if errors.Is(err, fs.ErrNotExist) {
		if err = os.MkdirAll(filepath.Dir(to), 0o755); err == nil {
			err = os.Rename(h.store.path(h.name.String()), to)
		}
	}
	if err != nil {
		return fmt.Errorf("give back %s: %w", h.name, err)
	}
	return nil
}

// freed reads what was given back, that given back first first: the names of
// files, the lines of the log, and the last time for each address.
func (s store) freed() (files, log []string, at map[netip.Addr]time.Duration, err error) {
	if log, err = s.readLog(); err != nil {
		return nil, nil, nil, err
	}
	files, err = readNames(s.path(freedDir))
	files = slices.DeleteFunc(files, func(file string) bool { return !strings.Contains(file, ",") })
	slices.Sort(files) // they start with a time of fixed width
	at = make(map[netip.Addr]time.Duration, 2*(len(log)+len(files)))
	for _, all := range [][]string{log, files} {
		for _, file := range all {
			t, ok := freedAt(file)
			if !ok {
				continue
			}
			_, rest, _ := strings.Cut(file, ",")
			for a := range addressesOf(rest) {
				at[a] = max(at[a], t)
			}
		}
	}
	return files, log, at, err
}

// addressesOf is parseRecordName for whoever has hundreds and wants no more of
// them: it makes no slices.
func addressesOf(file string) iter.Seq[netip.Addr] {
	return func(yield func(netip.Addr) bool) {
		for n := strings.Count(file, ",") - 1; n > 0; n-- { // interface and container come last
			var field string
			field, file, _ = strings.Cut(file, ",")
			if a, err := netip.ParseAddr(field); err != nil || !yield(a) {
				return
			}
		}
	}
}

// maxLog bounds what is read of the log: maxResting names of 255 bytes, and
// newlines, and as many again.
const maxLog = 2 * maxResting * 256

// readLog reads the names of what was given back and whose file has become
// another record. Only whole lines count.
func (s store) readLog() ([]string, error) {
	f, err := openFile(s.logPath(), unix.O_RDONLY)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read what was given back: %w", err)
	}
	defer f.Close()
	about, err := f.Stat()
	if err != nil {
		return nil, fmt.Errorf("read what was given back: %w", err)
	}
	text := make([]byte, min(about.Size(), maxLog))
	n, err := f.ReadAt(text, 0)
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, fmt.Errorf("read what was given back: %w", err)
	}
	lines := strings.Split(string(text[:n]), "\n")
	return lines[:len(lines)-1], nil
}

func (s store) logPath() string { return filepath.Join(s.dir, freedDir, freedLog) }

// remember writes the name of a freed file that is about to become a record,
// so that when its addresses were given back stays known. Call it with the lock.
func (s store) remember(file string) error {
	f, err := openFile(s.logPath(), unix.O_WRONLY|unix.O_CREAT|unix.O_APPEND)
	if err != nil {
		return fmt.Errorf("remember what was given back: %w", err)
	}
	defer f.Close()
	about, err := f.Stat()
	if err != nil {
		return fmt.Errorf("remember what was given back: %w", err)
	}
	if _, err := f.WriteString(file + "\n"); err != nil {
		_ = f.Truncate(about.Size()) // half a line would spoil the next one
		return fmt.Errorf("remember what was given back: %w", err)
	}
	return nil
}

// former addresses of an attachment in this boot.
func (p pool) former(r Record) (addrs []netip.Addr) {
	for _, file := range slices.Concat(p.freedLog, p.freedFiles) {
		if !strings.HasSuffix(file, r.ContainerID) { // parsing all of them takes time
			continue
		}
		_, rest, _ := strings.Cut(file, ",")
		if n, ok := parseRecordName(rest); ok && n.is(r.ContainerID, r.IfName) {
			addrs = append(addrs, n.addresses...)
		}
	}
	return addrs
}

// maxReuse bounds how many files are tried. One may be locked for a moment by
// the DEL that gave it back, or by one that waited for what it was before.
const maxReuse = 4

// openFreed takes the file given back first, if there is one that nobody works
// on. What it says is of no use any more, only its name is.
func (h *held) openFreed(freed []string) (path string, err error) {
	for _, file := range freed[:min(maxReuse, len(freed))] {
		path := filepath.Join(h.store.dir, freedDir, file)
		f, err := openFile(path, unix.O_RDWR)
		if err != nil {
			continue // forgotten, or not ours to write
		}
		if flock(f, unix.LOCK_EX|unix.LOCK_NB) != nil {
			f.Close()
			continue
		}
		if err := h.store.remember(file); err != nil {
			f.Close()
			return "", err
		}
		h.f = f
		return path, nil
	}
	return "", nil
}

// forget keeps freed/ bounded, but for what rests. Call it with the lock. What
// fails is tried again the next time.
func (s store) forget(p pool) {
	files := p.freedFiles
	for _, file := range files[:max(0, len(files)-maxFreed)] {
		if !p.rested(file) {
			break // nor have those after it
		}
		_ = os.Remove(filepath.Join(s.dir, freedDir, file))
	}
	log, n := p.freedLog, 0
	for n < len(log)-maxFreed && (p.rested(log[n]) || n < len(log)-maxResting) {
		n++
	}
	if n < logSlack {
		return
	}
	temp := s.path(tempPrefix + freedLog)
	if err := os.WriteFile(temp, []byte(strings.Join(log[n:], "\n")+"\n"), 0o644); err == nil {
		_ = os.Rename(temp, s.logPath())
	}
}

// rested: the addresses of what was given back are out of quarantine, or the
// name is none of ours.
func (p pool) rested(file string) bool {
	at, ok := freedAt(file)
	return !ok || at > p.now || p.rest(at) <= 0
}

// freedAt is the time in a name in freed/.
func freedAt(file string) (time.Duration, bool) {
	when, _, _ := strings.Cut(file, ",")
	t, err := strconv.ParseInt(when, 10, 64)
	return time.Duration(t), err == nil && t >= 0
}
