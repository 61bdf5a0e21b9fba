package coredns

import (
	"context"
	"net"
	"net/netip"
	"os"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/miekg/dns"

	"meshd.dev/dns/index"
	"meshd.dev/pkg/mesh"
	"meshd.dev/pkg/status"
)

// The plan: the server answers on a loopback address of this process, on a free
// port; one upstream, a small server of the test, knows example.com.

var loopback = netip.AddrFrom4([4]byte{127, byte(64 + os.Getpid()>>16&63), byte(os.Getpid() >> 8), byte(os.Getpid())})

func addr(s string) netip.Addr { return netip.MustParseAddr(s) }

func endpoints(n int) []mesh.Endpoint {
	list := make([]mesh.Endpoint, n)
	for i := range list {
		list[i] = mesh.Endpoint{Addr: netip.AddrFrom4([4]byte{10, 244, byte(i >> 8), byte(i)}), Ready: true,
			Ports: []mesh.EndpointPort{{Name: "sql", Protocol: mesh.TCP, Port: 5432}}}
	}
	return list
}

func testState() *mesh.State {
	return &mesh.State{
		Namespaces: []string{"shop"},
		Services: []*mesh.Service{
			{Namespace: "shop", Name: "away", ExternalName: "www.example.com"},
			{Namespace: "shop", Name: "big", Headless: true, Endpoints: endpoints(1000)},
			{Namespace: "shop", Name: "broken", ExternalName: "broken.example.com"},
			{Namespace: "shop", Name: "db", Headless: true, Endpoints: endpoints(3)},
			{Namespace: "shop", Name: "gone", ExternalName: "nothing.example.com"},
			{Namespace: "shop", Name: "inside", ExternalName: "web.shop.svc.cluster.local."},
			{Namespace: "shop", Name: "inside-none", ExternalName: "nothing.shop.svc.cluster.local"},
			{Namespace: "shop", Name: "loop-a", ExternalName: "loop-b.shop.svc.cluster.local"},
			{Namespace: "shop", Name: "loop-b", ExternalName: "loop-a.shop.svc.cluster.local"},
			{Namespace: "shop", Name: "web", ClusterIPs: []netip.Addr{addr("10.96.0.20"), addr("fd00:10:96::20")},
				Ports: []mesh.ServicePort{{Name: "http", Protocol: mesh.TCP, Port: 80}}},
		},
	}
}

func newIndex(t testing.TB) *index.Index {
	t.Helper()
	x, err := index.New(index.Config{Zone: "cluster.local"})
	if err != nil {
		t.Fatal(err)
	}
	x.Apply(testState())
	return x
}

// upstream answers example.com: www has an address, nothing does not exist,
// broken fails. It returns where it listens.
func upstream(t testing.TB) netip.AddrPort {
	t.Helper()
	return serveUpstream(t, netip.AddrPortFrom(loopback, 0).String())
}

func serveUpstream(t testing.TB, on string) netip.AddrPort {
	t.Helper()
	packets, err := net.ListenPacket("udp", on)
	if err != nil {
		t.Fatal(err)
	}
	at := packets.LocalAddr().(*net.UDPAddr).AddrPort()
	listener, err := net.Listen("tcp", at.String())
	if err != nil {
		t.Fatal(err)
	}
	handler := dns.HandlerFunc(func(w dns.ResponseWriter, r *dns.Msg) {
		m := new(dns.Msg)
		m.SetReply(r)
		switch name := strings.ToLower(r.Question[0].Name); {
		case name == "www.example.com." && r.Question[0].Qtype == dns.TypeA:
			m.Answer = []dns.RR{&dns.A{A: net.IPv4(192, 0, 2, 80),
				Hdr: dns.RR_Header{Name: r.Question[0].Name, Rrtype: dns.TypeA, Class: dns.ClassINET, Ttl: 60}}}
		case name == "nothing.example.com.":
			m.Rcode = dns.RcodeNameError
		case name == "broken.example.com.":
			m.Rcode = dns.RcodeServerFailure
		case strings.HasSuffix(name, ".arpa."):
			m.Rcode = dns.RcodeNameError
		}
		_ = w.WriteMsg(m)
	})
	for _, s := range []*dns.Server{{PacketConn: packets, Handler: handler}, {Listener: listener, Handler: handler}} {
		started := make(chan struct{})
		s.NotifyStartedFunc = func() { close(started) }
		stopped := make(chan struct{})
		go func() { defer close(stopped); _ = s.ActivateAndServe() }()
		<-started
		t.Cleanup(func() { _ = s.Shutdown(); <-stopped })
	}
	return at
}

