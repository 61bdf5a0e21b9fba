package datapath

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"meshd.dev/pkg/datapath/internal/testns"
	"meshd.dev/pkg/datapath/wireguard"
	"meshd.dev/pkg/datapath/wireguard/userspace"
	"meshd.dev/pkg/mesh"
	"meshd.dev/pkg/status"
)

// The test binary plays every role of the story: the test itself, a machine
// with a Datapath, its userspace device, and programs in pods.
func TestMain(m *testing.M) {
	roles := map[string]func([]string) error{"wireguard": roleWireguard, "hold": roleHold, "machine": roleMachine, "serve": roleServe, "ask": roleAsk, "send": roleSend,
		"drain": roleDrain, "pour": rolePour, "flood": roleFlood, "flows-serve": roleFlowsServe, "flows": roleFlows, "forge": roleForge, "toobig": roleTooBig, "echo": roleEcho, "probe": roleProbe, "mss": roleMSS, "mss-serve": roleMSSServe}
	if len(os.Args) > 1 {
		if role, ok := roles[os.Args[1]]; ok {
			if err := role(os.Args[2:]); err != nil {
				fmt.Fprintln(os.Stderr, err)
				os.Exit(1)
			}
			os.Exit(0)
		}
	}
	testns.Main(m)
}

func roleWireguard(args []string) error {
	ctx, stop := signal.NotifyContext(context.Background(), unix.SIGTERM)
	defer stop()
	go deepen(ctx, args[0])
	return userspace.Run(ctx, userspace.Config{Device: args[0], Log: slog.New(slog.NewTextHandler(os.Stderr, nil))})
}

func exe() string {
	path, err := os.Executable()
	if err != nil {
		panic(err)
	}
	return path
}

// deepen the queue in front of a userspace device: on a busy machine it may
// have to wait for its turn longer than 500 packets last, and then the kernel
// drops what no test is about.
func deepen(ctx context.Context, name string) {
	for ctx.Err() == nil {
		if link, err := netlink.LinkByName(name); err == nil {
			_ = netlink.LinkSetTxQLen(link, 20000)
			return
		}
		time.Sleep(time.Millisecond) // until the device is there
	}
}

// request to a machine: a new state, words of its peers, to change its key, to
// look at its kernel for what is left to do, or nothing; the reply is how it is.
type request struct {
	State  *mesh.State
	Heard  map[string]Sending
	Rotate bool
	Look   bool
}

type reply struct {
	Key     mesh.Key
	Keys    wireguard.Keys // as others may know them
	Sends   map[string]Sending
	Turn    Rotation
	Plan    []string
	Err     string
	Checks  []status.Check
	Tunnels []status.Tunnel
	Repairs []status.Repair
	Network Network
}

type source struct{ atomic.Pointer[mesh.State] }

func (s *source) State() *mesh.State { return s.Load() }

// agreed is a preshared key of every two keys, the same at both ends, as if
// they had talked about it.
func agreed(_ mesh.Node, own, peer mesh.Key) PSK {
	if bytes.Compare(own[:], peer[:]) > 0 {
		own, peer = peer, own
	}
	return PSK{Secret: sha256.Sum256(append(own[:], peer[:]...))}
}

// roleHold holds the namespaces of a machine until stdin ends, so that meshd
// in it may die.
func roleHold([]string) error {
	if err := testns.Furnish(); err != nil {
		return err
	}
	fmt.Println("ready")
	_, err := io.Copy(io.Discard, os.Stdin)
	return err
}

