package exchange

// Nodes a, b, c are all at 127.0.0.1, each at a port of its own. a begins with
// b, and b with c.

import (
	"context"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"meshd.dev/pkg/mesh"
	"meshd.dev/pkg/status"
)

// world is what the nodes of a test see of each other.
type world struct {
	*testing.T
	mu    sync.Mutex
	nodes map[string]mesh.Node
	next  map[string]mesh.Key
	known map[string]*side
}

// side is one node.
type side struct {
	*Exchange
	dir   string
	board *status.Board
	stop  func()
	mu    sync.Mutex
	heard map[string]Sending
}

func newWorld(t *testing.T) *world {
	return &world{T: t, nodes: map[string]mesh.Node{}, next: map[string]mesh.Key{}, known: map[string]*side{}}
}

func (w *world) state() *mesh.State {
	w.mu.Lock()
	defer w.mu.Unlock()
	s := &mesh.State{}
	for _, n := range w.nodes {
		s.Nodes = append(s.Nodes, n)
	}
	slices.SortFunc(s.Nodes, func(a, b mesh.Node) int { return strings.Compare(a.Name, b.Name) })
	return s
}

// change what a node has published, and tell everybody.
func (w *world) change(name string, change func(*mesh.Node)) {
	w.mu.Lock()
	n := w.nodes[name]
	change(&n)
	w.nodes[name] = n
	w.mu.Unlock()
	for _, s := range w.known {
		s.Kick()
	}
}

func freePort(t *testing.T) int {
	l, err := net.Listen("tcp", ":0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().(*net.TCPAddr).Port
}

// start a node, again after it was stopped.
func (w *world) start(name string, key byte) *side {
	w.Helper()
	s := &side{dir: filepath.Join(w.TempDir(), name), board: &status.Board{}, heard: map[string]Sending{}}
	port := freePort(w.T)
	if old := w.known[name]; old != nil {
		s.dir, port = old.dir, old.cfg.Port
	}
	var err error
	s.Exchange, err = New(Config{
		Node: name, Dir: s.dir, Port: port, State: w.state, Board: s.board,
		Keys: func() (mesh.Key, mesh.Key) {
			w.mu.Lock()
			defer w.mu.Unlock()
			return w.nodes[name].PublicKey, w.next[name]
		},
		Sends:   func(node string) (Sending, bool) { return Sending{Key: mesh.Key{key}, Second: true}, true },
		Heard:   func(node string, x Sending, _ time.Time) { s.mu.Lock(); s.heard[node] = x; s.mu.Unlock() },
		Changed: func(string) {},
		Moved:   func() { w.change(name, func(n *mesh.Node) { n.Exchange = s.Published() }) },
	})
	if err != nil {
		w.Fatal(err)
	}
	s.again = 10 * time.Millisecond
	w.known[name] = s
	w.change(name, func(n *mesh.Node) {
		*n = mesh.Node{Name: name, UID: "uid-" + name, PublicKey: mesh.Key{key}, Ready: true, Exchange: s.Published(),
			Endpoints: []netip.AddrPort{netip.MustParseAddrPort("127.0.0.1:51820")}}
	})
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	stopped := false
	s.stop = func() {
		if !stopped {
			stopped = true
			cancel()
			if err := <-done; err != nil {
				w.Errorf("run %s: %v", name, err)
			}
		}
	}
	w.Cleanup(s.stop)
	return s
}

// The port of one node has a connection going out, as the kernel gives it to
// any; it may last for days. The two agree all the same, and go back when it
// has ended. Who has not heard of that gets an answer as well.
func TestPortOfAConnection(t *testing.T) {
	w := newWorld(t)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	out, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer out.Close()
	taken := out.LocalAddr().(*net.TCPAddr).Port
	w.start("n1", 1)
	w.known["n2"] = &side{dir: filepath.Join(t.TempDir(), "n2"), Exchange: &Exchange{cfg: Config{Port: taken}}} // where n2 starts
	n2 := w.start("n2", 2)
	if port := n2.Published().Port; int(port) == taken || port == 0 {
		t.Errorf("published port %d, and %d is taken", port, taken)
	}
	w.same("n1", "n2", 1, 2)
	listening := func() (c status.Check) {
		checks := n2.board.Checks()
		return checks[slices.IndexFunc(checks, func(c status.Check) bool { return c.Name == "psk/listening" })]
	}
	if c := listening(); !c.Healthy || !strings.Contains(c.Note, fmt.Sprintf("TCP port %d is in use", taken)) {
		t.Errorf("check %+v", c)
	}

	before, _ := w.state().Node("n2")
	_ = out.(*net.TCPConn).SetLinger(0) // nothing of it stays
	out.Close()
	w.eventually("back on its port", func() error {
		n, _ := w.state().Node("n2")
		if c := listening(); int(n.Exchange.Port) != taken || !c.Healthy || c.Note != "" {
			return fmt.Errorf("published port %d, want %d, check %+v", n.Exchange.Port, taken, c)
		}
		return nil
	})
	after, _ := w.state().Node("n2")
	for _, n := range []mesh.Node{before, after} {
		c, err := w.known["n1"].dial(t.Context(), n)
		if err != nil {
			t.Fatalf("port %d: %v", n.Exchange.Port, err)
		}
		defer c.Close()
		if _, err := c.ask(request{Op: opSends, From: "n1", To: "n2"}); err != nil {
			t.Errorf("port %d: %v", n.Exchange.Port, err)
		}
	}
}

func (w *world) eventually(what string, f func() error) {
	w.Helper()
	deadline := time.Now().Add(20 * time.Second)
	for {
		err := f()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			w.Fatalf("%s: %v", what, err)
		}
		time.Sleep(10 * time.Millisecond)
	}
}

