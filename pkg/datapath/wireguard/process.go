package wireguard

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"

	"golang.org/x/sys/unix"
)

// Process serves a userspace device; its link is open here as well.
type Process struct {
	Pid int
	// Life is its pidfd: it can be read once the process has ended.
	Life *os.File
	// Link is a plain descriptor. In an os.File each packet would wake this
	// process, and handing that on would have reads wait.
	Link int
}

// ProcessOf the device, as its lock names it.
func ProcessOf(device string) (p Process, err error) {
	text, err := os.ReadFile(LockPath(device))
	if err != nil {
		return p, err
	}
	if p.Pid, err = strconv.Atoi(strings.TrimSpace(string(text))); err != nil || p.Pid <= 0 {
		return p, fmt.Errorf("%s does not name a process: %q", LockPath(device), text)
	}
	pidfd, err := unix.PidfdOpen(p.Pid, unix.PIDFD_NONBLOCK)
	if err != nil {
		return p, fmt.Errorf("process %d: %w", p.Pid, err)
	}
	p.Life = os.NewFile(uintptr(pidfd), "pidfd")
	fd, err := descriptorOf(p.Pid, device)
	if err == nil {
		p.Link, err = unix.PidfdGetfd(pidfd, fd, 0)
	}
	if err != nil {
		p.Life.Close()
		return Process{}, fmt.Errorf("link %s of process %d: %w", device, p.Pid, err)
	}
	return p, nil
}

// Close gives back what is open of it here. The process goes on.
func (p Process) Close() {
	p.Life.Close()
	unix.Close(p.Link)
}

// descriptorOf is the number under which a process has the link open.
func descriptorOf(pid int, device string) (int, error) {
	infos, err := filepath.Glob(fmt.Sprintf("/proc/%d/fdinfo/*", pid))
	if err != nil {
		return 0, err
	}
	for _, path := range infos {
		text, err := os.ReadFile(path)
		if err == nil && bytes.Contains(text, []byte("iff:\t"+device+"\n")) {
			return strconv.Atoi(filepath.Base(path))
		}
	}
	return 0, fmt.Errorf("process %d does not have link %s open", pid, device)
}

// holder has the process of a device that is ours to start again.
//
// Since the link is open here as well it outlives the process, with addresses
// and routes, and the next process goes on with it. What is sent meanwhile waits
// in the link, and takes no other way; the next process reads it from the start,
// and drops what is for peers it has not been told of yet. Without either
// process the link goes.
type holder struct {
	process *Process
	watch   sync.WaitGroup
}

// hold the process that serves the device called name, if one does and none is
// held; died is called when it has ended.
func (h *holder) hold(name string, died func()) error {
	if h.process != nil && !ended(h.process.Life) {
		return nil
	}
	p, err := ProcessOf(name)
	if errors.Is(err, os.ErrNotExist) {
		return nil // the kernel's
	}
	if err != nil {
		return err
	}
	h.letGo()
	h.process = &p
	if died != nil {
		h.watch.Go(func() {
			if raw, err := p.Life.SyscallConn(); err == nil && raw.Read(hasEnded) == nil {
				died()
			}
		})
	}
	return nil
}

// letGo of the process, and of the link if it ended.
func (h *holder) letGo() {
	if h.process == nil {
		return
	}
	h.process.Close()
	h.process = nil
	h.watch.Wait()
}

// link that is held, if it still is the one called name.
func (h *holder) link(name string) (fd int, ok bool) {
	if h.process == nil {
		return 0, false
	}
	req, err := unix.NewIfreq(name)
	if err != nil {
		return 0, false
	}
	err = unix.IoctlIfreq(h.process.Link, unix.TUNGETIFF, req)
	return h.process.Link, err == nil && req.Name() == name
}

// ended reports whether the process with this pidfd has.
func ended(life *os.File) (yes bool) {
	raw, err := life.SyscallConn()
	if err != nil {
		return true
	}
	err = raw.Control(func(fd uintptr) { yes = hasEnded(fd) })
	return yes || err != nil
}

func hasEnded(pidfd uintptr) bool {
	n, err := unix.Poll([]unix.PollFd{{Fd: int32(pidfd), Events: unix.POLLIN}}, 0)
	return n > 0 && err == nil
}