// roleMachine runs a Datapath and answers requests on stdin until it ends.
func roleMachine(args []string) error {
	src, board := &source{}, &status.Board{}
	exe, _ := os.Executable()
	var mu sync.Mutex
	var network Network
	d, err := New(Config{
		Node: args[0], StateDir: args[1], RunDir: args[1], Services: true, Source: src, Board: board,
		PodCIDRs:       []netip.Prefix{netip.MustParsePrefix("10.244.0.0/16"), netip.MustParsePrefix("fd00:10:244::/48")},
		ServiceCIDRs:   []netip.Prefix{netip.MustParsePrefix("10.96.0.0/16"), netip.MustParsePrefix("fd00:10:96::/112")},
		PSK:            agreed,
		SpawnUserspace: []string{exe, "wireguard"},
		Pods:           func() ([]mesh.LocalPod, error) { return podsIn(args[1]) },
		Log:            slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelDebug})),
		OnReady: func(n Network) error {
			mu.Lock()
			defer mu.Unlock()
			network = n
			return nil
		},
	})
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	done := make(chan error, 1)
	go func() { done <- d.Run(ctx) }()
	in, out := json.NewDecoder(os.Stdin), json.NewEncoder(os.Stdout)
	for {
		var req request
		if err := in.Decode(&req); err == io.EOF {
			break
		} else if err != nil {
			return err
		}
		if req.State != nil {
			src.Store(req.State)
			d.Kick()
		}
		for node, s := range req.Heard {
			d.Heard(node, s, time.Now())
		}
		if req.Rotate {
			d.RotateKey()
		}
		r := reply{Key: d.PublicKey(), Turn: d.Rotation(), Sends: map[string]Sending{}, Checks: board.Checks(), Tunnels: d.Tunnels(), Repairs: board.Repairs()}
		if keys, known := d.Published(); known {
			r.Keys = keys
		}
		mu.Lock()
		r.Network = network
		mu.Unlock()
		if state := src.State(); state != nil {
			for _, n := range state.Nodes {
				if s, ok := d.SendsTo(n.Name); ok {
					r.Sends[n.Name] = s
				}
			}
			if req.Look {
				if r.Plan, err = d.Plan(); err != nil {
					r.Err = err.Error()
				}
			}
		}
		if err := out.Encode(r); err != nil {
			return err
		}
	}
	cancel()
	return <-done
}

// podsFile is where a machine says which pods it has.
const podsFile = "pods.json"

func podsIn(dir string) (pods []mesh.LocalPod, err error) {
	text, err := os.ReadFile(filepath.Join(dir, podsFile))
	if err != nil {
		return nil, nil // none yet
	}
	return pods, json.Unmarshal(text, &pods)
}

// record says that pod n is there, with ports of the machine that lead to it.
func (m *machine) record(n int, ports ...mesh.HostPort) {
	m.t.Helper()
	pods, err := podsIn(m.dir)
	if err != nil {
		m.t.Fatal(err)
	}
	link := fmt.Sprintf("mshp%d", n)
	pods = slices.DeleteFunc(pods, func(p mesh.LocalPod) bool { return p.Link == link })
	text, err := json.Marshal(append(pods, mesh.LocalPod{Link: link, Addrs: addrs(m.podAddr(n), m.podAddr6(n)), HostPorts: ports}))
	if err != nil {
		m.t.Fatal(err)
	}
	temp := filepath.Join(m.dir, podsFile+".new")
	if err := os.WriteFile(temp, text, 0o600); err != nil {
		m.t.Fatal(err)
	}
	if err := os.Rename(temp, filepath.Join(m.dir, podsFile)); err != nil {
		m.t.Fatal(err)
	}
}

// roleServe answers every connection or datagram with a name and the address
// of who asked.
func roleServe(args []string) error {
	network, addr, name := args[0], args[1], args[2]
	if network == "udp" {
		c, err := net.ListenPacket("udp", addr)
		if err != nil {
			return err
		}
		buf := make([]byte, 2000)
		for {
			_, from, err := c.ReadFrom(buf)
			if err != nil {
				return err
			}
			host, _, _ := net.SplitHostPort(from.String())
			_, _ = c.WriteTo([]byte(name+" saw "+host), from)
		}
	}
	l, err := net.Listen("tcp", addr)
	if err != nil {
		return err
	}
	for {
		c, err := l.Accept()
		if err != nil {
			return err
		}
		go func() {
			defer c.Close()
			_, _ = bufio.NewReader(c).ReadString('\n')
			host, _, _ := net.SplitHostPort(c.RemoteAddr().String())
			fmt.Fprintf(c, "%s saw %s", name, host)
		}()
	}
}

// roleAsk sends a line and prints the answer; with a number, so often, each
// time as a new client.
func roleAsk(args []string) error {
	times := 1
	if len(args) > 3 {
		times, _ = strconv.Atoi(args[3])
	}
	for range times {
		if err := askOnce(args[0], args[1], args[2]); err != nil {
			return err
		}
	}
	return nil
}

func askOnce(network, addr, text string) error {
	c, err := net.DialTimeout(network, addr, 2*time.Second)
	if err != nil {
		return err
	}
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(2 * time.Second))
	if _, err := fmt.Fprintln(c, text); err != nil {
		return err
	}
	buf := make([]byte, 2000)
	n, err := c.Read(buf)
	if n == 0 {
		return err
	}
	fmt.Println(string(buf[:n]))
	return nil
}

// patient: what waits for a busy test is not lost.
func patient(c *net.UDPConn) error {
	raw, err := c.SyscallConn()
	if err != nil {
		return err
	}
	var set error
	err = raw.Control(func(fd uintptr) { set = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 16<<20) })
	return errors.Join(err, set)
}

