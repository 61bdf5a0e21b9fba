package coredns

import (
	"encoding/binary"
	"net"
	"net/netip"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/miekg/dns"

	"meshd.dev/dns/index"
)

// raw sends bytes over UDP and returns the response.
func raw(t testing.TB, s *Server, query []byte) []byte {
	t.Helper()
	c, err := net.Dial("udp", s.at(s.wanted()[0]))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(10 * time.Second))
	if _, err := c.Write(query); err != nil {
		t.Fatal(err)
	}
	b := make([]byte, 65535)
	n, err := c.Read(b)
	if err != nil {
		t.Fatal(err)
	}
	return b[:n]
}

func query(name string, qtype uint16, change func(*dns.Msg)) []byte {
	m := new(dns.Msg)
	m.SetQuestion(name, qtype)
	m.Id = 0x4d45
	if change != nil {
		change(m)
	}
	b, err := m.Pack()
	if err != nil {
		panic(err)
	}
	return b
}

func edns(size uint16, do bool) func(*dns.Msg) {
	return func(m *dns.Msg) { m.SetEdns0(size, do) }
}

func TestWire(t *testing.T) {
	s := start(t, Config{Listen: []netip.Addr{loopback}, Upstreams: []netip.AddrPort{upstream(t)}})
	const web, big = "web.shop.svc.cluster.local.", "big.shop.svc.cluster.local."
	for _, c := range []struct {
		name  string
		query []byte
		want  string // rcode, flags, number of answers, OPT
	}{
		{"plain", query(web, dns.TypeA, nil), "NOERROR aa rd 1"},
		{"no recursion desired", query(web, dns.TypeA, func(m *dns.Msg) { m.RecursionDesired = false }), "NOERROR aa 1"},
		{"edns", query(web, dns.TypeA, edns(1232, false)), "NOERROR aa rd 1 opt"},
		{"edns wants dnssec", query(web, dns.TypeA, edns(4096, true)), "NOERROR aa rd 1 opt do"},
		{"edns with a cookie", query(web, dns.TypeA, func(m *dns.Msg) {
			m.SetEdns0(1232, false)
			m.IsEdns0().Option = []dns.EDNS0{&dns.EDNS0_COOKIE{Code: dns.EDNS0COOKIE, Cookie: "24a5ac1423e5a6b7"}}
		}), "NOERROR aa rd 1 opt"},
		{"edns version 1", query(web, dns.TypeA, func(m *dns.Msg) { m.SetEdns0(1232, false); m.IsEdns0().SetVersion(1) }), "BADVERS rd 0 opt"},
		{"checking disabled", query(web, dns.TypeA, func(m *dns.Msg) { m.CheckingDisabled = true }), "NOERROR aa rd cd 1"},
		{"class CHAOS", query(web, dns.TypeTXT, func(m *dns.Msg) { m.Question[0].Qclass = dns.ClassCHAOS }), "REFUSED rd 0"},
		{"class ANY", query(web, dns.TypeA, func(m *dns.Msg) { m.Question[0].Qclass = dns.ClassANY }), "REFUSED rd 0"},
		{"type ANY", query(web, dns.TypeANY, nil), "NOERROR aa rd 0"},
		{"unknown type", query(web, 65280, nil), "NOERROR aa rd 0"},
		{"unknown type of no name", query("no."+web, 65280, nil), "NXDOMAIN aa rd 0"},
		{"zone transfer", query("cluster.local.", dns.TypeAXFR, nil), "REFUSED rd 0"},
		{"opcode status", query(web, dns.TypeA, func(m *dns.Msg) { m.Opcode = dns.OpcodeStatus }), "NOTIMP rd 0"},
		{"opcode notify", query(web, dns.TypeSOA, func(m *dns.Msg) { m.Opcode = dns.OpcodeNotify }), "NOTIMP rd 0"},
		{"opcode update", query(web, dns.TypeSOA, func(m *dns.Msg) { m.Opcode = dns.OpcodeUpdate }), "NOTIMP rd 0"},
		{"no question", query(web, dns.TypeA, func(m *dns.Msg) { m.Question = nil }), "FORMERR rd 0"},
		{"two questions", query(web, dns.TypeA, func(m *dns.Msg) { m.Question = append(m.Question, m.Question[0]) }), "FORMERR rd 0"},
		{"cut short", query(web, dns.TypeA, nil)[:20], "FORMERR rd 0"},
		{"label too long", append(append([]byte("MX\x01\x00\x00\x01\x00\x00\x00\x00\x00\x00"), 64), query(web, dns.TypeA, nil)[12:]...), "FORMERR rd 0"},
		{"pointer to itself", []byte("MX\x01\x00\x00\x01\x00\x00\x00\x00\x00\x00\xc0\x0c\x00\x01\x00\x01"), "FORMERR rd 0"},
		{"large answer, no edns", query(big, dns.TypeA, nil), "NOERROR tc aa rd 29"},
		{"large answer, edns 512", query(big, dns.TypeA, edns(512, false)), "NOERROR tc aa rd 28 opt"},
		{"large answer, edns 100", query(big, dns.TypeA, edns(100, false)), "NOERROR tc aa rd 28 opt"},
		{"large answer, edns 1232", query(big, dns.TypeA, edns(1232, false)), "NOERROR tc aa rd 73 opt"},
		{"large answer, edns 65535", query(big, dns.TypeA, edns(65535, false)), "NOERROR tc aa rd 73 opt"},
	} {
		t.Run(c.name, func(t *testing.T) {
			got := raw(t, s, c.query)
			if len(got) > maxUDP {
				t.Errorf("%d octets over UDP", len(got))
			}
			m := new(dns.Msg)
			if err := m.Unpack(got); err != nil {
				t.Fatalf("%v in % x", err, got)
			}
			if id := binary.BigEndian.Uint16(c.query); m.Id != id || !m.Response {
				t.Errorf("id %x, response %t, want %x", m.Id, m.Response, id)
			}
			if got := flags(m); got != c.want {
				t.Errorf("%s, want %s", got, c.want)
			}
		})
	}
}

