package exchange

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"meshd.dev/pkg/mesh"
)

const (
	// maxConns at a time, of all callers together and of one node.
	maxConns     = 256
	maxNodeConns = 4
	// maxStrangers of one address, before the handshake says who they are.
	maxStrangers = 8
	// handshakeTimeout of a caller nobody knows yet.
	handshakeTimeout = 5 * time.Second
	// idleTimeout between two requests.
	idleTimeout = 15 * time.Second
	// acceptPause after a caller could not be taken.
	acceptPause = time.Second
	// missPause between two times a node is heard that has no preshared key.
	missPause = time.Second
	// dialTimeout of one address.
	dialTimeout = 2 * time.Second
	// askTimeout of one request.
	askTimeout = 5 * time.Second
)

// serve answers the other nodes, on the port that is published and, when that
// is the wished one again, on the one before for as long as it can: the others
// have not heard yet.
func (x *Exchange) serve(ctx context.Context) error {
	var ports sync.WaitGroup
	defer ports.Wait()
	port := x.port()
	if port != x.cfg.Port {
		ports.Go(func() {
			if l := x.regain(ctx); l != nil {
				x.serveAt(ctx, x.cfg.Port, l)
			}
		})
	}
	x.serveAt(ctx, port, x.first)
	return nil
}

// serveAt a port, l if that is open, until ctx ends. One that is taken is told
// and tried again: tunnels go on without it.
func (x *Exchange) serveAt(ctx context.Context, port int, l net.Listener) {
	for ctx.Err() == nil {
		err := x.listen(ctx, port, l)
		l = nil
		if err != nil {
			x.cfg.Log.Warn("key exchange", "err", err)
		}
		if port != x.port() {
			return // it was of use until it failed
		}
		x.cfg.Board.Report("psk/listening", err, fmt.Sprintf("free TCP port %d, or choose another --listen-port; without it the nodes cannot agree on preshared keys nor change their keys", port))
		select {
		case <-ctx.Done():
		case <-time.After(5 * time.Second):
		}
	}
}

// choosePort opens the port that is wished. It is among those that the kernel
// gives to connections going out, of which a busy machine, such as one with a
// control plane, has hundreds that last for days. Where one of them has it,
// another port serves as well, until it is free: it is published.
func (x *Exchange) choosePort() {
	x.publish(x.cfg.Port)
	l, err := listen(x.cfg.Port)
	if errors.Is(err, unix.EADDRINUSE) {
		if l, err = listen(0); err == nil {
			x.publish(l.Addr().(*net.TCPAddr).Port)
			x.cfg.Log.Warn("key exchange", "err", x.elsewhere())
		}
	}
	if err == nil {
		x.first = l
	}
}

func (x *Exchange) port() int        { return int(x.published.Load()) }
func (x *Exchange) publish(port int) { x.published.Store(int32(port)) }

func (x *Exchange) elsewhere() string {
	return fmt.Sprintf("TCP port %d is in use (`ss -Htanp sport = %[1]d`), so the others are told port %d until it is free, which is looked at each minute: a firewall has to let that through", x.cfg.Port, x.port())
}

// regain opens the wished port when it is free, and has it published; nil when
// ctx ends before.
func (x *Exchange) regain(ctx context.Context) net.Listener {
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(x.again):
		}
		l, err := listen(x.cfg.Port)
		if err != nil {
			continue
		}
		x.cfg.Log.Info("key exchange", "port", x.cfg.Port, "before", x.port())
		x.publish(x.cfg.Port)
		if x.cfg.Moved != nil {
			x.cfg.Moved()
		}
		return l
	}
}

// listen at port until ctx ends; l is open already, or nil.
func (x *Exchange) listen(ctx context.Context, port int, l net.Listener) (err error) {
	if l == nil {
		if l, err = listen(port); err != nil {
			return fmt.Errorf("listen: %w", err)
		}
	}
	x.listening()
	return x.accept(ctx, l)
}

func (x *Exchange) listening() {
	if x.port() != x.cfg.Port {
		x.cfg.Board.Note("psk/listening", x.elsewhere())
		return
	}
	x.cfg.Board.OK("psk/listening")
}

func listen(port int) (net.Listener, error) { return net.Listen("tcp", fmt.Sprintf(":%d", port)) }

// accept callers until ctx ends. It closes l.
func (x *Exchange) accept(ctx context.Context, l net.Listener) error {
	stop := context.AfterFunc(ctx, func() { l.Close() })
	defer stop()
	defer l.Close()
	ctx, cancel := context.WithCancel(ctx)
	var conns sync.WaitGroup
	defer conns.Wait()
	defer cancel() // closes them: some would live as long as their callers
	for {
		raw, err := l.Accept()
		if ctx.Err() != nil {
			return nil
		}
		if err != nil && !passes(err) {
			return fmt.Errorf("accept: %w", err)
		}
		x.listening()
		if err != nil { // the port stays open, and who has a connection keeps it
			x.cfg.Board.Fail("psk/listening", err.Error(), "look what has all the files or the memory; callers wait until there is room")
			x.cfg.Log.Warn("key exchange", "err", fmt.Errorf("accept: %w", err))
			select {
			case <-ctx.Done():
			case <-time.After(acceptPause):
			}
			continue
		}
		select {
		case x.free <- struct{}{}:
		default:
			raw.Close()
			continue
		}
		conns.Go(func() {
			defer func() { <-x.free }()
			x.serveConn(ctx, raw, x.counts)
		})
	}
}