// freePort is one nobody listens on.
func freePort(t testing.TB) uint16 {
	t.Helper()
	c, err := net.ListenPacket("udp", netip.AddrPortFrom(loopback, 0).String())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	return c.LocalAddr().(*net.UDPAddr).AddrPort().Port()
}

// start runs a server until the test ends and waits until it answers.
func start(t testing.TB, c Config) *Server {
	t.Helper()
	if c.Index == nil {
		c.Index = newIndex(t)
	}
	if c.Port == 0 {
		c.Port = freePort(t)
	}
	if c.Board == nil {
		c.Board = &status.Board{}
	}
	s, err := New(c)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	if len(c.Listen) > 0 {
		waitFor(t, c.Board, checkListening, true)
	}
	return s
}

// waitFor waits until a check is as healthy as wanted.
func waitFor(t testing.TB, b *status.Board, name string, healthy bool) (found status.Check) {
	t.Helper()
	waitUntil(t, func() bool {
		for _, c := range b.Checks() {
			if c.Name == name && c.Healthy == healthy {
				found = c
				return true
			}
		}
		return false
	})
	return found
}

func waitUntil(t testing.TB, done func() bool) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	for !done() {
		select {
		case <-ctx.Done():
			t.Fatal("never happened")
		case <-tick.C:
		}
	}
}

func (s *Server) at(a netip.Addr) string { return netip.AddrPortFrom(a, s.cfg.Port).String() }

func ask(t testing.TB, s *Server, network, name string, qtype uint16) *dns.Msg {
	t.Helper()
	m := new(dns.Msg)
	m.SetQuestion(name, qtype)
	return exchange(t, s, network, m)
}

func exchange(t testing.TB, s *Server, network string, m *dns.Msg) *dns.Msg {
	t.Helper()
	c := &dns.Client{Net: network, Timeout: 10 * time.Second, UDPSize: 65535}
	r, _, err := c.Exchange(m, s.at(s.wanted()[0]))
	if err != nil {
		t.Fatalf("%s: %v", m.Question[0].String(), err)
	}
	return r
}

// summary is the rcode and the answers, a word each.
func summary(m *dns.Msg) string {
	words := []string{dns.RcodeToString[m.Rcode]}
	if m.Truncated {
		words = append(words, "TC")
	}
	for _, rr := range m.Answer {
		switch rr := rr.(type) {
		case *dns.A:
			words = append(words, rr.A.String())
		case *dns.AAAA:
			words = append(words, rr.AAAA.String())
		case *dns.CNAME:
			words = append(words, rr.Target)
		default:
			words = append(words, dns.TypeToString[rr.Header().Rrtype])
		}
	}
	for _, rr := range m.Ns {
		words = append(words, dns.TypeToString[rr.Header().Rrtype]+"="+rr.Header().Name)
	}
	return strings.Join(words, " ")
}

