package serviceip

// Addresses: services 10.96.0.0/24 and 2001:db8:96::/112, node ports
// 30000-30031. "v4", "v6" and "np" in expectations are chosen automatically.

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apiserver/pkg/endpoints/request"
	genericregistry "k8s.io/apiserver/pkg/registry/generic/registry"
	"k8s.io/apiserver/pkg/registry/rest"
	"sigs.k8s.io/yaml"
)

var (
	v4Only = []netip.Prefix{netip.MustParsePrefix("10.96.0.0/24")}
	dual   = []netip.Prefix{netip.MustParsePrefix("10.96.0.0/24"), netip.MustParsePrefix("2001:db8:96::/112")}
)

type bench struct {
	*testing.T
	ctx   context.Context
	m     *memory
	store *genericregistry.Store
	a     *Allocator
}

func start(t *testing.T, m *memory, cidrs []netip.Prefix) *bench {
	t.Helper()
	a, err := New(Config{CIDRs: cidrs, NodePorts: PortRange{30000, 30031}})
	if err != nil {
		t.Fatal(err)
	}
	store := newStore(t, m)
	if err := a.Attach(store); err != nil {
		t.Fatal(err)
	}
	return &bench{t, request.WithNamespace(t.Context(), "default"), m, store, a}
}

func service(t testing.TB, name, spec string) *corev1.Service {
	svc := &corev1.Service{ObjectMeta: metav1.ObjectMeta{Name: name, Namespace: "default"}}
	if err := yaml.UnmarshalStrict([]byte(spec), &svc.Spec); err != nil {
		t.Fatalf("spec %q: %v", spec, err)
	}
	if svc.Spec.Type == "" {
		svc.Spec.Type = corev1.ServiceTypeClusterIP
	}
	return svc
}

func (b *bench) create(svc *corev1.Service, dry ...string) (*corev1.Service, error) {
	obj, err := b.store.Create(b.ctx, svc, rest.ValidateAllObjectFunc, &metav1.CreateOptions{DryRun: dry})
	if err != nil {
		return nil, err
	}
	return obj.(*corev1.Service), nil
}

func (b *bench) update(svc *corev1.Service) (*corev1.Service, error) {
	obj, _, err := b.store.Update(b.ctx, svc.Name, rest.DefaultUpdatedObjectInfo(svc), rest.ValidateAllObjectFunc,
		rest.ValidateAllObjectUpdateFunc, true, &metav1.UpdateOptions{})
	if err != nil {
		return nil, err
	}
	return obj.(*corev1.Service), nil
}

func (b *bench) delete(name string) error {
	_, _, err := b.store.Delete(b.ctx, name, rest.ValidateAllObjectFunc, &metav1.DeleteOptions{})
	return err
}

// consistent checks that the pool holds exactly what is stored.
func (b *bench) consistent() {
	b.Helper()
	svcs, err := b.a.list(b.ctx)
	if err != nil {
		b.Fatal(err)
	}
	want := map[item]string{}
	for i := range svcs {
		for _, it := range holdings(&svcs[i]) {
			if other, twice := want[it]; twice {
				b.Errorf("%s: both %s and %s have it", it, other, svcs[i].Name)
			}
			want[it] = svcs[i].Name
		}
	}
	for it, h := range b.a.pool.held {
		if _, ok := want[it]; !ok {
			b.Errorf("%s: held %d times, stored by nobody", it, h.refs)
		} else if h.refs != 1 {
			b.Errorf("%s: %d references, want 1", it, h.refs)
		}
	}
	for it := range want {
		if b.a.pool.held[it] == nil {
			b.Errorf("%s: stored by %s, not held", it, want[it])
		}
	}
}

// show prints what the allocator decides; addresses and ports in asked are
// printed as they are, others by kind.
func show(svc *corev1.Service, asked string) string {
	var w []string
	word := func(s, kind string) string {
		if strings.Contains(asked, s) {
			return s
		}
		return kind
	}
	if p := svc.Spec.IPFamilyPolicy; p != nil {
		w = append(w, string(*p))
	}
	for _, f := range svc.Spec.IPFamilies {
		w = append(w, string(f))
	}
	for i, ip := range svc.Spec.ClusterIPs {
		if i == 0 && svc.Spec.ClusterIP != ip {
			w = append(w, "MISMATCH "+svc.Spec.ClusterIP)
		}
		kind := "v4"
		if strings.Contains(ip, ":") {
			kind = "v6"
		}
		w = append(w, word(ip, kind))
	}
	for _, p := range svc.Spec.Ports {
		if p.NodePort != 0 {
			w = append(w, word(fmt.Sprint(p.NodePort), "np"))
		}
	}
	if p := svc.Spec.HealthCheckNodePort; p != 0 {
		w = append(w, "health="+word(fmt.Sprint(p), "np"))
	}
	return strings.Join(w, " ")
}

