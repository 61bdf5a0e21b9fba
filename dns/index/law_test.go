package index

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/miekg/dns"

	"meshd.dev/pkg/mesh"
)

var allTypes = []uint16{dns.TypeA, dns.TypeAAAA, dns.TypeSRV, dns.TypeTXT, dns.TypeCNAME, dns.TypePTR, dns.TypeMX,
	dns.TypeNS, dns.TypeSOA, dns.TypeHTTPS, dns.TypeSVCB, dns.TypeDS, dns.TypeANY, 65280}

// randomState is a cluster of few names, so that two of them share many.
func randomState(r *rand.Rand) *mesh.State {
	s := &mesh.State{Namespaces: []string{"a", "b"}}
	if r.IntN(2) == 0 {
		s.Namespaces = append(s.Namespaces, "void")
	}
	for _, ns := range []string{"a", "b"} {
		for i := range 8 {
			if r.IntN(3) > 0 {
				s.Services = append(s.Services, randomService(r, ns, fmt.Sprintf("s%d", i), i))
			}
		}
	}
	return s
}

func randomService(r *rand.Rand, ns, name string, i int) *mesh.Service {
	s := &mesh.Service{Namespace: ns, Name: name, Headless: r.IntN(2) == 0}
	if r.IntN(6) == 0 {
		s.Headless, s.ExternalName = false, "www.example.com"
		return s
	}
	if r.IntN(3) > 0 {
		s.Ports = []mesh.ServicePort{{Name: "http", Protocol: mesh.TCP, Port: 80}}
	}
	if !s.Headless {
		s.ClusterIPs = []netip.Addr{netip.AddrFrom4([4]byte{10, 96, ns[0], byte(i)})}
	}
	for e := range r.IntN(4) {
		ep := ready(fmt.Sprintf("10.244.%d.%d", i, e), "", pick(r, "node1", "node2", ""), mesh.EndpointPort{Name: "http", Protocol: mesh.TCP, Port: 80})
		if r.IntN(2) == 0 {
			ep.Addr = netip.MustParseAddr(fmt.Sprintf("fd00:10:244:%d::%d", i, e))
		}
		if r.IntN(2) == 0 {
			ep.Hostname = fmt.Sprintf("pod-%d", r.IntN(3))
		}
		ep.Ready = r.IntN(4) > 0
		s.Endpoints = append(s.Endpoints, ep)
	}
	return s
}

func pick[T any](r *rand.Rand, of ...T) T { return of[r.IntN(len(of))] }

// names are all that exist in s, and some that nearly do.
func names(s *mesh.State) []string {
	list := []string{"", "svc.", "pod.", "dns.", "ns.dns.", "dns-version.", "x.", "x.ns.dns.", "void.svc.", "1-2-3-4.a.pod.", "x.1-2-3-4.a.pod.", "1-2-3-4.no.pod."}
	for _, ns := range []string{"a", "b", "no"} {
		list = append(list, ns+".svc.", ns+".pod.")
		for i := range 9 {
			svc := fmt.Sprintf("s%d.%s.svc.", i, ns)
			list = append(list, svc, "x."+svc, "_tcp."+svc, "_udp."+svc, "_http._tcp."+svc, "x._http._tcp."+svc)
			for e := range 3 {
				list = append(list, fmt.Sprintf("pod-%d.%s", e, svc))
			}
		}
	}
	for i := range list {
		list[i] += "cluster.local."
	}
	for _, svc := range s.Services {
		for _, a := range svc.ClusterIPs {
			name, _ := dns.ReverseAddr(a.String())
			list = append(list, name)
		}
		for _, e := range svc.Endpoints {
			name, _ := dns.ReverseAddr(e.Addr.String())
			list = append(list, name, string(appendDashed(nil, e.Addr))+"."+svc.Name+"."+svc.Namespace+".svc.cluster.local.")
		}
	}
	return list
}