func TestAnswers(t *testing.T) {
	s := start(t, Config{Listen: []netip.Addr{loopback}, Upstreams: []netip.AddrPort{upstream(t)}})
	for _, c := range []struct {
		name  string
		qtype uint16
		want  string
	}{
		{"web.shop.svc.cluster.local.", dns.TypeA, "NOERROR 10.96.0.20"},
		{"web.shop.svc.cluster.local.", dns.TypeAAAA, "NOERROR fd00:10:96::20"},
		{"web.shop.svc.cluster.local.", dns.TypeMX, "NOERROR SOA=cluster.local."},
		{"_http._tcp.web.shop.svc.cluster.local.", dns.TypeSRV, "NOERROR SRV"},
		{"none.shop.svc.cluster.local.", dns.TypeA, "NXDOMAIN SOA=cluster.local."},
		{"none.shop.svc.cluster.local.", dns.TypeSRV, "NXDOMAIN SOA=cluster.local."},
		{"cluster.local.", dns.TypeSOA, "NOERROR SOA"},
		{"cluster.local.", dns.TypeNS, "NOERROR NS"},
		{"cluster.local.", dns.TypeA, "NOERROR SOA=cluster.local."},
		{"ns.dns.cluster.local.", dns.TypeA, "NOERROR " + loopback.String()},
		{"dns-version.cluster.local.", dns.TypeTXT, "NOERROR TXT"},
		{"cluster.local.", dns.TypeAXFR, "REFUSED"},
		{"20.0.96.10.in-addr.arpa.", dns.TypePTR, "NOERROR PTR"},
		{"20.0.96.10.in-addr.arpa.", dns.TypeA, "NOERROR SOA=in-addr.arpa."},
		{"1.2.0.192.in-addr.arpa.", dns.TypePTR, "NXDOMAIN"}, // the upstream's word
		{"www.example.com.", dns.TypeA, "NOERROR 192.0.2.80"},
		{"nothing.example.com.", dns.TypeA, "NXDOMAIN"},
		{"away.shop.svc.cluster.local.", dns.TypeA, "NOERROR www.example.com. 192.0.2.80"},
		{"away.shop.svc.cluster.local.", dns.TypeCNAME, "NOERROR www.example.com."},
		{"inside.shop.svc.cluster.local.", dns.TypeA, "NOERROR web.shop.svc.cluster.local. 10.96.0.20"},
		{"inside-none.shop.svc.cluster.local.", dns.TypeA, "NOERROR nothing.shop.svc.cluster.local. SOA=cluster.local."},
		{"gone.shop.svc.cluster.local.", dns.TypeA, "NOERROR nothing.example.com."},
		{"broken.shop.svc.cluster.local.", dns.TypeA, "SERVFAIL"},
		{"loop-a.shop.svc.cluster.local.", dns.TypeA, "NOERROR loop-b.shop.svc.cluster.local. loop-a.shop.svc.cluster.local."},
	} {
		for _, network := range []string{"udp", "tcp"} {
			if got := summary(ask(t, s, network, c.name, c.qtype)); got != c.want {
				t.Errorf("%s %s over %s: %s, want %s", c.name, dns.TypeToString[c.qtype], network, got, c.want)
			}
		}
	}
}

func TestNoStateYet(t *testing.T) {
	x, err := index.New(index.Config{Zone: "cluster.local"})
	if err != nil {
		t.Fatal(err)
	}
	board := &status.Board{}
	s := start(t, Config{Index: x, Board: board, Listen: []netip.Addr{loopback}, Upstreams: []netip.AddrPort{upstream(t)}})
	if c := waitFor(t, board, checkRecords, false); c.Reason == "" || c.Next == "" {
		t.Errorf("%+v", c)
	}
	question := func(name string) string { return summary(ask(t, s, "udp", name, dns.TypeA)) }
	if got := question("web.shop.svc.cluster.local."); got != "SERVFAIL" {
		t.Errorf("name of the cluster: %s", got)
	}
	if got := question("www.example.com."); got != "NOERROR 192.0.2.80" {
		t.Errorf("foreign name: %s", got)
	}
	x.Apply(testState())
	if got := question("web.shop.svc.cluster.local."); got != "NOERROR 10.96.0.20" {
		t.Errorf("after the first state: %s", got)
	}
	s.loop.Kick()
	waitFor(t, board, checkRecords, true)
}