// same waits until two nodes have the same preshared key of two keys.
func (w *world) same(a, b string, keyA, keyB byte) Secret {
	w.Helper()
	var psk Secret
	w.eventually(fmt.Sprintf("%s and %s agree", a, b), func() error {
		na, nb := w.nodes[a], w.nodes[b]
		x, y := w.known[a].PSK(nb, mesh.Key{keyA}, mesh.Key{keyB}), w.known[b].PSK(na, mesh.Key{keyB}, mesh.Key{keyA})
		if x.PSK == (Secret{}) || x.PSK != y.PSK {
			return fmt.Errorf("%s: %q, %s: %q, the same: %v", a, x.Wait, b, y.Wait, x.PSK == y.PSK)
		}
		psk = x.PSK
		return nil
	})
	return psk
}

func TestAgree(t *testing.T) {
	w := newWorld(t)
	a := w.start("a", 1)
	if got := a.PSK(mesh.Node{Name: "b", UID: "uid-b", Exchange: mesh.Exchange{Port: 1}}, mesh.Key{1}, mesh.Key{2}); got.Wait != "its preshared key is being agreed" || got.Firm {
		t.Errorf("before the first contact: %+v", got)
	}
	if got := a.PSK(mesh.Node{Name: "old", UID: "u"}, mesh.Key{1}, mesh.Key{2}); got != (Agreement{}) {
		t.Errorf("with a node that does not talk: %+v", got)
	}
	b := w.start("b", 2)
	w.start("c", 3)
	ab, bc, ac := w.same("a", "b", 1, 2), w.same("b", "c", 2, 3), w.same("a", "c", 1, 3)
	if ab == bc || bc == ac || ab == ac {
		t.Error("two pairs have the same preshared key")
	}
	// A new key gets a new one, and nothing before that.
	w.mu.Lock()
	w.next["b"] = mesh.Key{22}
	w.mu.Unlock()
	if got := b.PSK(w.nodes["a"], mesh.Key{22}, mesh.Key{1}); got.Wait == "" || !got.Firm {
		t.Errorf("for the next key: %+v", got)
	}
	w.change("b", func(n *mesh.Node) { n.NextKey = mesh.Key{22} })
	if next := w.same("a", "b", 1, 22); next == ab {
		t.Error("the next key has the preshared key of the old one")
	}
	if w.same("a", "b", 1, 2) != ab {
		t.Error("the preshared key of the old one changed")
	}
	w.eventually("b hears what it asks for", func() error {
		b.mu.Lock()
		defer b.mu.Unlock()
		if b.heard["a"] != (Sending{mesh.Key{1}, true}) || b.heard["c"] != (Sending{mesh.Key{3}, true}) {
			return fmt.Errorf("%v", b.heard)
		}
		return nil
	})
	for _, path := range []string{"exchange.key", "psk/a", "psk/c"} {
		if info, err := os.Stat(filepath.Join(b.dir, path)); err != nil || info.Mode() != 0o600 {
			t.Errorf("%s: %v, %v; want mode 0600", path, info, err)
		}
	}
}