func TestCreate(t *testing.T) {
	for _, c := range []struct {
		name, spec string
		cidrs      []netip.Prefix
		want       string // of show, or "error: " and a part of the error
	}{
		{"plain", `{}`, v4Only, "SingleStack IPv4 v4"},
		{"plain, dual cluster", `{}`, dual, "SingleStack IPv4 v4"},
		{"v6 family", `{ipFamilies: [IPv6]}`, dual, "SingleStack IPv6 v6"},
		{"v6 address decides the family", `{clusterIP: "2001:db8:96::20"}`, dual, "SingleStack IPv6 2001:db8:96::20"},
		{"prefer dual, single cluster", `{ipFamilyPolicy: PreferDualStack}`, v4Only, "PreferDualStack IPv4 v4"},
		{"prefer dual, dual cluster", `{ipFamilyPolicy: PreferDualStack}`, dual, "PreferDualStack IPv4 IPv6 v4 v6"},
		{"prefer dual, v6 first", `{ipFamilyPolicy: PreferDualStack, ipFamilies: [IPv6]}`, dual, "PreferDualStack IPv6 IPv4 v6 v4"},
		{"require dual", `{ipFamilyPolicy: RequireDualStack}`, dual, "RequireDualStack IPv4 IPv6 v4 v6"},
		{"require dual, single cluster", `{ipFamilyPolicy: RequireDualStack}`, v4Only, "error: spec.ipFamilyPolicy: Invalid value: \"RequireDualStack\": this cluster is not configured for dual-stack services"},
		{"family the cluster lacks", `{ipFamilies: [IPv6]}`, v4Only, "error: spec.ipFamilies[0]: Invalid value: \"IPv6\": not configured on this cluster"},
		{"two families without policy", `{ipFamilies: [IPv4, IPv6]}`, dual, "error: must be 'RequireDualStack' or 'PreferDualStack' when multiple IP families"},
		{"requested address", `{clusterIP: 10.96.0.20}`, v4Only, "SingleStack IPv4 10.96.0.20"},
		{"requested second address", `{ipFamilyPolicy: RequireDualStack, clusterIPs: [10.96.0.20, "2001:db8:96::7"], clusterIP: 10.96.0.20}`, dual, "RequireDualStack IPv4 IPv6 10.96.0.20 2001:db8:96::7"},
		{"outside the range", `{clusterIP: 10.97.0.20}`, v4Only, "error: failed to allocate IP 10.97.0.20: not in the service range 10.96.0.0/24"},
		{"network address", `{clusterIP: 10.96.0.0}`, v4Only, "error: the network address of the service range"},
		{"broadcast address", `{clusterIP: 10.96.0.255}`, v4Only, "error: the broadcast address of the service range"},
		{"first address is of kubernetes", `{clusterIP: 10.96.0.1}`, v4Only, "error: failed to allocate IP 10.96.0.1: reserved for the service default/kubernetes"},
		{"not an address", `{clusterIP: potato}`, v4Only, "error: spec.clusterIPs[0]: Invalid value: \"potato\": must be an IP address"},
		{"two of one family", `{ipFamilyPolicy: RequireDualStack, clusterIPs: [10.96.0.20, 10.96.0.21], clusterIP: 10.96.0.20}`, dual, "error: two addresses must be one of each family"},
		{"address of the other family", `{ipFamilies: [IPv6], clusterIP: 10.96.0.20}`, dual, "error: must be an IPv6 address, as ipFamilies[0] says"},
		{"headless", `{clusterIP: None, selector: {a: b}}`, dual, "SingleStack IPv4 v4 None"},
		{"headless without selector spans both", `{clusterIP: None}`, v4Only, "RequireDualStack IPv4 IPv6 v4 None"},
		{"external name", `{type: ExternalName, externalName: a.example}`, dual, ""},
		{"node port", `{type: NodePort, ports: [{port: 80}]}`, v4Only, "SingleStack IPv4 v4 np"},
		{"requested node port", `{type: NodePort, ports: [{port: 80, nodePort: 30005}]}`, v4Only, "SingleStack IPv4 v4 30005"},
		{"node port out of range", `{type: NodePort, ports: [{port: 80, nodePort: 80}]}`, v4Only, "error: spec.ports[0].nodePort: Invalid value: 80: provided port is not in the valid range. The range of valid ports is 30000-30031"},
		{"same node port, two protocols", `{type: NodePort, ports: [{name: a, port: 53, nodePort: 30005, protocol: UDP}, {name: b, port: 53, protocol: TCP}]}`, v4Only, "SingleStack IPv4 v4 30005 30005"},
		{"same node port twice", `{type: NodePort, ports: [{name: a, port: 53, nodePort: 30005}, {name: b, port: 54, nodePort: 30005}]}`, v4Only, "error: spec.ports[1].nodePort: Duplicate value: 30005"},
		{"load balancer", `{type: LoadBalancer, ports: [{port: 80}]}`, v4Only, "SingleStack IPv4 v4 np"},
		{"load balancer without node ports", `{type: LoadBalancer, allocateLoadBalancerNodePorts: false, ports: [{port: 80}]}`, v4Only, "SingleStack IPv4 v4"},
		{"load balancer, local", `{type: LoadBalancer, externalTrafficPolicy: Local, ports: [{port: 80}]}`, v4Only, "SingleStack IPv4 v4 np health=np"},
		{"load balancer, local, requested", `{type: LoadBalancer, externalTrafficPolicy: Local, healthCheckNodePort: 30009, ports: [{port: 80}]}`, v4Only, "SingleStack IPv4 v4 np health=30009"},
	} {
		t.Run(c.name, func(t *testing.T) {
			b := start(t, newMemory(), c.cidrs)
			svc, err := b.create(service(t, "a", c.spec))
			if part, isErr := strings.CutPrefix(c.want, "error: "); isErr {
				if err == nil || !strings.Contains(err.Error(), part) {
					t.Errorf("error %v, want a part %q", err, part)
				}
			} else if err != nil {
				t.Errorf("create: %v", err)
			} else if got := show(svc, c.spec); got != strings.Replace(c.want, "v4 None", "None", 1) {
				t.Errorf("got  %s\nwant %s", got, c.want)
			}
			b.consistent()
		})
	}
}

