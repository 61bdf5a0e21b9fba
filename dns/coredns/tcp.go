package coredns

import (
	"net"
	"net/netip"
	"sync"
	"time"

	"github.com/miekg/dns"
)

// Limits of TCP: a client that opens connections and does nothing keeps few of
// them, and not for long.
const (
	maxConns          = 512 // of all addresses
	maxConnsPerClient = 32
	tcpIdle           = 8 * time.Second
	tcpRead           = 3 * time.Second
	tcpWrite          = 3 * time.Second
)

// clients counts what the clients of a server have under way, and bounds it in
// all and for each: one that goes wild does not take what the others need.
type clients struct {
	max, maxEach int

	mu    sync.Mutex
	all   int
	count map[netip.Addr]int
}

func newClients(max, maxEach int) *clients {
	return &clients{max: max, maxEach: maxEach, count: map[netip.Addr]int{}}
}

// enter counts one more of a, unless that is one too many.
func (c *clients) enter(a netip.Addr) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.all >= c.max || c.count[a] >= c.maxEach {
		return false
	}
	c.all++
	c.count[a]++
	return true
}

func (c *clients) leave(a netip.Addr) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.all--
	if c.count[a]--; c.count[a] == 0 {
		delete(c.count, a)
	}
}

// limited is a listener that closes connections beyond the limits at once.
type limited struct {
	net.Listener
	server *Server
}

func (l limited) Accept() (net.Conn, error) {
	for {
		conn, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		from := conn.RemoteAddr().(*net.TCPAddr).AddrPort().Addr().Unmap()
		if !l.server.serves(from) || !l.server.conns.enter(from) {
			dropped.Inc()
			conn.Close()
			continue
		}
		return &counted{Conn: conn, leave: sync.OnceFunc(func() { l.server.conns.leave(from) })}, nil
	}
}

// counted is a connection that counts until it is closed.
type counted struct {
	net.Conn
	leave func()
}

func (c *counted) Close() error {
	c.leave()
	return c.Conn.Close()
}

// tcpServer answers on one listener; miekg/dns does the framing.
type tcpServer struct{ server *dns.Server }

func (s *Server) newTCP(l net.Listener) *tcpServer {
	return &tcpServer{&dns.Server{
		Listener:      limited{l, s},
		Handler:       dns.HandlerFunc(s.serve),
		MsgAcceptFunc: accept,
		ReadTimeout:   tcpRead,
		WriteTimeout:  tcpWrite,
		IdleTimeout:   func() time.Duration { return tcpIdle },
	}}
}

func (t *tcpServer) serve() error { return t.server.ActivateAndServe() }

// close lets the questions that were read be answered.
func (t *tcpServer) close() {
	// Shutdown of a server that is not yet started closes nothing.
	if t.server.Shutdown() != nil {
		t.server.Listener.Close()
	}
}
