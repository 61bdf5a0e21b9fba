package datapath

import (
	"fmt"
	"io"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"meshd.dev/pkg/datapath/internal/testns"
	"meshd.dev/pkg/datapath/wireguard"
	"meshd.dev/pkg/mesh"
)

// cluster stands in for the API and for what nodes say to each other: it
// carries keys and words between machines.
type cluster struct {
	*testing.T
	machines []*machine
	state    mesh.State
	mute     bool // carries no words
}

// carry hands on once what each machine has published and said.
func (c *cluster) carry() map[string]reply {
	replies, changed := map[string]reply{}, false
	for i, m := range c.machines {
		r := m.request(request{})
		replies[m.name] = r
		n := &c.state.Nodes[i]
		if known := !r.Keys.Current.IsZero(); known && (n.PublicKey != r.Keys.Current || n.NextKey != r.Keys.Next) {
			changed = true
			n.PublicKey, n.NextKey, n.NextPort = r.Keys.Current, r.Keys.Next, 51821
		}
	}
	for _, m := range c.machines {
		req := request{Heard: map[string]Sending{}}
		for name, r := range replies {
			if s, ok := r.Sends[m.name]; ok && name != m.name && !c.mute {
				req.Heard[name] = s
			}
		}
		if changed {
			state := c.state
			state.Nodes = append([]mesh.Node(nil), c.state.Nodes...)
			req.State = &state
		}
		m.request(req)
	}
	return replies
}

// until carries on until what is said of the machines holds.
func (c *cluster) until(what string, holds func(map[string]reply) bool) {
	c.Helper()
	deadline := time.Now().Add(2 * time.Minute)
	for {
		replies := c.carry()
		if holds(replies) {
			return
		}
		if time.Now().After(deadline) {
			for _, m := range c.machines {
				r := m.ask(nil)
				c.Logf("%s: %s of %v, sends %v, waits %v, plan %q %s", m.name, r.Turn.Stage(), r.Keys, r.Sends, r.Turn.Waiting, r.Plan, r.Err)
				c.Logf("%s:\n%s", m.name, m.sh("wg show all; ip route show proto 77; for f in "+m.dir+"/*next.log; do tail -20 $f; done"))
			}
			c.Fatalf("%s: not after two minutes", what)
		}
		time.Sleep(20 * time.Millisecond) // the API and the wire take their time as well
	}
}

// rotate has machines change their keys, all at the same time.
func (c *cluster) rotate(ms ...*machine) {
	c.Helper()
	want := map[string]int{}
	for _, m := range ms {
		want[m.name] = m.request(request{Rotate: true}).Turn.Generation + 1
	}
	c.until("the keys change", func(replies map[string]reply) bool {
		for name, generation := range want {
			if r := replies[name]; r.Turn.Generation != generation || r.Turn.Stage() != wireguard.Steady || !r.Keys.Next.IsZero() {
				return false
			}
		}
		return true
	})
}

// probe sends rate packets a second from pod 2 of one machine to pod 2 of
// another, which sends them back, until stop is called.
func (c *cluster) probe(from, to *machine, addr string, rate int) (stop func() string) {
	c.Helper()
	exe, _ := os.Executable()
	cmd := exec.Command("nsenter", "-t", from.ns, "-n", "-m", "ip", "netns", "exec", "p2", exe, "probe", addr, fmt.Sprint(rate))
	in, err := cmd.StdinPipe()
	if err != nil {
		c.Fatal(err)
	}
	out := &strings.Builder{}
	cmd.Stdout, cmd.Stderr = out, out
	if err := cmd.Start(); err != nil {
		c.Fatal(err)
	}
	stopped := false
	stop = func() string {
		if !stopped {
			stopped = true
			in.(io.Closer).Close()
			_ = cmd.Wait()
		}
		return fmt.Sprintf("%s to %s (%s): %s", from.name, to.name, addr, strings.TrimSpace(out.String()))
	}
	c.Cleanup(func() { stop() })
	return stop
}

func (m *machine) echo() {
	exe, _ := os.Executable()
	cmd := exec.Command("nsenter", "-t", m.ns, "-n", "-m", "ip", "netns", "exec", "p2", exe, "echo", ":7")
	if err := cmd.Start(); err != nil {
		m.t.Fatal(err)
	}
	m.t.Cleanup(func() { _ = cmd.Process.Kill(); _ = cmd.Wait() })
	eventually(m.t, "the echo listens", func() error {
		if out, err := m.in_(2, "ss", "-lnu"); err != nil || !strings.Contains(out, ":7 ") {
			return fmt.Errorf("%s %v", out, err)
		}
		return nil
	})
}

