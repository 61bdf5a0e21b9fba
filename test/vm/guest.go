package vm

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
)

const qemu = "qemu-system-x86_64"

// Time in a guest is what its processor has done, an instruction a nanosecond,
// and goes on at once where it waits. So it is a machine of a thousand million
// instructions a second whatever this one has to do beside: what takes a second
// there takes eight here at full load and nothing when idle, no patience of a
// test ends early, and a thousand packets a second are that many.
const clock = "shift=0,sleep=off"

// What emulation is quick with, measured in CPU seconds of the host for the
// same tests: 25 with a processor that can all QEMU can and two of them, 20
// with a plain one (and a source of random numbers, so that nobody waits), 14
// when the kernel does not wait for grace periods either (network namespaces
// die of them), 8 with all of that and one processor. Of other tests: 31 with
// programs at addresses by chance, since QEMU translates them again at each,
// and 20 without; perhaps a fifth less (single runs, noise as large) when memory
// is not cleared twice, and not with "rep stos", which is slow where it is
// emulated (feature 112).
const (
	processor   = "qemu64,+rdrand"
	commandLine = "console=ttyS0 loglevel=4 panic=-1 oops=panic mitigations=off nopti nokaslr norandmaps init_on_alloc=0 clearcpuid=112 no_timer_check rcupdate.rcu_expedited=1"
)

// modules the tests need, without those they depend on.
var modules = []string{"wireguard", "veth", "bridge", "tun", "dummy", "unix_diag", "inet_diag", "tcp_diag", "udp_diag",
	"nf_tables", "nft_chain_nat", "nft_ct", "nft_nat", "nft_masq", "nft_redir", "nft_numgen", "nft_hash", "nft_limit",
	"nft_fib_inet", "nft_reject_inet", "nft_objref", "nf_conntrack_netlink", "nft_socket",
	"nft_compat", "iptable_nat", "ip6table_nat", "sch_tbf", "sch_ingress"}

// Config of a guest.
type Config struct {
	Kernel *Kernel
	// Dir takes kernel, initramfs and console log; the caller removes it.
	Dir string
	// Init is the program in folder init, compiled for the guest.
	Init string
	Runs []Run
}

// A Run is a program of the guest, run after those before it.
type Run struct {
	// Program on this host; in the guest it is /tests/<base name>.
	Program string
	// Folder whose testdata the program finds where it runs; may be empty.
	Folder string
	Args   []string
	Env    []string
}

// order is what init reads; its counterpart is in init/main.go.
type order struct {
	Modules []string
	Runs    []Run
}

// A Guest is a running machine.
type Guest struct {
	cmd     *exec.Cmd
	out     *bufio.Reader
	console string
}

// Missing says which programs of this host a guest needs and does not find.
func Missing() (missing []string) {
	for _, name := range append([]string{qemu, "dpkg-deb", "ldd"}, Tools...) {
		if _, err := exec.LookPath(name); err != nil {
			missing = append(missing, name)
		}
	}
	return missing
}

// Boot starts a guest. It is killed when ctx ends.
func Boot(ctx context.Context, cfg Config) (*Guest, error) {
	image, initramfs := filepath.Join(cfg.Dir, "vmlinuz"), filepath.Join(cfg.Dir, "initramfs")
	if err := os.WriteFile(image, cfg.Kernel.Image, 0o600); err != nil {
		return nil, err
	}
	if err := writeInitramfs(initramfs, cfg); err != nil {
		return nil, fmt.Errorf("make initramfs: %w", err)
	}
	g := &Guest{console: filepath.Join(cfg.Dir, "console")}
	g.cmd = exec.CommandContext(ctx, qemu, "-nodefaults", "-no-user-config", "-display", "none", "-nic", "none",
		"-machine", "pc", "-accel", "tcg,tb-size=512", "-icount", clock, "-cpu", processor, "-smp", "1", "-m", "1024", "-no-reboot",
		"-kernel", image, "-initrd", initramfs, "-append", commandLine,
		"-serial", "file:"+g.console, "-serial", "stdio")
	g.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	out, err := g.cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	g.out = bufio.NewReaderSize(out, 1<<16)
	g.cmd.Stderr = os.Stderr
	if err := g.cmd.Start(); err != nil {
		return nil, fmt.Errorf("start guest: %w", err)
	}
	return g, nil
}

func writeInitramfs(path string, cfg Config) error {
	load, err := cfg.Kernel.Load(modules...)
	if err != nil {
		return err
	}
	r := newRoot()
	o := order{Modules: load}
	for _, name := range load {
		r.add("/modules/"+name, 0o600, cfg.Kernel.modules[name])
	}
	for _, run := range cfg.Runs {
		inside := "/tests/" + filepath.Base(run.Program)
		if err := r.copy(run.Program, inside); err != nil {
			return err
		}
		folder := inside + ".run"
		r.dir(folder)
		if run.Folder != "" {
			if err := r.tree(filepath.Join(run.Folder, "testdata"), folder+"/testdata"); err != nil {
				return err
			}
		}
		o.Runs = append(o.Runs, Run{inside, folder, run.Args, run.Env})
	}
	for _, name := range Tools {
		if err := r.tool(name); err != nil {
			return err
		}
	}
	for _, name := range texts {
		if err := r.tree(name, name); err != nil {
			return err
		}
	}
	if err := r.copy(cfg.Init, "/init"); err != nil {
		return err
	}
	b, err := json.Marshal(o)
	if err != nil {
		return err
	}
	r.add("/order", 0o600, b)
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	return errors.Join(r.write(f), f.Close())
}

// Next hands on the lines the next Run prints and returns its exit status.
func (g *Guest) Next(line func(string)) (status int, err error) {
	for {
		text, err := g.out.ReadString('\n')
		if rest, ok := strings.CutPrefix(text, endMark); ok && err == nil {
			return strconv.Atoi(strings.TrimSpace(rest))
		}
		if text = strings.TrimRight(text, "\r\n"); text != "" {
			line(text)
		}
		if err != nil {
			return 0, fmt.Errorf("guest ended early: %w", err)
		}
	}
}

// endMark begins the line that ends the output of a Run. Its counterpart is in
// init/main.go.
const endMark = "\x1eend "

// Console is what the guest's kernel said so far.
func (g *Guest) Console() string {
	b, _ := os.ReadFile(g.console)
	return string(b)
}

// Close ends the guest.
func (g *Guest) Close() error {
	_ = g.cmd.Process.Kill()
	err := g.cmd.Wait()
	if exit := (&exec.ExitError{}); errors.As(err, &exit) {
		return nil // killed, or its kernel panicked: Next has said so
	}
	return err
}
