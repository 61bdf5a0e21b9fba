package netlab

// Addresses: the underlay's (see doc.go).

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"

	"meshd.dev/test/images"
)

func TestMain(m *testing.M) {
	Init()
	os.Exit(m.Run())
}

// need skips the test, by name of what is missing, where it cannot run.
func need(t *testing.T, tools ...string) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	for _, tool := range tools {
		if _, err := exec.LookPath(tool); err != nil {
			t.Skipf("needs %s", tool)
		}
	}
}

// newLab makes a lab of n machines that are on, and checks afterwards that
// nothing of it is left.
func newLab(t *testing.T, n int) (*Lab, []*Machine) {
	t.Helper()
	ctx := t.Context()
	l, err := New(ctx, Config{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := l.Destroy(context.Background()); err != nil {
			t.Error(err)
		}
		if traces := l.Traces(); len(traces) > 0 {
			t.Errorf("left behind:\n%s", strings.Join(traces, "\n"))
		}
	})
	for i := range n {
		m, err := l.Add(ctx, fmt.Sprintf("m%d", i+1))
		if err != nil {
			t.Fatal(err)
		}
		if err := m.PowerOn(ctx); err != nil {
			t.Fatal(err)
		}
	}
	return l, l.Machines()
}

func TestMachinesReachEachOther(t *testing.T) {
	need(t)
	l, ms := newLab(t, 2)
	const marker = "a line in clear"
	c, err := l.Capture([]byte(marker), netip.MustParsePrefix("10.244.0.0/16"))
	if err != nil {
		t.Fatal(err)
	}
	for _, addr := range []netip.Addr{ms[1].IPv4(), ms[1].IPv6()} {
		if err := say(t.Context(), ms[0], ms[1], netip.AddrPortFrom(addr, 7000), marker); err != nil {
			t.Error(err)
		}
	}
	seen := c.Stop()
	t.Log(seen)
	if seen.Marked != 2 || seen.Inner != 0 || seen.Dropped != 0 || seen.Packets["tcp/7000"] == 0 || seen.Packets["arp"] == 0 {
		t.Errorf("the capture saw %s\n%v", seen, seen.MarkedKinds)
	}
}

// say sends text from one machine to another over TCP.
func say(ctx context.Context, from, to *Machine, addr netip.AddrPort, text string) error {
	var l net.Listener
	if err := to.InNetNS(func() (err error) { l, err = net.Listen("tcp", addr.String()); return }); err != nil {
		return err
	}
	defer l.Close()
	heard := make(chan string, 1)
	go func() {
		conn, err := l.Accept()
		if err != nil {
			heard <- err.Error()
			return
		}
		b, _ := io.ReadAll(conn)
		conn.Close()
		heard <- string(b)
	}()
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	conn, err := from.DialContext(ctx, "tcp", addr.String())
	if err != nil {
		return err
	}
	if _, err := io.WriteString(conn, text); err != nil {
		return err
	}
	conn.Close()
	if got := <-heard; got != text {
		return fmt.Errorf("heard %q, want %q", got, text)
	}
	return nil
}

func TestCommandsAreInside(t *testing.T) {
	need(t)
	_, ms := newLab(t, 1)
	m := ms[0]
	for _, c := range []struct{ name, script, want string }{
		{"host name", "hostname; cat /etc/hostname", "m1\nm1\n"},
		{"first process", "tr '\\0' ' ' </proc/1/cmdline | cut -d' ' -f1", "netlab-init\n"},
		{"cgroup is the root", "cut -d: -f3 /proc/self/cgroup | sort -u", "/\n"},
		{"network", "ls /sys/class/net | sort | tr '\\n' ' '", "eth0 lo "},
		{"host's files are not there", "ls -d /work /farm /old 2>/dev/null | wc -l", "0\n"},
		{"programs are read-only", "touch /usr/bin/x 2>/dev/null || echo no", "no\n"},
		{"nothing is left of the way in", "ls /proc/self/fd | tr '\\n' ' '", "0 1 2 3 "},
		{"environment", "echo $HOME", "/root\n"},
	} {
		t.Run(c.name, func(t *testing.T) {
			got, err := m.Run(t.Context(), "sh", "-c", c.script)
			if err != nil {
				t.Fatal(err)
			}
			if c.name == "cgroup is the root" && unified(m.lab.state.Cgroups) {
				c.want = "/" + leaf + "\n"
			}
			if got != c.want {
				t.Errorf("%s: got %q, want %q", c.script, got, c.want)
			}
		})
	}
	if _, err := m.Run(t.Context(), "sh", "-c", "echo why >&2; exit 7"); err == nil ||
		!strings.Contains(err.Error(), "exit status 7: why") {
		t.Errorf("a failing command says %v", err)
	}
}

