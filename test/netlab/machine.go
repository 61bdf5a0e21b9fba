package netlab

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"
)

// machine is what lab.json knows of one.
type machine struct {
	Name   string  `json:"name"`
	Number int     `json:"number"`
	First  process `json:"first"` // its process 1; the zero process while off
	System *System `json:"system,omitempty"`
}

// A Machine can be switched on and off and runs commands while it is on.
type Machine struct {
	lab *Lab
	*machine
}

// IPv4 and IPv6 are the machine's addresses on the underlay.
func (m *machine) IPv4() netip.Addr { return nth(Underlay4, m.Number) }
func (m *machine) IPv6() netip.Addr { return nth(Underlay6, m.Number) }

// link is the name of the underlay's end of the machine's cable.
func (m *machine) link() string { return "v" + strconv.Itoa(m.Number) }

// mac is the same at every boot, as on a real network card.
func (m *machine) mac() net.HardwareAddr {
	return net.HardwareAddr{0x02, 0x4d, 0x4c, 0, 0, byte(m.Number)}
}

func (m *Machine) dir() string   { return filepath.Join(m.lab.dir(), m.Name) }
func (m *Machine) group() string { return m.lab.group() + "/" + m.Name }

// Add gives the lab one more machine, installed but not switched on: an empty
// disk with the host's /etc.
func (l *Lab) Add(ctx context.Context, name string) (*Machine, error) {
	if err := checkName(name, 16); err != nil {
		return nil, fmt.Errorf("machine name: %w", err)
	}
	if l.Machine(name) != nil {
		return nil, fmt.Errorf("machine %s exists already", name)
	}
	if len(l.state.Machines) >= 250 {
		return nil, errors.New("a lab has at most 250 machines")
	}
	l.state.Machines = append(l.state.Machines, &machine{Name: name, Number: len(l.state.Machines) + 1})
	if err := l.save(); err != nil {
		return nil, err
	}
	m := l.Machine(name)
	if err := m.install(ctx); err != nil {
		return nil, fmt.Errorf("install machine %s: %w", name, err)
	}
	return m, nil
}

// install makes the machine's disk.
func (m *Machine) install(ctx context.Context) error {
	disk := filepath.Join(m.dir(), "disk")
	for _, dir := range []string{"etc", "opt/cni/bin", "srv", "root", "home", "local/bin", "local/sbin", "local/lib",
		"var/lib", "var/log/pods", "var/log/containers", "var/cache", "var/tmp", "var/lib/containerd", "var/lib/meshd"} {
		if err := os.MkdirAll(filepath.Join(disk, dir), 0o755); err != nil {
			return err
		}
	}
	if err := os.Chmod(filepath.Join(disk, "var/tmp"), 0o1777); err != nil {
		return err
	}
	for link, to := range map[string]string{"var/run": "/run", "var/lock": "/run/lock"} {
		if err := os.Symlink(to, filepath.Join(disk, link)); err != nil {
			return err
		}
	}
	if out, err := exec.CommandContext(ctx, "cp", "-a", "/etc/.", filepath.Join(disk, "etc")).CombinedOutput(); err != nil {
		return fmt.Errorf("copy /etc: %w: %s", err, out)
	}
	return m.writeEtc(filepath.Join(disk, "etc"))
}

// writeEtc makes the host's /etc the machine's own.
func (m *Machine) writeEtc(etc string) error {
	for _, other := range []string{"cni", "containerd", "meshd", "kubernetes", "resolv.conf", "hostname", "hosts", "machine-id"} {
		if err := os.RemoveAll(filepath.Join(etc, other)); err != nil {
			return err
		}
	}
	files := map[string]string{
		"hostname":               m.Name + "\n",
		"hosts":                  fmt.Sprintf("127.0.0.1 localhost\n::1 localhost\n%s %s\n", m.IPv4(), m.Name),
		"resolv.conf":            fmt.Sprintf("nameserver %s\n", gateway4),
		"machine-id":             fmt.Sprintf("%032x\n", m.Number),
		"containerd/config.toml": containerdConfig,
	}
	for name, text := range files {
		path := filepath.Join(etc, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			return err
		}
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			return err
		}
	}
	return os.MkdirAll(filepath.Join(etc, "cni/net.d"), 0o755)
}

