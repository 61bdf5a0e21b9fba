package main

import (
	"bufio"
	"context"
	"crypto/ecdh"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"
)

// A lab is two network namespaces and several tunnels between them, all up at
// the same time, each with its processes in a CPU account of its own:
//
//	192.0.2.1/24 = "under" = 192.0.2.2/24      the underlay, frames of 9000
//	198.18.0.1/24 = "plain" = 198.18.0.2/24    1500, without offloads
//	10.99.N.1/24 = tunnel N = 10.99.N.2/24
type lab struct {
	dir      string
	ns       [2]string // a and b
	all      account
	variants []*variant
	iperf    account
	stop     context.CancelFunc
	procs    []*exec.Cmd
}

// A variant is a way from one namespace to the other.
type variant struct {
	name string
	mtu  int
	// daemon starts the process of one end, which makes the link called dev;
	// nil: link makes it, and the kernel does the work.
	daemon func(ctx context.Context, l *lab, v *variant, side int) (*exec.Cmd, error)
	// configure tells a daemon that runs its key and peer; nil: its files did.
	configure func(v *variant, side int) error
	link      func(l *lab, v *variant) error

	number int
	cpu    account
	pids   []int
	memory int64 // most of RssAnon seen, one end
}

func (v *variant) dev(side int) string { return fmt.Sprintf("bn%d%c", v.number, 'a'+side) }
func (v *variant) addr(side int) string {
	if v.daemon == nil && v.link == nil {
		return fmt.Sprintf("198.18.0.%d", side+1)
	}
	return fmt.Sprintf("10.99.%d.%d", v.number, side+1)
}
func (v *variant) port() int { return 51800 + v.number }

// inside is a command in namespace ns. It dies with us.
func inside(ctx context.Context, ns string, argv ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, "nsenter", append([]string{"--net=/run/netns/" + ns}, argv...)...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	return cmd
}

func sh(script string) error {
	out, err := exec.Command("sh", "-ec", script).CombinedOutput()
	if err != nil {
		return fmt.Errorf("%s: %w: %s", strings.TrimSpace(script), err, out)
	}
	return nil
}

func newLab(ctx context.Context, variants []*variant) (_ *lab, err error) {
	id := fmt.Sprintf("bench%d", os.Getpid())
	l := &lab{ns: [2]string{id + "a", id + "b"}, variants: variants}
	ctx, l.stop = context.WithCancel(ctx)
	done := false
	defer func() {
		if !done {
			err = errors.Join(err, l.close())
		}
	}()
	if l.dir, err = os.MkdirTemp("", "meshd-bench-"); err != nil {
		return nil, err
	}
	if l.all, err = newAccount(account{}, id); err != nil {
		return nil, err
	}
	if l.iperf, err = newAccount(l.all, "iperf"); err != nil {
		return nil, err
	}
	if err := sh(fmt.Sprintf(`A=%s; B=%s
		for n in $A $B; do ip netns add $n; ip -n $n link set lo up; done
		ip -n $A link add under mtu 9000 type veth peer name under mtu 9000 netns $B
		ip -n $A link add plain mtu 1500 type veth peer name plain mtu 1500 netns $B
		for n in $A $B; do nsenter --net=/run/netns/$n ethtool -K plain tso off gso off gro off tx-udp-segmentation off >/dev/null; done
		ip -n $A addr add 192.0.2.1/24 dev under; ip -n $B addr add 192.0.2.2/24 dev under
		ip -n $A addr add 198.18.0.1/24 dev plain; ip -n $B addr add 198.18.0.2/24 dev plain
		for n in $A $B; do ip -n $n link set under up; ip -n $n link set plain up; done`, l.ns[0], l.ns[1])); err != nil {
		return nil, err
	}
	for i, v := range variants {
		v.number = i + 1
		if err := l.up(ctx, v); err != nil {
			return nil, fmt.Errorf("%s: %w", v.name, err)
		}
	}
	done = true
	return l, nil
}

