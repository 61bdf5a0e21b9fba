package index

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/miekg/dns"

	"meshd.dev/pkg/mesh"
)

// The cluster of these tests: services in 10.96/16 and fd00:10:96::/112, pods
// in 10.244.<node>.0/24.

func addrs(list ...string) []netip.Addr {
	var out []netip.Addr
	for _, s := range list {
		out = append(out, netip.MustParseAddr(s))
	}
	return out
}

func ready(addr, hostname, node string, ports ...mesh.EndpointPort) mesh.Endpoint {
	return mesh.Endpoint{Addr: netip.MustParseAddr(addr), Hostname: hostname, Node: node, Ready: true, Serving: true, Ports: ports}
}

func cluster() *mesh.State {
	sql := mesh.EndpointPort{Name: "sql", Protocol: mesh.TCP, Port: 5432}
	http := mesh.EndpointPort{Name: "http", Protocol: mesh.TCP, Port: 8080}
	leaving := ready("10.244.3.7", "db-2", "node3", sql)
	leaving.Ready, leaving.Terminating = false, true
	return &mesh.State{
		Namespaces: []string{"empty", "kube-system", "shop"},
		Services: []*mesh.Service{
			{Namespace: "kube-system", Name: "kube-dns", ClusterIPs: addrs("10.96.0.10"), Ports: []mesh.ServicePort{
				{Name: "dns", Protocol: mesh.UDP, Port: 53}, {Name: "dns-tcp", Protocol: mesh.TCP, Port: 53}}},
			{Namespace: "shop", Name: "alias", ExternalName: "web.shop.svc.cluster.local"},
			{Namespace: "shop", Name: "alias-ip", ExternalName: "192.0.2.1"},
			{Namespace: "shop", Name: "away", ExternalName: "db.example.com"},
			{Namespace: "shop", Name: "db", Headless: true, Ports: []mesh.ServicePort{{Name: "sql", Protocol: mesh.TCP, Port: 5432}},
				Endpoints: []mesh.Endpoint{
					ready("10.244.1.7", "db-0", "node1", sql), ready("10.244.2.7", "db-1", "node2", sql), leaving,
					ready("fd00:10:244:1::7", "db-0", "node1", sql),
					ready("10.244.1.9", "", "node1", sql), ready("fd00:10:244:1::", "", "node1", sql),
				}},
			{Namespace: "shop", Name: "idle", Headless: true},
			{Namespace: "shop", Name: "v6", ClusterIPs: addrs("fd00:10:96::6")},
			{Namespace: "shop", Name: "web", ClusterIPs: addrs("10.96.0.20", "fd00:10:96::20"),
				Ports: []mesh.ServicePort{{Name: "http", Protocol: mesh.TCP, Port: 80}, {Protocol: mesh.UDP, Port: 443}},
				Endpoints: []mesh.Endpoint{
					ready("10.244.1.8", "", "node1", http), ready("10.244.2.8", "front", "node2", http),
				}},
		},
	}
}

func newIndex(t testing.TB, s *mesh.State) *Index {
	t.Helper()
	x, err := New(Config{Zone: "cluster.local"})
	if err != nil {
		t.Fatal(err)
	}
	x.SetNameservers(addrs("10.244.1.1", "fd00:10:244:1::1"))
	x.Apply(s)
	return x
}

func lookup(t testing.TB, x *Index, name string, qtype uint16) *Reply {
	t.Helper()
	wire, err := Fold(nil, name)
	if err != nil {
		t.Fatal(err)
	}
	r := new(Reply)
	x.Lookup(r, wire, qtype)
	return r
}

// text prints a reply as lines of a zone file, sorted, after its code.
func text(r *Reply, name string) string {
	var lines []string
	for _, list := range [][]Record{r.Answer, r.Extra} {
		for _, c := range list {
			owner := c.Owner
			if owner == "" {
				owner = name
			}
			data := c.Target + c.Text
			switch c.Type {
			case dns.TypeA, dns.TypeAAAA:
				data = c.Addr.String()
			case dns.TypeSRV:
				data = fmt.Sprintf("0 %d %d %s", c.Weight, c.Port, c.Target)
			}
			lines = append(lines, owner+" "+dns.TypeToString[c.Type]+" "+data)
		}
	}
	slices.Sort(lines)
	return strings.Join(append([]string{r.Code.String()}, lines...), "\n")
}