func TestUpdate(t *testing.T) {
	for _, c := range []struct {
		name, from, to string
		want           string
	}{
		{"same manifest again", `{clusterIP: 10.96.0.20, type: NodePort, ports: [{port: 80, nodePort: 30003}]}`, `{type: NodePort, ports: [{port: 80}]}`, "SingleStack IPv4 10.96.0.20 30003"},
		{"another address", `{clusterIP: 10.96.0.20}`, `{clusterIP: 10.96.0.21}`, "error: may not change once set, it is 10.96.0.20"},
		{"to headless", `{clusterIP: 10.96.0.20}`, `{clusterIP: None}`, "error: may not change once set"},
		{"from headless", `{clusterIP: None, selector: {a: b}}`, `{clusterIP: 10.96.0.21, selector: {a: b}}`, "error: may not change once set, it is None"},
		{"to external name", `{clusterIP: 10.96.0.20}`, `{type: ExternalName, externalName: a.example, clusterIP: 10.96.0.20, clusterIPs: [10.96.0.20], ipFamilies: [IPv4], ipFamilyPolicy: SingleStack}`, ""},
		{"from external name", `{type: ExternalName, externalName: a.example}`, `{}`, "SingleStack IPv4 v4"},
		{"to node port", `{clusterIP: 10.96.0.20, ports: [{port: 80}]}`, `{type: NodePort, ports: [{port: 80}]}`, "SingleStack IPv4 10.96.0.20 np"},
		{"from node port", `{clusterIP: 10.96.0.20, type: NodePort, ports: [{port: 80, nodePort: 30003}]}`, `{ports: [{port: 80, nodePort: 30003}]}`, "SingleStack IPv4 10.96.0.20"},
		{"second family", `{clusterIP: 10.96.0.20}`, `{ipFamilyPolicy: PreferDualStack}`, "PreferDualStack IPv4 IPv6 10.96.0.20 v6"},
		{"second family away", `{clusterIP: 10.96.0.20, ipFamilyPolicy: RequireDualStack}`, `{ipFamilyPolicy: SingleStack}`, "SingleStack IPv4 10.96.0.20"},
		{"second address away without policy", `{clusterIP: 10.96.0.20, ipFamilyPolicy: RequireDualStack}`, `{clusterIP: 10.96.0.20, clusterIPs: [10.96.0.20], ipFamilyPolicy: RequireDualStack}`, "error: must be 'SingleStack' to release the secondary cluster IP"},
		{"another node port", `{type: NodePort, clusterIP: 10.96.0.20, ports: [{port: 80, nodePort: 30003}]}`, `{type: NodePort, ports: [{port: 80, nodePort: 30004}]}`, "SingleStack IPv4 10.96.0.20 30004"},
		{"ports swap node ports", `{type: NodePort, clusterIP: 10.96.0.20, ports: [{name: a, port: 80, nodePort: 30003}, {name: b, port: 81, nodePort: 30004}]}`, `{type: NodePort, ports: [{name: a, port: 80, nodePort: 30004}, {name: b, port: 81, nodePort: 30003}]}`, "SingleStack IPv4 10.96.0.20 30004 30003"},
		{"node port moves to another port", `{type: NodePort, clusterIP: 10.96.0.20, ports: [{name: a, port: 80, nodePort: 30003}]}`, `{type: NodePort, ports: [{name: a, port: 80}, {name: b, port: 81, nodePort: 30003}]}`, "SingleStack IPv4 10.96.0.20 np 30003"},
		{"fails validation after allocation", `{clusterIP: 10.96.0.20, ports: [{port: 80}]}`, `{type: NodePort, ports: [{port: 80, nodePort: 30009}]} # invalid`, "error: the test says so"},
	} {
		t.Run(c.name, func(t *testing.T) {
			b := start(t, newMemory(), dual)
			if _, err := b.create(service(t, "a", c.from)); err != nil {
				t.Fatal(err)
			}
			to := service(t, "a", c.to)
			if strings.HasSuffix(c.to, "invalid") {
				to.Labels = map[string]string{"invalid": "true"}
			}
			svc, err := b.update(to)
			if part, isErr := strings.CutPrefix(c.want, "error: "); isErr {
				if err == nil || !strings.Contains(err.Error(), part) {
					t.Errorf("error %v, want a part %q", err, part)
				}
			} else if err != nil {
				t.Errorf("update: %v", err)
			} else if got := show(svc, c.from+c.to); got != c.want {
				t.Errorf("got  %s\nwant %s", got, c.want)
			}
			b.consistent()
		})
	}
}