// TestExistenceDoesNotDependOnTheType: never NXDOMAIN for one type and NOERROR
// for another (RFC 4074), and never NXDOMAIN for a name above one that exists
// (RFC 8020).
func TestExistenceDoesNotDependOnTheType(t *testing.T) {
	for seed := range uint64(50) {
		s := randomState(rand.New(rand.NewPCG(seed, 1)))
		x := newIndex(t, s)
		for _, name := range names(s) {
			code := lookup(t, x, name, dns.TypeA).Code
			for _, qtype := range allTypes {
				if r := lookup(t, x, name, qtype); r.Code != code {
					t.Errorf("%s %s: %s, but A %s", name, dns.TypeToString[qtype], r.Code, code)
				}
			}
			if code != Exists || strings.HasSuffix(name, ".arpa.") {
				continue
			}
			for above := name; above != "cluster.local."; {
				_, above, _ = strings.Cut(above, ".")
				if r := lookup(t, x, above, dns.TypeA); r.Code != Exists {
					t.Errorf("%s exists, but %s: %s", name, above, r.Code)
				}
			}
		}
	}
}

// TestApplyEndsWhereAFreshIndexBegins: from any state to any other, the index
// is the one that never saw anything else.
func TestApplyEndsWhereAFreshIndexBegins(t *testing.T) {
	r := rand.New(rand.NewPCG(3, 1))
	s := randomState(r)
	x := newIndex(t, s)
	for step := range 200 {
		before := s
		s = replaceSome(r, s)
		x.Apply(s)
		fresh := newIndex(t, s)
		for _, name := range append(names(before), names(s)...) {
			for _, qtype := range []uint16{dns.TypeA, dns.TypeAAAA, dns.TypeSRV, dns.TypePTR} {
				if got, want := text(lookup(t, x, name, qtype), name), text(lookup(t, fresh, name, qtype), name); got != want {
					t.Fatalf("step %d: %s %s\n%s\nbut fresh\n%s", step, name, dns.TypeToString[qtype], got, want)
				}
			}
		}
		if got, want := x.Len(), fresh.Len(); got != want {
			t.Fatalf("step %d: %d services, want %d", step, got, want)
		}
		if got, want := len(x.reverse.first)+len(x.reverse.more), len(fresh.reverse.first)+len(fresh.reverse.more); got != want {
			t.Fatalf("step %d: %d addresses, want %d", step, got, want)
		}
	}
}

// replaceSome replaces about a third of the services and keeps the others' pointers.
func replaceSome(r *rand.Rand, s *mesh.State) *mesh.State {
	next := randomState(r)
	for i, svc := range next.Services {
		for _, old := range s.Services {
			if old.Name == svc.Name && old.Namespace == svc.Namespace && r.IntN(3) > 0 {
				next.Services[i] = old
			}
		}
	}
	return next
}

func TestApplyTouchesOnlyWhatChanged(t *testing.T) {
	s := cluster()
	x := newIndex(t, s)
	serial := x.Serial()
	content := func(name string) *service { return x.services.get([]byte(serviceKey(name, "shop"))) }
	web, db := content("web"), content("db")

	next := &mesh.State{Namespaces: s.Namespaces, Services: slices.Clone(s.Services)}
	x.Apply(next)
	if content("web") != web || content("db") != db || x.Serial() != serial {
		t.Error("a state with the same pointers changed something")
	}
	next = &mesh.State{Namespaces: s.Namespaces, Services: slices.Clone(s.Services)}
	for i, svc := range next.Services {
		if svc.Name == "db" {
			changed := *svc
			changed.Endpoints = changed.Endpoints[:1]
			next.Services[i] = &changed
		}
	}
	x.Apply(next)
	if content("web") != web || content("db") == db || x.Serial() == serial {
		t.Error("a change of db changed web, or nothing")
	}
}

func TestServiceOfANamespaceNotYetSeen(t *testing.T) {
	x := newIndex(t, &mesh.State{Services: []*mesh.Service{{Namespace: "new", Name: "web", ClusterIPs: addrs("10.96.0.1")}}})
	if r := lookup(t, x, "new.svc.cluster.local.", dns.TypeA); r.Code != Exists {
		t.Error(r.Code)
	}
}

