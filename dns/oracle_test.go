package dns_test

import (
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	discovery "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"

	"meshd.dev/pkg/mesh"
)

// objects is a cluster in the words of the Kubernetes API, from which both
// sides of the comparison learn it.
type objects struct {
	namespaces []corev1.Namespace
	services   []corev1.Service
	slices     []discovery.EndpointSlice
}

// randomObjects makes a cluster with every kind of service.
func randomObjects(r *rand.Rand) *objects {
	o := &objects{}
	for _, ns := range []string{"default", "kube-system", "shop", "void"} {
		o.namespaces = append(o.namespaces, corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: ns}})
	}
	for i := range 40 {
		o.addService(r, o.namespaces[r.IntN(3)].Name, fmt.Sprintf("s%d", i), i)
	}
	return o
}

func (o *objects) addService(r *rand.Rand, ns, name string, i int) {
	s := corev1.Service{ObjectMeta: metav1.ObjectMeta{Name: name, Namespace: ns}}
	s.Spec.Ports = randomPorts(r)
	four, six := fmt.Sprintf("10.96.0.%d", i+1), fmt.Sprintf("fd00:10:96::%x", i+1)
	switch r.IntN(8) {
	case 0:
		s.Spec.ClusterIPs = []string{four}
	case 1:
		s.Spec.ClusterIPs = []string{six}
	case 2:
		s.Spec.ClusterIPs = []string{four, six}
	case 3:
		s.Spec.Type, s.Spec.Ports = corev1.ServiceTypeExternalName, nil
		s.Spec.ExternalName = pick(r, "www.example.com", "v6.example.com", "no.example.com", "192.0.2.7",
			"s1.shop.svc.cluster.local", "s2.default.svc.cluster.local", "nope.shop.svc.cluster.local")
	default:
		s.Spec.ClusterIPs = []string{corev1.ClusterIPNone}
	}
	if len(s.Spec.ClusterIPs) > 0 {
		s.Spec.ClusterIP = s.Spec.ClusterIPs[0]
		o.addSlices(r, &s, i)
	}
	o.services = append(o.services, s)
}

func randomPorts(r *rand.Rand) []corev1.ServicePort {
	all := []corev1.ServicePort{
		{Name: "http", Protocol: corev1.ProtocolTCP, Port: 80}, {Name: "dns", Protocol: corev1.ProtocolUDP, Port: 53},
		{Name: "sip", Protocol: corev1.ProtocolSCTP, Port: 5060}, {Name: "metrics", Protocol: corev1.ProtocolTCP, Port: 9090},
	}
	switch r.IntN(5) {
	case 0:
		return nil
	case 1:
		return []corev1.ServicePort{{Protocol: corev1.ProtocolTCP, Port: 443}}
	}
	r.Shuffle(len(all), func(i, j int) { all[i], all[j] = all[j], all[i] })
	return all[:1+r.IntN(len(all))]
}

// addSlices gives s up to three slices of each family, some endpoints with a
// hostname, some not ready.
func (o *objects) addSlices(r *rand.Rand, s *corev1.Service, i int) {
	var ports []discovery.EndpointPort
	for _, p := range s.Spec.Ports {
		ports = append(ports, discovery.EndpointPort{Name: &p.Name, Protocol: &p.Protocol, Port: new(p.Port + 8000)})
	}
	for k := range r.IntN(4) {
		for _, family := range []discovery.AddressType{discovery.AddressTypeIPv4, discovery.AddressTypeIPv6} {
			if r.IntN(3) == 0 {
				continue
			}
			slice := discovery.EndpointSlice{AddressType: family, Ports: ports, ObjectMeta: metav1.ObjectMeta{
				Namespace: s.Namespace, Name: fmt.Sprintf("%s-%d-%s", s.Name, k, strings.ToLower(string(family))),
				Labels: map[string]string{discovery.LabelServiceName: s.Name}}}
			for e := range r.IntN(6) {
				slice.Endpoints = append(slice.Endpoints, randomEndpoint(r, family, i, k, e))
			}
			o.slices = append(o.slices, slice)
		}
	}
}

func randomEndpoint(r *rand.Rand, family discovery.AddressType, i, k, e int) discovery.Endpoint {
	ep := discovery.Endpoint{Addresses: []string{fmt.Sprintf("10.244.%d.%d", i, k*16+e+1)}}
	if family == discovery.AddressTypeIPv6 {
		ep.Addresses[0] = fmt.Sprintf("fd00:10:244:%x::%x", i+1, k*16+e)
		if k*16+e == 0 {
			ep.Addresses[0] = fmt.Sprintf("fd00:10:244:%x::", i+1)
		}
	}
	switch r.IntN(4) {
	case 0:
		ep.Conditions.Ready = new(false)
	case 1:
		ep.Conditions.Ready = new(true)
	}
	if r.IntN(2) == 0 {
		ep.Hostname = new(fmt.Sprintf("pod-%d", k*16+e))
	}
	return ep
}