func TestNothingTwice(t *testing.T) {
	b := start(t, newMemory(), v4Only)
	const spec = `{clusterIP: 10.96.0.20, type: NodePort, ports: [{port: 80, nodePort: 30003}]}`
	if _, err := b.create(service(t, "a", spec)); err != nil {
		t.Fatal(err)
	}
	_, err := b.create(service(t, "b", spec))
	for _, part := range []string{"provided IP is already allocated to another service", "provided port is already allocated to another service"} {
		if err == nil || !strings.Contains(err.Error(), part) {
			t.Errorf("error %v, want a part %q", err, part)
		}
	}
	if _, err := b.create(service(t, "b", spec), metav1.DryRunAll); err == nil {
		t.Error("dry run took what another service has")
	}
	if _, err := b.create(service(t, "c", `{clusterIP: 10.96.0.21}`), metav1.DryRunAll); err != nil {
		t.Error(err)
	}
	if err := b.delete("a"); err != nil {
		t.Fatal(err)
	}
	if _, err := b.create(service(t, "b", spec)); err != nil {
		t.Errorf("after the holder was deleted: %v", err)
	}
	b.consistent()
}

func TestKubernetesServiceHasTheFirstAddress(t *testing.T) {
	b := start(t, newMemory(), dual)
	if got := b.a.First().String(); got != "10.96.0.1" {
		t.Errorf("First() = %s", got)
	}
	svc, err := b.create(service(t, "kubernetes", `{clusterIP: 10.96.0.1}`))
	if err != nil || svc.Spec.ClusterIP != "10.96.0.1" {
		t.Errorf("create default/kubernetes: %v", err)
	}
}

// TestFull takes every address and node port there is, and one more.
func TestFull(t *testing.T) {
	b := start(t, newMemory(), []netip.Prefix{netip.MustParsePrefix("10.96.0.0/27")})
	n := 0
	for ; ; n++ {
		svc, err := b.create(service(t, fmt.Sprint("s", n), `{}`))
		if err != nil {
			if !strings.Contains(err.Error(), "service range 10.96.0.0/27: no free one left") {
				t.Error(err)
			}
			break
		}
		if svc.Spec.ClusterIP == "10.96.0.1" || svc.Spec.ClusterIP == "10.96.0.31" {
			t.Errorf("chose %s", svc.Spec.ClusterIP)
		}
	}
	if n != 29 { // 32 without network, first and broadcast address
		t.Errorf("%d services, want 29", n)
	}
	b.consistent()
}

