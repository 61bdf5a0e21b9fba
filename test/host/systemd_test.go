package host

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"meshd.dev/test/cluster"
	"meshd.dev/test/netlab"
)

// The units of manifests/systemd, installed as their page says, under a systemd
// that is process 1 of its machine.
func TestSystemd(t *testing.T) {
	w := newWorld(t)
	t.Cleanup(func() {
		if t.Failed() {
			w.journals(t)
		}
	})
	tell(t, w, []step{
		{"two machines with systemd as their first process", bootSystemd},
		{"meshd-server is started: the API serves when systemctl returns", serverUnit},
		{"meshd-join is started: the machine has joined when systemctl returns", joinUnit},
		{"pods run, and tunnels are up", podsUnderSystemd},
		{"the journal has what meshd says", journalHasIt},
		{"reload and re-execution of systemd: meshd is not touched", reloaded},
		{"restart: pods and tunnel process stay, a connection lives", undisturbedBy([]string{"systemctl", "restart", "meshd-join"})},
		{"stop and start: stay", stopped},
		{"kill -s KILL of meshd: started again, stay", killedMain},
		{"kill -s KILL of all of it: the tunnel process is started again, a connection lives", killedAll},
		{"restart of the server: stay", serverRestarted},
		{"a mistake in the settings is named, and mended", mistake},
		{"m2 boots anew: everything comes back, nothing in clear", rebooted},
		{"without meshd-floor something is in clear", withoutFloor},
		{"the server boots anew: everything comes back", serverRebooted},
		{"m2 is taken out, as the page says", takenOut},
	})
}

func (w *world) journals(t *testing.T) {
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	if w.Lab == nil {
		return
	}
	for _, m := range w.Lab.Machines() {
		if m.On() {
			out, err := m.Run(ctx, "sh", "-c", "journalctl --no-pager --lines=60 --output=short-precise; ss -tuanp")
			t.Logf("--- %s: end of the journal, and sockets (%v)\n%s", m.Name, err, out)
		}
	}
}

const (
	serverName = "meshd-server"
	joinName   = "meshd-join"
	floorName  = "meshd-floor"
)

// install puts the units where the page says; the programs are there.
func (w *world) installUnits(ctx context.Context, m *netlab.Machine) error {
	units, err := filepath.Glob("../../manifests/systemd/*.service")
	if err != nil || len(units) == 0 {
		return fmt.Errorf("no units: %w", err)
	}
	for _, unit := range units {
		b, err := os.ReadFile(unit)
		if err != nil {
			return err
		}
		if err := m.WriteFile("/etc/systemd/system/"+filepath.Base(unit), b, 0o644); err != nil {
			return err
		}
	}
	_, err = m.Run(ctx, "systemctl", "daemon-reload")
	return err
}

func serverUnit(ctx context.Context, w *world) (string, error) {
	m := w.Machine("m1")
	if err := w.installUnits(ctx, m); err != nil {
		return "", err
	}
	if _, err := m.Run(ctx, "systemctl", "enable", "--now", floorName, serverName); err != nil {
		return "", err
	}
	if err := w.ConnectAdmin(ctx); err != nil { // at once
		return "", err
	}
	return "", errors.Join(
		want(ctx, m, serverName, "ActiveState=active", "SubState=running", "Type=notify", "NRestarts=0", "UnitFileState=enabled"),
		want(ctx, m, floorName, "ActiveState=inactive", "ConditionResult=no", "UnitFileState=enabled"))
}

func joinUnit(ctx context.Context, w *world) (string, error) {
	m := w.m2()
	if err := w.installUnits(ctx, m); err != nil {
		return "", err
	}
	token, err := w.Token(ctx)
	if err != nil {
		return "", err
	}
	if err := m.WriteFile("/etc/meshd/join.env", []byte("JOIN="+w.Machine("m1").IPv4().String()+":6443 --token "+token+"\n"), 0o600); err != nil {
		return "", err
	}
	if _, err := m.Run(ctx, "systemctl", "enable", "--now", floorName, joinName); err != nil {
		return "", err
	}
	if _, err := w.API.CoreV1().Nodes().Get(ctx, "m2", metav1.GetOptions{}); err != nil { // at once
		return "", err
	}
	if err := os.Remove(m.Disk("/etc/meshd/join.env")); err != nil {
		return "", err
	}
	return "", errors.Join(want(ctx, m, joinName, "ActiveState=active", "SubState=running", "NRestarts=0"),
		want(ctx, m, floorName, "ActiveState=inactive", "ConditionResult=no"))
}

