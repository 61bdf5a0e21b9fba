package datapath

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os/exec"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"meshd.dev/pkg/datapath/internal/testns"
	"meshd.dev/pkg/mesh"
)

// roleDrain reads and forgets what connections bring.
func roleDrain(args []string) error {
	l, err := net.Listen("tcp", args[0])
	if err != nil {
		return err
	}
	for {
		c, err := l.Accept()
		if err != nil {
			return err
		}
		go func() { _, _ = io.Copy(io.Discard, c); c.Close() }()
	}
}

// rolePour sends as fast as it can, by one connection, and prints a line for
// every further 256 KiB that went into it: no more is under way than the
// buffers of a few hundred KB hold.
func rolePour(args []string) error {
	c, err := net.Dial("tcp", args[0])
	if err != nil {
		return err
	}
	_ = c.(*net.TCPConn).SetWriteBuffer(64 << 10)
	buf := make([]byte, 64<<10)
	for i := 0; ; i++ {
		if _, err := c.Write(buf); err != nil {
			return err
		}
		if i%4 == 0 {
			fmt.Println("poured")
		}
	}
}

// pour has a pod of m send to an address, and tells of each portion.
func (m *machine) pour(t *testing.T, pod int, to string) (portions <-chan time.Time, stop func()) {
	t.Helper()
	cmd := m.command(pod, "pour", to)
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	came := make(chan time.Time, 1<<16)
	go func() {
		buf := make([]byte, 7)
		for {
			if _, err := io.ReadFull(out, buf); err != nil {
				close(came)
				return
			}
			came <- time.Now()
		}
	}()
	stop = sync.OnceFunc(func() { _ = cmd.Process.Kill(); _ = cmd.Wait() })
	t.Cleanup(stop)
	return came, stop
}

// goesOn waits for n portions after a moment, and says when the first came.
func goesOn(t *testing.T, what string, portions <-chan time.Time, after time.Time, n int) time.Duration {
	t.Helper()
	limit := time.After(30 * time.Second)
	var first time.Time
	for n > 0 {
		select {
		case at, ok := <-portions:
			if !ok {
				t.Fatalf("%s: the connection ended", what)
			}
			if at.Before(after) {
				continue
			}
			if first.IsZero() {
				first = at
			}
			n--
		case <-limit:
			t.Fatalf("%s: nothing goes through any more", what)
		}
	}
	return first.Sub(after)
}

// Two machines, a and b, at 192.0.2.N and 2001:db8::N. In the middle large
// packets begin to vanish without a word: a transfer under way goes on with
// smaller ones, and with large ones when those pass again.
func TestBlackHole(t *testing.T) {
	for _, c := range []struct {
		underlay, endpointA, endpointB string
		limit                          int // of packets in the middle
	}{
		{"IPv4 underlay", "192.0.2.1:51820", "192.0.2.2:51820", 1420},
		{"IPv6 underlay", "[2001:db8::1]:51820", "[2001:db8::2]:51820", 1440},
	} {
		t.Run(c.underlay, func(t *testing.T) {
			underlay(t)
			a, b := newMachine(t, "a", 1), newMachine(t, "b", 2)
			nodeA, nodeB := a.node(), b.node()
			nodeA.Endpoints = []netip.AddrPort{netip.MustParseAddrPort(c.endpointA)}
			nodeB.Endpoints = []netip.AddrPort{netip.MustParseAddrPort(c.endpointB)}
			state := mesh.State{Nodes: []mesh.Node{nodeA, nodeB}}
			tell(state, a, b)
			settled(t, a, b)
			for _, m := range []*machine{a, b} {
				m.sh("ip link set eth0 gso_max_segs 1") // on a real wire packets are packets
				m.pod(2)
				m.run(2, "drain", ":90")
				m.listens(2, "90")
			}
			mtu := func(m *machine) int { return m.ask(nil).Tunnels[0].MTU }
			for _, dir := range []struct {
				name string
				from *machine
				to   string
			}{
				{"IPv4 pods", a, b.podAddr(2) + ":90"},
				{"IPv6 pods, the other way", b, "[" + a.podAddr6(2) + "]:90"},
			} {
				portions, stop := dir.from.pour(t, 2, dir.to)
				goesOn(t, dir.name, portions, time.Now(), 8)
				if got := mtu(dir.from); got != 1420 {
					t.Errorf("%s: MTU %d before, want 1420", dir.name, got)
				}
				testns.Sh(t, fmt.Sprintf(`
					nft add table netdev hole
					for n in 1 2; do
						nft add chain netdev hole in$n "{ type filter hook ingress device under$n priority 0; }"
						nft add rule netdev hole in$n meta length '>' %d drop
					done`, c.limit))
				hole := time.Now()
				// What fits into buffers went before the hole was felt.
				eventually(t, "the MTU falls", func() error {
					if got := mtu(dir.from); got >= 1420 {
						return fmt.Errorf("MTU %d", got)
					}
					return nil
				})
				fell := time.Since(hole)
				again := goesOn(t, dir.name+", through the hole", portions, time.Now(), 8) + fell
				t.Logf("%s, %s: MTU lowered %d ms after the hole, 2 MB more %d ms after it", c.underlay, dir.name, fell.Milliseconds(), again.Milliseconds())
				stop() // a slow machine has enough to do
				eventually(t, "the best MTU is found", func() error {
					overhead := map[bool]int{true: 80, false: 60}[strings.HasPrefix(c.endpointB, "[")]
					if got, want := mtu(dir.from), (c.limit-overhead)/16*16; got != want {
						return fmt.Errorf("MTU %d, want %d", got, want)
					}
					return nil
				})
				if note := dir.from.ask(nil).Tunnels[0].Note; !strings.Contains(note, "get lost, though the route allows 1420") {
					t.Errorf("note %q", note)
				}
				// Whoever sends too much without leave to split is told.
				ping := []string{"ping", "-c1", "-W3", "-M", "do", "-s", "1350", strings.Trim(strings.TrimSuffix(dir.to, ":90"), "[]")}
				out, err := dir.from.in_(2, ping...)
				if err == nil || !strings.Contains(strings.ToLower(out), "mtu") {
					t.Errorf("%q: %v\n%s\nwant a word about the MTU", ping, err, out)
				}
				testns.Sh(t, "nft delete table netdev hole")
				for _, m := range []*machine{a, b} { // a new one looks anew
					m.stop()
					m.start()
				}
				tell(state, a, b)
				settled(t, a, b)
			}
		})
	}
}