// TestLost: whoever forgets is told anew, whoever comes back knows.
func TestLost(t *testing.T) {
	for _, c := range []struct {
		name, who string
		lose      func(t *testing.T, dir string)
		same      bool
	}{
		{"the one that begins restarts", "a", func(*testing.T, string) {}, true},
		{"the other restarts", "b", func(*testing.T, string) {}, true},
		{"the one that begins lost it", "a", func(t *testing.T, dir string) { remove(t, dir+"/psk/b") }, false},
		{"the other lost it", "b", func(t *testing.T, dir string) { remove(t, dir+"/psk/a") }, false},
		{"the other has another", "b", func(t *testing.T, dir string) {
			b, err := os.ReadFile(dir + "/psk/a")
			if err == nil {
				i := strings.Index(string(b), `"psk":"`) + len(`"psk":"`)
				b[i], b[i+1] = 'A', 'A'+b[i+1]%7
				err = os.WriteFile(dir+"/psk/a", b, 0o600)
			}
			if err != nil {
				t.Fatal(err)
			}
		}, false},
		{"the other's is damaged", "b", func(t *testing.T, dir string) {
			if err := os.WriteFile(dir+"/psk/a", []byte("{"), 0o600); err != nil {
				t.Fatal(err)
			}
		}, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			w := newWorld(t)
			w.start("a", 1)
			w.start("b", 2)
			before := w.same("a", "b", 1, 2)
			s := w.known[c.who]
			s.stop()
			c.lose(t, s.dir)
			w.start(c.who, map[string]byte{"a": 1, "b": 2}[c.who])
			// The other looks by itself every recheck; here it is told.
			for _, p := range w.known["a"].peers {
				w.known["a"].mu.Lock()
				clear(p.checked)
				w.known["a"].mu.Unlock()
			}
			w.known["a"].Kick()
			w.eventually("checked", func() error {
				a := w.known["a"]
				a.mu.Lock()
				defer a.mu.Unlock()
				if p := a.peers["b"]; p == nil || len(p.checked) == 0 {
					return fmt.Errorf("not yet: %v", p)
				}
				return nil
			})
			if after := w.same("a", "b", 1, 2); (after == before) != c.same {
				t.Errorf("the preshared key is the same: %v, want %v", after == before, c.same)
			}
		})
	}
}

func remove(t *testing.T, path string) {
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
}