func podsUnderSystemd(ctx context.Context, w *world) (string, error) {
	if err := w.Machine("m1").WriteFile("/root/everywhere.yaml", []byte(everywhere), 0o644); err != nil {
		return "", err
	}
	if _, err := w.NodesReady(ctx, both); err != nil {
		return "", err
	}
	if _, err := w.Kubectl(ctx, "apply", "-f", "/root/everywhere.yaml"); err != nil {
		return "", err
	}
	return w.whole(ctx)
}

var both = []string{"m1", "m2"}

// whole waits until both nodes, their pods and their tunnels are well.
func (w *world) whole(ctx context.Context) (string, error) {
	if _, err := w.NodesReady(ctx, both); err != nil {
		return "", err
	}
	if _, err := w.ReadyOn(ctx, "everywhere", len(both)); err != nil {
		return "", err
	}
	return w.StatusHealthy(ctx, both)
}

func journalHasIt(ctx context.Context, w *world) (string, error) {
	for m, line := range map[*netlab.Machine][2]string{
		w.Machine("m1"): {serverName, "meshd server is ready"}, w.m2(): {joinName, "meshd node runs"},
	} {
		if err := says(ctx, m, line[0], line[1]); err != nil {
			return "", err
		}
	}
	return "", nil
}

// outlives are the processes of a machine that have to outlive meshd, by their
// number: pods, their shims, and the process that carries the tunnels.
func outlives(m *netlab.Machine) (list []string) {
	for _, p := range m.Processes() {
		if name := p.Name(); name == "echo" || name == "pause" || name == tunnelProcess || strings.HasPrefix(name, "containerd-shim") {
			list = append(list, fmt.Sprint(p.Pid, " ", name))
		}
	}
	slices.Sort(list)
	return list
}

const tunnelProcess = "meshd-wireguard"

// kept does something to the meshd of m2 while a connection goes through its
// tunnel, and wants that nothing else ends.
func (w *world) kept(ctx context.Context, do func(context.Context, *netlab.Machine) error) (string, error) {
	before := outlives(w.m2())
	if !slices.ContainsFunc(before, isTunnel) || len(before) < 4 {
		return "", fmt.Errorf("want a pod and a tunnel process, have %v", before)
	}
	note, err := w.connected(ctx, do)
	if err != nil {
		return "", err
	}
	if after := outlives(w.m2()); !slices.Equal(before, after) {
		return "", fmt.Errorf("before ran\n%s\nnow run\n%s", strings.Join(before, "\n"), strings.Join(after, "\n"))
	}
	return note, nil
}

// connected does something while a connection between the pods goes on, and
// wants that it does not break.
func (w *world) connected(ctx context.Context, do func(context.Context, *netlab.Machine) error) (string, error) {
	from, err := w.PodOn(ctx, "everywhere", "m1")
	if err != nil {
		return "", err
	}
	to, err := w.PodOn(ctx, "everywhere", "m2")
	if err != nil {
		return "", err
	}
	transfer, err := w.StartTransfer(ctx, from, cluster.Stream(to), "unit", 1<<20)
	if err != nil {
		return "", err
	}
	if err := do(ctx, w.m2()); err != nil {
		return "", err
	}
	if _, err := w.whole(ctx); err != nil {
		return "", err
	}
	p, err := transfer.Stop(ctx)
	return fmt.Sprintf("a connection of %d KB with a longest silence of %s", p.Bytes>>10, cluster.Short(p.Silence)), err
}

// undisturbedBy runs a command that replaces the meshd of m2.
func undisturbedBy(argv []string) func(context.Context, *world) (string, error) {
	return func(ctx context.Context, w *world) (string, error) {
		return w.kept(ctx, func(ctx context.Context, m *netlab.Machine) error {
			return replaced(ctx, m, joinName, func() error {
				_, err := m.Run(ctx, argv...)
				return errors.Join(err, want(ctx, m, joinName, "ActiveState=active", "SubState=running"))
			})
		})
	}
}

// replaced wants that a unit's main process is another one afterwards.
func replaced(ctx context.Context, m *netlab.Machine, unit string, do func() error) error {
	before, err := properties(ctx, m, unit)
	if err != nil {
		return err
	}
	if err := do(); err != nil {
		return err
	}
	after, err := properties(ctx, m, unit)
	if err == nil && (after["MainPID"] == before["MainPID"] || after["MainPID"] == "0") {
		err = fmt.Errorf("main process of %s was %s and is %s", unit, before["MainPID"], after["MainPID"])
	}
	return err
}