// TestNamesOfNodesAreForgotten: a cluster whose nodes come and go for years
// does not grow.
func TestNamesOfNodesAreForgotten(t *testing.T) {
	x := newIndex(t, &mesh.State{})
	x.SetNode("down-for-good", true)
	for i := range 10000 {
		x.Apply(&mesh.State{Services: []*mesh.Service{{Namespace: "a", Name: "s", Headless: true,
			Endpoints: []mesh.Endpoint{ready("10.244.0.1", "", fmt.Sprintf("node%d", i)), ready("10.244.0.2", "", "down-for-good")}}}})
	}
	if n := len(x.nodes.byName); n > 5000 {
		t.Errorf("%d names of nodes", n)
	}
	if r := lookup(t, x, "s.a.svc.cluster.local.", dns.TypeA); len(r.Answer) != 1 {
		t.Errorf("a node that is down is answered: %v", r.Answer)
	}
}

// TestReadersNeverMissWhatIsThere reads while states are applied.
func TestReadersNeverMissWhatIsThere(t *testing.T) {
	constant := &mesh.Service{Namespace: "b", Name: "z", ClusterIPs: addrs("10.96.0.1")}
	with := func(s *mesh.State) *mesh.State {
		s.Services = append(s.Services, constant)
		return s
	}
	x := newIndex(t, with(&mesh.State{}))
	stop := make(chan struct{})
	var readers sync.WaitGroup
	for range 4 {
		readers.Go(func() {
			r := new(Reply)
			forward, _ := Fold(nil, "z.b.svc.cluster.local.")
			back, _ := Fold(nil, "1.0.96.10.in-addr.arpa.")
			for {
				select {
				case <-stop:
					return
				default:
				}
				if x.Lookup(r, forward, dns.TypeA); len(r.Answer) != 1 {
					t.Errorf("forward: %v", r.Code)
				}
				if x.Lookup(r, back, dns.TypePTR); len(r.Answer) != 1 {
					t.Errorf("back: %v", r.Code)
				}
			}
		})
	}
	r := rand.New(rand.NewPCG(9, 9))
	for i := range 500 {
		x.Apply(with(randomState(r)))
		x.SetNode("node1", i%2 == 0)
	}
	close(stop)
	readers.Wait()
}

// FuzzAnswer: no message makes it read or write out of bounds, and what it
// writes is a response to the message, within the size the client takes.
func FuzzAnswer(f *testing.F) {
	x := newIndex(f, cluster())
	for _, name := range []string{"web.shop.svc.cluster.local.", "db.shop.svc.cluster.local.", "no.cluster.local.", "cluster.local.", "7.1.244.10.in-addr.arpa."} {
		m := new(dns.Msg)
		m.SetQuestion(name, dns.TypeA)
		b, _ := m.Pack()
		f.Add(b)
		m.SetEdns0(1232, true)
		b, _ = m.Pack()
		f.Add(b)
	}
	r := new(Reply)
	f.Fuzz(func(t *testing.T, query []byte) {
		out, ok := x.Answer([]byte("before"), query, r, Options{TTL: 5})
		if !ok {
			return
		}
		if !strings.HasPrefix(string(out), "before") {
			t.Fatal("what was there is gone")
		}
		q, m := new(dns.Msg), new(dns.Msg)
		if err := q.Unpack(query); err != nil {
			t.Fatalf("answered what does not parse: %v: % x", err, query)
		}
		if err := m.Unpack(out[6:]); err != nil {
			t.Fatalf("% x: %v", out, err)
		}
		size := 512
		if opt := q.IsEdns0(); opt != nil {
			size = max(size, int(opt.UDPSize()))
		}
		if m.Id != q.Id || !m.Response || m.Question[0] != q.Question[0] || len(out)-6 > size {
			t.Errorf("to %v\nin %d octets: %v", q, len(out)-6, m)
		}
	})
}

