package host

import (
	"context"
	"fmt"
	"os"
	"slices"
	"strings"
	"syscall"

	"meshd.dev/test/cluster"
	"meshd.dev/test/netlab"
)

// managers is where a machine sees what make unpacked.
const managers = "/usr/local/bin/managers"

// users are those the packages would make when they are installed.
const users = `messagebus:x:961:961::/nonexistent:/usr/sbin/nologin
systemd-network:x:962:962::/run/systemd:/usr/sbin/nologin
`

// install gives a machine what the packages have in /etc, their users and
// the folders that systemd would make for them.
func install(ctx context.Context, m *netlab.Machine) error {
	_, err := m.Run(ctx, "sh", "-c", `set -e
cp -r --no-clobber `+managers+`/etc/. /etc/
while IFS=: read -r name x id rest; do
	grep -q "^$name:" /etc/group || echo "$name:x:$id:" >> /etc/group
	grep -q "^$name:" /etc/passwd || echo "$name:$x:$id:$rest" >> /etc/passwd
done <<END
`+users+`END
mkdir -p /run/dbus /run/systemd/netif/links /run/systemd/netif/leases /run/systemd/netif/lldp /var/lib/NetworkManager
chown -R systemd-network: /run/systemd/netif`)
	return err
}

// among are argv among the managers' programs.
func among(argv ...string) []string {
	return append([]string{"unshare", "-m", "--propagation", "private", "sh", "-c",
		"mount -t overlay overlay -o lowerdir=" + managers + "/usr:/usr /usr && exec \"$@\"", "sh"}, argv...)
}

// run has m2 run a manager's tool.
func (w *world) run(ctx context.Context, argv ...string) (string, error) {
	return w.m2().Run(ctx, among(argv...)...)
}

// start has m2 start a manager.
func (w *world) start(ctx context.Context, name string, argv ...string) error {
	pid, err := w.m2().Start(ctx, name, among(argv...)...)
	w.daemons[name] = pid
	return err
}

// stop ends a manager as systemd would.
func (w *world) stop(ctx context.Context, name string) error {
	pid := w.daemons[name]
	if err := syscall.Kill(pid, syscall.SIGTERM); err != nil {
		return fmt.Errorf("end %s: %w", name, err)
	}
	return w.until(ctx, name, func(context.Context) error {
		if netlab.Alive(pid) {
			return fmt.Errorf("%s does not end", name)
		}
		return nil
	})
}

// until is cluster.Until; what fails shows what a manager said.
func (w *world) until(ctx context.Context, name string, ok func(context.Context) error) error {
	err := cluster.Until(ctx, ok)
	if err != nil {
		err = fmt.Errorf("%w; the log of %s ends\n%s", err, name, cluster.LastLines(w.m2().Disk("/var/log/"+name+".log"), 30))
	}
	return err
}

// udevd keeps to links: of all else it has no rules, and no folder of devices.
const udevd = `mkdir /tmp/rules && cp /usr/lib/udev/rules.d/*-net-*.rules /usr/lib/udev/rules.d/*-nm-*.rules /tmp/rules &&
mount --bind /tmp/rules /usr/lib/udev/rules.d &&
touch /tmp/null && mount --bind /dev/null /tmp/null && mount -t tmpfs tmpfs /dev && touch /dev/null && mount --move /tmp/null /dev/null &&
exec /usr/lib/systemd/systemd-udevd`

// startUdev starts the program that names links, gives them lasting MAC
// addresses, and tells the managers when it is done with one: before, they do
// not touch it.
func (w *world) startUdev(ctx context.Context) error {
	if err := w.start(ctx, "udev", "sh", "-c", udevd); err != nil {
		return err
	}
	return w.until(ctx, "udev", func(ctx context.Context) error {
		if _, err := w.run(ctx, "udevadm", "trigger", "--subsystem-match=net", "--action=add"); err != nil {
			return err
		}
		if _, err := w.run(ctx, "udevadm", "settle", "--timeout=10"); err != nil {
			return err
		}
		_, err := os.Stat(w.m2().Path("/run/udev/data/n2")) // lo is 1, eth0 is 2
		return err
	})
}

// startBus starts the bus by which the managers are asked.
func (w *world) startBus(ctx context.Context) error {
	if err := w.start(ctx, "dbus", "dbus-daemon", "--system", "--nofork", "--nopidfile"); err != nil {
		return err
	}
	return w.until(ctx, "dbus", func(context.Context) error {
		_, err := os.Stat(w.m2().Path("/run/dbus/system_bus_socket"))
		return err
	})
}

// write files of m2, by path. Most of them systemd-networkd has to read, who is
// not root; a connection of NetworkManager nobody but root may.
func (w *world) write(files map[string]string) error {
	for path, text := range files {
		mode := os.FileMode(0o644)
		if strings.HasSuffix(path, ".nmconnection") {
			mode = 0o600
		}
		if err := w.m2().WriteFile(path, []byte(text), mode); err != nil {
			return err
		}
	}
	return nil
}

// fields of a table's lines.
func fields(table string) (rows [][]string) {
	for line := range strings.Lines(table) {
		rows = append(rows, strings.Fields(line))
	}
	return slices.DeleteFunc(rows, func(r []string) bool { return len(r) == 0 })
}