func TestRecords(t *testing.T) {
	const z = "cluster.local."
	x := newIndex(t, cluster())
	for _, c := range []struct{ question, want string }{
		// Services with an address.
		{"web.shop.svc.cluster.local. A", "exists\nweb.shop.svc.cluster.local. A 10.96.0.20"},
		{"web.shop.svc.cluster.local. AAAA", "exists\nweb.shop.svc.cluster.local. AAAA fd00:10:96::20"},
		{"v6.shop.svc.cluster.local. A", "exists"},
		{"v6.shop.svc.cluster.local. AAAA", "exists\nv6.shop.svc.cluster.local. AAAA fd00:10:96::6"},
		{"web.shop.svc.cluster.local. MX", "exists"},
		{"web.shop.svc.cluster.local. HTTPS", "exists"},
		{"web.shop.svc.cluster.local. TXT", "exists"},
		{"web.empty.svc.cluster.local. A", "missing"},
		{"web.nowhere.svc.cluster.local. A", "missing"},
		{"WEB.Shop.SVC.cluster.LOCAL. A", "exists\nWEB.Shop.SVC.cluster.LOCAL. A 10.96.0.20"},

		// Headless services: ready endpoints only; none is no name.
		{"db.shop.svc.cluster.local. A", `exists
db.shop.svc.cluster.local. A 10.244.1.7
db.shop.svc.cluster.local. A 10.244.1.9
db.shop.svc.cluster.local. A 10.244.2.7`},
		{"db.shop.svc.cluster.local. AAAA", `exists
db.shop.svc.cluster.local. AAAA fd00:10:244:1::
db.shop.svc.cluster.local. AAAA fd00:10:244:1::7`},
		{"idle.shop.svc.cluster.local. A", "missing"},
		{"idle.shop.svc.cluster.local. SRV", "missing"},

		// Endpoints: the hostname, or else the address with dashes.
		{"db-0.db.shop.svc.cluster.local. A", "exists\ndb-0.db.shop.svc.cluster.local. A 10.244.1.7"},
		{"db-0.db.shop.svc.cluster.local. AAAA", "exists\ndb-0.db.shop.svc.cluster.local. AAAA fd00:10:244:1::7"},
		{"db-1.db.shop.svc.cluster.local. AAAA", "exists"},
		{"db-2.db.shop.svc.cluster.local. A", "missing"},
		{"10-244-1-9.db.shop.svc.cluster.local. A", "exists\n10-244-1-9.db.shop.svc.cluster.local. A 10.244.1.9"},
		{"10-244-1-7.db.shop.svc.cluster.local. A", "missing"}, // it has a hostname
		{"10-244-1-09.db.shop.svc.cluster.local. A", "missing"},
		{"fd00-10-244-1--0.db.shop.svc.cluster.local. AAAA", "exists\nfd00-10-244-1--0.db.shop.svc.cluster.local. AAAA fd00:10:244:1::"},
		{"fd00-10-244-1--.db.shop.svc.cluster.local. AAAA", "missing"},
		{"front.web.shop.svc.cluster.local. A", "exists\nfront.web.shop.svc.cluster.local. A 10.244.2.8"},
		{"10-244-1-8.web.shop.svc.cluster.local. A", "exists\n10-244-1-8.web.shop.svc.cluster.local. A 10.244.1.8"},
		{"x.db-0.db.shop.svc.cluster.local. A", "missing"},

		// Ports.
		{"_http._tcp.web.shop.svc.cluster.local. SRV", `exists
_http._tcp.web.shop.svc.cluster.local. SRV 0 100 80 web.shop.svc.cluster.local.
web.shop.svc.cluster.local. A 10.96.0.20
web.shop.svc.cluster.local. AAAA fd00:10:96::20`},
		{"web.shop.svc.cluster.local. SRV", `exists
web.shop.svc.cluster.local. A 10.96.0.20
web.shop.svc.cluster.local. AAAA fd00:10:96::20
web.shop.svc.cluster.local. SRV 0 50 443 web.shop.svc.cluster.local.
web.shop.svc.cluster.local. SRV 0 50 80 web.shop.svc.cluster.local.`},
		{"_HTTP._TCP.web.shop.svc.cluster.local. A", "exists"},
		{"_http._udp.web.shop.svc.cluster.local. SRV", "missing"},
		{"http.tcp.web.shop.svc.cluster.local. SRV", "missing"},
		{"_._tcp.web.shop.svc.cluster.local. SRV", "missing"},
		{"_tcp.web.shop.svc.cluster.local. SRV", "exists"},
		{"_udp.web.shop.svc.cluster.local. A", "missing"}, // that port has no name
		{"_dns._udp.kube-dns.kube-system.svc.cluster.local. SRV", `exists
_dns._udp.kube-dns.kube-system.svc.cluster.local. SRV 0 100 53 kube-dns.kube-system.svc.cluster.local.
kube-dns.kube-system.svc.cluster.local. A 10.96.0.10`},
		{"_sql._tcp.db.shop.svc.cluster.local. SRV", `exists
10-244-1-9.db.shop.svc.cluster.local. A 10.244.1.9
_sql._tcp.db.shop.svc.cluster.local. SRV 0 25 5432 10-244-1-9.db.shop.svc.cluster.local.
_sql._tcp.db.shop.svc.cluster.local. SRV 0 25 5432 db-0.db.shop.svc.cluster.local.
_sql._tcp.db.shop.svc.cluster.local. SRV 0 25 5432 db-1.db.shop.svc.cluster.local.
_sql._tcp.db.shop.svc.cluster.local. SRV 0 25 5432 fd00-10-244-1--0.db.shop.svc.cluster.local.
db-0.db.shop.svc.cluster.local. A 10.244.1.7
db-0.db.shop.svc.cluster.local. AAAA fd00:10:244:1::7
db-1.db.shop.svc.cluster.local. A 10.244.2.7
fd00-10-244-1--0.db.shop.svc.cluster.local. AAAA fd00:10:244:1::`},
		{"db-1.db.shop.svc.cluster.local. SRV", `exists
db-1.db.shop.svc.cluster.local. A 10.244.2.7
db-1.db.shop.svc.cluster.local. SRV 0 100 5432 db-1.db.shop.svc.cluster.local.`},

		// Names outside the cluster.
		{"away.shop.svc.cluster.local. A", "exists\naway.shop.svc.cluster.local. CNAME db.example.com."},
		{"away.shop.svc.cluster.local. CNAME", "exists\naway.shop.svc.cluster.local. CNAME db.example.com."},
		{"alias-ip.shop.svc.cluster.local. A", "missing"},
		{"x.away.shop.svc.cluster.local. A", "missing"},

		// Pods.
		{"10-244-1-7.shop.pod.cluster.local. A", "exists\n10-244-1-7.shop.pod.cluster.local. A 10.244.1.7"},
		{"10-244-1-7.shop.pod.cluster.local. AAAA", "exists"},
		{"10-244-1-7.nowhere.pod.cluster.local. A", "missing"},
		{"--1.shop.pod.cluster.local. AAAA", "exists\n--1.shop.pod.cluster.local. AAAA ::1"},
		{"fd00-10-244-1--7.shop.pod.cluster.local. AAAA", "exists\nfd00-10-244-1--7.shop.pod.cluster.local. AAAA fd00:10:244:1::7"},
		{"1-2-3.shop.pod.cluster.local. A", "missing"},
		{"1-2-3-256.shop.pod.cluster.local. A", "missing"},
		{"x.10-244-1-7.shop.pod.cluster.local. A", "missing"},

		// The names in between, and the zone itself.
		{z + " A", "exists"},
		{z + " NS", `exists
cluster.local. NS ns.dns.cluster.local.
ns.dns.cluster.local. A 10.244.1.1
ns.dns.cluster.local. AAAA fd00:10:244:1::1`},
		{"ns.dns.cluster.local. A", "exists\nns.dns.cluster.local. A 10.244.1.1"},
		{"dns.cluster.local. A", "exists"},
		{"svc.cluster.local. A", "exists"},
		{"pod.cluster.local. A", "exists"},
		{"shop.svc.cluster.local. A", "exists"},
		{"empty.svc.cluster.local. TXT", "exists"},
		{"empty.pod.cluster.local. TXT", "exists"},
		{"nowhere.svc.cluster.local. A", "missing"},
		{"nowhere.cluster.local. A", "missing"},
		{"www.example.com.cluster.local. A", "missing"},
		{"dns-version.cluster.local. TXT", "exists\ndns-version.cluster.local. TXT 1.1.0"},
		{"dns-version.cluster.local. A", "exists"},
		{`a\.b.svc.cluster.local. A`, "missing"},

		// Other zones.
		{"www.example.com. A", "outside"},
		{"local. A", "outside"},
		{". NS", "outside"},
		{`web.shop.svc\.cluster.local. A`, "outside"},
		{"xcluster.local. A", "outside"},

		// Reverse.
		{"20.0.96.10.in-addr.arpa. PTR", "exists\n20.0.96.10.in-addr.arpa. PTR web.shop.svc.cluster.local."},
		{"20.0.96.10.in-addr.arpa. A", "exists"},
		{"7.1.244.10.in-addr.arpa. PTR", "exists\n7.1.244.10.in-addr.arpa. PTR db-0.db.shop.svc.cluster.local."},
		{"8.1.244.10.in-addr.arpa. PTR", "exists\n8.1.244.10.in-addr.arpa. PTR 10-244-1-8.web.shop.svc.cluster.local."},
		{"7.3.244.10.in-addr.arpa. PTR", "outside"}, // not ready
		{"1.2.0.192.in-addr.arpa. PTR", "outside"},
		{"020.0.96.10.in-addr.arpa. PTR", "outside"},
		{"96.10.in-addr.arpa. PTR", "outside"},
		{"0.2.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.6.9.0.0.0.1.0.0.0.0.d.f.ip6.arpa. PTR", "exists\n" +
			"0.2.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.6.9.0.0.0.1.0.0.0.0.d.f.ip6.arpa. PTR web.shop.svc.cluster.local."},
		{"d.f.ip6.arpa. PTR", "outside"},
	} {
		name, qtype, _ := strings.Cut(c.question, " ")
		t.Run(c.question, func(t *testing.T) {
			r := lookup(t, x, name, dns.StringToType[qtype])
			if diff := cmp.Diff(c.want, text(r, name)); diff != "" {
				t.Errorf("(-want +got)\n%s", diff)
			}
		})
	}
}

