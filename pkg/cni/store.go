package cni

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Names in a network's folder beside the records.
const (
	lockFile   = "lock"
	bootFile   = "boot"
	freedDir   = "freed"
	tempPrefix = ".tmp-"
	// freedLog in freedDir has the names of files there that became records again.
	freedLog = "log"
)

// store is the folder of one network.
type store struct {
	dir     string
	network string
	// hostLocal is where host-local keeps its networks; empty: nowhere.
	hostLocal string
}

func openStore(dataDir, network string) store {
	return store{dir: filepath.Join(dataDir, network), network: network}
}

func (s store) path(name string) string { return filepath.Join(s.dir, name) }

// lock keeps others from choosing addresses. The kernel lets go of it when
// the process ends, however it ends.
func (s store) lock() (unlock func(), err error) {
	if err := os.MkdirAll(s.path(freedDir), 0o755); err != nil {
		return nil, fmt.Errorf("make state folder: %w", err)
	}
	f, err := openFile(s.path(lockFile), unix.O_RDWR|unix.O_CREAT)
	if err != nil {
		return nil, fmt.Errorf("lock state folder: %w", err)
	}
	if err := flock(f, unix.LOCK_EX); err != nil {
		f.Close()
		return nil, fmt.Errorf("lock state folder: %w", err)
	}
	return func() { f.Close() }, nil
}

func flock(f *os.File, how int) error {
	for {
		if err := unix.Flock(int(f.Fd()), how); !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}

// names reads the records' names. A folder that is not there has none.
func (s store) names() (names []recordName, stale []string, err error) {
	files, err := readNames(s.dir)
	for _, file := range files {
		if n, ok := parseRecordName(file); ok {
			names = append(names, n)
		} else if strings.HasPrefix(file, tempPrefix) {
			stale = append(stale, file)
		}
	}
	return names, stale, err
}

func readNames(dir string) ([]string, error) {
	d, err := openFile(dir, unix.O_RDONLY)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read state folder: %w", err)
	}
	defer d.Close()
	names, err := d.Readdirnames(-1)
	if err != nil {
		return nil, fmt.Errorf("read state folder: %w", err)
	}
	return names, nil
}

// find gives the record of an attachment.
func (s store) find(containerID, ifName string) (recordName, bool, error) {
	names, _, err := s.names()
	if i := slices.IndexFunc(names, func(n recordName) bool { return n.is(containerID, ifName) }); i >= 0 {
		return names[i], true, nil
	}
	return recordName{}, false, err
}

// held is a record that this process alone works on.
type held struct {
	store store
	name  recordName
	f     *os.File
}

// errBusy: another process works on the attachment.
var errBusy = errors.New("another ADD or DEL of this attachment is at work")

// errGone: the record went away before it could be held.
var errGone = errors.New("record is gone")

// hold locks a record; how is unix.LOCK_EX, with unix.LOCK_NB not to wait.
func (s store) hold(name recordName, how int) (*held, error) {
	path := s.path(name.String())
	f, err := openFile(path, unix.O_RDONLY)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, errGone
	}
	if err != nil {
		return nil, fmt.Errorf("open record: %w", err)
	}
	if err := flock(f, how); err != nil {
		f.Close()
		if errors.Is(err, unix.EWOULDBLOCK) {
			return nil, errBusy
		}
		return nil, fmt.Errorf("lock record: %w", err)
	}
	if !isAt(f, path) { // freed while we waited
		f.Close()
		return nil, errGone
	}
	return &held{store: s, name: name, f: f}, nil
}

func isAt(f *os.File, path string) bool {
	have, err := f.Stat()
	if err != nil {
		return false
	}
	there, err := os.Stat(path)
	return err == nil && os.SameFile(have, there)
}

// release lets others work on the record.
func (h *held) release() { h.f.Close() }

// peek reads a record without holding it. Its attachment may go meanwhile, and
// the file become that of another one: what cannot be trusted and is not there
// any more says nothing.
func (s store) peek(name recordName) (r Record, err error) {
	for range maxTries { // it may be there again, whole
		f, openErr := openFile(s.path(name.String()), unix.O_RDONLY)
		if errors.Is(openErr, fs.ErrNotExist) {
			return Record{}, errGone
		}
		if openErr != nil {
			return Record{}, fmt.Errorf("open record: %w", openErr)
		}
		r, err = s.peekAt(name, f)
		f.Close()
		if !errors.Is(err, errCorrupt) {
			break
		}
	}
	return r, err
}

// peekAt is peek for a file that was name's when it was opened.
func (s store) peekAt(name recordName, f *os.File) (Record, error) {
	h := held{store: s, name: name, f: f}
	r, err := h.read()
	if errors.Is(err, errCorrupt) && !isAt(f, s.path(name.String())) {
		return Record{}, errGone
	}
	return r, err
}