// up starts both ends of a variant and waits until they reach each other.
func (l *lab) up(ctx context.Context, v *variant) error {
	var err error
	if v.cpu, err = newAccount(l.all, strings.ReplaceAll(v.name, " ", "-")); err != nil {
		return err
	}
	if v.link != nil {
		if err := v.link(l, v); err != nil {
			return err
		}
	}
	for side := range 2 {
		if v.daemon == nil {
			continue
		}
		cmd, err := v.daemon(ctx, l, v, side)
		if err != nil {
			return err
		}
		log, err := os.Create(filepath.Join(l.dir, v.dev(side)+".log"))
		if err != nil {
			return err
		}
		defer log.Close()
		cmd.Stdout, cmd.Stderr = log, log
		if err := cmd.Start(); err != nil {
			return err
		}
		l.procs = append(l.procs, cmd)
		v.pids = append(v.pids, cmd.Process.Pid)
		if err := v.cpu.take(cmd.Process.Pid); err != nil {
			return err
		}
		if err := until(ctx, func() error {
			if err := sh(fmt.Sprintf("ip -n %s link show %s", l.ns[side], v.dev(side))); err != nil || v.configure == nil {
				return err
			}
			return v.configure(v, side)
		}); err != nil {
			words, _ := os.ReadFile(log.Name())
			return fmt.Errorf("%w; it says: %s", err, words)
		}
	}
	if v.daemon != nil || v.link != nil {
		for side := range 2 {
			if err := sh(fmt.Sprintf("ip -n %s link set %s mtu %d up; ip -n %[1]s addr replace %[4]s/24 dev %[2]s",
				l.ns[side], v.dev(side), v.mtu, v.addr(side))); err != nil {
				return err
			}
		}
	}
	if err := until(ctx, func() error {
		return sh(fmt.Sprintf("nsenter --net=/run/netns/%s ping -c1 -W1 %s", l.ns[0], v.addr(1)))
	}); err != nil {
		return err
	}
	server, err := serve(ctx, l.ns[1], v.addr(1))
	if err != nil {
		return err
	}
	l.procs = append(l.procs, server)
	return l.iperf.take(server.Process.Pid)
}

// until tries f every 50 ms, for 20 s.
func until(ctx context.Context, f func() error) error {
	deadline := time.Now().Add(20 * time.Second)
	for {
		err := f()
		if err == nil || time.Now().After(deadline) {
			return err
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(50 * time.Millisecond):
		}
	}
}

// close takes everything away.
func (l *lab) close() error {
	l.stop()
	for _, p := range l.procs {
		_ = p.Wait() // its context killed it
	}
	var errs []error
	for _, ns := range l.ns {
		if exists("/run/netns/" + ns) {
			errs = append(errs, sh("ip netns del "+ns))
		}
	}
	accounts := []account{l.iperf}
	for _, v := range l.variants {
		accounts = append(accounts, v.cpu)
	}
	for _, a := range append(accounts, l.all) {
		if a.dir != "" {
			errs = append(errs, until(context.Background(), a.remove))
		}
	}
	if l.dir != "" {
		errs = append(errs, os.RemoveAll(l.dir))
	}
	return errors.Join(errs...)
}

// wireguard is a variant whose daemon is a process on the standard control
// socket, started as argv with the link's name behind it.
func wireguard(name string, mtu int, argv ...string) *variant {
	var keys [2]*ecdh.PrivateKey
	for i := range keys {
		keys[i], _ = ecdh.X25519().GenerateKey(rand.Reader) // never fails
	}
	return &variant{name: name, mtu: mtu,
		daemon: func(ctx context.Context, l *lab, v *variant, side int) (*exec.Cmd, error) {
			return inside(ctx, l.ns[side], append(slices.Clone(argv), v.dev(side))...), nil
		},
		configure: func(v *variant, side int) error {
			return uapi(v.dev(side), fmt.Sprintf("private_key=%s\nlisten_port=%d\npublic_key=%s\nendpoint=192.0.2.%d:%d\nallowed_ip=10.99.%d.0/24\n",
				hex.EncodeToString(keys[side].Bytes()), v.port(), hex.EncodeToString(keys[1-side].PublicKey().Bytes()), 2-side, v.port(), v.number))
		}}
}