// On reports whether the machine is switched on.
func (m *Machine) On() bool { return m.First.alive() }

// PowerOn boots the machine from its disk. Nothing of ours runs in it yet.
func (m *Machine) PowerOn(ctx context.Context) error {
	if m.On() {
		return fmt.Errorf("power on %s: it is on", m.Name)
	}
	if err := m.boot(ctx); err != nil {
		return errors.Join(fmt.Errorf("power on %s: %w", m.Name, err), m.PowerOff(ctx))
	}
	m.lab.log.Info("powered on", "machine", m.Name, "pid", m.First.Pid)
	return nil
}

func (m *Machine) boot(ctx context.Context) error {
	if err := makeGroups(m.lab.state.Cgroups, m.group()); err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Join(m.dir(), "root"), 0o755); err != nil {
		return err
	}
	log, err := os.OpenFile(filepath.Join(m.dir(), "console"), os.O_CREATE|os.O_APPEND|os.O_RDWR, 0o600)
	if err != nil {
		return err
	}
	defer log.Close()
	from, err := log.Seek(0, 2)
	if err != nil {
		return err
	}
	order := bootOrder{Hostname: m.Name, Dir: m.dir(), Group: m.group(), Cgroups: m.lab.state.Cgroups,
		Binaries: m.lab.state.Binaries, System: m.System}
	if !m.lab.state.HostBoot {
		order.BootID = uuid()
	}
	cmd := helper(powerName, order)
	cmd.Stderr = log
	out, err := cmd.Output()
	if err != nil {
		why := make([]byte, 4096)
		n, _ := log.ReadAt(why, from)
		return fmt.Errorf("%w: %s", err, bytes.TrimSpace(why[:n]))
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(out)))
	if err != nil {
		return err
	}
	m.First = find(pid)
	if err := m.lab.save(); err != nil {
		return err
	}
	return m.lab.plug(m.machine)
}

// PowerOff is a power cut: every process of the machine dies at once, and with
// them its mounts and network. The disk stays. It is no error if it is off.
func (m *Machine) PowerOff(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	err := m.First.kill(ctx)
	if err == nil {
		err = m.killRest(ctx)
	}
	if err = errors.Join(err, m.lab.unplug(m.machine), removeGroups(m.lab.state.Cgroups, m.group())); err != nil {
		return fmt.Errorf("power off %s: %w", m.Name, err)
	}
	m.First = process{}
	m.lab.log.Info("powered off", "machine", m.Name)
	return m.lab.save()
}

// killRest ends what is left in the machine's cgroups: processes on their way
// out, helpers of ours that wait for a command in it, or all of a machine whose
// first process was lost before lab.json knew it.
func (m *Machine) killRest(ctx context.Context) error {
	for _, pid := range groupPids(m.lab.state.Cgroups, m.group()) {
		if err := find(pid).kill(ctx); err != nil {
			return err
		}
	}
	return nil
}

// Command is argv, run inside the machine: in its namespaces, its cgroup, from
// its root folder, with an environment of its own (cmd.Env holds what is added
// to it). The command dies when ctx ends or this program does.
func (m *Machine) Command(ctx context.Context, argv ...string) *exec.Cmd {
	h := helper(enterName, m.order(argv, ""))
	cmd := exec.CommandContext(ctx, h.Path)
	cmd.Args = h.Args
	return cmd
}

func (m *Machine) order(argv []string, log string) enterOrder {
	return enterOrder{Pid: m.First.Pid, Group: m.group(), Cgroups: m.lab.state.Cgroups, Argv: argv, Log: log}
}

// Run runs argv inside the machine and returns what it printed; an error holds
// what it printed to standard error.
func (m *Machine) Run(ctx context.Context, argv ...string) (string, error) {
	if !m.On() {
		return "", fmt.Errorf("%s: run %s: it is off", m.Name, strings.Join(argv, " "))
	}
	cmd := m.Command(ctx, argv...)
	var out, errOut bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errOut
	if err := cmd.Run(); err != nil {
		return out.String(), fmt.Errorf("%s: %s: %w: %s", m.Name, strings.Join(argv, " "), err, bytes.TrimSpace(errOut.Bytes()))
	}
	return out.String(), nil
}