// FuzzLookup: any bytes for a name.
func FuzzLookup(f *testing.F) {
	x := newIndex(f, cluster())
	for _, name := range []string{"_sql._tcp.db.shop.svc.cluster.local.", "10-244-1-9.db.shop.svc.cluster.local.", "--1.shop.pod.cluster.local.", "20.0.96.10.in-addr.arpa."} {
		b, _ := Fold(nil, name)
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, name []byte) {
		r := new(Reply)
		x.Lookup(r, name, dns.TypeA)
		code := r.Code
		for _, qtype := range allTypes {
			if x.Lookup(r, name, qtype); r.Code != code {
				t.Errorf("% x: %s for %d and %s for A", name, r.Code, qtype, code)
			}
		}
	})
}

func big(services, endpoints int) *mesh.State {
	s := &mesh.State{}
	for i := range services {
		ns := fmt.Sprintf("ns%02d", i/100)
		svc := &mesh.Service{Namespace: ns, Name: fmt.Sprintf("svc%05d", i), ClusterIPs: addrs(fmt.Sprintf("10.96.%d.%d", i>>8, i&255)),
			Ports: []mesh.ServicePort{{Name: "http", Protocol: mesh.TCP, Port: 80}}}
		if i%10 == 0 {
			svc.Headless, svc.ClusterIPs = true, nil
		}
		for e := range endpoints {
			svc.Endpoints = append(svc.Endpoints, ready(fmt.Sprintf("10.%d.%d.%d", 128+e, i>>8, i&255), "", fmt.Sprintf("node%d", (i+e)%500)))
		}
		s.Services = append(s.Services, svc)
	}
	return s
}

func TestAnswersAllocateNothing(t *testing.T) {
	x := newIndex(t, cluster())
	for _, name := range []string{"web.shop.svc.cluster.local.", "db.shop.svc.cluster.local.", "no.shop.svc.cluster.local."} {
		m := new(dns.Msg)
		m.SetQuestion(name, dns.TypeA)
		query, _ := m.Pack()
		r, out := new(Reply), make([]byte, 0, 1232)
		if n := testing.AllocsPerRun(100, func() { out, _ = x.Answer(out[:0], query, r, Options{TTL: 5}) }); n != 0 {
			t.Errorf("%s: %v allocations", name, n)
		}
	}
}

func BenchmarkAnswer(b *testing.B) {
	x := newIndex(b, big(10000, 5))
	for _, c := range []struct {
		name, question string
		qtype          uint16
	}{
		{"vip", "svc00042.ns00.svc.cluster.local.", dns.TypeA},
		{"headless5", "svc00040.ns00.svc.cluster.local.", dns.TypeA},
		{"nodata", "svc00042.ns00.svc.cluster.local.", dns.TypeAAAA},
		{"nxdomain", "www.example.com.ns00.svc.cluster.local.", dns.TypeA},
	} {
		m := new(dns.Msg)
		m.SetQuestion(c.question, c.qtype)
		query, _ := m.Pack()
		b.Run(c.name, func(b *testing.B) {
			r, out := new(Reply), make([]byte, 0, 1232)
			ok := true
			b.ReportAllocs()
			for b.Loop() {
				out, ok = x.Answer(out[:0], query, r, Options{TTL: 5})
			}
			if !ok {
				b.Error("not answered")
			}
		})
	}
}

func BenchmarkApply(b *testing.B) {
	s := big(10000, 5)
	b.Run("first", func(b *testing.B) {
		for b.Loop() {
			newIndex(b, s)
		}
	})
	b.Run("one of 10000 changed", func(b *testing.B) {
		x := newIndex(b, s)
		b.ReportAllocs()
		for b.Loop() {
			next := &mesh.State{Services: slices.Clone(s.Services)}
			changed := *next.Services[77]
			next.Services[77] = &changed
			x.Apply(next)
		}
	})
	b.Run("node down and up", func(b *testing.B) {
		x := newIndex(b, s)
		for b.Loop() {
			x.SetNode("node7", true)
			x.SetNode("node7", false)
		}
	})
}