// uapi sets something on a device's control socket.
func uapi(dev, set string) error {
	c, err := net.Dial("unix", "/var/run/wireguard/"+dev+".sock")
	if err != nil {
		return err
	}
	defer c.Close()
	if _, err := fmt.Fprintf(c, "set=1\n%s\n", set); err != nil {
		return err
	}
	answer, err := bufio.NewReader(c).ReadString('\n')
	if err == nil && answer != "errno=0\n" {
		err = fmt.Errorf("device %s: %s", dev, strings.TrimSpace(answer))
	}
	return err
}

// bins is the folder of our binaries, with those of others in its folder tools.
type bins string

func binaries(o options) (bins, error) {
	dir, err := filepath.Abs(o.bin)
	return bins(dir), err
}

func (b bins) tool(name string) string { return filepath.Join(string(b), "tools", name) }

func (b bins) ours(mtu int) *variant {
	return wireguard("meshd", mtu, filepath.Join(string(b), "meshd"), "wireguard")
}

// official is wireguard-go, and tailscale the fork whose protocol we use, each
// with links and sockets of its own.
func (b bins) official(mtu int) *variant {
	return wireguard("official", mtu, b.tool("wireguard-official"), "-f")
}

func (b bins) tailscale(mtu int) *variant {
	return wireguard("tailscale", mtu, b.tool("wireguard-tailscale"), "-f")
}

// nebula is Slack's overlay, with AES, its default.
func (b bins) nebula(mtu int) *variant {
	return &variant{name: "nebula", mtu: mtu, daemon: func(ctx context.Context, l *lab, v *variant, side int) (*exec.Cmd, error) {
		if side == 0 {
			if err := sh(fmt.Sprintf(`cd %s; %s ca -name bench
				for s in 1 2; do %[2]s sign -name n$s -networks 10.99.%[3]d.$s/24; done`, l.dir, b.tool("nebula-cert"), v.number)); err != nil {
				return nil, err
			}
		}
		config := fmt.Sprintf(`pki: {ca: %[1]s/ca.crt, cert: %[1]s/n%[2]d.crt, key: %[1]s/n%[2]d.key}
static_host_map: {"10.99.%[3]d.%[4]d": ["192.0.2.%[4]d:%[5]d"]}
lighthouse: {am_lighthouse: false}
listen: {host: 192.0.2.%[2]d, port: %[5]d}
tun: {dev: %[6]s, mtu: %[7]d}
logging: {level: warning}
firewall: {outbound: [{port: any, proto: any, host: any}], inbound: [{port: any, proto: any, host: any}]}
`, l.dir, side+1, v.number, 2-side, v.port(), v.dev(side), mtu)
		path := filepath.Join(l.dir, fmt.Sprintf("nebula%d.yaml", side))
		if err := os.WriteFile(path, []byte(config), 0o600); err != nil {
			return nil, err
		}
		return inside(ctx, l.ns[side], b.tool("nebula"), "-config", path), nil
	}}
}

// vxlan is the kernel's, in clear.
func vxlan(mtu int) *variant {
	return &variant{name: "vxlan", mtu: mtu, link: func(l *lab, v *variant) error {
		for side := range 2 {
			if err := sh(fmt.Sprintf("ip -n %s link add %s type vxlan id %d remote 192.0.2.%d local 192.0.2.%d dstport 4789 dev under",
				l.ns[side], v.dev(side), v.number, 2-side, side+1)); err != nil {
				return err
			}
		}
		return nil
	}}
}

// plain is the veth without offloads, the honest floor of a packet's way.
func plain() *variant { return &variant{name: "veth without offloads", mtu: 1500} }