// Start starts argv as a daemon of the machine that writes to /var/log/NAME.log
// there, and returns its process number on the host. It outlives this program.
func (m *Machine) Start(ctx context.Context, name string, argv ...string) (int, error) {
	if !m.On() {
		return 0, fmt.Errorf("%s: start %s: it is off", m.Name, name)
	}
	h := helper(enterName, m.order(argv, "/var/log/"+name+".log"))
	cmd := exec.CommandContext(ctx, h.Path)
	cmd.Args = h.Args
	out, err := cmd.Output()
	if err != nil {
		var exit *exec.ExitError
		if errors.As(err, &exit) {
			err = fmt.Errorf("%w: %s", err, bytes.TrimSpace(exit.Stderr))
		}
		return 0, fmt.Errorf("%s: start %s: %w", m.Name, name, err)
	}
	return strconv.Atoi(strings.TrimSpace(string(out)))
}

// Processes are those of the machine, containers' included, without the
// machine's first one.
func (m *Machine) Processes() []Process {
	var ps []Process
	for _, pid := range groupPids(m.lab.state.Cgroups, m.group()) {
		if pid == m.First.Pid {
			continue
		}
		if p := readProcess(pid); len(p.Argv) > 0 && p.Argv[0] != enterName {
			ps = append(ps, p)
		}
	}
	return ps
}

// Alive reports whether the process of that number on the host runs.
func Alive(pid int) bool { return find(pid).alive() }

// Kill sends SIGKILL to a process of a machine and waits until it is gone.
func Kill(ctx context.Context, pid int) error { return find(pid).kill(ctx) }

// Path is where the host finds a file of the running machine.
func (m *Machine) Path(path string) string {
	return filepath.Join("/proc", strconv.Itoa(m.First.Pid), "root", path)
}

// Disk is where the host finds a file of the machine's disk, on or off:
// anything below /etc, /var, /opt, /srv, /root and /home.
func (m *Machine) Disk(path string) string { return filepath.Join(m.dir(), "disk", path) }

// WriteFile writes a file of the machine's disk, making its folder.
func (m *Machine) WriteFile(path string, b []byte, mode os.FileMode) error {
	if err := os.MkdirAll(filepath.Dir(m.Disk(path)), 0o755); err != nil {
		return err
	}
	return os.WriteFile(m.Disk(path), b, mode)
}

// NetNS is the path of the machine's network namespace.
func (m *Machine) NetNS() string { return fmt.Sprintf("/proc/%d/ns/net", m.First.Pid) }

// InNetNS runs do on a thread inside the machine's network namespace: sockets
// it opens are the machine's and stay so.
func (m *Machine) InNetNS(do func() error) error { return inNamespace(m.NetNS(), do) }

// InNetNS is the same for the namespace of any process of the host, a pod's too.
func InNetNS(pid int, do func() error) error {
	return inNamespace(fmt.Sprintf("/proc/%d/ns/net", pid), do)
}

// DialContext connects from the machine; address must be numeric.
func (m *Machine) DialContext(ctx context.Context, network, address string) (net.Conn, error) {
	if !m.On() {
		return nil, fmt.Errorf("dial %s from %s: it is off", address, m.Name)
	}
	var conn net.Conn
	err := m.InNetNS(func() (err error) {
		conn, err = (&net.Dialer{}).DialContext(ctx, network, address)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("from %s: %w", m.Name, err)
	}
	return conn, nil
}

// uuid is a random one (RFC 9562 version 4).
func uuid() string {
	b := make([]byte, 16)
	_, _ = rand.Read(b)
	b[6], b[8] = b[6]&0x0f|0x40, b[8]&0x3f|0x80
	return fmt.Sprintf("%x-%x-%x-%x-%x", b[:4], b[4:6], b[6:8], b[8:10], b[10:])
}