func TestNothingIsDeniedBeforeTheFirstState(t *testing.T) {
	x, err := New(Config{Zone: "cluster.local"})
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"web.shop.svc.cluster.local.", "cluster.local.", "x.cluster.local.", "20.0.96.10.in-addr.arpa."} {
		if r := lookup(t, x, name, dns.TypeA); r.Code != NotReady {
			t.Errorf("%s: %s", name, r.Code)
		}
	}
	x.Apply(nil)
	if x.Ready() {
		t.Error("ready after no state")
	}
}

func TestNodeThatIsDownLeavesTheAnswerUntilAllAre(t *testing.T) {
	x := newIndex(t, cluster())
	got := func() string { return text(lookup(t, x, "db.shop.svc.cluster.local.", dns.TypeA), "db") }
	want := func(step, addrs string) {
		t.Helper()
		lines := []string{"exists"}
		for _, a := range strings.Fields(addrs) {
			lines = append(lines, "db A "+a)
		}
		if diff := cmp.Diff(strings.Join(lines, "\n"), got()); diff != "" {
			t.Errorf("%s (-want +got)\n%s", step, diff)
		}
	}
	serial := x.Serial()
	x.SetNode("node1", true)
	want("node1 down", "10.244.2.7")
	if x.Serial() == serial {
		t.Error("the serial did not move")
	}
	x.SetDown([]string{"node2", "unheard-of"})
	want("node2 instead", "10.244.1.7 10.244.1.9")
	x.SetDown([]string{"node1", "node2"})
	want("all down", "10.244.1.7 10.244.1.9 10.244.2.7")
	x.SetNode("node1", false)
	want("node1 up again", "10.244.1.7 10.244.1.9")

	// The mark outlives a new state.
	s := cluster()
	x.Apply(s)
	want("same contents, new pointers", "10.244.1.7 10.244.1.9")

	// The name of one endpoint is answered although its node is down, for it
	// exists; with two addresses the living one is.
	r := lookup(t, x, "db-1.db.shop.svc.cluster.local.", dns.TypeA)
	if got := text(r, "db-1"); got != "exists\ndb-1 A 10.244.2.7" {
		t.Error(got)
	}
	r = lookup(t, x, "_sql._tcp.db.shop.svc.cluster.local.", dns.TypeSRV)
	if got := text(r, "srv"); strings.Contains(got, "db-1") || !strings.Contains(got, "db-0") {
		t.Error(got)
	}
}

func TestAnswersTakeTurns(t *testing.T) {
	x := newIndex(t, cluster())
	first := map[netip.Addr]bool{}
	for range 3 {
		first[lookup(t, x, "db.shop.svc.cluster.local.", dns.TypeA).Answer[0].Addr] = true
	}
	if len(first) != 3 {
		t.Errorf("three answers began with %v", first)
	}
}

func TestConfig(t *testing.T) {
	for zone, want := range map[string]string{
		"":                                 "cluster.local.",
		"Example.ORG":                      "example.org.",
		".":                                "error",
		"a..b":                             "error",
		strings.Repeat("a", 64) + ".local": "error",
		strings.Repeat("abcdefgh.", 8) + "local.": "error",
	} {
		x, err := New(Config{Zone: zone})
		got := "error"
		if err == nil {
			got = x.Zone()
		}
		if got != want {
			t.Errorf("zone %q: %s %v, want %s", zone, got, err, want)
		}
	}
}
