package dns_test

import (
	"context"
	"fmt"
	"math/rand/v2"
	"net"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/coredns/caddy"
	"github.com/coredns/coredns/core/dnsserver"
	"github.com/coredns/coredns/plugin"
	_ "github.com/coredns/coredns/plugin/bind"
	_ "github.com/coredns/coredns/plugin/kubernetes"
	"github.com/miekg/dns"

	mesh "meshd.dev/dns"
	"meshd.dev/dns/index"
)

// upstreamPlugin stands where forward stands in life: it knows example.com.
const upstreamPlugin = "test_upstream"

func init() {
	plugin.Register(upstreamPlugin, func(c *caddy.Controller) error {
		dnsserver.GetConfig(c).AddPlugin(func(plugin.Handler) plugin.Handler { return outside{} })
		return nil
	})
}

type outside struct{}

func (outside) Name() string { return upstreamPlugin }

func (outside) ServeDNS(_ context.Context, w dns.ResponseWriter, r *dns.Msg) (int, error) {
	m := new(dns.Msg)
	m.SetReply(r)
	q := r.Question[0]
	switch name := strings.ToLower(q.Name); {
	case name == "www.example.com." && q.Qtype == dns.TypeA:
		m.Answer = []dns.RR{record(q.Name + " 5 IN A 192.0.2.80")}
	case name == "v6.example.com." && q.Qtype == dns.TypeAAAA:
		m.Answer = []dns.RR{record(q.Name + " 5 IN AAAA 2001:db8::6")}
	case name == "no.example.com." || strings.HasSuffix(name, ".arpa."):
		m.Rcode = dns.RcodeNameError
	}
	return dns.RcodeSuccess, w.WriteMsg(m)
}

func record(s string) dns.RR {
	rr, err := dns.NewRR(s)
	if err != nil {
		panic(err)
	}
	return rr
}

