package netlab

import (
	"context"
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// A System takes the place of the first process of a machine: an init with
// services of its own, as systemd. Such a machine sees of /dev, /sys and
// /proc/sys what systemd-nspawn shows (CONTAINER_INTERFACE.md of systemd), so
// that it settles nothing of the host, and its eth0 has no address before the
// system gives it one.
type System struct {
	// Argv of the first process, and its environment.
	Argv []string `json:"argv"`
	Env  []string `json:"env,omitempty"`
	// Usr is a folder of the host laid over /usr; may be empty.
	Usr string `json:"usr,omitempty"`
}

// Install gives the machine a system, from its next boot on.
func (m *Machine) Install(s System) error {
	m.System = &s
	return m.lab.save()
}

// Rest waits until the machine has switched itself off.
func (m *Machine) Rest(ctx context.Context) error {
	if err := until(ctx, func() bool { return !m.On() }); err != nil {
		return fmt.Errorf("%s does not go off: %w", m.Name, err)
	}
	return nil
}

// start takes the place of the calling process.
func (s System) start() error {
	if err := unix.Exec(s.Argv[0], s.Argv, s.Env); err != nil {
		return fmt.Errorf("start %s: %w", s.Argv[0], err)
	}
	return nil
}

// devices of the host that a machine with a system of its own has.
var devices = []string{"full", "fuse", "net/tun", "null", "random", "tty", "urandom", "zero"}

// programs lays the system's own programs over the host's.
func (s System) programs(root string) error {
	if s.Usr == "" {
		return nil
	}
	return mount{"overlay", "/usr", "overlay", unix.MS_RDONLY, "lowerdir=" + s.Usr + ":/usr"}.do(root)
}

// makeDevices shows devices of the host in root.
func makeDevices(root string) error {
	for _, name := range devices {
		if _, err := os.Stat("/dev/" + name); err != nil {
			continue // a host without TUN or FUSE
		}
		target := filepath.Join(root, "dev", name)
		if err := os.MkdirAll(filepath.Dir(target), 0o755); err != nil {
			return err
		}
		if err := os.WriteFile(target, nil, 0o600); err != nil {
			return err
		}
		if err := unix.Mount("/dev/"+name, target, "", unix.MS_BIND, ""); err != nil {
			return fmt.Errorf("show /dev/%s: %w", name, err)
		}
	}
	for link, to := range map[string]string{"fd": "/proc/self/fd", "stdin": "/proc/self/fd/0", "stdout": "/proc/self/fd/1",
		"stderr": "/proc/self/fd/2", "ptmx": "pts/ptmx"} {
		if err := os.Symlink(to, filepath.Join(root, "dev", link)); err != nil {
			return err
		}
	}
	return nil
}

// readOnlySettings keeps of the kernel's settings those of the network writable.
func readOnlySettings(root string) error {
	sys, network := filepath.Join(root, "/proc/sys"), filepath.Join(root, "/proc/sys/net")
	if err := unix.Mount(sys, sys, "", unix.MS_BIND, ""); err != nil {
		return fmt.Errorf("bind /proc/sys: %w", err)
	}
	if err := unix.Mount(network, network, "", unix.MS_BIND, ""); err != nil {
		return fmt.Errorf("bind /proc/sys/net: %w", err)
	}
	for _, dir := range []string{sys, filepath.Join(root, "/sys")} {
		if err := unix.Mount("", dir, "", unix.MS_BIND|unix.MS_REMOUNT|unix.MS_RDONLY, ""); err != nil {
			return fmt.Errorf("make %s read-only: %w", dir, err)
		}
	}
	return nil
}