// TestConcurrent lets many writers create, update and delete at once, with
// writes whose outcome is lost, and looks for an address in two services.
func TestConcurrent(t *testing.T) {
	m := newMemory()
	b := start(t, m, dual)
	var mu sync.Mutex
	rnd := rand.New(rand.NewPCG(1, 2))
	dice := func(n int) int { mu.Lock(); defer mu.Unlock(); return rnd.IntN(n) }
	m.fault = func(op, key string) fault {
		switch dice(20) {
		case 0:
			return refused
		case 1:
			return lost
		}
		return none
	}
	specs := []string{`{}`, `{type: NodePort, ports: [{port: 80}]}`, `{ipFamilyPolicy: PreferDualStack}`,
		`{type: ExternalName, externalName: a.example}`, `{type: NodePort, ports: [{port: 80, nodePort: 30007}]}`}
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			for range 60 {
				svc := service(t, fmt.Sprint("s", dice(12)), specs[dice(len(specs))])
				switch dice(3) {
				case 0:
					b.create(svc)
				case 1:
					b.update(svc) // creates what is missing, as server-side apply does
				case 2:
					b.delete(svc.Name)
				}
			}
		})
	}
	wg.Wait()
	m.fault = nil
	stored := noneTwice(t, b)

	now := time.Now()
	for _, after := range []time.Duration{0, settleTime} {
		if err := b.a.reconcile(b.ctx, now.Add(after)); err != nil {
			t.Fatal(err)
		}
	}
	for it := range b.a.pool.held {
		if !stored[it] {
			t.Errorf("%s: still held after two lists without it", it)
		}
	}
	for it := range stored {
		if b.a.pool.held[it] == nil {
			t.Errorf("%s: stored, but not held", it)
		}
	}
}

func noneTwice(t *testing.T, b *bench) map[item]bool {
	t.Helper()
	svcs, err := b.a.list(b.ctx)
	if err != nil {
		t.Fatal(err)
	}
	stored := map[item]bool{}
	for i := range svcs {
		for _, it := range holdings(&svcs[i]) {
			if stored[it] {
				t.Errorf("%s is in two services", it)
			}
			stored[it] = true
		}
	}
	return stored
}

// TestLostWrite: a create whose answer was lost may have been stored, so its
// address is not for others.
func TestLostWrite(t *testing.T) {
	for _, f := range []fault{lost, refused} {
		m := newMemory()
		b := start(t, m, v4Only)
		m.fault = func(string, string) fault { return f }
		if _, err := b.create(service(t, "a", `{clusterIP: 10.96.0.20}`)); !errors.Is(err, errTimeout) {
			t.Fatalf("error %v, want a timeout", err)
		}
		m.fault = nil
		if _, err := b.create(service(t, "b", `{clusterIP: 10.96.0.20}`)); err == nil {
			t.Error("the address of a lost write was given to another service")
		}
		now := time.Now()
		b.a.reconcile(b.ctx, now)
		b.a.reconcile(b.ctx, now.Add(settleTime))
		_, err := b.create(service(t, "b", `{clusterIP: 10.96.0.20}`))
		if f == lost && err == nil {
			t.Error("the address of a stored service was given away after reading storage")
		}
		if f == refused && err != nil {
			t.Errorf("the address of a write that never happened is not given back: %v", err)
		}
	}
}

// TestRestart: a new process knows what is stored before its first write.
func TestRestart(t *testing.T) {
	m := newMemory()
	b := start(t, m, dual)
	const spec = `{clusterIP: 10.96.0.20, type: NodePort, ports: [{port: 80, nodePort: 30003}]}`
	if _, err := b.create(service(t, "a", spec)); err != nil {
		t.Fatal(err)
	}
	b = start(t, m, dual)
	if _, err := b.create(service(t, "b", spec)); err == nil {
		t.Error("after a restart the address was given out twice")
	}
	if _, err := b.update(service(t, "a", spec)); err != nil {
		t.Errorf("update after a restart: %v", err)
	}
	b.consistent()
}

func TestRangeArithmetic(t *testing.T) {
	for _, c := range []struct {
		prefix        string
		first, second string
		size          uint32
	}{
		{"10.96.0.0/16", "10.96.0.1", "10.96.1.0", 65534},
		{"10.96.0.0/30", "10.96.0.1", "10.96.1.0", 2},
		{"2001:db8:96::/112", "2001:db8:96::1", "2001:db8:96::100", 65535},
		{"2001:db8::ff00/108", "2001:db8::1", "2001:db8::100", 65535},
	} {
		r, err := newAddrRange(netip.MustParsePrefix(c.prefix))
		if err != nil {
			t.Fatal(err)
		}
		if got := fmt.Sprint(r.kubernetes(), r.at(256), r.last); got != fmt.Sprint(netip.MustParseAddr(c.first), netip.MustParseAddr(c.second), c.size) {
			t.Errorf("%s: %s", c.prefix, got)
		}
	}
}