// passes reports whether an error of Accept is for want of something.
func passes(err error) bool {
	return slices.ContainsFunc([]error{unix.EMFILE, unix.ENFILE, unix.ENOBUFS, unix.ENOMEM}, func(e error) bool { return errors.Is(err, e) })
}

// counts the connections of each node, by its pin, and of each address whose
// node is not known yet.
type counts struct {
	mu sync.Mutex
	of map[string]int
}

func (c *counts) add(node string, n, most int) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if n > 0 && c.of[node] >= most {
		return false
	}
	if c.of[node] += n; c.of[node] == 0 {
		delete(c.of, node)
	}
	return true
}

// caller finds the nodes with a pin. A node that was removed has none.
func (x *Exchange) caller(pin mesh.Pin, name string) (mesh.Node, error) {
	state := x.cfg.State()
	if state == nil {
		return mesh.Node{}, errors.New("the nodes of the cluster are not known yet")
	}
	if name == "" { // the handshake, before it has said its name
		for _, n := range state.Nodes {
			if n.Exchange.Port != 0 && n.Exchange.Pin == pin && n.Name != x.cfg.Node {
				return n, nil
			}
		}
		return mesh.Node{}, errors.New("no node of the cluster has this key")
	}
	n, ok := state.Node(name)
	if !ok || n.Exchange.Port == 0 || n.Exchange.Pin != pin || name == x.cfg.Node {
		return mesh.Node{}, fmt.Errorf("node %.80q does not have this key", name)
	}
	return n, nil
}

func (x *Exchange) serveConn(ctx context.Context, raw net.Conn, counts *counts) {
	stop := context.AfterFunc(ctx, func() { raw.Close() })
	defer stop()
	defer raw.Close()
	c := x.greet(ctx, raw, counts)
	if c == nil {
		return
	}
	pin := pinOf(c.ConnectionState().PeerCertificates[0])
	node := pin.String()
	if !counts.add(node, 1, maxNodeConns) {
		return
	}
	defer counts.add(node, -1, 0)
	var offer *pending
	for {
		_ = raw.SetDeadline(time.Now().Add(idleTimeout))
		var req request
		if err := read(c, &req); err != nil {
			return
		}
		var resp response
		resp, offer = x.answer(c, pin, req, offer)
		if err := write(c, resp); err != nil {
			return
		}
	}
}

// greet shakes hands with a caller that is a node; nil if it is not. A node
// calls from an address of the underlay, never from a pod's.
func (x *Exchange) greet(ctx context.Context, raw net.Conn, counts *counts) *conn {
	from := raw.RemoteAddr().(*net.TCPAddr).AddrPort().Addr().Unmap()
	if x.inside(from) || !counts.add(from.String(), 1, maxStrangers) {
		return nil
	}
	defer counts.add(from.String(), -1, 0)
	accept := func(pin mesh.Pin) error { _, err := x.caller(pin, ""); return err }
	c := &conn{tls.Server(raw, x.id.config(accept))}
	_ = raw.SetDeadline(time.Now().Add(handshakeTimeout))
	if err := c.HandshakeContext(ctx); err != nil {
		x.cfg.Log.Debug("key exchange refused", "from", from, "err", err)
		return nil
	}
	return c
}

// inside reports whether an address is of the pods of a node or of a service.
func (x *Exchange) inside(a netip.Addr) bool {
	state, contains := x.cfg.State(), func(p netip.Prefix) bool { return p.Contains(a) }
	return state != nil && (slices.ContainsFunc(state.ServiceCIDRs, contains) || slices.ContainsFunc(state.Nodes, func(n mesh.Node) bool {
		return slices.ContainsFunc(n.PodCIDRs, contains)
	}))
}