func stopped(ctx context.Context, w *world) (string, error) {
	return w.kept(ctx, func(ctx context.Context, m *netlab.Machine) error {
		if _, err := m.Run(ctx, "systemctl", "stop", joinName); err != nil {
			return err
		}
		if err := want(ctx, m, joinName, "ActiveState=inactive", "Result=success", "MainPID=0"); err != nil {
			return err
		}
		// Its pod has an answer, through the tunnel of a machine without meshd.
		to, err := w.PodOn(ctx, "everywhere", "m2")
		if err != nil {
			return err
		}
		if _, err := w.AskFrom(ctx, w.Machine("m1"), to.Status.PodIP, "GET", "/"); err != nil {
			return err
		}
		if _, err := m.Run(ctx, "systemctl", "start", joinName); err != nil {
			return err
		}
		return want(ctx, m, joinName, "ActiveState=active")
	})
}

// again waits until systemd has started a unit once more by itself.
func again(ctx context.Context, m *netlab.Machine, unit string, do func() error) error {
	before, err := properties(ctx, m, unit)
	if err != nil {
		return err
	}
	n, err := strconv.Atoi(before["NRestarts"])
	if err != nil {
		return err
	}
	return replaced(ctx, m, unit, func() error {
		if err := do(); err != nil {
			return err
		}
		return cluster.Until(ctx, func(ctx context.Context) error {
			return want(ctx, m, unit, "ActiveState=active", fmt.Sprint("NRestarts=", n+1))
		})
	})
}

func killedMain(ctx context.Context, w *world) (string, error) {
	return w.kept(ctx, func(ctx context.Context, m *netlab.Machine) error {
		return again(ctx, m, joinName, func() error {
			_, err := m.Run(ctx, "systemctl", "kill", "-s", "KILL", "--kill-whom=main", joinName)
			return err
		})
	})
}

func killedAll(ctx context.Context, w *world) (string, error) {
	before := slices.DeleteFunc(outlives(w.m2()), isTunnel)
	note, err := w.connected(ctx, func(ctx context.Context, m *netlab.Machine) error {
		return again(ctx, m, joinName, func() error {
			_, err := m.Run(ctx, "systemctl", "kill", "-s", "KILL", joinName)
			return err
		})
	})
	if err != nil {
		return "", err
	}
	if after := slices.DeleteFunc(outlives(w.m2()), isTunnel); !slices.Equal(before, after) {
		return "", fmt.Errorf("pods were %v, are %v", before, after)
	}
	return note, nil
}

func isTunnel(s string) bool { return strings.HasSuffix(s, " "+tunnelProcess) }

func reloaded(ctx context.Context, w *world) (string, error) {
	for _, verb := range []string{"daemon-reload", "daemon-reexec"} {
		before, err := properties(ctx, w.m2(), joinName)
		if err != nil {
			return "", err
		}
		if _, err := w.m2().Run(ctx, "systemctl", verb); err != nil {
			return "", err
		}
		if err := want(ctx, w.m2(), joinName, "ActiveState=active", "NRestarts=0", "MainPID="+before["MainPID"]); err != nil {
			return "", fmt.Errorf("%s: %w", verb, err)
		}
	}
	return "", nil
}

func serverRestarted(ctx context.Context, w *world) (string, error) {
	m, before := w.Machine("m1"), outlives(w.Machine("m1"))
	note, err := w.connected(ctx, func(ctx context.Context, _ *netlab.Machine) error {
		err := replaced(ctx, m, serverName, func() error {
			_, err := m.Run(ctx, "systemctl", "restart", serverName)
			return err
		})
		return errors.Join(err, w.ConnectAdmin(ctx)) // at once
	})
	if err != nil {
		return "", err
	}
	if after := outlives(m); !slices.Equal(before, after) {
		return "", fmt.Errorf("before ran %v, now run %v", before, after)
	}
	return note, nil
}

func mistake(ctx context.Context, w *world) (string, error) {
	const config = "/etc/meshd/config.yaml"
	return w.kept(ctx, func(ctx context.Context, m *netlab.Machine) error {
		if err := m.WriteFile(config, []byte("node-nam: m2\n"), 0o644); err != nil {
			return err
		}
		if _, err := m.Run(ctx, "systemctl", "restart", joinName); err == nil {
			return errors.New("systemctl restart says nothing of the mistake")
		}
		status, _ := m.Run(ctx, "systemctl", "status", "--no-pager", joinName) // of an ended unit the status is 3
		if !strings.Contains(status, "status=1/FAILURE") {
			return fmt.Errorf("systemctl status shows no failure:\n%s", status)
		}
		if err := cluster.Until(ctx, func(ctx context.Context) error { return says(ctx, m, joinName, "node-nam: no such setting") }); err != nil {
			return err
		}
		if err := os.Remove(m.Disk(config)); err != nil {
			return err
		}
		return cluster.Until(ctx, func(ctx context.Context) error { return want(ctx, m, joinName, "ActiveState=active") })
	})
}
