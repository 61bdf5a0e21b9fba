package netlab

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// process names one process for good: its number, and when it started, because
// numbers come round again.
type process struct {
	Pid   int    `json:"pid"`
	Start uint64 `json:"start"` // clock ticks since boot, proc_pid_stat(5) field 22
}

func self() process { return find(os.Getpid()) }

// find is the process that has that number now; the zero process if none has.
func find(pid int) process {
	f := statFields(pid)
	if len(f) < 20 {
		return process{}
	}
	start, err := strconv.ParseUint(f[19], 10, 64)
	if err != nil {
		return process{}
	}
	return process{Pid: pid, Start: start}
}

// statFields are the fields of /proc/PID/stat from the third on: the second
// may hold anything.
func statFields(pid int) []string {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return nil
	}
	return strings.Fields(string(b[bytes.LastIndexByte(b, ')')+1:]))
}

// alive reports whether it runs still; a zombie does not.
func (p process) alive() bool {
	if p.Pid == 0 || find(p.Pid) != p {
		return false
	}
	f := statFields(p.Pid)
	return len(f) > 0 && f[0] != "Z" && f[0] != "X"
}

// kill sends SIGKILL and waits until the process is gone.
func (p process) kill(ctx context.Context) error {
	if !p.alive() {
		return nil
	}
	if err := unix.Kill(p.Pid, unix.SIGKILL); err != nil && !errors.Is(err, syscall.ESRCH) {
		return fmt.Errorf("kill %d: %w", p.Pid, err)
	}
	if err := until(ctx, func() bool { return !p.alive() }); err != nil {
		return fmt.Errorf("process %d does not end: %w", p.Pid, err)
	}
	return nil
}

// A Process is one process of a machine as the host sees it.
type Process struct {
	Pid  int      // on the host
	Argv []string // empty for a process that is ending
	RSS  int64    // resident bytes
	Anon int64    // of which belong to no file
}

// Name is the last part of the program's path.
func (p Process) Name() string {
	if len(p.Argv) == 0 {
		return ""
	}
	return p.Argv[0][strings.LastIndexByte(p.Argv[0], '/')+1:]
}

func readProcess(pid int) Process {
	p := Process{Pid: pid}
	b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
	if s := strings.TrimRight(string(b), "\x00"); s != "" {
		p.Argv = strings.Split(s, "\x00")
	}
	b, _ = os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	for line := range strings.Lines(string(b)) {
		f := strings.Fields(line)
		if len(f) < 2 {
			continue
		}
		kb, _ := strconv.ParseInt(f[1], 10, 64)
		switch f[0] {
		case "VmRSS:":
			p.RSS = kb << 10
		case "RssAnon:":
			p.Anon = kb << 10
		}
	}
	return p
}

// Parent is the process that is to bury the given one.
func Parent(pid int) (Process, error) {
	f := statFields(pid)
	if len(f) < 2 {
		return Process{}, fmt.Errorf("process %d is gone", pid)
	}
	parent, err := strconv.Atoi(f[1])
	if err != nil {
		return Process{}, err
	}
	return readProcess(parent), nil
}
