package main

import (
	"fmt"
	"os"
	"os/exec"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// inside marks the process that has namespaces of its own.
const inside = "MESHD_TEST_INSIDE"

// TestMain runs the tests in a network and mount namespace of their own, so
// that an agent of theirs may do here what it does on a machine. What a test
// spawns as `meshd wireguard` is this program as well.
func TestMain(m *testing.M) {
	switch {
	case len(os.Args) > 1 && os.Args[1] == "wireguard":
		main()
	case os.Geteuid() != 0 || os.Getenv(inside) != "":
		if err := furnish(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(2)
		}
		os.Exit(m.Run())
	}
	cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
	cmd.Args[0] = os.Args[0]
	cmd.Env = append(os.Environ(), inside+"=1")
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNET | unix.CLONE_NEWNS, Pdeathsig: syscall.SIGKILL}
	if err := cmd.Run(); err != nil && cmd.ProcessState == nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(2)
	}
	os.Exit(cmd.ProcessState.ExitCode())
}

// furnish gives the namespaces what programs expect: a loopback that is up,
// an underlay address, no userspace tunnel of the host's, and network managers
// whose folders are not the host's.
func furnish() error {
	if os.Getenv(inside) == "" {
		return nil
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("make mounts private: %w", err)
	}
	script := "mkdir -p /run/wireguard; mount -t tmpfs tmpfs /run/wireguard; " +
		"for d in /etc/systemd/network /etc/NetworkManager/conf.d; do if [ -d $d ]; then mount -t tmpfs tmpfs ${d%/*}; mkdir $d; fi; done; " +
		"ip link set lo up; ip address add 192.0.2.1/32 dev lo; ip address add 192.0.2.2/32 dev lo"
	if out, err := exec.Command("sh", "-ec", script).CombinedOutput(); err != nil {
		return fmt.Errorf("%s: %w: %s", script, err, out)
	}
	return nil
}
