package host

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
)

func TestNetworkManager(t *testing.T) {
	tell(t, newWorld(t), []step{
		{"two machines, one with NetworkManager", boot},
		{"a cluster of them, and pods", start},
		{"a greedy NetworkManager starts: what is ours stays", nmStarts},
		{"it reads its configuration anew: stays", nmReloads},
		{"it starts again: stays", nmAgain},
		{"without meshd's drop-in it takes ours as well", nmWithout},
	})
}

const networkManager = "NetworkManager"

// nmGreed has every link managed, also those that Debian's rules for udev keep
// it from. Such a link it connects by itself if it has a carrier and nothing
// else: that is what the host's end of a pod looks like.
var nmGreed = map[string]string{
	"/etc/NetworkManager/conf.d/50-all.conf": `[device-all]
match-device=*
managed=1
`,
	"/etc/NetworkManager/system-connections/eth0.nmconnection": `[connection]
id=eth0
uuid=6b0a3c0e-7e5f-4b8e-9d5c-3b2f1c9a7700
type=ethernet
interface-name=eth0
[ipv4]
method=manual
address1=172.31.77.2/24,172.31.77.254
[ipv6]
method=manual
address1=fd31:77::2/64
`,
}

// nmBait is a link like a pod's.
var nmBait = []string{"sh", "-c", `ip link delete bait 2>/dev/null
ip link add bait type veth peer name bait-peer && ip link set bait-peer up && ip link set bait up`}

// nmSettled waits until NetworkManager has taken eth0 and the bait; ours says
// what it is to have done with ours.
func (w *world) nmSettled(ctx context.Context, wanted func(state string) bool) error {
	return w.until(ctx, networkManager, func(ctx context.Context) error {
		table, err := w.run(ctx, "nmcli", "-t", "-f", "DEVICE,STATE", "device")
		if err != nil {
			return err
		}
		seen := 0
		for line := range strings.Lines(table) {
			name, state, _ := strings.Cut(strings.TrimSpace(line), ":")
			switch {
			case ours.MatchString(name):
				seen++
				if !wanted(state) {
					return fmt.Errorf("%s is %s:\n%s", name, state, table)
				}
			case name == "eth0" && !strings.HasPrefix(state, "connected"), name == "bait" && !strings.HasPrefix(state, "connecting"):
				return fmt.Errorf("%s is %s:\n%s", name, state, table)
			}
		}
		if seen < 2 || !strings.Contains(table, "bait:") {
			return fmt.Errorf("want the tunnel, a pod's link, and the bait:\n%s", table)
		}
		return nil
	})
}

func nmUnmanaged(state string) bool { return state == "unmanaged" }

func (w *world) startNM(ctx context.Context) error {
	if _, err := w.m2().Run(ctx, nmBait...); err != nil {
		return err
	}
	return w.start(ctx, networkManager, "NetworkManager", "--debug")
}

func nmStarts(ctx context.Context, w *world) (string, error) {
	if err := w.write(nmGreed); err != nil {
		return "", err
	}
	return w.undisturbed(ctx, func(ctx context.Context) error {
		if err := w.startNM(ctx); err != nil {
			return err
		}
		return w.nmSettled(ctx, nmUnmanaged)
	})
}

func nmReloads(ctx context.Context, w *world) (string, error) {
	return w.undisturbed(ctx, func(ctx context.Context) error {
		for _, argv := range [][]string{nmBait, among("nmcli", "general", "reload"), among("nmcli", "connection", "reload"), among("nmcli", "connection", "up", "eth0")} {
			if _, err := w.m2().Run(ctx, argv...); err != nil {
				return err
			}
		}
		return w.nmSettled(ctx, nmUnmanaged)
	})
}

func nmAgain(ctx context.Context, w *world) (string, error) {
	return w.undisturbed(ctx, func(ctx context.Context) error {
		if err := w.stop(ctx, networkManager); err != nil {
			return err
		}
		if err := w.startNM(ctx); err != nil {
			return err
		}
		return w.nmSettled(ctx, nmUnmanaged)
	})
}

// nmWithout shows that the steps before could fail.
func nmWithout(ctx context.Context, w *world) (string, error) {
	if err := w.stop(ctx, networkManager); err != nil {
		return "", err
	}
	if _, err := w.m2().Run(ctx, "rm", "/etc/NetworkManager/conf.d/00-meshd.conf"); err != nil {
		return "", err
	}
	_, heard, err := w.heard(ctx, func(ctx context.Context) error {
		if err := w.startNM(ctx); err != nil {
			return err
		}
		return w.nmSettled(ctx, func(state string) bool { return strings.HasPrefix(state, "connect") })
	})
	if err == nil && len(heard) == 0 {
		err = errors.New("a NetworkManager that looks after every link changed nothing of ours")
	}
	if err != nil {
		return "", err
	}
	return fmt.Sprintf("%d changes of what is ours, such as: %s", len(heard), heard[0]), nil
}
