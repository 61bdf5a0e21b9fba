package kube

import (
	"cmp"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"

	"meshd.dev/pkg/mesh"
)

// maxEndpoints bounds what a node may say of itself.
const maxEndpoints = 16

// NodeOf reads a Node object. What cannot be read is left out and named in
// the error; the rest is still good.
func NodeOf(n *corev1.Node) (mesh.Node, error) {
	var errs []error
	node := mesh.Node{Name: n.Name, UID: string(n.UID)}
	for _, c := range n.Status.Conditions {
		node.Ready = node.Ready || c.Type == corev1.NodeReady && c.Status == corev1.ConditionTrue
	}
	for _, a := range n.Status.Addresses {
		if a.Type != corev1.NodeInternalIP {
			continue
		}
		addr, err := netip.ParseAddr(a.Address)
		if err == nil && !usable(addr) { // others will dial it
			err = errors.New("want a unicast address by which others reach it")
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("node %s: status address %.80q: %w", n.Name, a.Address, err))
			continue
		}
		node.Addresses = append(node.Addresses, addr.Unmap())
	}
	for _, c := range n.Spec.PodCIDRs {
		p, err := netip.ParsePrefix(c)
		if err != nil {
			errs = append(errs, fmt.Errorf("node %s: pod CIDR %.80q: %w", n.Name, c, err))
			continue
		}
		node.PodCIDRs = append(node.PodCIDRs, p.Masked())
	}
	read := func(name string, parse func(string) error) {
		if text := n.Annotations[name]; text != "" {
			if err := parse(text); err != nil {
				errs = append(errs, fmt.Errorf("node %s: annotation %s: %w", n.Name, name, err))
			}
		}
	}
	read(mesh.AnnotationPublicKey, func(text string) (err error) { node.PublicKey, err = mesh.ParseKey(text); return err })
	read(mesh.AnnotationNextKey, func(text string) (err error) { node.NextKey, node.NextPort, err = parseNextKey(text); return err })
	read(mesh.AnnotationRotateKey, func(text string) (err error) { node.LeaveKey, err = mesh.ParseKey(text); return err })
	read(mesh.AnnotationKeyExchange, func(text string) (err error) { node.Exchange, err = parseExchange(text); return err })
	endpoints, err := parseEndpoints(n.Annotations[mesh.AnnotationEndpoints])
	if err != nil {
		errs = append(errs, fmt.Errorf("node %s: annotation %s: %w", n.Name, mesh.AnnotationEndpoints, err))
	}
	node.Endpoints = endpoints
	return node, errors.Join(errs...)
}

// parseNextKey reads "KEY PORT".
func parseNextKey(text string) (mesh.Key, uint16, error) {
	word, rest, _ := strings.Cut(text, " ")
	port, err := strconv.ParseUint(rest, 10, 16)
	if err != nil || port == 0 {
		return mesh.Key{}, 0, fmt.Errorf("%.80q: want a public key, a space and a port", text)
	}
	key, err := mesh.ParseKey(word)
	if err == nil && key.IsZero() {
		err = errors.New("the key is zero")
	}
	if err != nil {
		return mesh.Key{}, 0, err
	}
	return key, uint16(port), nil
}

// FormatNextKey is what parseNextKey reads.
func FormatNextKey(key mesh.Key, port uint16) string { return fmt.Sprintf("%s %d", key, port) }

// parseExchange reads "PORT PIN".
func parseExchange(text string) (mesh.Exchange, error) {
	word, rest, _ := strings.Cut(text, " ")
	port, err := strconv.ParseUint(word, 10, 16)
	if err != nil || port == 0 {
		return mesh.Exchange{}, fmt.Errorf("%.80q: want a port, a space and a pin", text)
	}
	x := mesh.Exchange{Port: uint16(port)}
	if err := x.Pin.UnmarshalText([]byte(rest)); err != nil {
		return mesh.Exchange{}, err
	}
	return x, nil
}

// FormatExchange is what parseExchange reads.
func FormatExchange(x mesh.Exchange) string { return fmt.Sprintf("%d %s", x.Port, x.Pin) }

// parseEndpoints reads comma-separated host:port with literal addresses.
func parseEndpoints(text string) ([]netip.AddrPort, error) {
	if text == "" {
		return nil, nil
	}
	parts := strings.SplitN(text, ",", maxEndpoints+1)
	if len(parts) > maxEndpoints {
		return nil, fmt.Errorf("more than %d endpoints", maxEndpoints)
	}
	var endpoints []netip.AddrPort
	for _, part := range parts {
		ep, err := netip.ParseAddrPort(strings.TrimSpace(part))
		if err != nil || !usable(ep.Addr()) || ep.Port() == 0 {
			return nil, fmt.Errorf("endpoint %.80q: want address:port of a unicast address", part)
		}
		endpoints = append(endpoints, netip.AddrPortFrom(ep.Addr().Unmap(), ep.Port()))
	}
	return endpoints, nil
}

