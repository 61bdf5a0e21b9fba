package dns

import (
	"context"
	"net/netip"
	"testing"

	"github.com/coredns/coredns/plugin"
	"github.com/coredns/coredns/plugin/pkg/dnstest"
	"github.com/coredns/coredns/plugin/pkg/fall"
	"github.com/coredns/coredns/plugin/test"
	"github.com/miekg/dns"

	"meshd.dev/dns/index"
	"meshd.dev/pkg/mesh"
)

func testMesh(t testing.TB, s *mesh.State) *Mesh {
	t.Helper()
	x, err := index.New(index.Config{Zone: "cluster.local"})
	if err != nil {
		t.Fatal(err)
	}
	x.SetNameservers([]netip.Addr{netip.MustParseAddr("10.244.1.1")})
	x.Apply(s)
	return &Mesh{Index: x, Zones: []string{"cluster.local.", "in-addr.arpa.", "ip6.arpa."}, TTL: 5}
}

func testState() *mesh.State {
	addr := netip.MustParseAddr
	sql := []mesh.EndpointPort{{Name: "sql", Protocol: mesh.TCP, Port: 5432}}
	return &mesh.State{
		Namespaces: []string{"shop"},
		Services: []*mesh.Service{
			{Namespace: "shop", Name: "db", Headless: true, Endpoints: []mesh.Endpoint{
				{Addr: addr("10.244.1.7"), Hostname: "db-0", Ready: true, Ports: sql},
				{Addr: addr("10.244.2.7"), Hostname: "db-1", Ready: true, Ports: sql}}},
			{Namespace: "shop", Name: "front", ExternalName: "web.shop.svc.cluster.local"},
			{Namespace: "shop", Name: "web", ClusterIPs: []netip.Addr{addr("10.96.0.20"), addr("fd00:10:96::20")},
				Ports: []mesh.ServicePort{{Name: "http", Protocol: mesh.TCP, Port: 80}}},
		},
	}
}

var soa = test.SOA("cluster.local. 5 IN SOA ns.dns.cluster.local. hostmaster.cluster.local. 1 7200 1800 86400 5")

var cases = []test.Case{
	{Qname: "web.shop.svc.cluster.local.", Qtype: dns.TypeA, Answer: []dns.RR{test.A("web.shop.svc.cluster.local. 5 IN A 10.96.0.20")}},
	{Qname: "web.shop.svc.cluster.local.", Qtype: dns.TypeAAAA, Answer: []dns.RR{test.AAAA("web.shop.svc.cluster.local. 5 IN AAAA fd00:10:96::20")}},
	{Qname: "web.shop.svc.cluster.local.", Qtype: dns.TypeTXT, Ns: []dns.RR{soa}},
	{Qname: "db.shop.svc.cluster.local.", Qtype: dns.TypeA, Answer: []dns.RR{
		test.A("db.shop.svc.cluster.local. 5 IN A 10.244.1.7"), test.A("db.shop.svc.cluster.local. 5 IN A 10.244.2.7")}},
	{Qname: "_sql._tcp.db.shop.svc.cluster.local.", Qtype: dns.TypeSRV,
		Answer: []dns.RR{
			test.SRV("_sql._tcp.db.shop.svc.cluster.local. 5 IN SRV 0 50 5432 db-0.db.shop.svc.cluster.local."),
			test.SRV("_sql._tcp.db.shop.svc.cluster.local. 5 IN SRV 0 50 5432 db-1.db.shop.svc.cluster.local.")},
		Extra: []dns.RR{test.A("db-0.db.shop.svc.cluster.local. 5 IN A 10.244.1.7"), test.A("db-1.db.shop.svc.cluster.local. 5 IN A 10.244.2.7")}},
	{Qname: "front.shop.svc.cluster.local.", Qtype: dns.TypeA, Answer: []dns.RR{
		test.CNAME("front.shop.svc.cluster.local. 5 IN CNAME web.shop.svc.cluster.local."), test.A("web.shop.svc.cluster.local. 5 IN A 10.96.0.20")}},
	{Qname: "front.shop.svc.cluster.local.", Qtype: dns.TypeMX, Ns: []dns.RR{soa},
		Answer: []dns.RR{test.CNAME("front.shop.svc.cluster.local. 5 IN CNAME web.shop.svc.cluster.local.")}},
	{Qname: "1-2-3-4.shop.pod.cluster.local.", Qtype: dns.TypeA, Answer: []dns.RR{test.A("1-2-3-4.shop.pod.cluster.local. 5 IN A 1.2.3.4")}},
	{Qname: "20.0.96.10.in-addr.arpa.", Qtype: dns.TypePTR, Answer: []dns.RR{test.PTR("20.0.96.10.in-addr.arpa. 5 IN PTR web.shop.svc.cluster.local.")}},
	{Qname: "dns-version.cluster.local.", Qtype: dns.TypeTXT, Answer: []dns.RR{test.TXT("dns-version.cluster.local. 28800 IN TXT 1.1.0")}},
	{Qname: "cluster.local.", Qtype: dns.TypeNS, Answer: []dns.RR{test.NS("cluster.local. 5 IN NS ns.dns.cluster.local.")},
		Extra: []dns.RR{test.A("ns.dns.cluster.local. 5 IN A 10.244.1.1")}},
	{Qname: "no.shop.svc.cluster.local.", Qtype: dns.TypeA, Rcode: dns.RcodeNameError, Ns: []dns.RR{soa}},
}