// command is this test binary in a role, in a pod of m or on the node when pod
// is 0.
func (m *machine) command(pod int, args ...string) *exec.Cmd {
	enter := []string{"-t", m.ns, "-n", "-m"}
	if pod > 0 {
		enter = append(enter, "ip", "netns", "exec", fmt.Sprintf("p%d", pod))
	}
	return exec.Command("nsenter", append(append(enter, exe()), args...)...)
}

// run starts a role that ends with the test.
func (m *machine) run(pod int, args ...string) {
	m.t.Helper()
	cmd := m.command(pod, args...)
	if err := cmd.Start(); err != nil {
		m.t.Fatal(err)
	}
	m.t.Cleanup(func() { _ = cmd.Process.Kill(); _ = cmd.Wait() })
}

// listens waits for somebody to listen on a port in a pod.
func (m *machine) listens(pod int, port string) {
	m.t.Helper()
	eventually(m.t, "somebody listens on "+port, func() error {
		out, err := m.in_(pod, "ss", "-lnut")
		if err != nil || !strings.Contains(out, ":"+port+" ") {
			return fmt.Errorf("%s %v", out, err)
		}
		return nil
	})
}

// roleMSSServe tells whoever connects how large segments to it may be.
func roleMSSServe(args []string) error {
	l, err := net.Listen("tcp", args[0])
	if err != nil {
		return err
	}
	for {
		c, err := l.Accept()
		if err != nil {
			return err
		}
		mss, err := segment(c)
		if err != nil {
			return err
		}
		fmt.Fprintln(c, mss)
		c.Close()
	}
}

// roleMSS connects, and prints how large segments each side may send.
func roleMSS(args []string) error {
	c, err := net.DialTimeout("tcp", args[0], 5*time.Second)
	if err != nil {
		return err
	}
	defer c.Close()
	ours, err := segment(c)
	if err != nil {
		return err
	}
	theirs, err := io.ReadAll(c)
	fmt.Printf("%d %s", ours, theirs)
	return err
}

// segment is what the other side of a connection takes at once, as it said or
// as somebody on the way said for it.
func segment(c net.Conn) (mss int, err error) {
	raw, err := c.(*net.TCPConn).SyscallConn()
	if err != nil {
		return 0, err
	}
	var refused error
	err = raw.Control(func(fd uintptr) { mss, refused = unix.GetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_MAXSEG) })
	return mss, errors.Join(err, refused)
}

// a has a cable of 1500, b one of 1400; pods believe in 1500. Whoever connects,
// both ends hear of segments that fit the smaller tunnel: of what b says to a,
// because b's rules fit it to the way out, and of what a says to b, because b's
// rules fit what comes in to the way back.
func TestSegmentsFitTheTunnel(t *testing.T) {
	underlay(t)
	a, b := newMachine(t, "a", 1), newMachine(t, "b", 2)
	b.sh("ip link set eth0 mtu 1400")
	state := mesh.State{Nodes: []mesh.Node{a.node(), b.node()}}
	tell(state, a, b)
	settled(t, a, b)
	for _, m := range []*machine{a, b} {
		m.pod(2)
		m.sh("ip netns exec p2 sysctl -qw net.ipv4.tcp_timestamps=0") // they would take their part
		m.run(2, "mss-serve", ":90")
		m.listens(2, "90")
	}
	a.reaches(t, "pod to pod", b.podAddr(2))
	const tunnel = 1400 - 80
	for _, c := range []struct {
		name   string
		from   *machine
		to     string
		header int
	}{
		{"IPv4 to the smaller", a, b.podAddr(2) + ":90", 40},
		{"IPv6 to the smaller", a, "[" + b.podAddr6(2) + "]:90", 60},
		{"IPv4 to the larger", b, a.podAddr(2) + ":90", 40},
		{"IPv6 to the larger", b, "[" + a.podAddr6(2) + "]:90", 60},
	} {
		out, err := c.from.command(2, "mss", c.to).CombinedOutput()
		if want := fmt.Sprintf("%d %[1]d\n", tunnel-c.header); err != nil || string(out) != want {
			t.Errorf("%s: segments each way %q, %v; want %q", c.name, out, err, want)
		}
	}
}