// flags prints what TestWire compares.
func flags(m *dns.Msg) string {
	words := []string{dns.RcodeToString[m.Rcode]}
	if m.Rcode == dns.RcodeBadVers {
		words[0] = "BADVERS"
	}
	for _, f := range []struct {
		name string
		set  bool
	}{{"tc", m.Truncated}, {"aa", m.Authoritative}, {"rd", m.RecursionDesired}, {"cd", m.CheckingDisabled}} {
		if f.set {
			words = append(words, f.name)
		}
	}
	words = append(words, strconv.Itoa(len(m.Answer)))
	if opt := m.IsEdns0(); opt != nil {
		words = append(words, "opt")
		if opt.Do() {
			words = append(words, "do")
		}
	}
	return strings.Join(words, " ")
}

func TestCaseOfTheQuestionIsKept(t *testing.T) {
	s := start(t, Config{Listen: []netip.Addr{loopback}, Upstreams: []netip.AddrPort{upstream(t)}})
	for _, c := range []struct {
		name  string
		qtype uint16
	}{
		{"wEb.ShOp.SvC.clusTER.lOcAl.", dns.TypeA},
		{"nOne.ShOp.SvC.clusTER.lOcAl.", dns.TypeA},
		{"_hTTp._tCp.wEb.ShOp.SvC.clusTER.lOcAl.", dns.TypeSRV},
		{"aWay.ShOp.SvC.clusTER.lOcAl.", dns.TypeA},
		{"wWw.eXample.COM.", dns.TypeA},
	} {
		m := ask(t, s, "udp", c.name, c.qtype)
		if m.Question[0].Name != c.name {
			t.Errorf("asked for %s, the response says %s", c.name, m.Question[0].Name)
		}
		// What comes out of the cache has the case of who asked first.
		foreign := strings.HasSuffix(strings.ToLower(c.name), "example.com.")
		if len(m.Answer) > 0 && !foreign && m.Answer[0].Header().Name != c.name {
			t.Errorf("asked for %s, the answer is for %s", c.name, m.Answer[0].Header().Name)
		}
	}
}

func TestLargeAnswerIsWholeOverTCP(t *testing.T) {
	s := start(t, Config{Listen: []netip.Addr{loopback}, Upstreams: []netip.AddrPort{upstream(t)}})
	if m := ask(t, s, "tcp", "big.shop.svc.cluster.local.", dns.TypeA); m.Truncated || len(m.Answer) != 1000 {
		t.Errorf("%d of 1000 addresses, truncated %t", len(m.Answer), m.Truncated)
	}
}

func TestTCPConnectionsOfOneClientAreBounded(t *testing.T) {
	s := start(t, Config{Listen: []netip.Addr{loopback}, Upstreams: []netip.AddrPort{upstream(t)}})
	var open []net.Conn
	for range maxConnsPerClient {
		c, err := net.Dial("tcp", s.at(loopback))
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		open = append(open, c)
	}
	extra, err := net.Dial("tcp", s.at(loopback))
	if err != nil {
		t.Fatal(err)
	}
	defer extra.Close()
	_ = extra.SetDeadline(time.Now().Add(10 * time.Second))
	if _, err := extra.Read(make([]byte, 1)); err == nil {
		t.Error("one connection too many was served")
	}
	// Those within the bound work, several questions each.
	c := &dns.Conn{Conn: open[0]}
	_ = c.SetDeadline(time.Now().Add(10 * time.Second))
	for range 3 {
		m := new(dns.Msg)
		m.SetQuestion("web.shop.svc.cluster.local.", dns.TypeA)
		if err := c.WriteMsg(m); err != nil {
			t.Fatal(err)
		}
		if r, err := c.ReadMsg(); err != nil || len(r.Answer) != 1 {
			t.Fatalf("%v %v", r, err)
		}
	}
}