// TestRefused: who is not a node of the cluster, or not this one, or offers
// another key agreement, is not talked with.
func TestRefused(t *testing.T) {
	w := newWorld(t)
	a, b := w.start("a", 1), w.start("b", 2)
	w.same("a", "b", 1, 2)
	stranger, err := LoadIdentity(filepath.Join(t.TempDir(), "exchange.key"))
	if err != nil {
		t.Fatal(err)
	}
	any := func(mesh.Pin) error { return nil }
	addr := fmt.Sprintf("127.0.0.1:%d", b.cfg.Port)
	try := func(config *tls.Config, req request) error {
		to := addr
		if req.To == "a" {
			to = fmt.Sprintf("127.0.0.1:%d", a.cfg.Port)
		}
		raw, err := tls.Dial("tcp", to, config)
		if err != nil {
			return err
		}
		c := &conn{raw}
		defer c.Close()
		_, err = c.ask(req)
		return err
	}
	classic := a.id.config(any)
	classic.CurvePreferences = []tls.CurveID{tls.X25519}
	old := a.id.config(any)
	old.MinVersion, old.MaxVersion = tls.VersionTLS12, tls.VersionTLS12
	nameless := a.id.config(any)
	nameless.Certificates = nil
	good := request{Op: opSends, From: "a", To: "b"}
	pair := Pair{mesh.Key{1}, mesh.Key{2}}
	for _, c := range []struct {
		name   string
		config *tls.Config
		req    request
		want   string
	}{
		{"a node", a.id.config(any), good, ""},
		{"a stranger", stranger.config(any), good, "tls:"},
		{"without ML-KEM", classic, good, "tls: handshake failure"},
		{"TLS 1.2", old, good, "tls:"},
		{"without a certificate", nameless, good, "tls:"},
		{"under another's name", a.id.config(any), request{Op: opSends, From: "c", To: "b"}, `node "c" does not have this key`},
		{"for another", a.id.config(any), request{Op: opSends, From: "a", To: "c"}, "this is node b"},
		{"something else", a.id.config(any), request{Op: "x", From: "a", To: "b"}, `request "x" is not known`},
		{"keys nobody has", a.id.config(any), request{Op: opOffer, From: "a", To: "b", Pair: Pair{mesh.Key{1}, mesh.Key{9}}}, "does not know one of these keys"},
		{"no encapsulation key", a.id.config(any), request{Op: opOffer, From: "a", To: "b", Pair: pair, Data: []byte("x")}, "read encapsulation key"},
		{"confirms what was not offered", a.id.config(any), request{Op: opConfirm, From: "a", To: "b", Pair: pair}, "confirms what was not offered"},
		{"a miss of keys nobody has", b.id.config(any), request{Op: opMiss, From: "b", To: "a", Pair: Pair{mesh.Key{1}, mesh.Key{9}}}, "does not know one of these keys"},
		{"a miss to one that does not begin", a.id.config(any), request{Op: opMiss, From: "a", To: "b", Pair: pair}, "does not begin"},
	} {
		err := try(c.config, c.req)
		if c.want == "" && err != nil || c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want)) {
			t.Errorf("%s: %v, want %q", c.name, err, c.want)
		}
	}
	// A peer that shows another key than the one it has published.
	other := w.nodes["b"]
	other.Exchange.Pin = stranger.Pin
	if _, err := a.dial(t.Context(), other); err == nil || !strings.Contains(err.Error(), "its key is not the one on its Node object") {
		t.Errorf("dialled somebody else: %v", err)
	}
	// A message that is too long ends the connection before it is read.
	raw, err := tls.Dial("tcp", addr, a.id.config(any))
	if err != nil {
		t.Fatal(err)
	}
	defer raw.Close()
	_, _ = raw.Write(binary.BigEndian.AppendUint32(nil, maxMessage+1))
	if n, err := raw.Read(make([]byte, 1)); err == nil {
		t.Errorf("%d bytes in answer to a message that is too long", n)
	}
	// A removed node is refused, on the connection it has as well.
	raw, err = tls.Dial("tcp", addr, a.id.config(any))
	if err != nil {
		t.Fatal(err)
	}
	defer raw.Close()
	if _, err := (&conn{raw}).ask(good); err != nil {
		t.Fatal(err)
	}
	w.mu.Lock()
	delete(w.nodes, "a")
	w.mu.Unlock()
	if _, err := (&conn{raw}).ask(good); err == nil || !strings.Contains(err.Error(), "does not have this key") {
		t.Errorf("a removed node on an open connection: %v", err)
	}
	if err := try(a.id.config(any), good); err == nil {
		t.Error("a removed node was answered")
	}
	b.Kick()
	w.eventually("b forgets a removed node", func() error { _, err := os.Stat(b.dir + "/psk/a"); return exists(err) })
}

func exists(err error) error {
	if err == nil {
		return fmt.Errorf("it is still there")
	}
	return nil
}

// TestNoWayBack: a pair that had a preshared key gets no tunnel without one.
func TestNoWayBack(t *testing.T) {
	w := newWorld(t)
	a := w.start("a", 1)
	w.start("b", 2)
	w.same("a", "b", 1, 2)
	n := w.nodes["b"]
	for _, c := range []struct {
		name   string
		change func(*mesh.Node)
		firm   bool
	}{
		{"it stopped talking", func(n *mesh.Node) { n.Exchange = mesh.Exchange{} }, true},
		{"it has a new TLS key", func(n *mesh.Node) { n.Exchange.Pin = mesh.Pin{1} }, true},
		{"it is another Node object", func(n *mesh.Node) { n.UID = "other"; n.Exchange = mesh.Exchange{} }, false},
	} {
		m := n
		c.change(&m)
		if got := a.PSK(m, mesh.Key{1}, mesh.Key{9}); got.Firm != c.firm || (got.Wait != "") != c.firm {
			t.Errorf("%s: %+v, want firm %v", c.name, got, c.firm)
		}
	}
}