// answer a request. What was offered stays until the next offer or its
// confirmation.
func (x *Exchange) answer(c *conn, pin mesh.Pin, req request, offer *pending) (response, *pending) {
	n, err := x.caller(pin, req.From)
	if err == nil && req.To != x.cfg.Node {
		err = fmt.Errorf("this is node %s, not %.80q", x.cfg.Node, req.To)
	}
	if err != nil {
		return response{Error: err.Error()}, nil
	}
	resp := response{}
	switch req.Op {
	case opSends:
		if s, ok := x.cfg.Sends(n.Name); ok {
			resp.Sends = &s
		}
		return resp, offer
	case opMiss:
		err = x.missed(n, req.Pair)
		resp.OK = err == nil
	case opCheck, opOffer, opConfirm:
		if err = x.fits(n, req.Pair); err != nil {
			break
		}
		switch req.Op {
		case opCheck:
			e, ok, _ := x.store.get(n, req.Pair.Second, req.Pair.First)
			resp.OK = ok && confirms(Secret(e.PSK).name(), req.Name) == nil
		case opOffer:
			offer, resp.Data, err = x.offered(c, n, req)
		case opConfirm:
			err = x.confirmed(offer, n, req)
			offer, resp.OK = nil, err == nil
		}
	default:
		err = fmt.Errorf("request %.20q is not known", req.Op)
	}
	if err != nil {
		return response{Error: err.Error()}, nil
	}
	return resp, offer
}

// fits reports whether n may begin, and both know the keys.
func (x *Exchange) fits(n mesh.Node, p Pair) error {
	if x.begins(n.Name) {
		return fmt.Errorf("node %s begins, not %s", x.cfg.Node, n.Name)
	}
	if !x.useful(n)(p.Second, p.First) {
		return fmt.Errorf("node %s does not know one of these keys", x.cfg.Node)
	}
	return nil
}

// missed: the other has no preshared key of a pair, and we begin. It may say
// so often: once in missPause we go and see.
func (x *Exchange) missed(n mesh.Node, p Pair) error {
	if !x.begins(n.Name) {
		return fmt.Errorf("node %s does not begin", x.cfg.Node)
	}
	if !x.useful(n)(p.First, p.Second) {
		return fmt.Errorf("node %s does not know one of these keys", x.cfg.Node)
	}
	x.mu.Lock()
	defer x.mu.Unlock()
	q := x.peer(n)
	if time.Since(q.missed) < missPause {
		return nil
	}
	q.missed, q.retry = time.Now(), time.Time{}
	delete(q.checked, p)
	x.loop.Kick()
	return nil
}

// conn is one end of a connection.
type conn struct{ *tls.Conn }

// ask and wait for the answer.
func (c *conn) ask(req request) (response, error) {
	_ = c.SetDeadline(time.Now().Add(askTimeout))
	var resp response
	if err := write(c, req); err != nil {
		return resp, err
	}
	if err := read(c, &resp); err != nil {
		return resp, err
	}
	if resp.Error != "" {
		return resp, fmt.Errorf("%s says: %.200s", req.To, resp.Error)
	}
	return resp, nil
}

// stagger is how long the next address waits for the one before.
const stagger = 200 * time.Millisecond

// dial n at its addresses, each a moment after the one before, for some of
// them may be known to others and lead nowhere from here.
func (x *Exchange) dial(ctx context.Context, n mesh.Node) (won *conn, err error) {
	addrs := addressesOf(n)
	if len(addrs) == 0 {
		return nil, errors.New("it has published no address")
	}
	if addrs = slices.DeleteFunc(addrs, x.inside); len(addrs) == 0 {
		return nil, errors.New("all addresses it has published are of pods or services: they are reached through the tunnel that the keys are for")
	}
	type result struct {
		c   *conn
		err error
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	results := make(chan result)
	for i, a := range addrs {
		go func() { // ends with its result, and all are taken
			select {
			case <-ctx.Done():
				results <- result{err: ctx.Err()}
			case <-time.After(time.Duration(i) * stagger):
				c, err := x.dialAt(ctx, n, a)
				results <- result{c, err}
			}
		}()
	}
	var errs []error
	for range addrs {
		switch r := <-results; {
		case r.err != nil:
			errs = append(errs, r.err)
		case won != nil:
			r.c.Close()
		default:
			won = r.c
			cancel()
		}
	}
	if won != nil {
		return won, nil
	}
	return nil, errors.Join(errs...)
}

// addressesOf n, those of its tunnel first.
func addressesOf(n mesh.Node) (list []netip.Addr) {
	for _, e := range n.Endpoints {
		list = append(list, e.Addr())
	}
	seen := map[netip.Addr]bool{}
	return slices.DeleteFunc(append(list, n.Addresses...), func(a netip.Addr) bool {
		again := seen[a]
		seen[a] = true
		return again
	})
}

func (x *Exchange) dialAt(ctx context.Context, n mesh.Node, a netip.Addr) (*conn, error) {
	accept := func(pin mesh.Pin) error {
		if pin != n.Exchange.Pin {
			return fmt.Errorf("it is not node %s: its key is not the one on its Node object", n.Name)
		}
		return nil
	}
	d := tls.Dialer{NetDialer: &net.Dialer{Timeout: dialTimeout}, Config: x.id.config(accept)}
	c, err := d.DialContext(ctx, "tcp", netip.AddrPortFrom(a, n.Exchange.Port).String())
	if err != nil {
		return nil, err
	}
	return &conn{c.(*tls.Conn)}, nil
}
