package host

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"

	"meshd.dev/test/cluster"
)

func TestNetworkd(t *testing.T) {
	tell(t, newWorld(t), []step{
		{"two machines, one with systemd-networkd", boot},
		{"a cluster of them, and pods", start},
		{"a greedy networkd starts: what is ours stays", networkdStarts},
		{"it reloads and takes its links anew: stays", networkdReloads},
		{"it starts again: stays", networkdAgain},
		{"without the drop-in for routes it removes ours, and meshd puts them back", networkdWithoutConf},
		{"without the drop-in for links it takes ours as well; the connection lives, for meshd puts them back", networkdWithout},
	})
}

// greed is the configuration of somebody who wants every link looked after; the
// machine's own has its address, as a sane one would.
var greed = map[string]string{
	"/etc/systemd/network/50-eth0.network": `[Match]
Name=eth0
[Network]
Address=172.31.77.2/24
Address=fd31:77::2/64
Gateway=172.31.77.254
LinkLocalAddressing=no
IPv6AcceptRA=no
`,
	"/etc/systemd/network/99-all.network": `[Match]
Name=*
[Network]
DHCP=yes
LinkLocalAddressing=yes
IPv6AcceptRA=yes
`,
}

// bait is a link with what nobody configured, for a manager to take.
var bait = []string{"sh", "-c", `ip link delete bait 2>/dev/null
ip link add bait type veth peer name bait-peer && ip link set bait-peer up && ip link set bait up &&
ip address add 192.0.2.77/32 dev bait && ip route add 192.0.2.128/25 dev bait proto 76`}

// taken waits until a manager has taken the bait.
func (w *world) taken(ctx context.Context, name string) error {
	return w.until(ctx, name, func(ctx context.Context) error {
		out, err := w.m2().Run(ctx, "sh", "-c", "ip -o address show dev bait; ip route show proto 76")
		if err == nil && (strings.Contains(out, "192.0.2.77") || strings.Contains(out, "192.0.2.128")) {
			err = fmt.Errorf("%s has left the link bait alone, so this shows nothing:\n%s", name, out)
		}
		return err
	})
}

const networkd = "systemd-networkd"

// settled waits until networkd has decided about every link and taken the
// bait; ours are to be in the state given.
func (w *world) settled(ctx context.Context, want ...string) error {
	err := w.until(ctx, networkd, func(ctx context.Context) error {
		table, err := w.run(ctx, "networkctl", "--no-legend", "--no-pager", "list")
		if err != nil {
			return err
		}
		seen := 0
		for _, f := range fields(table) {
			name, state := f[1], f[4]
			switch {
			case ours.MatchString(name):
				seen++
				if !slices.Contains(want, state) {
					return fmt.Errorf("%s is %s, want %s:\n%s", name, state, strings.Join(want, " or "), table)
				}
			case name == "eth0" && state != "configured", name == "bait" && (state == "pending" || state == "initialized"):
				return fmt.Errorf("%s is %s:\n%s", name, state, table)
			}
		}
		if seen < 2 {
			return cluster.Final{Err: fmt.Errorf("want the tunnel and a pod's link:\n%s", table)}
		}
		return nil
	})
	if err != nil {
		return err
	}
	return w.taken(ctx, networkd)
}

func (w *world) startNetworkd(ctx context.Context) error {
	if _, err := w.m2().Run(ctx, bait...); err != nil {
		return err
	}
	return w.start(ctx, networkd, "env", "SYSTEMD_LOG_TARGET=console", "SYSTEMD_LOG_LEVEL=debug", "/lib/systemd/systemd-networkd")
}

func networkdStarts(ctx context.Context, w *world) (string, error) {
	if err := w.write(greed); err != nil {
		return "", err
	}
	return w.undisturbed(ctx, func(ctx context.Context) error {
		if err := w.startNetworkd(ctx); err != nil {
			return err
		}
		return w.settled(ctx, "unmanaged")
	})
}

func networkdReloads(ctx context.Context, w *world) (string, error) {
	return w.undisturbed(ctx, func(ctx context.Context) error {
		if _, err := w.m2().Run(ctx, bait...); err != nil {
			return err
		}
		if _, err := w.run(ctx, "networkctl", "reload"); err != nil {
			return err
		}
		if _, err := w.run(ctx, "networkctl", "reconfigure", "eth0", "bait"); err != nil {
			return err
		}
		return w.settled(ctx, "unmanaged")
	})
}

func networkdAgain(ctx context.Context, w *world) (string, error) {
	return w.undisturbed(ctx, func(ctx context.Context) error {
		if err := w.stop(ctx, networkd); err != nil {
			return err
		}
		if err := w.startNetworkd(ctx); err != nil {
			return err
		}
		return w.settled(ctx, "unmanaged")
	})
}

// networkdWithoutConf shows that the steps before could fail for routes.
func networkdWithoutConf(ctx context.Context, w *world) (string, error) {
	before, err := picture(ctx, w.m2())
	if err != nil {
		return "", err
	}
	if err := w.stop(ctx, networkd); err != nil {
		return "", err
	}
	if _, err := w.m2().Run(ctx, "rm", "/etc/systemd/networkd.conf.d/00-meshd.conf"); err != nil {
		return "", err
	}
	_, heard, err := w.heard(ctx, func(ctx context.Context) error {
		if err := w.startNetworkd(ctx); err != nil {
			return err
		}
		return w.settled(ctx, "unmanaged")
	})
	if err == nil && !slices.ContainsFunc(heard, func(l string) bool { return strings.HasPrefix(l, "Deleted blackhole") }) {
		err = fmt.Errorf("a networkd that manages foreign routes removed none of ours:\n%s", strings.Join(heard, "\n"))
	}
	if err != nil {
		return "", err
	}
	return fmt.Sprintf("%d changes, such as: %s", len(heard), heard[0]), cluster.Until(ctx, func(ctx context.Context) error {
		after, err := picture(ctx, w.m2())
		if err != nil {
			return err
		}
		return differ(before, after)
	})
}

// networkdWithout shows that the steps before could fail for links, the pods'
// included.
func networkdWithout(ctx context.Context, w *world) (string, error) {
	if err := w.stop(ctx, networkd); err != nil {
		return "", err
	}
	if _, err := w.m2().Run(ctx, "rm", "/etc/systemd/network/00-meshd.network"); err != nil {
		return "", err
	}
	_, heard, err := w.heard(ctx, func(ctx context.Context) error {
		if err := w.startNetworkd(ctx); err != nil {
			return err
		}
		return w.settled(ctx, "configuring", "configured", "failed")
	})
	if err == nil && len(heard) == 0 {
		err = errors.New("a networkd that looks after every link changed nothing of ours")
	}
	if err != nil {
		return "", err
	}
	return fmt.Sprintf("%d changes of what is ours, such as: %s", len(heard), heard[0]), nil
}