// TestPatience: without an answer the first contact is over after a moment.
// Who says nothing has few connections of an address, and those of pods none:
// the others are for the nodes.
func TestStrangers(t *testing.T) {
	w := newWorld(t)
	b := w.start("b", 2)
	w.change("b", func(n *mesh.Node) { n.PodCIDRs = []netip.Prefix{netip.MustParsePrefix("127.0.5.0/24")} })
	to := net.JoinHostPort("127.0.0.1", fmt.Sprint(b.cfg.Port))
	call := func(from string) (c net.Conn) {
		d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(from)}}
		w.eventually("b listens", func() (err error) { c, err = d.Dial("tcp", to); return err })
		t.Cleanup(func() { c.Close() })
		return c
	}
	closed := func(conns ...net.Conn) (n int) {
		for _, c := range conns {
			_ = c.SetReadDeadline(time.Now().Add(time.Millisecond))
			if _, err := c.Read(make([]byte, 1)); err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
				n++
			}
		}
		return n
	}
	var strangers []net.Conn
	for range maxStrangers + 1 {
		strangers = append(strangers, call("127.0.0.5"))
	}
	w.eventually("one too many is refused", func() error {
		if closed(strangers...) == 0 {
			return errors.New("all are open")
		}
		return nil
	})
	if n := closed(strangers...); n != 1 { // all of them when they took too long
		t.Errorf("%d of %d were refused", n, len(strangers))
	}
	pod := call("127.0.5.1")
	w.eventually("a pod is refused", func() error {
		if closed(pod) == 0 {
			return errors.New("it is open")
		}
		return nil
	})
	w.start("a", 1)
	w.same("a", "b", 1, 2)
}

// A node is reached at the last of its addresses though nobody speaks at the
// others, before the visit has to end.
func TestDialsAllAddresses(t *testing.T) {
	state := &mesh.State{}
	a, err := New(Config{Node: "a", Dir: t.TempDir(), State: func() *mesh.State { return state }})
	if err != nil {
		t.Fatal(err)
	}
	b, err := LoadIdentity(filepath.Join(t.TempDir(), "exchange.key"))
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.9:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	port := uint16(l.Addr().(*net.TCPAddr).Port)
	go func() {
		raw, err := l.Accept()
		if err != nil {
			return
		}
		defer raw.Close()
		c := tls.Server(raw, b.config(func(mesh.Pin) error { return nil }))
		_ = c.Handshake()
		_, _ = c.Read(make([]byte, 1)) // until it is closed
	}()
	n := mesh.Node{Name: "b", UID: "b", Exchange: mesh.Exchange{Port: port, Pin: b.Pin}}
	for i := 2; i < 9; i++ {
		addr := netip.AddrFrom4([4]byte{127, 0, 0, byte(i)})
		silent, err := net.Listen("tcp", netip.AddrPortFrom(addr, port).String())
		if err != nil {
			t.Fatal(err)
		}
		defer silent.Close()
		n.Endpoints = append(n.Endpoints, netip.AddrPortFrom(addr, 51820))
	}
	n.Addresses = []netip.Addr{netip.MustParseAddr("127.0.0.2"), netip.MustParseAddr("127.0.0.9")}
	ctx, cancel := context.WithTimeout(t.Context(), visitTimeout)
	defer cancel()
	c, err := a.dial(ctx, n)
	if err != nil {
		t.Fatal(err)
	}
	c.Close()
	// Never through the tunnel, though somebody would answer there.
	for name, inside := range map[string]*mesh.State{
		"pods":     {Nodes: []mesh.Node{{Name: "c", PodCIDRs: []netip.Prefix{netip.MustParsePrefix("127.0.0.0/28")}}}},
		"services": {ServiceCIDRs: []netip.Prefix{netip.MustParsePrefix("127.0.0.0/28")}},
	} {
		state = inside
		if _, err := a.dial(ctx, n); err == nil || !strings.Contains(err.Error(), "are of pods or services") {
			t.Errorf("an address of %s was called: %v", name, err)
		}
	}
}

// flaky is a listener that has errors to give before a caller.
type flaky struct {
	net.Listener
	errs chan error
}

func (l flaky) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	select {
	case e := <-l.errs:
		if err == nil {
			c.Close()
		}
		return nil, e
	default:
		return c, err
	}
}

