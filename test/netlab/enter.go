package netlab

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"runtime"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// enterOrder is one command to run inside a machine.
type enterOrder struct {
	Pid     int         `json:"pid"` // the machine's first process
	Group   string      `json:"group"`
	Cgroups []hierarchy `json:"cgroups"`
	Argv    []string    `json:"argv"`
	Env     []string    `json:"env,omitempty"`
	// Log makes the command a daemon that writes there (a path in the machine).
	Log string `json:"log,omitempty"`
}

// machineEnv is what a command in a machine finds, whatever the caller has.
var machineEnv = []string{
	"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
	"HOME=/root", "LANG=C.UTF-8", "TERM=dumb",
}

// enter runs a command inside a machine. The process itself must stay outside
// the machine's pid namespace, so it stays between: it hands signals down and
// the exit status up, and when it dies the command dies with it.
func enter(arg string) error {
	var o enterOrder
	if err := json.Unmarshal([]byte(arg), &o); err != nil {
		return err
	}
	if err := joinGroups(o.Cgroups, o.Group, true); err != nil {
		return err
	}
	runtime.LockOSThread() // for good: the namespaces are this thread's
	if err := enterNamespaces(o.Pid); err != nil {
		return err
	}
	for _, kv := range append(machineEnv, o.Env...) {
		key, value, _ := strings.Cut(kv, "=")
		if err := os.Setenv(key, value); err != nil {
			return err
		}
	}
	argv := o.Argv
	if o.Log == "" {
		// Not SysProcAttr.Pdeathsig: it compares parent process numbers, and
		// here parent and child do not count alike.
		argv = append([]string{"setpriv", "--pdeathsig", "KILL", "--"}, argv...)
	}
	cmd := exec.Command(argv[0], argv[1:]...)
	cmd.Env = append(machineEnv, o.Env...)
	if o.Log != "" {
		return detach(cmd, o.Log)
	}
	return attend(cmd)
}

// enterNamespaces moves the calling thread into all namespaces of pid; the pid
// namespace takes effect for its children.
func enterNamespaces(pid int) error {
	kinds := []struct {
		name string
		flag int
	}{
		{"cgroup", unix.CLONE_NEWCGROUP}, {"ipc", unix.CLONE_NEWIPC}, {"uts", unix.CLONE_NEWUTS},
		{"net", unix.CLONE_NEWNET}, {"pid", unix.CLONE_NEWPID}, {"mnt", unix.CLONE_NEWNS},
	}
	fds := make([]int, len(kinds))
	for i, k := range kinds {
		path := fmt.Sprintf("/proc/%d/ns/%s", pid, k.name)
		fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err != nil {
			return fmt.Errorf("machine is off: open %s: %w", path, err)
		}
		fds[i] = fd
	}
	// A thread that shares its root folder with others may not change mount namespace.
	if err := unix.Unshare(unix.CLONE_FS); err != nil {
		return fmt.Errorf("unshare root folder: %w", err)
	}
	for i, k := range kinds {
		if err := unix.Setns(fds[i], k.flag); err != nil {
			return fmt.Errorf("enter %s namespace: %w", k.name, err)
		}
	}
	return unix.Chdir("/")
}

// detach starts cmd as a daemon, prints its process id and leaves it to the
// machine's first process.
func detach(cmd *exec.Cmd, log string) error {
	f, err := os.OpenFile(log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return err
	}
	defer f.Close()
	cmd.Stdout, cmd.Stderr = f, f
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("start %s: %w", cmd.Args[0], err)
	}
	fmt.Println(cmd.Process.Pid)
	return nil
}

// attend runs cmd to its end and exits as it did.
func attend(cmd *exec.Cmd) error {
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	signals := make(chan os.Signal, 16)
	signal.Notify(signals, syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP, syscall.SIGUSR1)
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("start command: %w", err)
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	for {
		select {
		case s := <-signals:
			_ = cmd.Process.Signal(s)
		case err := <-ended:
			var exit *exec.ExitError
			if !errors.As(err, &exit) {
				return err
			}
			if ws, ok := exit.Sys().(syscall.WaitStatus); ok && ws.Signaled() {
				os.Exit(128 + int(ws.Signal()))
			}
			os.Exit(exit.ExitCode())
		}
	}
}
