package main

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"
)

// account is a control group whose CPU time is counted: what the processes in
// it used, and what the kernel did on their behalf in soft interrupts.
type account struct {
	dir string
	v1  bool
}

// newAccount makes a control group below parent, or a new root where parent is
// the zero account: in cpuacct of version 1 if that is mounted, else in
// version 2, which counts without any controller.
func newAccount(parent account, name string) (account, error) {
	a := account{filepath.Join(parent.dir, name), parent.v1}
	if parent.dir == "" {
		switch {
		case exists("/sys/fs/cgroup/cpuacct/cpuacct.usage"):
			a = account{"/sys/fs/cgroup/cpuacct/" + name, true}
		case exists("/sys/fs/cgroup/unified/cgroup.procs"):
			a = account{"/sys/fs/cgroup/unified/" + name, false}
		case exists("/sys/fs/cgroup/cgroup.procs"):
			a = account{"/sys/fs/cgroup/" + name, false}
		default:
			return a, errors.New("no control groups below /sys/fs/cgroup")
		}
	}
	return a, os.Mkdir(a.dir, 0o755)
}

func exists(path string) bool { _, err := os.Stat(path); return err == nil }

// take moves a process and what it starts later into the account.
func (a account) take(pid int) error {
	return os.WriteFile(filepath.Join(a.dir, "cgroup.procs"), []byte(strconv.Itoa(pid)), 0)
}

// used is the CPU time counted so far, of accounts below too.
func (a account) used() (time.Duration, error) {
	if a.v1 {
		b, err := os.ReadFile(filepath.Join(a.dir, "cpuacct.usage"))
		if err != nil {
			return 0, err
		}
		ns, err := strconv.ParseInt(string(bytes.TrimSpace(b)), 10, 64)
		return time.Duration(ns), err
	}
	b, err := os.ReadFile(filepath.Join(a.dir, "cpu.stat"))
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(b)) {
		if us, ok := strings.CutPrefix(line, "usage_usec "); ok {
			n, err := strconv.ParseInt(strings.TrimSpace(us), 10, 64)
			return time.Duration(n) * time.Microsecond, err
		}
	}
	return 0, fmt.Errorf("%s/cpu.stat has no usage_usec", a.dir)
}

// remove takes the account away; its processes must be gone.
func (a account) remove() error { return os.Remove(a.dir) }

// busy is the time all CPUs of the machine were not idle, and their number.
func busy() (time.Duration, int, error) {
	b, err := os.ReadFile("/proc/stat")
	if err != nil {
		return 0, 0, err
	}
	var total time.Duration
	cpus := 0
	for line := range strings.Lines(string(b)) {
		f := strings.Fields(line)
		if len(f) < 9 || !strings.HasPrefix(f[0], "cpu") {
			continue
		}
		if f[0] != "cpu" {
			cpus++
			continue
		}
		for _, i := range []int{1, 2, 3, 6, 7, 8} { // user nice system irq softirq steal
			ticks, err := strconv.ParseInt(f[i], 10, 64)
			if err != nil {
				return 0, 0, fmt.Errorf("/proc/stat: %w", err)
			}
			total += time.Duration(ticks) * (time.Second / 100)
		}
	}
	return total, cpus, nil
}

// rssAnon is the resident memory of a process that no file backs.
func rssAnon(pid int) (int64, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(b)) {
		if kb, ok := strings.CutPrefix(line, "RssAnon:"); ok {
			n, err := strconv.ParseInt(strings.TrimSpace(strings.TrimSuffix(strings.TrimSpace(kb), "kB")), 10, 64)
			return n << 10, err
		}
	}
	return 0, fmt.Errorf("process %d has no RssAnon", pid)
}
