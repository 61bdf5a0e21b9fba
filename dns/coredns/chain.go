package coredns

import (
	"context"
	"fmt"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/coredns/caddy"
	"github.com/coredns/coredns/core/dnsserver"
	"github.com/coredns/coredns/plugin"
	_ "github.com/coredns/coredns/plugin/cache"  // the directive cache
	_ "github.com/coredns/coredns/plugin/errors" // the directive errors
	"github.com/coredns/coredns/plugin/forward"
	"github.com/coredns/coredns/plugin/metrics/vars"
	"github.com/coredns/coredns/plugin/pkg/rcode"
	"github.com/coredns/coredns/request"
	"github.com/miekg/dns"

	mesh "meshd.dev/dns"
)

// serverName labels our metrics among those of CoreDNS.
const serverName = "dns://meshd"

// maxUpstreams of a forward block in CoreDNS.
const maxUpstreams = 15

// chain is the plugins of one set of upstreams, compiled by CoreDNS.
type chain struct {
	server  *dnsserver.Server
	forward *forward.Forward // nil without upstreams
	forget  func()
	// inside counts who uses the chain, so that it is closed after them.
	inside sync.WaitGroup
}

// corefile of the chain. Names of the cluster never reach cache. Without
// upstreams the chain ends early, and what is left over answers SERVFAIL.
func (s *Server) corefile(name string, upstreams []netip.AddrPort) string {
	var b strings.Builder
	pods := "insecure"
	if s.cfg.NoPods {
		pods = "disabled"
	}
	fmt.Fprintf(&b, ". {\n%s\nerrors {\nconsolidate 30s \".*\" warning show_first\n}\n", captureDirective)
	fmt.Fprintf(&b, "%s %s in-addr.arpa ip6.arpa {\nindex %s\nttl %d\npods %s\n}\n",
		mesh.Name, s.cfg.Index.Zone(), name, s.options.TTL, pods)
	if len(upstreams) > 0 {
		b.WriteString("cache 3600 {\nservfail 1s\nserve_stale 1h verify\n}\nforward .")
		for _, u := range upstreams[:min(len(upstreams), maxUpstreams)] {
			fmt.Fprintf(&b, " %s", u)
		}
		fmt.Fprintf(&b, " {\npolicy sequential\nmax_concurrent %d\n}\n", maxWaiting)
	}
	b.WriteString("}\n")
	return b.String()
}

// deadEnd answers what nobody before it did: SERVFAIL, for a client can ask
// another server or again later.
type deadEnd struct{}

func (deadEnd) Name() string { return "deadend" }

func (deadEnd) ServeDNS(context.Context, dns.ResponseWriter, *dns.Msg) (int, error) {
	return dns.RcodeServerFailure, nil
}

const captureDirective = "meshd"

// compiling guards what CoreDNS and caddy keep for the whole process: the
// order of directives, and captured.
var (
	compiling  sync.Mutex
	captured   *dnsserver.Config
	registered bool
	chains     atomic.Uint64
)

// newChain has CoreDNS read a Corefile and compile its plugins, without
// opening sockets: the directive that only we know hands out the configuration
// while it is read.
func (s *Server) newChain(upstreams []netip.AddrPort) (*chain, error) {
	name := fmt.Sprintf("meshd-%d", chains.Add(1))
	c := &chain{forget: mesh.Share(name, s.cfg.Index)}
	config, err := compile(s.corefile(name, upstreams))
	if err == nil {
		config.AddPlugin(func(plugin.Handler) plugin.Handler { return deadEnd{} })
		c.server, err = dnsserver.NewServer(serverName, []*dnsserver.Config{config})
	}
	if err != nil {
		c.forget()
		return nil, fmt.Errorf("set up dns plugins: %w", err)
	}
	if f, ok := config.Handler("forward").(*forward.Forward); ok {
		c.forward = f
		if err := f.OnStartup(); err != nil {
			c.forget()
			return nil, fmt.Errorf("start forwarding: %w", err)
		}
	}
	return c, nil
}

func compile(corefile string) (*dnsserver.Config, error) {
	compiling.Lock()
	defer compiling.Unlock()
	if !registered {
		registered = true
		plugin.Register(captureDirective, func(c *caddy.Controller) error {
			captured = dnsserver.GetConfig(c)
			return nil
		})
	}
	defer func(d []string, quiet, caddyQuiet bool) {
		dnsserver.Directives, dnsserver.Quiet, caddy.Quiet, captured = d, quiet, caddyQuiet, nil
	}(dnsserver.Directives, dnsserver.Quiet, caddy.Quiet)
	dnsserver.Quiet, caddy.Quiet = true, true
	if err := dnsserver.SetDirectives([]string{captureDirective, "errors", mesh.Name, "cache", "forward"}); err != nil {
		return nil, err
	}
	input := caddy.CaddyfileInput{Filepath: "Corefile", Contents: []byte(corefile), ServerTypeName: "dns"}
	if err := caddy.ValidateAndExecuteDirectives(input, nil, true); err != nil {
		return nil, err
	}
	return captured, nil
}

// close waits until the chain is empty and stops it.
func (c *chain) close() {
	c.inside.Wait()
	if c.forward != nil {
		_ = c.forward.OnShutdown() // always nil
	}
	c.forget()
}

func (s *Server) current() *chain {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.chain
}

// enter is current for those who use it; they call inside.Done afterwards.
func (s *Server) enter() *chain {
	s.mu.RLock()
	defer s.mu.RUnlock()
	if s.chain != nil {
		s.chain.inside.Add(1)
	}
	return s.chain
}

// replace puts next in place of the chain, which is closed when it is empty.
func (s *Server) replace(next *chain) {
	s.mu.Lock()
	last := s.chain
	s.chain = next
	s.mu.Unlock()
	if last != nil {
		s.closing.Go(last.close)
	}
}

// serve has the chain answer m.
func (s *Server) serve(w dns.ResponseWriter, m *dns.Msg) {
	c := s.enter()
	if c == nil {
		return
	}
	defer c.inside.Done()
	start := time.Now()
	ctx := context.WithValue(context.Background(), dnsserver.Key{}, c.server)
	ctx = context.WithValue(ctx, dnsserver.LoopKey{}, 0)
	out := &recorder{ResponseWriter: w}
	c.server.ServeDNS(ctx, out, m)
	if len(m.Question) == 1 && out.written {
		vars.Report(serverName, request.Request{W: w, Req: m}, ".", "", rcode.ToString(out.rcode), "", out.size, start)
	}
}

// recorder remembers what was answered.
type recorder struct {
	dns.ResponseWriter
	written     bool
	rcode, size int
}

func (r *recorder) WriteMsg(m *dns.Msg) error {
	r.written, r.rcode, r.size = true, m.Rcode, m.Len()
	return r.ResponseWriter.WriteMsg(m)
}