func pick[T any](r *rand.Rand, of ...T) T { return of[r.IntN(len(of))] }

// state is the same cluster as the daemon would see it.
func (o *objects) state() *mesh.State {
	s := &mesh.State{}
	for _, ns := range o.namespaces {
		s.Namespaces = append(s.Namespaces, ns.Name)
	}
	for _, svc := range o.services {
		m := &mesh.Service{Namespace: svc.Namespace, Name: svc.Name, ExternalName: svc.Spec.ExternalName,
			Headless: svc.Spec.ClusterIP == corev1.ClusterIPNone}
		for _, ip := range svc.Spec.ClusterIPs {
			if a, err := netip.ParseAddr(ip); err == nil {
				m.ClusterIPs = append(m.ClusterIPs, a)
			}
		}
		for _, p := range svc.Spec.Ports {
			m.Ports = append(m.Ports, mesh.ServicePort{Name: p.Name, Protocol: mesh.Protocol(p.Protocol), Port: uint16(p.Port)})
		}
		for _, slice := range o.slices {
			if slice.Namespace == svc.Namespace && slice.Labels[discovery.LabelServiceName] == svc.Name {
				m.Endpoints = append(m.Endpoints, endpointsOf(slice)...)
			}
		}
		s.Services = append(s.Services, m)
	}
	slices.SortFunc(s.Services, func(a, b *mesh.Service) int {
		return strings.Compare(a.Namespace+"/"+a.Name, b.Namespace+"/"+b.Name)
	})
	return s
}

func endpointsOf(slice discovery.EndpointSlice) []mesh.Endpoint {
	var ports []mesh.EndpointPort
	for _, p := range slice.Ports {
		ports = append(ports, mesh.EndpointPort{Name: *p.Name, Protocol: mesh.Protocol(*p.Protocol), Port: uint16(*p.Port)})
	}
	var list []mesh.Endpoint
	for _, e := range slice.Endpoints {
		m := mesh.Endpoint{Addr: netip.MustParseAddr(e.Addresses[0]), Ready: e.Conditions.Ready == nil || *e.Conditions.Ready, Ports: ports}
		if e.Hostname != nil {
			m.Hostname = *e.Hostname
		}
		list = append(list, m)
	}
	return list
}

// serveAPI is as much of a Kubernetes API server as the kubernetes plugin
// needs: lists, and watches that begin with all there is and never say more.
func (o *objects) serveAPI() *httptest.Server {
	mux := http.NewServeMux()
	listed(mux, "/api/v1/namespaces", "v1", "Namespace", o.namespaces)
	listed(mux, "/api/v1/services", "v1", "Service", o.services)
	listed(mux, "/apis/discovery.k8s.io/v1/endpointslices", "discovery.k8s.io/v1", "EndpointSlice", o.slices)
	return httptest.NewServer(mux)
}

func listed[T any](mux *http.ServeMux, path, version, kind string, items []T) {
	mux.HandleFunc(path, func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		out := json.NewEncoder(w)
		if r.URL.Query().Get("watch") == "" {
			_ = out.Encode(map[string]any{"apiVersion": version, "kind": kind + "List",
				"metadata": map[string]any{"resourceVersion": "7"}, "items": items})
			return
		}
		if r.URL.Query().Get("sendInitialEvents") == "true" {
			for i := range items {
				_ = out.Encode(map[string]any{"type": "ADDED", "object": typed(&items[i], version, kind)})
			}
			_ = out.Encode(map[string]any{"type": "BOOKMARK", "object": map[string]any{"apiVersion": version, "kind": kind,
				"metadata": map[string]any{"resourceVersion": "7", "annotations": map[string]string{metav1.InitialEventsAnnotationKey: "true"}}}})
		}
		w.(http.Flusher).Flush()
		<-r.Context().Done()
	})
}

func typed(v any, version, kind string) map[string]any {
	m, err := runtime.DefaultUnstructuredConverter.ToUnstructured(v)
	if err != nil {
		panic(err)
	}
	m["apiVersion"], m["kind"] = version, kind
	m["metadata"].(map[string]any)["resourceVersion"] = "7"
	return m
}