// roleEcho sends every datagram back.
func roleEcho(args []string) error {
	c, err := net.ListenPacket("udp", args[0])
	if err != nil {
		return err
	}
	if err := patient(c.(*net.UDPConn)); err != nil {
		return err
	}
	buf := make([]byte, 2000)
	for {
		n, from, err := c.ReadFrom(buf)
		if err != nil {
			return err
		}
		_, _ = c.WriteTo(buf[:n], from)
	}
}

// roleProbe sends so many numbered datagrams a second to an echo until stdin
// ends, and says how many there were and which were not answered.
func roleProbe(args []string) error {
	c, err := net.Dial("udp", args[0])
	if err != nil {
		return err
	}
	if err := patient(c.(*net.UDPConn)); err != nil {
		return err
	}
	rate, err := strconv.ParseInt(args[1], 10, 64)
	if err != nil {
		return err
	}
	over := make(chan struct{})
	go func() { _, _ = io.Copy(io.Discard, os.Stdin); close(over) }()
	var sent atomic.Int64
	start := time.Now()
	go func() {
		tick := time.NewTicker(time.Millisecond)
		defer tick.Stop()
		for n := int64(0); ; {
			select {
			case <-over:
				_ = c.SetReadDeadline(time.Now().Add(2 * time.Second)) // for what is under way
				return
			case <-tick.C:
			}
			for ; n < time.Since(start).Milliseconds()*rate/1000; n++ {
				_, _ = fmt.Fprintf(c, "%d MARKER-IN-CLEAR", n)
				sent.Store(n + 1)
			}
		}
	}()
	answered, buf := map[int64]bool{}, make([]byte, 2000)
	for {
		n, err := c.Read(buf)
		if errors.Is(err, os.ErrDeadlineExceeded) {
			break
		}
		if err != nil { // refused: the echo is not there yet
			continue
		}
		number, _, _ := strings.Cut(string(buf[:n]), " ")
		i, _ := strconv.ParseInt(number, 10, 64)
		answered[i] = true
	}
	var bursts []string
	lost, begun := 0, int64(-1)
	for i := range sent.Load() + 1 {
		gone := i < sent.Load() && !answered[i]
		if gone {
			lost++
		}
		if gone && begun < 0 {
			begun = i
		} else if !gone && begun >= 0 {
			at := start.Add(time.Duration(begun*1000/rate) * time.Millisecond).UTC()
			bursts = append(bursts, fmt.Sprintf("%d from %s", i-begun, at.Format("15:04:05.000")))
			begun = -1
		}
	}
	fmt.Printf("sent %d lost %d %v\n", sent.Load(), lost, bursts[:min(len(bursts), 20)])
	return nil
}

// roleSend keeps one socket and asks n times, printing each answer, whatever
// becomes of it: a client with a long-lived flow.
func roleSend(args []string) error {
	c, err := net.Dial("udp", args[0])
	if err != nil {
		return err
	}
	buf := make([]byte, 2000)
	for lines := bufio.NewScanner(os.Stdin); lines.Scan(); {
		_, _ = c.Write(lines.Bytes())
		_ = c.SetReadDeadline(time.Now().Add(300 * time.Millisecond))
		n, err := c.Read(buf)
		if err != nil {
			n = copy(buf, "nothing")
		}
		fmt.Println(string(buf[:n]))
	}
	return nil
}

// machine is a node of the story, seen from the test.
type machine struct {
	t    *testing.T
	name string
	n    int // 1, 2, 3: in all its addresses
	dir  string
	cmd  *exec.Cmd
	in   *json.Encoder
	out  *json.Decoder
	pipe io.Closer
	log  *bytes.Buffer
	key  mesh.Key
	ns   string // pid that holds the namespaces
}