// maxRecord bounds what is read of a record; real ones have about 600 bytes.
const maxRecord = 64 << 10

func (h *held) read() (Record, error) {
	text, err := io.ReadAll(io.LimitReader(io.NewSectionReader(h.f, 0, maxRecord), maxRecord))
	if err != nil {
		return Record{}, fmt.Errorf("read record: %w", err)
	}
	r, err := decodeRecord(h.name, text)
	r.Network = h.store.network
	return r, err
}

// record is the content, or what the name says if it cannot be trusted.
func (h *held) record() (Record, error) {
	r, err := h.read()
	if errors.Is(err, errCorrupt) {
		return h.name.record(h.store.network), nil
	}
	return r, err
}

// discard removes a record whose addresses nobody ever saw.
func (h *held) discard() error {
	if err := os.Remove(h.store.path(h.name.String())); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove record %s: %w", h.name, err)
	}
	return nil
}

// save starts to bring a new record to disk; what it returns waits until it is
// there. The lock is not held, so that many at once wait for the disk once. The
// name is new, and this takes it to disk with the content (ext4, xfs, btrfs);
// elsewhere a power cut may lose the record, and with it the boot it is of.
func (h *held) save() (saved func() error) {
	done := make(chan error, 1)
	go func() { done <- h.f.Sync() }()
	return func() error {
		if err := <-done; err != nil {
			return fmt.Errorf("write record: %w", err)
		}
		return nil
	}
}

// setAside takes a corrupt record out of use, but not its addresses.
func (h *held) setAside() error {
	if h.name.corrupt {
		return nil
	}
	from := h.store.path(h.name.String())
	h.name.corrupt = true
	if err := os.Rename(from, h.store.path(h.name.String())); err != nil {
		return fmt.Errorf("set aside corrupt record: %w", err)
	}
	return nil
}

// request is what a new attachment wants from the store.
type request struct {
	record     Record // without addresses
	ranges     []span
	reserved   []netip.Addr
	requested  []netip.Addr
	quarantine time.Duration
	// noted: requested is the wish of the pod's author (an annotation), not
	// the runtime's.
	noted bool
}

// errExists comes with the held record of an attachment that is there already.
var errExists = errors.New("attachment has a record already")

// reserve chooses addresses and writes the record. It is not safe before it is
// saved, and only then may the kernel be touched. reused says whether an
// address had another pod in this boot.
func (s store) reserve(q request) (h *held, r Record, reused bool, err error) {
	unlock, err := s.lock()
	if err != nil {
		return nil, r, false, err
	}
	defer unlock()
	if _, _, err := s.enterBoot(q.record.BootID); err != nil {
		return nil, r, false, err
	}
	p, err := s.pool(q.ranges, q.reserved, q.quarantine)
	if err != nil {
		return nil, r, false, err
	}
	p.noted = q.noted
	s.removeStale(p.stale)
	for _, n := range p.names {
		if n.is(q.record.ContainerID, q.record.IfName) {
			if h, err = s.hold(n, unix.LOCK_EX|unix.LOCK_NB); err == nil {
				err = errExists
			}
			return h, r, false, err
		}
		if HostLink(n.containerID, n.ifName) == q.record.HostLink {
			return nil, r, false, fmt.Errorf("%s of container %s would share the link name %s with container %s: one in 2^48, try another ID",
				q.record.IfName, q.record.ContainerID, q.record.HostLink, n.containerID)
		}
	}
	s.forget(p)
	r = q.record
	r.former = p.former(r)
	if r.Addresses, err = p.choose(q.requested); err != nil {
		return nil, r, false, err
	}
	for _, a := range r.Addresses {
		_, was := p.freed[a]
		reused = reused || was
	}
	r.Network, r.Since, r.Uptime = s.network, time.Now().UTC().Truncate(time.Second), p.now
	h, err = s.create(r, p.freedFiles)
	return h, r, reused, err
}

// pool reads all there is to know for choosing addresses.
func (s store) pool(ranges []span, reserved []netip.Addr, quarantine time.Duration) (p pool, err error) {
	p = pool{ranges: ranges, reserved: reserved, quarantine: quarantine}
	// Records first: DEL moves one to freed without the lock, and so it is
	// seen at least once.
	if p.names, p.stale, err = s.names(); err != nil {
		return p, err
	}
	p.held = make(map[netip.Addr]recordName, 2*len(p.names))
	foreign, err := s.hostLocalFiles()
	if err != nil {
		return p, err
	}
	for _, f := range foreign {
		p.held[f.addr] = recordName{addresses: []netip.Addr{f.addr}, containerID: "of host-local, see " + f.path}
	}
	for _, n := range p.names {
		for _, a := range n.addresses {
			p.held[a] = n
		}
	}
	p.freedFiles, p.freedLog, p.freed, err = s.freed()
	p.now = uptime()
	for a, at := range p.freed {
		if at > p.now { // nonsense: not of this boot's clock
			p.freed[a] = 0
		}
	}
	return p, err
}