// carries reports whether nothing is lost in two seconds.
func carries(t *testing.T, probes []func() string) bool {
	time.Sleep(2 * time.Second) // this is how long is measured, nothing is waited for
	all := true
	for _, stop := range probes {
		said := stop()
		all = all && strings.Contains(said, " lost 0 ")
		t.Log("no key changes: " + said)
	}
	return all
}

// Three machines as in TestStory. Every packet of 1,000 a second in every
// direction arrives while keys change: of one machine, of all at once, and
// while meshd is killed at each stage of the change.
func TestRotation(t *testing.T) {
	underlay(t)
	a, b, c := newMachine(t, "a", 1), newMachine(t, "b", 2), newMachine(t, "c", 3)
	all := []*machine{a, b, c}
	cl := &cluster{T: t, machines: all, state: mesh.State{Nodes: []mesh.Node{a.node(), b.node(), c.node()}}}
	tell(cl.state, all...)
	settled(t, all...)
	for _, m := range all {
		m.pod(2)
		m.echo()
	}
	for _, m := range all { // sessions before the first packet that counts
		for _, to := range all {
			if m != to {
				eventually(t, m.name+" reaches "+to.name, func() error {
					out, err := m.in_(2, "ping", "-c1", "-W1", to.podAddr(2))
					if err != nil {
						return fmt.Errorf("%w: %s", err, out)
					}
					return nil
				})
			}
		}
	}
	capture := startCapture(t)
	probe := func(rate int) []func() string {
		return []func() string{
			cl.probe(a, b, b.podAddr(2)+":7", rate), cl.probe(b, a, "["+a.podAddr6(2)+"]:7", rate),
			cl.probe(a, c, c.podAddr(2)+":7", rate), cl.probe(c, b, "["+b.podAddr6(2)+"]:7", rate),
		}
	}
	// As many as this machine carries while no key changes, with time left.
	rate := 1000
	if text := os.Getenv("MESHD_TEST_RATE"); text != "" { // test/vm knows its processor
		var err error
		if rate, err = strconv.Atoi(text); err != nil {
			t.Fatalf("MESHD_TEST_RATE is %q, want a number of packets a second", text)
		}
	}
	for ; !carries(t, probe(rate)); rate /= 2 {
		if rate < 50 {
			t.Fatal("packets are lost while no key changes")
		}
	}
	t.Logf("%d packets a second each way", rate)
	probes := probe(rate)
	for _, chapter := range []struct {
		title string
		tell  func()
	}{
		{"one, twice", func() { cl.rotate(a); cl.rotate(a) }},
		{"another", func() { cl.rotate(c) }},
		{"all at once", func() { cl.rotate(all...) }},
		{"one process after the other has no time", func() { cl.stalls(a, a, b) }},
		{"meshd is killed as the key changes", func() { cl.kills(a, a) }},
		{"meshd of a peer is killed as the key changes", func() { cl.kills(a, b) }},
	} {
		t.Run(chapter.title, func(t *testing.T) { chapter.tell() })
	}
	for _, stop := range probes {
		if said := stop(); !strings.Contains(said, " lost 0 ") {
			t.Error(said)
		} else {
			t.Log(said)
		}
	}
	settled(t, all...)
	for _, m := range all {
		if out := m.sh("ip -o link show; ls -A /run/wireguard | grep -v lock ||:"); strings.Contains(out, mesh.SecondSuffix) {
			t.Errorf("%s: something of the second device stayed:\n%s", m.name, out)
		}
	}
	capture(t)
}

// kills changes the key of m and kills meshd of victim once in each stage.
func (c *cluster) kills(m, victim *machine) {
	c.Helper()
	generation := m.request(request{Rotate: true}).Turn.Generation
	for _, stage := range []wireguard.Stage{wireguard.Leaving, wireguard.Returning} {
		c.until("the stage "+string(stage), func(r map[string]reply) bool { return r[m.name].Turn.Stage() == stage })
		if err := victim.cmd.Process.Kill(); err != nil {
			c.Fatal(err)
		}
		victim.stop()
		victim.start()
		victim.ask(&c.state)
	}
	c.until("the key changed", func(r map[string]reply) bool {
		return r[m.name].Turn.Generation == generation+1 && r[m.name].Turn.Stage() == wireguard.Steady && r[m.name].Keys.Next.IsZero()
	})
}

