// Command init is the first process of a guest of package vm: it mounts what
// programs expect, loads the modules, runs the programs of /order one after
// the other, and switches the machine off. What the programs print goes to the
// second serial line, and after each the line "\x1eend <exit status>".
package main

import (
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"

	"golang.org/x/sys/unix"
)

type order struct {
	Modules []string
	Runs    []struct {
		Program, Folder string
		Args, Env       []string
	}
}

func main() {
	if os.Getpid() != 1 {
		fmt.Fprintln(os.Stderr, "init: only as the first process of a guest")
		os.Exit(2)
	}
	if err := work(); err != nil {
		fmt.Fprintln(os.Stderr, "init:", err)
	}
	// QEMU is told to end instead of starting the machine again.
	_ = unix.Reboot(unix.LINUX_REBOOT_CMD_RESTART)
}

func work() error {
	if err := mounts(); err != nil {
		return err
	}
	var o order
	b, err := os.ReadFile("/order")
	if err != nil {
		return err
	}
	if err := json.Unmarshal(b, &o); err != nil {
		return err
	}
	for _, name := range o.Modules {
		if err := load(name); err != nil {
			return err
		}
	}
	out, err := line("/dev/ttyS1")
	if err != nil {
		return err
	}
	defer out.Close()
	for _, r := range o.Runs {
		cmd := exec.Command(r.Program, r.Args...)
		cmd.Env = append([]string{"PATH=/usr/sbin:/usr/bin", "HOME=/tmp", "TMPDIR=/tmp"}, r.Env...)
		cmd.Dir = r.Folder
		fmt.Fprintf(out, "\n\x1eend %d\n", run(cmd, out))
		bury()
	}
	return nil
}

func mounts() error {
	for _, m := range []struct{ dir, kind, options string }{
		{"/proc", "proc", ""}, {"/sys", "sysfs", ""}, {"/dev", "devtmpfs", ""}, {"/run", "tmpfs", "mode=755"}, {"/tmp", "tmpfs", "mode=1777"},
	} {
		if err := unix.Mount(m.kind, m.dir, m.kind, 0, m.options); err != nil {
			return fmt.Errorf("mount %s: %w", m.dir, err)
		}
	}
	return nil
}

func load(name string) error {
	f, err := os.Open(filepath.Join("/modules", name))
	if err != nil {
		return err
	}
	defer f.Close()
	if err := unix.FinitModule(int(f.Fd()), "", 0); err != nil && err != unix.EEXIST {
		return fmt.Errorf("load module %s: %w", name, err)
	}
	return nil
}

// line opens a serial line that hands on bytes as they are.
func line(path string) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_WRONLY|unix.O_NOCTTY, 0)
	if err != nil {
		return nil, err
	}
	t, err := unix.IoctlGetTermios(int(f.Fd()), unix.TCGETS)
	if err != nil {
		return nil, err
	}
	t.Oflag &^= unix.OPOST
	t.Cflag = t.Cflag&^unix.CBAUD | unix.B115200
	return f, unix.IoctlSetTermios(int(f.Fd()), unix.TCSETS, t)
}

// run waits for the program alone, not for what it leaves behind with its
// output still open: a file is handed on, not a pipe.
func run(cmd *exec.Cmd, out *os.File) int {
	cmd.Stdout, cmd.Stderr = out, out
	if err := cmd.Run(); cmd.ProcessState == nil {
		_, _ = io.WriteString(out, "init: "+err.Error()+"\n")
		return 127
	}
	return cmd.ProcessState.ExitCode()
}

// bury waits for orphans that have ended.
func bury() {
	for {
		if pid, err := unix.Wait4(-1, nil, unix.WNOHANG, nil); pid <= 0 || err != nil {
			return
		}
	}
}