// coredns starts a CoreDNS with one block of directives and returns a
// connection to it.
func coredns(t testing.TB, block string) *dns.Conn {
	t.Helper()
	dnsserver.Quiet, caddy.Quiet = true, true
	if err := dnsserver.SetDirectives([]string{"bind", "kubernetes", mesh.Name, upstreamPlugin}); err != nil {
		t.Fatal(err)
	}
	inst, err := caddy.Start(caddy.CaddyfileInput{Filepath: "Corefile", ServerTypeName: "dns",
		Contents: fmt.Appendf(nil, ".:0 {\nbind 127.0.0.1\n%s\n%s\n}\n", block, upstreamPlugin)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		for _, f := range inst.OnShutdown {
			_ = f()
		}
		_ = inst.Stop()
	})
	conn, err := net.Dial("udp", inst.Servers()[0].LocalAddr().String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return &dns.Conn{Conn: conn, UDPSize: 65535}
}

func ask(t *testing.T, c *dns.Conn, name string, qtype uint16) *dns.Msg {
	t.Helper()
	m := new(dns.Msg)
	m.SetQuestion(name, qtype)
	m.SetEdns0(65535, false)
	_ = c.SetDeadline(time.Now().Add(10 * time.Second))
	if err := c.WriteMsg(m); err != nil {
		t.Fatal(err)
	}
	r, err := c.ReadMsg()
	if err != nil || r.Id != m.Id {
		t.Fatalf("%s: %v %v", name, r, err)
	}
	return r
}

var types = []uint16{dns.TypeA, dns.TypeA, dns.TypeA, dns.TypeAAAA, dns.TypeAAAA, dns.TypeSRV, dns.TypeSRV, dns.TypeTXT,
	dns.TypeCNAME, dns.TypePTR, dns.TypeMX, dns.TypeNS, dns.TypeSOA, dns.TypeHTTPS, dns.TypeANY}

// randomName makes a name of a cluster: most of them exist, the rest nearly.
func randomName(r *rand.Rand, o *objects) string {
	const z = ".cluster.local."
	svc := o.services[r.IntN(len(o.services))]
	name, ns := svc.Name, svc.Namespace
	if r.IntN(10) == 0 {
		name = pick(r, "nope", "s1", "s99", "_s1", "s1-")
	}
	if r.IntN(10) == 0 {
		ns = pick(r, "nope", "void", "shop", "default")
	}
	full := name + "." + ns + ".svc" + z
	dashed := pick(r, "10-244-3-1", "10-96-0-3", "1-2-3-4", "1-2-3", "1-2-3-400", "1-2-3-04", "fd00-10-244-3--1", "--1", "fd00--", "--ffff-1-2", "x")
	switch r.IntN(16) {
	case 0, 1, 2:
		return full
	case 3:
		return pick(r, "_", "_http", "_dns", "_nope", "http", "dns", "sip", "metrics") + "." + pick(r, "_tcp", "_udp", "_sctp", "tcp", "_") + "." + full
	case 4:
		return "_" + pick(r, "http", "dns", "sip", "metrics") + "._" + pick(r, "tcp", "udp", "sctp") + "." + full
	case 5:
		return pick(r, "_tcp", "_udp", "_nope") + "." + full
	case 6:
		return fmt.Sprintf("pod-%d.", r.IntN(40)) + full
	case 7, 8, 9:
		return endpointOf(r, o) + z
	case 10:
		return dashed + "." + ns + ".pod" + z
	case 11:
		return pick(r, "x.", "x.y.") + dashed + "." + ns + pick(r, ".pod", ".svc") + z
	case 12:
		return pick(r, "svc", "pod", "dns", ns+".svc", ns+".pod", "nope.svc", "dns-version", "nope", "x.nope", "www.example.com") + z
	case 13:
		return pick(r, "cluster.local.", "www.example.com.", "no.example.com.", "local.")
	default:
		return reverseOf(r, o)
	}
}

func endpointOf(r *rand.Rand, o *objects) string {
	slice := o.slices[r.IntN(len(o.slices))]
	if len(slice.Endpoints) == 0 {
		return "nothing." + slice.Labels["kubernetes.io/service-name"] + "." + slice.Namespace + ".svc"
	}
	e := slice.Endpoints[r.IntN(len(slice.Endpoints))]
	name := strings.NewReplacer(".", "-", ":", "-").Replace(e.Addresses[0])
	if strings.HasSuffix(name, "-") {
		name += "0"
	}
	if e.Hostname != nil && r.IntN(4) > 0 {
		name = *e.Hostname
	}
	return name + "." + slice.Labels["kubernetes.io/service-name"] + "." + slice.Namespace + ".svc"
}

func reverseOf(r *rand.Rand, o *objects) string {
	address := pick(r, "192.0.2.1", "2001:db8::1", "10.96.0.99")
	if ips := o.services[r.IntN(len(o.services))].Spec.ClusterIPs; len(ips) > 0 && ips[0] != "None" && r.IntN(2) == 0 {
		address = ips[r.IntN(len(ips))]
	}
	if eps := o.slices[r.IntN(len(o.slices))].Endpoints; len(eps) > 0 && r.IntN(2) == 0 {
		address = eps[r.IntN(len(eps))].Addresses[0]
	}
	name, err := dns.ReverseAddr(address)
	if err != nil {
		panic(err)
	}
	return name
}

func randomCase(r *rand.Rand, s string) string {
	b := []byte(s)
	for i, c := range b {
		if 'a' <= c && c <= 'z' && r.IntN(4) == 0 {
			b[i] = c - 'a' + 'A'
		}
	}
	return string(b)
}

// shape is what of an answer is compared: the code, and the records in any
// order and in lower case. The weights of SRV records differ in dual-stack
// services and mean the same.
func shape(m *dns.Msg) string {
	lines := []string{}
	for _, section := range [][]dns.RR{m.Answer, m.Extra} {
		for _, rr := range section {
			if rr.Header().Rrtype == dns.TypeOPT || rr.Header().Rrtype == dns.TypeSOA {
				continue
			}
			if srv, ok := rr.(*dns.SRV); ok {
				srv.Weight = 0
			}
			lines = append(lines, strings.ToLower(rr.String()))
		}
	}
	slices.Sort(lines)
	return dns.RcodeToString[m.Rcode] + "\n" + strings.Join(slices.Compact(lines), "\n")
}

// known are the differences from the kubernetes plugin that we want, each with
// the reason. ours and theirs are shapes.
var known = []struct {
	why string
	is  func(name string, qtype uint16, ours, theirs string) bool
}{
	{"a name above another one exists (RFC 8020): dns.<zone>, _tcp.<service>", func(name string, _ uint16, ours, theirs string) bool {
		l := dns.SplitDomainName(name)
		return (name == "dns.cluster.local." || name[0] == '_' && len(l) == 6 && l[3] == "svc") && ours == empty && theirs == denied
	}},
	{"whether a name exists does not depend on the type: TXT of a namespace, anything of dns-version", func(name string, qtype uint16, ours, theirs string) bool {
		return (qtype == dns.TypeTXT || strings.HasPrefix(name, "dns-version.")) && ours == empty && theirs == denied
	}},
	{"nor does it for SOA", func(_ string, qtype uint16, ours, theirs string) bool {
		return qtype == dns.TypeSOA && ours == denied && theirs == empty
	}},
	{"the name of a port has no addresses (RFC 2782)", func(name string, qtype uint16, ours, theirs string) bool {
		return strings.HasPrefix(name, "_") && qtype != dns.TypeSRV && ours == empty && strings.HasPrefix(theirs, empty)
	}},
	{"the name of a port begins with an underscore, and so does its protocol", func(name string, _ uint16, ours, theirs string) bool {
		l := dns.SplitDomainName(name)
		bad := func(s string) bool { return s == "_" || !strings.HasPrefix(s, "_") }
		return len(l) > 4 && l[4] == "svc" && (bad(l[0]) || bad(l[1])) && ours == denied && strings.HasPrefix(theirs, empty)
	}},
	{"there is nothing below the name of a pod", func(name string, _ uint16, ours, theirs string) bool {
		l := dns.SplitDomainName(name)
		return len(l) > 5 && l[len(l)-3] == "pod" && ours == denied && strings.HasPrefix(theirs, empty)
	}},
	{"a pod has no ports that DNS knows of, and port 0 is none", func(name string, qtype uint16, ours, theirs string) bool {
		return strings.HasSuffix(name, ".pod.cluster.local.") && qtype == dns.TypeSRV && ours == empty
	}},
	{"a CNAME stands for every type (RFC 1034), also when its target does not exist", func(_ string, _ uint16, ours, theirs string) bool {
		return strings.Contains(ours, "\tcname\t") && theirs == empty
	}},
	{"the reverse name of an address we know exists for every type", func(name string, qtype uint16, ours, theirs string) bool {
		return strings.HasSuffix(name, ".arpa.") && qtype != dns.TypePTR && ours == empty
	}},
	{"the nameservers are ours to name", func(name string, qtype uint16, _, _ string) bool {
		return name == "cluster.local." && qtype == dns.TypeNS
	}},
}

const empty, denied = "NOERROR\n", "NXDOMAIN\n"

// TestSameAnswersAsKubernetesPlugin asks both plugins thousands of random
// questions about random clusters, over UDP. CoreDNS' kubernetes plugin is the
// oracle: each difference is one of known or a fault.
func TestSameAnswersAsKubernetesPlugin(t *testing.T) {
	const clusters, questions = 4, 4000
	counts := map[string]int{}
	for seed := range uint64(clusters) {
		r := rand.New(rand.NewPCG(seed, 7))
		o := randomObjects(r)
		api := o.serveAPI()
		t.Cleanup(api.Close)
		theirs := coredns(t, "kubernetes cluster.local in-addr.arpa ip6.arpa {\nendpoint "+api.URL+"\npods insecure\nfallthrough in-addr.arpa ip6.arpa\n}")
		t.Cleanup(api.CloseClientConnections)
		x, err := index.New(index.Config{Zone: "cluster.local"})
		if err != nil {
			t.Fatal(err)
		}
		x.Apply(o.state())
		t.Cleanup(mesh.Share("oracle", x))
		ours := coredns(t, "mesh cluster.local in-addr.arpa ip6.arpa {\nindex oracle\n}")
		for range questions {
			name, qtype := randomCase(r, randomName(r, o)), pick(r, types...)
			compare(t, ours, theirs, name, qtype, counts)
			compareWire(t, ours, x, name, qtype)
		}
	}
	for _, k := range known {
		t.Logf("%5d times: %s", counts[k.why], k.why)
		if counts[k.why] == 0 {
			t.Errorf("never seen, so not a difference any more: %s", k.why)
		}
	}
	t.Logf("%d questions", clusters*questions)
}

func compare(t *testing.T, ours, theirs *dns.Conn, name string, qtype uint16, counts map[string]int) {
	t.Helper()
	our, their := shape(ask(t, ours, name, qtype)), shape(ask(t, theirs, name, qtype))
	if our == their {
		return
	}
	for _, k := range known {
		if k.is(strings.ToLower(name), qtype, our, their) {
			counts[k.why]++
			return
		}
	}
	differs(t, "%s %s\nours:   %s\ntheirs: %s", name, dns.TypeToString[qtype], our, their)
}

// differs reports a difference, and ends the test when it is one of many.
func differs(t *testing.T, format string, args ...any) {
	t.Helper()
	t.Errorf(format, args...)
	if differences++; differences == 20 {
		t.Fatal("and more")
	}
}

var differences int

// compareWire checks that the answers an index writes itself are those the
// plugin gives.
func compareWire(t *testing.T, ours *dns.Conn, x *index.Index, name string, qtype uint16) {
	t.Helper()
	q := new(dns.Msg)
	q.SetQuestion(name, qtype)
	query, err := q.Pack()
	if err != nil {
		t.Fatal(err)
	}
	b, ok := x.Answer(nil, query, new(index.Reply), index.Options{TTL: mesh.DefaultTTL, MaxSize: 65535})
	if !ok {
		return
	}
	wire := new(dns.Msg)
	if err := wire.Unpack(b); err != nil {
		t.Fatalf("%s %s: %v in % x", name, dns.TypeToString[qtype], err, b)
	}
	if wire.Truncated {
		return
	}
	plugin := ask(t, ours, name, qtype)
	plugin.Extra, plugin.Id = nil, q.Id
	slices.SortFunc(wire.Answer, byText)
	slices.SortFunc(plugin.Answer, byText)
	// The names in an SOA have the case of the question in one of them.
	if !strings.EqualFold(wire.String(), plugin.String()) {
		differs(t, "written by the index:\n%s\nby the plugin:\n%s", wire, plugin)
	}
}

func byText(a, b dns.RR) int { return strings.Compare(a.String(), b.String()) }