// newMachine is a computer with a cable to the underlay, and meshd in it.
func newMachine(t *testing.T, name string, n int) *machine {
	t.Helper()
	m := &machine{t: t, name: name, n: n, dir: t.TempDir(), log: &bytes.Buffer{}}
	hold := testns.Command("hold")
	in, err := hold.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := hold.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := hold.Start(); err != nil {
		t.Fatal(err)
	}
	m.ns = fmt.Sprint(hold.Process.Pid)
	t.Cleanup(func() {
		m.killIn()
		in.Close()
		_ = hold.Wait()
	})
	if line, err := bufio.NewReader(out).ReadString('\n'); err != nil || line != "ready\n" {
		t.Fatalf("machine %s: %q, %v", name, line, err)
	}
	m.start()
	t.Cleanup(func() {
		m.stop()
		if t.Failed() {
			t.Logf("log of %s:\n%s", m.name, m.log)
			for _, device := range []string{mesh.Device, mesh.Device + mesh.SecondSuffix} {
				b, _ := os.ReadFile(filepath.Join(m.dir, "wireguard-"+device+".log"))
				t.Logf("userspace %s of %s:\n%s", device, m.name, b)
			}
		}
	})
	testns.Sh(t, fmt.Sprintf(`
		ip link add under%[1]d type veth peer name eth0 netns %[2]s
		ip link set under%[1]d master br0 up
		nsenter -t %[2]s -n sh -ec '
			ip link set eth0 up
			ip address add 192.0.2.%[1]d/24 dev eth0
			ip address add 2001:db8::%[1]d/64 dev eth0 nodad
			ip route add default via 192.0.2.254
			ip route add default via 2001:db8::fe'`, n, m.ns))
	return m
}

// start starts meshd.
func (m *machine) start() {
	exe, _ := os.Executable()
	m.cmd = exec.Command("nsenter", "-t", m.ns, "-n", "-m", exe, "machine", m.name, m.dir)
	m.cmd.SysProcAttr = &unix.SysProcAttr{Pdeathsig: unix.SIGKILL}
	m.cmd.Stderr = m.log
	in, err := m.cmd.StdinPipe()
	if err != nil {
		m.t.Fatal(err)
	}
	out, err := m.cmd.StdoutPipe()
	if err != nil {
		m.t.Fatal(err)
	}
	m.in, m.out, m.pipe = json.NewEncoder(in), json.NewDecoder(out), in
	if err := m.cmd.Start(); err != nil {
		m.t.Fatal(err)
	}
	m.key = m.ask(nil).Key
}

// stop lets meshd end by itself.
func (m *machine) stop() {
	m.pipe.Close()
	_ = m.cmd.Wait()
}

// killIn ends the processes the machine left to themselves: its userspace
// device and servers in pods.
func (m *machine) killIn() {
	_ = testns.Exec("nsenter", "-t", m.ns, "-n", "-m", "sh", "-c",
		`for ns in $(ls /run/netns); do for p in $(ip netns pids $ns); do kill -9 $p; done; done; for l in /run/wireguard/*.lock; do kill -9 $(cat $l); done`)
}

func (m *machine) ask(s *mesh.State) reply {
	m.t.Helper()
	return m.request(request{State: s, Look: true})
}

func (m *machine) request(req request) reply {
	m.t.Helper()
	if err := m.in.Encode(req); err != nil {
		m.t.Fatal(err)
	}
	var r reply
	if err := m.out.Decode(&r); err != nil {
		m.t.Fatalf("%s: %v\n%s", m.name, err, m.log)
	}
	return r
}

// sh runs shell in the machine.
func (m *machine) sh(script string) string {
	m.t.Helper()
	out, err := testns.Output("nsenter", "-t", m.ns, "-n", "-m", "sh", "-ec", script)
	if err != nil {
		m.t.Fatalf("%s: %s\n%v", m.name, script, err)
	}
	return out
}

func (m *machine) podAddr(n int) string  { return fmt.Sprintf("10.244.%d.%d", m.n, n) }
func (m *machine) podAddr6(n int) string { return fmt.Sprintf("fd00:10:244:%d::%d", m.n, n) }

// pod attaches a pod by hand, as pkg/cni does it.
func (m *machine) pod(n int) {
	m.sh(fmt.Sprintf(`
		ip netns add p%[1]d
		ip link add mshp%[1]d type veth peer name eth0 netns p%[1]d
		ip link set mshp%[1]d up
		sysctl -qw net.ipv4.conf.mshp%[1]d.send_redirects=0
		ip route add %[2]s/32 dev mshp%[1]d proto 78
		ip route add %[3]s/128 dev mshp%[1]d proto 78
		mac=$(cat /sys/class/net/mshp%[1]d/address 2>/dev/null || ip -o link show mshp%[1]d | sed 's/.*ether \([^ ]*\).*/\1/')
		ip netns exec p%[1]d sh -ec "
			ip link set lo up
			ip link set eth0 up
			ip address add %[2]s/32 dev eth0
			ip address add %[3]s/128 dev eth0 nodad
			ip route add 169.254.1.1 dev eth0 scope link
			ip route add default via 169.254.1.1 dev eth0
			ip neigh add 169.254.1.1 lladdr $mac dev eth0 nud permanent
			ip neigh add fe80::1 lladdr $mac dev eth0 nud permanent
			ip -6 route add default via fe80::1 dev eth0"
		podmac=$(ip netns exec p%[1]d ip -o link show eth0 | sed 's/.*ether \([^ ]*\).*/\1/')
		ip neigh add %[2]s lladdr $podmac dev mshp%[1]d nud permanent
		ip neigh add %[3]s lladdr $podmac dev mshp%[1]d nud permanent`, n, m.podAddr(n), m.podAddr6(n)))
	m.record(n)
}