// stalls changes the key of m while meshd and the tunnel processes of machines
// stand still, one after the other, each for a while.
func (c *cluster) stalls(m *machine, of ...*machine) {
	c.Helper()
	generation := m.request(request{Rotate: true}).Turn.Generation
	turn := 0
	c.until("the key changed", func(r map[string]reply) bool {
		pids := strings.Fields(of[turn%len(of)].sh("cat /run/wireguard/*.lock 2>/dev/null || true"))
		pids = append(pids, fmt.Sprint(of[turn%len(of)].cmd.Process.Pid))
		stand(c.T, pids[turn/len(of)%len(pids)], 400*time.Millisecond)
		turn++
		return r[m.name].Turn.Generation == generation+1 && r[m.name].Turn.Stage() == wireguard.Steady && r[m.name].Keys.Next.IsZero()
	})
	c.Logf("%d times one stood still", turn)
}

// stand still for a while; a process that has ended meanwhile does anyway.
func stand(t *testing.T, pid string, d time.Duration) {
	t.Helper()
	n, err := strconv.Atoi(pid)
	if err != nil || n <= 1 {
		t.Fatalf("process %q", pid)
	}
	if err := unix.Kill(n, unix.SIGSTOP); err != nil {
		return
	}
	defer unix.Kill(n, unix.SIGCONT)
	time.Sleep(d) // this is how long it stands still; nothing is waited for
}

// A tunnel process that has no time for two seconds, on either side: what came
// meanwhile arrives. The other side begins a session beside the one there is;
// in its place it would lose all that.
func TestTunnelsWithoutTime(t *testing.T) {
	if testns.Backend(t) != "userspace" {
		t.Skip("this kernel has WireGuard: there is no such process")
	}
	underlay(t)
	a, b := newMachine(t, "a", 1), newMachine(t, "b", 2)
	cl := &cluster{T: t, machines: []*machine{a, b}, state: mesh.State{Nodes: []mesh.Node{a.node(), b.node()}}}
	tell(cl.state, a, b)
	settled(t, a, b)
	for _, m := range cl.machines {
		m.pod(2)
		m.echo()
	}
	a.reaches(t, "pod to pod", b.podAddr(2))
	b.reaches(t, "pod to pod", a.podAddr(2))
	probes := []func() string{cl.probe(a, b, b.podAddr(2)+":7", 500), cl.probe(b, a, "["+a.podAddr6(2)+"]:7", 500)}
	for i, m := range cl.machines {
		stand(t, strings.TrimSpace(m.sh("cat /run/wireguard/mesh0.lock")), 2*time.Second)
		eventually(t, "the other side notices", func() error {
			if r := cl.machines[1-i].ask(nil).Repairs; len(r) == 0 || !strings.Contains(r[0].What, "began a new session") {
				return fmt.Errorf("repaired: %v", r)
			}
			return nil
		})
	}
	for _, stop := range probes {
		if said := stop(); !strings.Contains(said, " lost 0 ") {
			t.Error(said)
		} else {
			t.Log(said)
		}
	}
}

// Two machines that change a key and send over their second devices, when
// nothing passes between these any more: the first ones do again, and when it
// passes the key is changed.
func TestSecondIsWatched(t *testing.T) {
	underlay(t)
	a, b := newMachine(t, "a", 1), newMachine(t, "b", 2)
	cl := &cluster{T: t, machines: []*machine{a, b}, state: mesh.State{Nodes: []mesh.Node{a.node(), b.node()}}}
	tell(cl.state, a, b)
	settled(t, a, b)
	a.pod(2)
	b.pod(2)
	a.reaches(t, "pod to pod", b.podAddr(2))
	cl.mute = true // so that the change does not get on
	a.request(request{Rotate: true})
	cl.until("both send over the second device", func(r map[string]reply) bool {
		return r["a"].Sends["b"].Second && r["b"].Sends["a"].Second
	})
	a.reaches(t, "pod to pod over it", b.podAddr(2))
	if r := a.ask(nil); len(r.Tunnels) != 1 || r.Tunnels[0].Note != "" || !r.Sends["b"].Second {
		t.Errorf("over the second device: %+v, %+v", r.Tunnels, r.Sends)
	}
	for _, m := range cl.machines { // on arrival: whoever sends hears no error
		m.sh(`nft add table inet block
			nft add chain inet block in '{ type filter hook input priority filter; }'
			nft add rule inet block in udp dport 51821 drop`)
	}
	took := a.reaches(t, "pod to pod again", b.podAddr(2))
	t.Logf("over the first device %d ms later", took.Milliseconds())
	for _, m := range cl.machines {
		m.sh("nft delete table inet block")
	}
	cl.mute = false
	generation := a.ask(nil).Turn.Generation
	cl.until("the key changed", func(r map[string]reply) bool {
		return r["a"].Turn.Stage() == wireguard.Steady && r["a"].Keys.Generation >= generation && r["a"].Keys.Next.IsZero()
	})
	settled(t, a, b)
}
