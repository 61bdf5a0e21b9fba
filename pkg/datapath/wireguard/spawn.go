package wireguard

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
	"golang.zx2c4.com/wireguard/wgctrl"
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
	p, err := os.StartProcess(argv[0], argv, &os.ProcAttr{
		Dir: "/", Files: []*os.File{null, out, out},
		// Until it sets its own: a third less to start with, and peers wait.
		Env: append(os.Environ(), "GOGC=off", "GOMAXPROCS=1"),
		Sys: &unix.SysProcAttr{Setsid: true},
	})
	if err != nil {
		return fmt.Errorf("start userspace device: %w", err)
	}
	d.child = p.Pid
	_ = p.Release() // reap waits for it by number
	d.opts.Log.Info("started userspace device", "device", d.opts.Name, "pid", d.child)
	return d.ready(ctx, out.Name())
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

// ready waits until the new process answers on its socket.
func (d *Device) ready(ctx context.Context, log string) error {
	ctx, cancel := context.WithTimeout(ctx, spawnTimeout)
	defer cancel()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	wg, err := wgctrl.New()
	if err != nil {
		return err
	}
	defer wg.Close()
	for {
		if _, err := netlink.LinkByName(d.opts.Name); err == nil {
			if _, err = wg.Device(d.opts.Name); err == nil {
				return nil
			}
		}
		if d.reap() {
			return fmt.Errorf("userspace device died at once; its last words are in %s", log)
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("wait for userspace device: %w", ctx.Err())
		case <-tick.C:
		}
	}
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