// When files run out the port stays open, and who has a connection keeps it;
// when it cannot go on, those are closed and it ends.
func TestAcceptFails(t *testing.T) {
	w := newWorld(t)
	a, b := w.start("a", 1), w.start("b", 2)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	errs, done := make(chan error, 1), make(chan error, 1)
	go func() { done <- b.accept(t.Context(), flaky{l, errs}) }()
	call := func() (*conn, error) {
		raw, err := tls.Dial("tcp", l.Addr().String(), a.id.config(func(mesh.Pin) error { return nil }))
		if err != nil {
			return nil, err
		}
		t.Cleanup(func() { raw.Close() })
		return &conn{raw}, nil
	}
	good := request{Op: opSends, From: "a", To: "b"}
	c, err := call()
	if err != nil {
		t.Fatal(err)
	}
	ask := func(what string) {
		t.Helper()
		if _, err := c.ask(good); err != nil {
			t.Fatalf("%s: %v", what, err)
		}
	}
	ask("before")
	errs <- &net.OpError{Op: "accept", Err: os.NewSyscallError("accept4", unix.EMFILE)}
	if _, err := call(); err == nil {
		t.Error("there was no file for it")
	}
	ask("without files")
	if _, err := call(); err != nil {
		t.Errorf("after a while: %v", err)
	}
	ask("after a while")
	errs <- unix.EINVAL
	_, _ = call()
	if err := <-done; !errors.Is(err, unix.EINVAL) {
		t.Errorf("ended with %v", err)
	}
	if _, err := c.ask(good); err == nil {
		t.Error("a connection outlived it")
	}
}

// A node may say as often as it likes that it has no preshared key: its pair
// is looked at once a second.
func TestMissedOften(t *testing.T) {
	w := newWorld(t)
	a := w.start("a", 1)
	w.start("b", 2)
	w.same("a", "b", 1, 2)
	n, pair := w.nodes["b"], Pair{mesh.Key{1}, mesh.Key{2}}
	w.eventually("checked", func() error {
		a.mu.Lock()
		defer a.mu.Unlock()
		if a.peers["b"].busy || len(a.peers["b"].checked) == 0 {
			return errors.New("not yet")
		}
		return nil
	})
	for _, c := range []struct {
		ago  time.Duration
		want bool
	}{{0, false}, {missPause, true}} {
		a.mu.Lock()
		later := time.Now().Add(time.Hour)
		a.peers["b"].missed, a.peers["b"].retry = time.Now().Add(-c.ago), later
		a.mu.Unlock()
		if err := a.missed(n, pair); err != nil {
			t.Fatal(err)
		}
		a.mu.Lock()
		if heard := a.peers["b"].retry != later; heard != c.want {
			t.Errorf("%s after the last one it was heard: %v, want %v", c.ago, heard, c.want)
		}
		a.mu.Unlock()
	}
}

func TestPatience(t *testing.T) {
	w := newWorld(t)
	a := w.start("a", 1)
	n := mesh.Node{Name: "b", UID: "u", Exchange: mesh.Exchange{Port: 1}}
	if got := a.PSK(n, mesh.Key{1}, mesh.Key{2}); got.Wait == "" {
		t.Errorf("at first: %+v", got)
	}
	a.mu.Lock()
	a.peers["b"].since = time.Now().Add(-patience)
	a.mu.Unlock()
	if got := a.PSK(n, mesh.Key{1}, mesh.Key{2}); got != (Agreement{}) {
		t.Errorf("later: %+v", got)
	}
}

// TestExpand pins the derivation: both ends have to agree over versions.
func TestExpand(t *testing.T) {
	a, err := expand(make([]byte, 32), make([]byte, 32), "a", "b", Pair{mesh.Key{1}, mesh.Key{2}})
	if err != nil {
		t.Fatal(err)
	}
	got := fmt.Sprintf("%x %x %x %x", a.psk[:4], a.first[:4], a.second[:4], a.psk.name())
	const want = "cc917c3a 6fbee915 9a9119ec f9a2e80ee4c1cdbf"
	if got != want {
		t.Errorf("derived %s, want %s", got, want)
	}
	if fmt.Sprintf("%v %#v", a.psk, a.psk) != "(hidden) (hidden)" {
		t.Errorf("a secret prints as %v", a.psk)
	}
	for _, other := range []struct {
		first, second string
		pair          Pair
	}{{"b", "a", Pair{mesh.Key{1}, mesh.Key{2}}}, {"a", "b", Pair{mesh.Key{2}, mesh.Key{1}}}, {"ab", "", Pair{mesh.Key{1}, mesh.Key{2}}}} {
		if o, _ := expand(make([]byte, 32), make([]byte, 32), other.first, other.second, other.pair); o.psk == a.psk {
			t.Errorf("%v has the same preshared key", other)
		}
	}
}

