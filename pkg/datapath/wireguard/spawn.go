package wireguard

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

const (
	spawnTimeout = 10 * time.Second
	maxLog       = 1 << 20
)

// spawn starts the userspace process in a session of its own, so that it
// outlives this one, and returns when it answers.
func (d *Device) spawn(ctx context.Context) error {
	argv := append(append([]string{}, d.opts.SpawnUserspace...), d.opts.Name)
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer null.Close()
	out := null
	if d.opts.LogDir != "" {
		if out, err = openLog(filepath.Join(d.opts.LogDir, "wireguard-"+d.opts.Name+".log")); err != nil {
			return err
		}
		defer out.Close()
	}
	d.waitForLock(ctx)
	ready, readied, err := os.Pipe()
	if err != nil {
		return err
	}
	defer ready.Close()
	defer readied.Close()
	with := Inheritance{Device: d.opts.Name}
	files := []uintptr{null.Fd(), out.Fd(), out.Fd(), readied.Fd()}
	if fd, ok := d.holder.link(d.opts.Name); ok {
		with.Link = true
		files = append(files, uintptr(fd))
	}
	d.child, err = syscall.ForkExec(argv[0], argv, &syscall.ProcAttr{
		Dir: "/", Files: files,
		// Until it sets its own: a third less to start with, and peers wait.
		Env: append(os.Environ(), "GOGC=off", "GOMAXPROCS=1", with.String()),
		Sys: &syscall.SysProcAttr{Setsid: true},
	})
	if err != nil {
		return fmt.Errorf("start userspace device: %w", err)
	}
	readied.Close()
	d.opts.Log.Info("started userspace device", "device", d.opts.Name, "pid", d.child, "goes on with the link", with.Link)
	return d.ready(ctx, ready, out.Name())
}

// Inheritance is what a userspace process gets from the one that starts it,
// as descriptors.
type Inheritance struct {
	Device string
	// Link says that there is a link to go on with.
	Link bool
}

// Descriptors of an Inheritance: a pipe to be closed by the process when it
// answers, and the link.
const (
	ReadyDescriptor = 3 + iota
	LinkDescriptor
)

// inherits is the variable that tells of it.
const inherits, andLink = "MESHD_WIREGUARD_INHERITS", ",link"

// String is a line of the environment.
func (i Inheritance) String() string {
	if i.Link {
		return inherits + "=" + i.Device + andLink
	}
	return inherits + "=" + i.Device
}

// Inherited by this process for the device; whoever asks has it from then on.
func Inherited(device string) (i Inheritance, ok bool) {
	for _, i := range []Inheritance{{device, false}, {device, true}} {
		if i.String() == inherits+"="+os.Getenv(inherits) {
			os.Unsetenv(inherits)
			return i, true
		}
	}
	return i, false
}

// waitForLock: the link of a process that was killed may be gone before its
// lock is, and the next one would give up at once.
func (d *Device) waitForLock(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for {
		if _, err := os.Stat(LockPath(d.opts.Name)); err != nil || d.processGone() {
			return
		}
		select {
		case <-ctx.Done():
			return // the new one says what is wrong
		case <-tick.C:
		}
	}
}

// openLog appends, and starts over when the file has grown large.
func openLog(path string) (*os.File, error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return nil, err
	}
	flags := os.O_CREATE | os.O_WRONLY | os.O_APPEND
	if i, err := os.Stat(path); err == nil && i.Size() > maxLog {
		flags |= os.O_TRUNC
	}
	return os.OpenFile(path, flags, 0o600)
}

// ready waits until the new process answers on its socket, or ends: in either
// case nobody has the other end of the pipe any more.
func (d *Device) ready(ctx context.Context, pipe *os.File, log string) error {
	ctx, cancel := context.WithTimeout(ctx, spawnTimeout)
	defer cancel()
	defer context.AfterFunc(ctx, func() { _ = pipe.SetReadDeadline(time.Now()) })()
	if _, err := pipe.Read(make([]byte, 1)); !errors.Is(err, io.EOF) {
		return fmt.Errorf("wait for userspace device: %w", cmp.Or(ctx.Err(), err))
	}
	_, _, err := d.Stats()
	if err != nil && d.dying() {
		return fmt.Errorf("userspace device died at once; its last words are in %s", log)
	}
	return err
}

// dying: our child lets go of what it has before it can be buried.
func (d *Device) dying() bool {
	pidfd, err := unix.PidfdOpen(d.child, 0)
	if err != nil {
		return d.reap()
	}
	defer unix.Close(pidfd)
	_, _ = unix.Poll([]unix.PollFd{{Fd: int32(pidfd), Events: unix.POLLIN}}, 1000)
	return d.reap()
}

// reap buries our child if it died though it is needed, and reports whether it
// did.
func (d *Device) reap() bool {
	pid := d.child
	ws, died := d.bury()
	if died {
		d.opts.Log.Warn("userspace device died", "device", d.opts.Name, "pid", pid, "status", int(ws))
	}
	return died
}

// bury our child if it died.
func (d *Device) bury() (ws unix.WaitStatus, died bool) {
	if d.child == 0 {
		return 0, false
	}
	pid, err := unix.Wait4(d.child, &ws, unix.WNOHANG, nil)
	if pid == 0 && err == nil || errors.Is(err, unix.EINTR) {
		return 0, false
	}
	d.child = 0
	return ws, true
}

// processGone reports whether no process holds the lock of the device: the
// kernel is still clearing up after one that died.
func (d *Device) processGone() bool {
	f, err := os.OpenFile(LockPath(d.opts.Name), os.O_RDWR, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return false // not one of ours
	}
	if err != nil {
		return false
	}
	defer f.Close()
	return unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB) == nil
}

// LockPath is the file a userspace process holds a lock on while it serves
// the device called name.
func LockPath(name string) string { return "/var/run/wireguard/" + name + ".lock" }
