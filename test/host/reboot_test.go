package host

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"

	corev1 "k8s.io/api/core/v1"

	"meshd.dev/test/cluster"
	"meshd.dev/test/netlab"
)

// A speaker is a program of the machine that sends to a pod of another one, and
// to addresses of pods and services that nobody has, all the time: from before the network is there until systemd ends what is left.
const (
	spoken  = "spoken in clear"
	speaker = `[Unit]
Description=sends to a pod of another machine
DefaultDependencies=no
[Service]
ExecStart=/usr/bin/bash -c 'while true; do for to in %s; do echo "` + spoken + `" > /dev/udp/$to/7778; done; sleep 0.01; done'
StandardError=null
[Install]
WantedBy=sysinit.target
`
)

// observed has m2 boot anew with a speaker on it, and says what was on the
// underlay meanwhile.
func (w *world) observed(ctx context.Context) (seen netlab.Traffic, note string, err error) {
	m := w.m2()
	to, err := w.PodOn(ctx, "everywhere", "m1")
	if err != nil {
		return seen, "", err
	}
	if err := m.WriteFile("/etc/systemd/system/speaker.service", fmt.Appendf(nil, speaker, addresses(to)), 0o644); err != nil {
		return seen, "", err
	}
	if _, err := m.Run(ctx, "systemctl", "enable", "--now", "speaker"); err != nil {
		return seen, "", err
	}
	capture, err := w.Lab.Capture([]byte(spoken))
	if err != nil {
		return seen, "", err
	}
	down, err := reboot(ctx, m)
	if err == nil {
		err = want(ctx, m, "speaker", "ActiveState=active", "NRestarts=0")
	}
	if err == nil {
		_, err = w.whole(ctx)
	}
	seen = capture.Stop()
	if err == nil && seen.Dropped > 0 {
		err = fmt.Errorf("the capture missed %d packets", seen.Dropped)
	}
	return seen, fmt.Sprintf("down after %s; on the underlay %s", cluster.Short(down), seen), err
}

// addresses are those of a pod, and of a service and a pod that do not exist.
func addresses(p *corev1.Pod) string {
	list := []string{"10.96.77.77", "fd00:10:96::7777", "10.244.77.77", "fd00:10:244:77::77"}
	for _, ip := range p.Status.PodIPs {
		list = append(list, ip.IP)
	}
	return strings.Join(list, " ")
}

func rebooted(ctx context.Context, w *world) (string, error) {
	seen, note, err := w.observed(ctx)
	if err != nil {
		return note, err
	}
	if seen.Marked > 0 {
		return note, fmt.Errorf("%d packets in clear: %s", seen.Marked, strings.Join(seen.MarkedKinds, ", "))
	}
	if seen.Packets["wireguard"] == 0 {
		return note, errors.New("nothing went through the tunnel")
	}
	if err := order(ctx, w.m2(), floorName, "systemd-networkd", "network-online.target", joinName); err != nil {
		return note, err
	}
	return note, errors.Join(want(ctx, w.m2(), floorName, "ActiveState=active", "SubState=exited", "Result=success"),
		want(ctx, w.m2(), joinName, "ActiveState=active", "NRestarts=0"))
}

// order wants that each unit was active before the next one was begun.
func order(ctx context.Context, m *netlab.Machine, units ...string) error {
	var last uint64
	for i, unit := range units {
		p, err := properties(ctx, m, unit)
		if err != nil {
			return err
		}
		begun, active := p["InactiveExitTimestampMonotonic"], p["ActiveEnterTimestampMonotonic"]
		from, err1 := strconv.ParseUint(begun, 10, 64)
		to, err2 := strconv.ParseUint(active, 10, 64)
		if err := errors.Join(err1, err2); err != nil || from == 0 || to == 0 {
			return fmt.Errorf("%s: begun at %q, active at %q", unit, begun, active)
		}
		if from < last {
			return fmt.Errorf("%s was begun %d µs before %s was active", unit, last-from, units[i-1])
		}
		last = to
	}
	return nil
}

// withoutFloor shows that the step before could fail.
func withoutFloor(ctx context.Context, w *world) (string, error) {
	if _, err := w.m2().Run(ctx, "systemctl", "disable", floorName); err != nil {
		return "", err
	}
	seen, note, err := w.observed(ctx)
	if err == nil && seen.Marked == 0 {
		err = errors.New("nothing was in clear, so the step before shows nothing")
	}
	if err != nil {
		return note, err
	}
	_, err = w.m2().Run(ctx, "systemctl", "enable", floorName)
	return note, err
}

func serverRebooted(ctx context.Context, w *world) (string, error) {
	m := w.Machine("m1")
	down, err := reboot(ctx, m)
	if err != nil {
		return "", err
	}
	if err := w.ConnectAdmin(ctx); err != nil { // at once: up has waited for meshd-server
		return "", err
	}
	if _, err := w.whole(ctx); err != nil {
		return "", err
	}
	return "down after " + cluster.Short(down), errors.Join(
		want(ctx, m, serverName, "ActiveState=active", "NRestarts=0"), want(ctx, m, floorName, "ActiveState=active"))
}

// takenOut follows "Removing a machine" of meshd's page.
func takenOut(ctx context.Context, w *world) (string, error) {
	m := w.m2()
	for _, args := range [][]string{{"drain", "m2", "--ignore-daemonsets"}, {"delete", "node", "m2"}} {
		if _, err := w.Kubectl(ctx, args...); err != nil {
			return "", err
		}
	}
	if _, err := m.Run(ctx, "systemctl", "disable", "--now", joinName, floorName); err != nil {
		return "", err
	}
	if _, err := m.Run(ctx, "meshd", "cleanup", "--all", "--force"); err != nil {
		return "", err
	}
	if _, err := reboot(ctx, m); err != nil {
		return "", err
	}
	left, err := m.Run(ctx, "sh", "-c", "ip -o link show; ip route show table all; ip -6 route show table all; nft list tables")
	if err == nil && (ours.MatchString(left) || strings.Contains(left, "inet meshd")) {
		err = fmt.Errorf("left behind:\n%s", left)
	}
	return "", err
}
