package host

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"meshd.dev/test/cluster"
	"meshd.dev/test/netlab"
)

// systemd is the first process of a machine that has it. What the kernel of the
// host lends to all, systemd in a container leaves alone.
var systemd = netlab.System{Argv: []string{"/lib/systemd/systemd"}, Env: []string{"container=netlab"}}

// network is how systemd-networkd gives m an address. The gateway, which does
// not exist, has a neighbour entry, so that what is sent to it is to be seen.
func network(m *netlab.Machine) string {
	return fmt.Sprintf(`[Match]
Name=eth0
[Network]
LinkLocalAddressing=ipv6
IPv6AcceptRA=no
Gateway=172.31.77.254
Gateway=fd31:77::fe
[Address]
Address=%s/24
[Address]
Address=%s/64
DuplicateAddressDetection=none
[Neighbor]
Address=172.31.77.254
LinkLayerAddress=02:4d:4c:00:00:fe
[Neighbor]
Address=fd31:77::fe
LinkLayerAddress=02:4d:4c:00:00:fe
`, m.IPv4(), m.IPv6())
}

// installSystemd makes systemd the system of a machine that is off, as the
// packages have it and with nothing of the host's configuration.
func installSystemd(ctx context.Context, m *netlab.Machine) error {
	from, err := filepath.Abs("../../bin/managers")
	if err != nil {
		return err
	}
	if err := os.RemoveAll(m.Disk("/etc/systemd")); err != nil {
		return err
	}
	if out, err := exec.CommandContext(ctx, "cp", "-r", "--no-clobber", from+"/etc/.", m.Disk("/etc")).CombinedOutput(); err != nil {
		return fmt.Errorf("copy /etc of the packages: %w: %s", err, out)
	}
	if err := os.MkdirAll(m.Disk("/var/log/journal"), 0o755); err != nil { // so that it outlives a boot
		return err
	}
	if err := m.WriteFile("/etc/systemd/network/50-eth0.network", []byte(network(m)), 0o644); err != nil {
		return err
	}
	own := systemd
	own.Usr = from + "/usr"
	return m.Install(own)
}

// bootSystemd makes the machines, with systemd, its network and containerd.
func bootSystemd(ctx context.Context, w *world) (string, error) {
	if err := w.BuildImages(ctx); err != nil {
		return "", err
	}
	if err := w.Make(ctx, "m1", "m2"); err != nil {
		return "", err
	}
	var said []string
	for _, m := range w.Lab.Machines() {
		if err := installSystemd(ctx, m); err != nil {
			return "", err
		}
		if err := m.PowerOn(ctx); err != nil {
			return "", err
		}
		version, err := up(ctx, m)
		if err != nil {
			return "", err
		}
		said = append(said, m.Name+" "+version)
		if _, err := m.Run(ctx, "systemctl", "enable", "--now", "systemd-networkd", "systemd-networkd-wait-online", "containerd"); err != nil {
			return "", err
		}
		if err := w.Import(ctx, m); err != nil {
			return "", err
		}
	}
	return strings.Join(said, ", "), nil
}

// up waits until a machine's systemd has done all it does at boot, and wants
// that nothing of it failed.
func up(ctx context.Context, m *netlab.Machine) (string, error) {
	err := cluster.Until(ctx, func(ctx context.Context) error {
		state, err := m.Run(ctx, "systemctl", "is-system-running")
		if strings.TrimSpace(state) == "degraded" {
			failed, _ := m.Run(ctx, "systemctl", "--failed", "--plain", "--no-legend")
			return cluster.Final{Err: fmt.Errorf("%s: failed are\n%s", m.Name, failed)}
		}
		return err
	})
	if err != nil {
		return "", err
	}
	version, err := m.Run(ctx, "systemctl", "show", "--property=Version", "--value")
	return "systemd " + strings.TrimSpace(version), err
}

// reboot has a machine boot anew and waits until it is up; took is what going
// down took.
func reboot(ctx context.Context, m *netlab.Machine) (took time.Duration, err error) {
	began := time.Now()
	if _, err := m.Run(ctx, "systemctl", "reboot"); err != nil && m.On() {
		return 0, err
	}
	if err := m.Rest(ctx); err != nil {
		return 0, err
	}
	took = time.Since(began)
	if err := m.PowerOff(ctx); err != nil { // what a power supply has to do with it
		return 0, err
	}
	if err := m.PowerOn(ctx); err != nil {
		return 0, err
	}
	_, err = up(ctx, m)
	return took, err
}

// properties of a unit, by name.
func properties(ctx context.Context, m *netlab.Machine, unit string) (map[string]string, error) {
	out, err := m.Run(ctx, "systemctl", "show", unit)
	found := map[string]string{}
	for line := range strings.Lines(out) {
		name, value, _ := strings.Cut(strings.TrimSpace(line), "=")
		found[name] = value
	}
	return found, err
}

// want that properties of a unit are so: "Name=value" each.
func want(ctx context.Context, m *netlab.Machine, unit string, wish ...string) error {
	is, err := properties(ctx, m, unit)
	if err != nil {
		return err
	}
	var errs error
	for _, w := range wish {
		name, value, _ := strings.Cut(w, "=")
		if is[name] != value {
			errs = errors.Join(errs, fmt.Errorf("%s on %s: %s is %q, want %q", unit, m.Name, name, is[name], value))
		}
	}
	return errs
}

// says wants a text in what a unit has said since the machine's last boot, as a
// person would look for it.
func says(ctx context.Context, m *netlab.Machine, unit, text string) error {
	out, err := m.Run(ctx, "journalctl", "--no-pager", "--boot", "--output=cat", "--unit="+unit)
	if err == nil && !strings.Contains(out, text) {
		err = fmt.Errorf("the journal of %s on %s has no %q:\n%s", unit, m.Name, text, out)
	}
	return err
}