// memoryWriter keeps what was sent.
type memoryWriter struct{ sent []byte }

func (w *memoryWriter) Write(b []byte) (int, error) {
	w.sent = append([]byte(nil), b...)
	return len(b), nil
}

// FuzzUDP feeds anything to what reads the network: the answer out of the
// index and the chain behind it. Whatever comes back has to be a response to
// what was sent, and no larger than a response may be.
func FuzzUDP(f *testing.F) {
	f.Add(query("web.shop.svc.cluster.local.", dns.TypeA, nil))
	f.Add(query("big.shop.svc.cluster.local.", dns.TypeA, edns(4096, true)))
	f.Add(query("_http._tcp.web.shop.svc.cluster.local.", dns.TypeSRV, edns(512, false)))
	f.Add(query("20.0.96.10.in-addr.arpa.", dns.TypePTR, nil))
	f.Add(query("away.shop.svc.cluster.local.", dns.TypeA, nil))
	f.Add([]byte("MX\x01\x00\x00\x01\x00\x00\x00\x00\x00\x00\xc0\x0c\x00\x01\x00\x01"))
	s, err := New(Config{Index: newIndex(f)})
	if err != nil {
		f.Fatal(err)
	}
	c, err := s.newChain(nil)
	if err != nil {
		f.Fatal(err)
	}
	s.replace(c)
	f.Cleanup(func() { s.replace(nil); s.closing.Wait() })
	reply := new(index.Reply)
	f.Fuzz(func(t *testing.T, b []byte) {
		var got []byte
		out, ok := s.cfg.Index.Answer(nil, b, reply, s.options)
		if ok {
			got = out
		} else {
			w := &memoryWriter{}
			s.serveWire(&udpWriter{Writer: w, local: &net.UDPAddr{}, from: netip.MustParseAddrPort("10.244.1.9:5353")}, b)
			got = w.sent
		}
		if got == nil {
			return
		}
		m := new(dns.Msg)
		if err := m.Unpack(got); err != nil {
			t.Fatalf("response to % x does not parse: %v", b, err)
		}
		if len(got) > maxUDP || !m.Response || binary.BigEndian.Uint16(b) != m.Id {
			t.Errorf("response of %d octets to % x: %v", len(got), b, m)
		}
	})
}

func TestClientsThatMayNotAskGetNoAnswer(t *testing.T) {
	s := start(t, Config{Listen: []netip.Addr{loopback}, Upstreams: []netip.AddrPort{upstream(t)},
		Clients: []netip.Prefix{netip.MustParsePrefix("127.0.0.1/32")}})
	q := new(dns.Msg)
	q.SetQuestion("web.shop.svc.cluster.local.", dns.TypeA)
	stranger := netip.AddrFrom4([4]byte{127, 1, 2, 3})
	for network, from := range map[string]net.Addr{
		"udp": net.UDPAddrFromAddrPort(netip.AddrPortFrom(stranger, 0)),
		"tcp": net.TCPAddrFromAddrPort(netip.AddrPortFrom(stranger, 0)),
	} {
		c := &dns.Client{Net: network, Dialer: &net.Dialer{LocalAddr: from, Timeout: 200 * time.Millisecond}}
		if r, _, err := c.Exchange(q, s.at(loopback)); err == nil {
			t.Errorf("%s: %v", network, r)
		}
		if got := summary(ask(t, s, network, q.Question[0].Name, dns.TypeA)); got != "NOERROR 10.96.0.20" {
			t.Errorf("%s, allowed: %s", network, got)
		}
	}
}

func TestOneClientDoesNotTakeWhatOthersNeed(t *testing.T) {
	c := newClients(5, 3)
	a, b := addr("10.244.1.7"), addr("10.244.1.8")
	for _, step := range []struct {
		who  netip.Addr
		want bool
	}{{a, true}, {a, true}, {a, true}, {a, false}, {b, true}, {b, true}, {b, false}} {
		if got := c.enter(step.who); got != step.want {
			t.Errorf("%v: %t", step, got)
		}
	}
	for range 3 {
		c.leave(a)
	}
	c.leave(b)
	c.leave(b)
	if c.all != 0 || len(c.count) != 0 {
		t.Errorf("%d left, %v", c.all, c.count)
	}
}