// create writes a record, whole and locked from before it can be seen. The
// file is that of an attachment given back, one of freed, where there is one:
// it has its place on the disk already, and the wait for the disk is half as
// long, most of all when it is long.
func (s store) create(r Record, freed []string) (*held, error) {
	h := &held{store: s, name: r.name()}
	from, err := h.openFreed(freed)
	if err != nil {
		return nil, err
	}
	if h.f == nil {
		from = s.path(tempPrefix + strconv.Itoa(os.Getpid()))
		if err := h.openNew(from); err != nil {
			return nil, err
		}
	}
	err = h.fill(r.encode())
	if err == nil {
		err = os.Rename(from, s.path(h.name.String()))
	}
	if err != nil {
		_ = os.Remove(from) // whoever has the lock next does it else
		h.f.Close()
		return nil, fmt.Errorf("write record: %w", err)
	}
	return h, nil
}

func (h *held) openNew(path string) error {
	f, err := openFile(path, unix.O_RDWR|unix.O_CREAT|unix.O_TRUNC)
	if err != nil {
		return fmt.Errorf("write record: %w", err)
	}
	if err := flock(f, unix.LOCK_EX|unix.LOCK_NB); err != nil {
		f.Close()
		return fmt.Errorf("lock record: %w", err)
	}
	h.f = f
	return nil
}

// fill makes text the whole of the file, over what was there: to cut first
// would give the place on the disk away.
func (h *held) fill(text []byte) error {
	if _, err := h.f.WriteAt(text, 0); err != nil {
		return err
	}
	return h.f.Truncate(int64(len(text)))
}

// removeStale: temporary files are made under the lock, so that whoever has
// the lock sees only those of the dead.
func (s store) removeStale(files []string) {
	for _, file := range files {
		_ = os.Remove(s.path(file)) // the next one tries again
	}
}

// enterBoot voids the records of other boots. Call it with the lock. It reads
// one small file unless the boot is new.
func (s store) enterBoot(bootID string) (voided []Record, corrupt []string, err error) {
	if have, err := readLine(s.path(bootFile)); err == nil && have == bootID {
		return nil, nil, nil
	}
	voided, corrupt, err = s.voidOtherBoots(bootID)
	if err != nil {
		return voided, corrupt, err
	}
	temp := s.path(tempPrefix + bootFile)
	if err := os.WriteFile(temp, []byte(bootID+"\n"), 0o644); err != nil {
		return voided, corrupt, fmt.Errorf("write boot ID: %w", err)
	}
	if err := os.Rename(temp, s.path(bootFile)); err != nil {
		return voided, corrupt, fmt.Errorf("write boot ID: %w", err)
	}
	return voided, corrupt, nil
}

// voidOtherBoots removes records of other boots and all that was freed then,
// and sets corrupt ones aside.
func (s store) voidOtherBoots(bootID string) (voided []Record, corrupt []string, err error) {
	names, _, err := s.names()
	if err != nil {
		return nil, nil, err
	}
	for _, n := range names {
		h, err := s.hold(n, unix.LOCK_EX|unix.LOCK_NB)
		if errors.Is(err, errBusy) || errors.Is(err, errGone) {
			continue // at work now, so of this boot
		}
		if err != nil {
			return voided, corrupt, err
		}
		r, readErr := h.read()
		switch {
		case readErr != nil:
			err = h.setAside()
			corrupt = append(corrupt, s.path(h.name.String()))
		case r.BootID != bootID:
			err = h.void(r)
			voided = append(voided, r)
		}
		h.release()
		if err != nil {
			return voided, corrupt, err
		}
	}
	files, err := readNames(s.path(freedDir))
	for _, file := range files {
		_ = os.Remove(filepath.Join(s.dir, freedDir, file))
	}
	return voided, corrupt, err
}

// uptime is CLOCK_BOOTTIME: it goes on in suspend and never goes back.
func uptime() time.Duration {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts); err != nil {
		return 0
	}
	return time.Duration(ts.Nano())
}

func readBootID() (string, error) {
	id, err := readLine("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return "", fmt.Errorf("read boot ID: %w", err)
	}
	return id, nil
}
