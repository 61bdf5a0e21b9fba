package coredns

import (
	"net"
	"net/netip"
	"sync"
	"time"

	"github.com/miekg/dns"
)

// Limits of TCP: a client that opens connections and does nothing keeps few of
// them and not for long.
const (
	maxConns          = 512 // of all addresses
	maxConnsPerClient = 32
	tcpIdle           = 8 * time.Second
	tcpRead           = 3 * time.Second
	tcpWrite          = 3 * time.Second
)

// clients counts the open connections.
type clients struct {
	mu    sync.Mutex
	all   int
	conns map[netip.Addr]int
}

func (c *clients) enter(a netip.Addr) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.all >= maxConns || c.conns[a] >= maxConnsPerClient {
		return false
	}
	if c.conns == nil {
		c.conns = map[netip.Addr]int{}
	}
	c.all++
	c.conns[a]++
	return true
}

func (c *clients) leave(a netip.Addr) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.all--
	if c.conns[a]--; c.conns[a] == 0 {
		delete(c.conns, a)
	}
}

// limited is a listener that closes connections beyond the limits at once.
type limited struct {
	net.Listener
	clients *clients
}

func (l limited) Accept() (net.Conn, error) {
	for {
		conn, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		from := conn.RemoteAddr().(*net.TCPAddr).AddrPort().Addr().Unmap()
		if !l.clients.enter(from) {
			dropped.Inc()
			conn.Close()
			continue
		}
		return &counted{Conn: conn, leave: sync.OnceFunc(func() { l.clients.leave(from) })}, nil
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
		Listener:      limited{l, &s.clients},
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
