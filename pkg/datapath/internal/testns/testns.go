// Package testns gives tests machines of their own: a test binary that starts
// itself again inside fresh network and mount namespaces, and fresh network
// namespaces for single tests. Nothing reaches the machine's own network.
package testns

import (
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

const inside = "MESHD_TESTNS"

// Backend is the WireGuard device the tests shall meet, "kernel" or
// "userspace": what the environment variable MESHD_TEST_BACKEND says, or what
// this kernel can. Tests check that they have it and not the other.
func Backend(t testing.TB) string {
	t.Helper()
	want := os.Getenv("MESHD_TEST_BACKEND")
	if want == "kernel" || want == "userspace" {
		return want
	} else if want != "" {
		t.Fatalf("MESHD_TEST_BACKEND is %q, want kernel or userspace", want)
	}
	if Exec("unshare", "-n", "ip", "link", "add", "probe", "type", "wireguard") == nil {
		return "kernel"
	}
	return "userspace"
}

// Main runs the tests of a package inside fresh namespaces; call it from
// TestMain. Without root the tests run where they are and New skips.
func Main(m *testing.M) {
	if os.Getenv(inside) != "" {
		if err := furnish(); err != nil {
			fmt.Fprintln(os.Stderr, "testns:", err)
			os.Exit(2)
		}
		os.Exit(m.Run())
	}
	if os.Geteuid() != 0 {
		os.Exit(m.Run())
	}
	cmd := Command(os.Args[1:]...)
	cmd.Env = append(os.Environ(), inside+"=1")
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	err := cmd.Run()
	if exit := (&exec.ExitError{}); err != nil && !asExit(err, &exit) {
		fmt.Fprintln(os.Stderr, "testns:", err)
		os.Exit(2)
	}
	os.Exit(cmd.ProcessState.ExitCode())
}

func asExit(err error, target **exec.ExitError) bool {
	e, ok := err.(*exec.ExitError)
	*target = e
	return ok
}

// Command is this test binary with args, in network and mount namespaces of
// its own. It and what it leaves behind dies with the test.
func Command(args ...string) *exec.Cmd {
	exe, err := os.Executable()
	if err != nil {
		panic(err)
	}
	cmd := exec.Command(exe, args...)
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags:   unix.CLONE_NEWNET | unix.CLONE_NEWNS,
		Unshareflags: 0,
		Pdeathsig:    syscall.SIGKILL,
	}
	return cmd
}

// Furnish makes this process's mount namespace private, with an empty
// /run/wireguard and /run/netns, and brings lo up.
func Furnish() error { return furnish() }

func furnish() error {
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("make mounts private: %w", err)
	}
	for _, dir := range []string{"/run/wireguard", "/run/netns"} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return err
		}
		if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "mode=755"); err != nil {
			return fmt.Errorf("mount on %s: %w", dir, err)
		}
	}
	return Up("lo")
}

// New moves this test to a fresh network namespace with lo up. The thread is
// not given back, so it and the namespace end with the test. Subtests run on
// other threads; each joins with the function that is returned.
func New(t testing.TB) (join func(testing.TB)) {
	t.Helper()
	if os.Getenv(inside) == "" {
		t.Skip("needs root")
	}
	runtime.LockOSThread() // never unlocked: the thread ends with the goroutine
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		t.Fatalf("make network namespace: %v", err)
	}
	// A new namespace takes over what the machine's first one is told.
	if err := os.WriteFile("/proc/sys/net/ipv4/ip_forward", []byte("0"), 0); err != nil {
		t.Fatal(err)
	}
	if err := Up("lo"); err != nil {
		t.Fatal(err)
	}
	ns, err := os.Open("/proc/thread-self/ns/net")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ns.Close() })
	return func(t testing.TB) {
		runtime.LockOSThread()
		if err := unix.Setns(int(ns.Fd()), unix.CLONE_NEWNET); err != nil {
			t.Fatal(err)
		}
	}
}

// Up brings a link up.
func Up(link string) error { return Exec("ip", "link", "set", link, "up") }

// Exec runs a command in the caller's thread's namespaces.
func Exec(name string, args ...string) error {
	_, err := Output(name, args...)
	return err
}

// Output runs a command and returns what it printed. A command started by a
// locked thread inherits that thread's namespaces.
func Output(name string, args ...string) (string, error) {
	out, err := exec.Command(name, args...).CombinedOutput()
	if err != nil {
		return string(out), fmt.Errorf("%s %v: %w: %s", name, args, err, out)
	}
	return string(out), nil
}

// Sh runs lines of shell and fails the test when one of them fails.
func Sh(t testing.TB, script string) string {
	t.Helper()
	out, err := Output("sh", "-ec", script)
	if err != nil {
		t.Fatalf("%s\n%v", script, err)
	}
	return out
}