func TestUpstreamThatDoesNotAnswerIsReported(t *testing.T) {
	board := &status.Board{}
	silent, err := net.ListenPacket("udp", netip.AddrPortFrom(loopback, 0).String())
	if err != nil {
		t.Fatal(err)
	}
	defer silent.Close()
	s := start(t, Config{Board: board, Listen: []netip.Addr{loopback},
		Upstreams: []netip.AddrPort{silent.LocalAddr().(*net.UDPAddr).AddrPort()}})
	waitFor(t, board, checkUpstream, true)
	if got := summary(ask(t, s, "udp", "www.example.com.", dns.TypeA)); got != "SERVFAIL" {
		t.Error(got)
	}
	waitUntil(t, func() bool {
		s.loop.Kick()
		for _, c := range board.Checks() {
			if c.Name == checkUpstream && !c.Healthy {
				return strings.HasPrefix(c.Reason, "no answer from 127.") && c.Next != ""
			}
		}
		return false
	})
}

// TestRunLeavesNothing: when Run returns, sockets and goroutines are gone.
func TestRunLeavesNothing(t *testing.T) {
	up := upstream(t)
	port := freePort(t)
	before := runtime.NumGoroutine()
	for range 3 {
		s, err := New(Config{Index: newIndex(t), Port: port, Listen: []netip.Addr{loopback}, Upstreams: []netip.AddrPort{up}, Board: &status.Board{}})
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(context.Background())
		done := make(chan error, 1)
		go func() { done <- s.Run(ctx) }()
		waitFor(t, s.cfg.Board, checkListening, true)
		for _, network := range []string{"udp", "tcp"} {
			ask(t, s, network, "www.example.com.", dns.TypeA)
		}
		cancel()
		if err := <-done; err != nil {
			t.Fatal(err)
		}
	}
	waitUntil(t, func() bool {
		runtime.GC() // CoreDNS ends the connections of an upstream in a finalizer
		return runtime.NumGoroutine() <= before
	})
}

func TestConfig(t *testing.T) {
	for name, c := range map[string]Config{
		"no index":     {},
		"another zone": {Index: newIndex(t), Zone: "example.org"},
		"ttl":          {Index: newIndex(t), TTL: 2 * time.Hour},
	} {
		if _, err := New(c); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
	if _, err := New(Config{Index: newIndex(t), Zone: "Cluster.Local"}); err != nil {
		t.Error(err)
	}
}

func TestResolvConf(t *testing.T) {
	for text, want := range map[string]string{
		"": "",
		"nameserver 192.0.2.1\nnameserver 2001:db8::1\n":                                  "192.0.2.1:53, [2001:db8::1]:53",
		"# nameserver 192.0.2.9\n; nameserver 192.0.2.8\nsearch a b\nnameserver 10.0.0.1": "10.0.0.1:53",
		"nameserver\nnameserver x\nnameserver 300.1.1.1\nnameserver fe80::1%eth0\n":       "[fe80::1%eth0]:53",
		"options ndots:abc timeout:-1\nnameserver ::ffff:10.0.0.1\n":                      "10.0.0.1:53",
		strings.Repeat("nameserver 10.0.0.1\n", 10000):                                    "10.0.0.1:53",
		"nameserver 0.0.0.0\nnameserver " + loopback.String() + "\n":                      "",
	} {
		found, err := parseResolvConf(strings.NewReader(text))
		if got := join(usable(found, []netip.Addr{loopback}, 53)); got != want || err != nil {
			t.Errorf("%.60q: %s, %v, want %s", text, got, err, want)
		}
	}
}

func FuzzResolvConf(f *testing.F) {
	f.Add("search example.org\nnameserver 192.0.2.1\noptions ndots:5 timeout:1 attempts:2\n")
	f.Fuzz(func(t *testing.T, text string) {
		found, err := parseResolvConf(strings.NewReader(text))
		if err != nil {
			return
		}
		for _, a := range usable(found, nil, 53) {
			if !a.IsValid() {
				t.Errorf("%q: %v", text, a)
			}
		}
	})
}