func TestACommandDiesWithItsContext(t *testing.T) {
	need(t)
	_, ms := newLab(t, 1)
	ctx, cancel := context.WithCancel(t.Context())
	cmd := ms[0].Command(ctx, "sleep", "1000")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	sleeps := func() bool { return runs(ms[0], "sleep") }
	deadline, stop := context.WithTimeout(t.Context(), 10*time.Second)
	defer stop()
	if err := until(deadline, sleeps); err != nil {
		t.Fatal("sleep did not start")
	}
	cancel()
	_ = cmd.Wait()
	if err := until(deadline, func() bool { return !sleeps() }); err != nil {
		t.Error("sleep outlives its context")
	}
}

func runs(m *Machine, name string) bool {
	return slices.ContainsFunc(m.Processes(), func(p Process) bool { return p.Name() == name })
}

func TestPowerCycle(t *testing.T) {
	need(t)
	_, ms := newLab(t, 1)
	m, ctx := ms[0], t.Context()
	script := `cat /proc/sys/kernel/random/boot_id
for d in /etc /var/lib/meshd /opt /root /run /tmp /mnt; do [ -e $d/mark ] && echo $d; touch $d/mark; done; true`
	first, err := m.Run(ctx, "sh", "-c", script)
	if err != nil {
		t.Fatal(err)
	}
	pid, err := m.Start(ctx, "sleeper", "sleep", "1000")
	if err != nil {
		t.Fatal(err)
	}
	if !Alive(pid) {
		t.Fatal("the daemon does not run")
	}
	if err := m.PowerOff(ctx); err != nil {
		t.Fatal(err)
	}
	if Alive(pid) || m.On() {
		t.Error("the machine lives on without power")
	}
	if err := m.PowerOn(ctx); err != nil {
		t.Fatal(err)
	}
	second, err := m.Run(ctx, "sh", "-c", script)
	if err != nil {
		t.Fatal(err)
	}
	id1, _, _ := strings.Cut(first, "\n")
	id2, kept, _ := strings.Cut(second, "\n")
	if id1 == id2 {
		t.Error("the boot id did not change")
	}
	if want := "/etc\n/var/lib/meshd\n/opt\n/root\n"; kept != want {
		t.Errorf("kept across the power cut:\n%swant\n%s", kept, want)
	}
}

func TestContainersRun(t *testing.T) {
	need(t, "containerd", "runc", "ctr", "go")
	_, ms := newLab(t, 1)
	m, ctx := ms[0], t.Context()
	tars, err := images.Build(ctx, t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	for boot := range 2 {
		if _, err := m.StartContainerd(ctx); err != nil {
			t.Fatal(err)
		}
		if boot == 0 {
			for _, tar := range tars {
				if err := m.Import(ctx, tar); err != nil {
					t.Fatal(err)
				}
			}
		}
		id := fmt.Sprintf("c%d", boot)
		if out, err := m.Run(ctx, "ctr", "-n", "k8s.io", "run", "-d", images.Pause, id); err != nil {
			t.Fatal(out, err)
		}
		deadline, cancel := context.WithTimeout(ctx, 10*time.Second)
		if err := until(deadline, func() bool { return runs(m, "pause") }); err != nil {
			t.Errorf("no container process among %v", m.Processes())
		}
		cancel()
		if err := m.PowerOff(ctx); err != nil {
			t.Fatal(err)
		}
		if err := m.PowerOn(ctx); err != nil {
			t.Fatal(err)
		}
	}
}

func TestSweepTakesWhatADeadOwnerLeft(t *testing.T) {
	need(t)
	l, ms := newLab(t, 1)
	l.state.Owner.Start++ // as if the number had come round to another process
	if err := l.save(); err != nil {
		t.Fatal(err)
	}
	first := ms[0].First
	if err := Sweep(t.Context()); err != nil {
		t.Fatal(err)
	}
	if first.alive() || len(l.Traces()) > 0 {
		t.Errorf("left behind: %v", l.Traces())
	}
}

func TestParseHierarchies(t *testing.T) {
	for _, c := range []struct{ name, mountinfo, want string }{
		{"v2", "30 22 0:27 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n", "[{/sys/fs/cgroup true }]"},
		{"v1 with names", `31 30 0:28 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct
39 30 0:36 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,xattr,release_agent=/lib/x,name=systemd
40 30 0:37 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw
`, "[{/sys/fs/cgroup/cpu,cpuacct false cpu,cpuacct} {/sys/fs/cgroup/systemd false none,name=systemd} {/sys/fs/cgroup/unified true }]"},
		{"none", "22 1 254:0 / / rw - ext4 /dev/vda rw\n", "[]"},
		{"cut short", "30 22 0:27 / /sys/fs/cgroup rw - cgroup2\n", "[]"},
	} {
		t.Run(c.name, func(t *testing.T) {
			if got := fmt.Sprint(parseHierarchies(c.mountinfo)); got != c.want {
				t.Errorf("got  %s\nwant %s", got, c.want)
			}
		})
	}
}

func FuzzClassify(f *testing.F) {
	f.Add([]byte{})
	f.Add(append(make([]byte, 12), 0x08, 0x00, 0x45, 0, 0, 0))
	f.Fuzz(func(t *testing.T, frame []byte) {
		if kind, _, _ := classify(frame); kind == "" {
			t.Error("a frame without a kind")
		}
	})
}