// in runs a command in a pod and returns what it printed, even if it failed.
func (m *machine) in_(pod int, args ...string) (string, error) {
	m.t.Helper()
	all := append([]string{"-t", m.ns, "-n", "-m", "ip", "netns", "exec", fmt.Sprintf("p%d", pod)}, args...)
	out, err := exec.Command("nsenter", all...).CombinedOutput()
	return strings.TrimSpace(string(out)), err
}

// serve starts a server in a pod, or on the node itself when pod is 0, and
// returns when it listens.
func (m *machine) serve(pod int, network string, addr string) {
	m.t.Helper()
	exe, _ := os.Executable()
	enter := []string{"-t", m.ns, "-n", "-m"}
	if pod > 0 {
		enter = append(enter, "ip", "netns", "exec", fmt.Sprintf("p%d", pod))
	}
	cmd := exec.Command("nsenter", append(slices.Clone(enter), exe, "serve", network, addr, fmt.Sprintf("%s/p%d", m.name, pod))...)
	if err := cmd.Start(); err != nil {
		m.t.Fatal(err)
	}
	m.t.Cleanup(func() { _ = cmd.Process.Kill(); _ = cmd.Wait() })
	_, port, _ := net.SplitHostPort(addr)
	eventually(m.t, "server listens", func() error {
		out, err := testns.Output("nsenter", append(slices.Clone(enter), "ss", "-lnut")...)
		if err != nil || !strings.Contains(out, ":"+port+" ") {
			return fmt.Errorf("%s %v", out, err)
		}
		return nil
	})
}

// askFrom asks from a pod, or from the node itself when pod is 0.
func (m *machine) askFrom(pod int, network, addr string, text ...string) (string, error) {
	exe, _ := os.Executable()
	args := append([]string{exe, "ask", network, addr}, text...)
	if pod > 0 {
		return m.in_(pod, args...)
	}
	out, err := exec.Command("nsenter", append([]string{"-t", m.ns, "-n", "-m"}, args...)...).CombinedOutput()
	return strings.TrimSpace(string(out)), err
}

func (m *machine) node() mesh.Node {
	n := mesh.Node{
		Name: m.name, Ready: true, PublicKey: m.key,
		Addresses: []netip.Addr{netip.MustParseAddr(fmt.Sprintf("192.0.2.%d", m.n))},
		PodCIDRs: []netip.Prefix{netip.MustParsePrefix(fmt.Sprintf("10.244.%d.0/24", m.n)),
			netip.MustParsePrefix(fmt.Sprintf("fd00:10:244:%d::/64", m.n))},
		Endpoints: []netip.AddrPort{netip.MustParseAddrPort(fmt.Sprintf("192.0.2.%d:51820", m.n))},
	}
	if m.n == 3 { // one is reached over IPv6
		n.Endpoints = []netip.AddrPort{netip.MustParseAddrPort("[2001:db8::3]:51820")}
	}
	return n
}

// eventually is for what other processes do in their own time.
func eventually(t *testing.T, what string, f func() error) {
	t.Helper()
	deadline := time.Now().Add(15 * time.Second)
	for {
		err := f()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("%s: %v", what, err)
		}
		time.Sleep(20 * time.Millisecond)
	}
}

// settled waits until nothing is left to do on any machine.
func settled(t *testing.T, ms ...*machine) {
	t.Helper()
	for _, m := range ms {
		eventually(t, m.name+" settles", func() error {
			r := m.ask(nil)
			bad := slices.DeleteFunc(r.Checks, func(c status.Check) bool { return c.Healthy })
			if len(r.Plan) > 0 || r.Err != "" || len(bad) > 0 || r.Network.MTU == 0 {
				return fmt.Errorf("plan %q, %s, checks %v, network %v", r.Plan, r.Err, bad, r.Network)
			}
			return nil
		})
	}
}

func underlay(t *testing.T) (join func(testing.TB)) {
	join = testns.New(t)
	testns.Sh(t, `
		ip link add br0 type bridge
		ip link set br0 up
		ip address add 192.0.2.254/24 dev br0
		ip address add 2001:db8::fe/64 dev br0 nodad`)
	return join
}