// A preshared key that was agreed on while we still talk about another stays,
// though the node had not published its next key when we began to talk.
func TestAgreedMeanwhile(t *testing.T) {
	a, err := New(Config{Node: "a", Dir: t.TempDir(), Changed: func(string) {},
		Keys: func() (current, next mesh.Key) { return mesh.Key{1}, mesh.Key{} }})
	if err != nil {
		t.Fatal(err)
	}
	before := mesh.Node{Name: "0", UID: "u", PublicKey: mesh.Key{2}}
	now := before
	now.NextKey = mesh.Key{22}
	a.cfg.State = func() *mesh.State { return &mesh.State{Nodes: []mesh.Node{now}} }
	for _, n := range []mesh.Node{now, before} {
		pair := Pair{n.PublicKey, mesh.Key{1}}
		if !n.NextKey.IsZero() {
			pair.First = n.NextKey
		}
		if err := a.confirmed(&pending{pair: pair, agreed: agreed{first: []byte("w")}}, n, request{Pair: pair, Data: []byte("w")}); err != nil {
			t.Fatal(err)
		}
	}
	for _, key := range []mesh.Key{{2}, {22}} {
		if _, ok, _ := a.store.get(now, mesh.Key{1}, key); !ok {
			t.Errorf("the preshared key of %v is gone", key)
		}
	}
}

// No more than maxVisits nodes are called at once: the others wait.
func TestVisitsWait(t *testing.T) {
	w := newWorld(t)
	a := w.start("a", 1)
	for range maxVisits {
		a.slots <- struct{}{}
	}
	b := w.start("b", 2)
	w.eventually("a waits to visit b", func() error {
		a.mu.Lock()
		defer a.mu.Unlock()
		if p := a.peers["b"]; p == nil || !p.busy {
			return errors.New("not yet")
		}
		return nil
	})
	w.eventually("b calls a", func() error {
		b.mu.Lock()
		defer b.mu.Unlock()
		if p := b.peers["a"]; p == nil || p.conn == nil {
			return errors.New("not yet")
		}
		return nil
	})
	if got := a.PSK(w.nodes["b"], mesh.Key{1}, mesh.Key{2}); got.PSK != (Secret{}) {
		t.Error("a has called b though it calls so many")
	}
	<-a.slots
	w.same("a", "b", 1, 2)
}

// A newer node may say more than we know; a file says what we wrote.
func TestNewerMessages(t *testing.T) {
	var req request
	if err := parse([]byte(`{"op":"sends","from":"a","to":"b","version":2,"pair":{"more":{}}}`), &req); err != nil || req.From != "a" {
		t.Errorf("a request of a newer version: %+v, %v", req, err)
	}
	var resp response
	if err := parse([]byte(`{"ok":true,"since":"today","sends":{"second":true,"mtu":1}}`), &resp); err != nil || !resp.OK || !resp.Sends.Second {
		t.Errorf("a response of a newer version: %+v, %v", resp, err)
	}
	if err := parse([]byte(`{"op":1}`), &req); err == nil {
		t.Error("a number for an op was taken")
	}
	const file = `{"uid":"u","keys":[{"own":"","peer":"","psk":"AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=","made":"2026-01-02T03:04:05Z"}]`
	if _, err := parseFile([]byte(file + "}")); err != nil {
		t.Errorf("a file: %v", err)
	}
	if _, err := parseFile([]byte(file + `,"version":2}`)); err == nil {
		t.Error("a file with more in it was taken")
	}
}

func FuzzMessages(f *testing.F) {
	f.Add([]byte(`{"op":"offer","from":"a","to":"b","pair":{"first":"","second":""},"data":"AAAA"}`))
	f.Add([]byte(`{"ok":true,"sends":{"key":"AQAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=","second":true}}`))
	f.Add([]byte(`{"uid":"u","keys":[{"own":"","peer":"","psk":"AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=","made":"2026-01-02T03:04:05Z"}]}`))
	f.Add([]byte(`{} {}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		framed := append(binary.BigEndian.AppendUint32(nil, uint32(len(b))), b...)
		var req request
		if err := read(strings.NewReader(string(framed)), &req); err == nil && len(b) > maxMessage {
			t.Errorf("a message of %d bytes was read", len(b))
		}
		var resp response
		_ = parse(b, &resp)
		if file, err := parseFile(b); err == nil && (file.UID == "" || len(file.Keys) == 0) {
			t.Errorf("%q is a file without a preshared key", b)
		}
	})
}