func usable(a netip.Addr) bool {
	a = a.Unmap()
	return a.IsValid() && !a.IsUnspecified() && !a.IsLoopback() && !a.IsMulticast() && !a.IsLinkLocalUnicast()
}

// FormatEndpoints is what parseEndpoints reads.
func FormatEndpoints(endpoints []netip.AddrPort) string {
	texts := make([]string, len(endpoints))
	for i, ep := range endpoints {
		texts[i] = ep.String()
	}
	return strings.Join(texts, ",")
}

// ServiceOf reads a Service and its EndpointSlices. What cannot be read is
// left out and named in the error.
func ServiceOf(s *corev1.Service, slicesOf []*discoveryv1.EndpointSlice) (*mesh.Service, error) {
	var errs []error
	svc := &mesh.Service{
		Namespace: s.Namespace,
		Name:      s.Name,
		Headless:  s.Spec.ClusterIP == corev1.ClusterIPNone,
		LocalOnly: s.Spec.InternalTrafficPolicy != nil && *s.Spec.InternalTrafficPolicy == corev1.ServiceInternalTrafficPolicyLocal,
	}
	if s.Spec.Type == corev1.ServiceTypeExternalName {
		svc.ExternalName = s.Spec.ExternalName
	}
	for _, text := range clusterIPs(s) {
		addr, err := netip.ParseAddr(text)
		if err != nil {
			errs = append(errs, fmt.Errorf("service %s/%s: cluster IP %.80q: %w", s.Namespace, s.Name, text, err))
			continue
		}
		svc.ClusterIPs = append(svc.ClusterIPs, addr.Unmap())
	}
	for _, p := range s.Spec.Ports {
		svc.Ports = append(svc.Ports, mesh.ServicePort{Name: p.Name, Protocol: protocol(p.Protocol), Port: uint16(p.Port), NodePort: uint16(p.NodePort)})
	}
	if s.Spec.SessionAffinity == corev1.ServiceAffinityClientIP {
		svc.AffinityTimeout = corev1.DefaultClientIPServiceAffinitySeconds
		if c := s.Spec.SessionAffinityConfig; c != nil && c.ClientIP != nil && c.ClientIP.TimeoutSeconds != nil {
			svc.AffinityTimeout = *c.ClientIP.TimeoutSeconds
		}
	}
	for _, slice := range slicesOf {
		endpoints, err := endpointsOf(slice)
		svc.Endpoints = append(svc.Endpoints, endpoints...)
		errs = append(errs, err)
	}
	slices.SortFunc(svc.Endpoints, func(a, b mesh.Endpoint) int { return cmp.Or(a.Addr.Compare(b.Addr), cmp.Compare(a.Pod, b.Pod)) })
	return svc, errors.Join(errs...)
}

func clusterIPs(s *corev1.Service) []string {
	switch {
	case s.Spec.ClusterIP == "" || s.Spec.ClusterIP == corev1.ClusterIPNone || s.Spec.Type == corev1.ServiceTypeExternalName:
		return nil
	case len(s.Spec.ClusterIPs) == 0:
		return []string{s.Spec.ClusterIP}
	}
	return s.Spec.ClusterIPs
}

func endpointsOf(slice *discoveryv1.EndpointSlice) ([]mesh.Endpoint, error) {
	if slice.AddressType == discoveryv1.AddressTypeFQDN {
		return nil, nil
	}
	var (
		endpoints []mesh.Endpoint
		errs      []error
	)
	ports := make([]mesh.EndpointPort, 0, len(slice.Ports))
	for _, p := range slice.Ports {
		if p.Port != nil { // a nil port means every port, which no service of ours asks for
			ports = append(ports, mesh.EndpointPort{Name: deref(p.Name, ""), Protocol: protocol(deref(p.Protocol, corev1.ProtocolTCP)), Port: uint16(*p.Port)})
		}
	}
	for _, e := range slice.Endpoints {
		if len(e.Addresses) == 0 {
			continue
		}
		addr, err := netip.ParseAddr(e.Addresses[0]) // the others are unspecified by the API
		if err != nil {
			errs = append(errs, fmt.Errorf("endpointslice %s/%s: address %.80q: %w", slice.Namespace, slice.Name, e.Addresses[0], err))
			continue
		}
		ep := mesh.Endpoint{
			Addr:        addr.Unmap(),
			Hostname:    deref(e.Hostname, ""),
			Node:        deref(e.NodeName, ""),
			Ready:       deref(e.Conditions.Ready, true),
			Terminating: deref(e.Conditions.Terminating, false),
			Ports:       ports,
		}
		ep.Serving = deref(e.Conditions.Serving, ep.Ready)
		if e.TargetRef != nil && e.TargetRef.Kind == "Pod" {
			ep.Pod = e.TargetRef.Name
		}
		endpoints = append(endpoints, ep)
	}
	return endpoints, errors.Join(errs...)
}

func protocol(p corev1.Protocol) mesh.Protocol {
	return mesh.Protocol(cmp.Or(string(p), string(corev1.ProtocolTCP)))
}

func deref[T any](p *T, otherwise T) T {
	if p == nil {
		return otherwise
	}
	return *p
}