func TestServeDNS(t *testing.T) {
	m := testMesh(t, testState())
	for _, c := range cases {
		rec := dnstest.NewRecorder(&test.ResponseWriter{})
		if _, err := m.ServeDNS(context.Background(), rec, c.Msg()); err != nil {
			t.Errorf("%s: %v", c.Qname, err)
			continue
		}
		if err := test.SortAndCheck(rec.Msg, c); err != nil {
			t.Errorf("%s %s: %v", c.Qname, dns.TypeToString[c.Qtype], err)
		}
		if !rec.Msg.Authoritative {
			t.Errorf("%s: not authoritative", c.Qname)
		}
	}
}

// What goes to the next plugin, and what is refused or fails.
func TestRest(t *testing.T) {
	next := test.NextHandler(dns.RcodeBadCookie, nil) // a code nobody else uses
	for _, c := range []struct {
		name    string
		state   *mesh.State
		through []string
		noPods  bool
		qname   string
		qtype   uint16
		want    int
	}{
		{name: "another zone", state: testState(), qname: "www.example.com.", qtype: dns.TypeA, want: dns.RcodeBadCookie},
		{name: "an address of nobody", state: testState(), qname: "1.2.0.192.in-addr.arpa.", qtype: dns.TypePTR, want: dns.RcodeBadCookie},
		{name: "fallthrough", state: testState(), through: []string{"cluster.local."}, qname: "no.cluster.local.", qtype: dns.TypeA, want: dns.RcodeBadCookie},
		{name: "no fallthrough for what exists", state: testState(), through: []string{"cluster.local."}, qname: "cluster.local.", qtype: dns.TypeA, want: dns.RcodeSuccess},
		{name: "zone transfer", state: testState(), qname: "cluster.local.", qtype: dns.TypeAXFR, want: dns.RcodeRefused},
		{name: "no state yet", qname: "web.shop.svc.cluster.local.", qtype: dns.TypeA, want: dns.RcodeServerFailure},
		{name: "no state yet, fallthrough", through: []string{"."}, qname: "web.shop.svc.cluster.local.", qtype: dns.TypeA, want: dns.RcodeServerFailure},
		{name: "no state yet, reverse", qname: "1.2.0.192.in-addr.arpa.", qtype: dns.TypePTR, want: dns.RcodeServerFailure},
	} {
		m := testMesh(t, c.state)
		m.Next, m.Fall, m.NoPods = next, fall.F{Zones: c.through}, c.noPods
		r := new(dns.Msg)
		r.SetQuestion(c.qname, c.qtype)
		if code, _ := m.ServeDNS(context.Background(), &test.ResponseWriter{}, r); code != c.want {
			t.Errorf("%s: code %d, want %d", c.name, code, c.want)
		}
	}
}

func TestPodsDisabled(t *testing.T) {
	m := testMesh(t, testState())
	m.NoPods = true
	r := new(dns.Msg)
	r.SetQuestion("1-2-3-4.shop.pod.cluster.local.", dns.TypeA)
	rec := dnstest.NewRecorder(&test.ResponseWriter{})
	if _, err := m.ServeDNS(context.Background(), rec, r); err != nil || rec.Rcode != dns.RcodeNameError {
		t.Errorf("code %d, %v", rec.Rcode, err)
	}
}

func BenchmarkServeDNS(b *testing.B) {
	m := testMesh(b, testState())
	var h plugin.Handler = m
	for _, name := range []string{"web.shop.svc.cluster.local.", "db.shop.svc.cluster.local.", "no.shop.svc.cluster.local."} {
		b.Run(name, func(b *testing.B) {
			r := new(dns.Msg)
			r.SetQuestion(name, dns.TypeA)
			b.ReportAllocs()
			for b.Loop() {
				_, _ = h.ServeDNS(context.Background(), &test.ResponseWriter{}, r)
			}
		})
	}
}
