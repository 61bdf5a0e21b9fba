package serviceip

import (
	"net/netip"
	"slices"

	corev1 "k8s.io/api/core/v1"
)

// holdings are the addresses and node ports a service has, each once.
func holdings(svc *corev1.Service) []item {
	var items []item
	add := func(it item) {
		if !slices.Contains(items, it) {
			items = append(items, it)
		}
	}
	if needsClusterIP(svc) && svc.Spec.ClusterIP != corev1.ClusterIPNone {
		for _, s := range clusterIPs(svc) {
			if a, err := netip.ParseAddr(s); err == nil {
				add(item{addr: a.Unmap()})
			}
		}
	}
	if needsNodePort(svc) {
		for _, p := range svc.Spec.Ports {
			if p.NodePort > 0 {
				add(item{port: uint16(p.NodePort)})
			}
		}
		if p := svc.Spec.HealthCheckNodePort; p > 0 {
			add(item{port: uint16(p)})
		}
	}
	return items
}

// without returns the items of a that are not in b.
func without(a, b []item) []item {
	var d []item
	for _, it := range a {
		if !slices.Contains(b, it) {
			d = append(d, it)
		}
	}
	return d
}

func clusterIPs(svc *corev1.Service) []string {
	if len(svc.Spec.ClusterIPs) > 0 {
		return svc.Spec.ClusterIPs
	}
	if svc.Spec.ClusterIP != "" {
		return []string{svc.Spec.ClusterIP}
	}
	return nil
}

func needsClusterIP(svc *corev1.Service) bool {
	return svc.Spec.Type != corev1.ServiceTypeExternalName
}

func needsNodePort(svc *corev1.Service) bool {
	return svc.Spec.Type == corev1.ServiceTypeNodePort || svc.Spec.Type == corev1.ServiceTypeLoadBalancer
}

func needsHealthCheckPort(svc *corev1.Service) bool {
	return svc.Spec.Type == corev1.ServiceTypeLoadBalancer &&
		svc.Spec.ExternalTrafficPolicy == corev1.ServiceExternalTrafficPolicyLocal
}

// allocatesNodePorts reports whether ports without a node port get one.
func allocatesNodePorts(svc *corev1.Service) bool {
	switch svc.Spec.Type {
	case corev1.ServiceTypeNodePort:
		return true
	case corev1.ServiceTypeLoadBalancer:
		a := svc.Spec.AllocateLoadBalancerNodePorts
		return a == nil || *a
	}
	return false
}

func isHeadless(svc *corev1.Service) bool { return svc.Spec.ClusterIP == corev1.ClusterIPNone }

// portKey identifies a port of a service across an update.
type portKey struct {
	protocol corev1.Protocol
	port     int32
}

func keyOf(p corev1.ServicePort) portKey {
	if p.Protocol == "" {
		p.Protocol = corev1.ProtocolTCP
	}
	return portKey{p.Protocol, p.Port}
}

// carryOver fills into an update what a client left out because it did not
// choose it: a client that sends the same manifest again keeps its addresses.
func carryOver(svc, old *corev1.Service) {
	if needsClusterIP(old) && needsClusterIP(svc) {
		if svc.Spec.ClusterIP == "" && len(svc.Spec.ClusterIPs) == 0 {
			svc.Spec.ClusterIP = old.Spec.ClusterIP
			svc.Spec.ClusterIPs = slices.Clone(old.Spec.ClusterIPs)
		} else if svc.Spec.ClusterIP == "" && len(old.Spec.ClusterIPs) > 0 && slices.Equal(svc.Spec.ClusterIPs, old.Spec.ClusterIPs) {
			svc.Spec.ClusterIP = old.Spec.ClusterIP
		}
	}
	if needsNodePort(old) && needsNodePort(svc) {
		carryNodePorts(svc, old)
	}
	if needsHealthCheckPort(old) && needsHealthCheckPort(svc) && svc.Spec.HealthCheckNodePort == 0 {
		svc.Spec.HealthCheckNodePort = old.Spec.HealthCheckNodePort
	}
}

func carryNodePorts(svc, old *corev1.Service) {
	had := map[portKey]int32{}
	for _, p := range old.Spec.Ports {
		had[keyOf(p)] = p.NodePort
	}
	// A port that names a node port of its own may name one the old service
	// had elsewhere; that one cannot be carried over as well.
	named := map[int32]corev1.Protocol{}
	for _, p := range svc.Spec.Ports {
		if p.NodePort != 0 {
			named[p.NodePort] = keyOf(p).protocol
		}
	}
	for i := range svc.Spec.Ports {
		p := &svc.Spec.Ports[i]
		if p.NodePort != 0 {
			continue
		}
		np := had[keyOf(*p)]
		if proto, taken := named[np]; np != 0 && (!taken || proto != keyOf(*p).protocol) {
			p.NodePort = np
		}
	}
}

// dropUnneeded clears what belongs to the old type of a service and was sent
// back unchanged: changing spec.type alone is a legal update.
func dropUnneeded(svc, old *corev1.Service) {
	if needsClusterIP(old) && !needsClusterIP(svc) {
		if slices.Equal(clusterIPs(svc), clusterIPs(old)) {
			svc.Spec.ClusterIP, svc.Spec.ClusterIPs = "", nil
		}
		if slices.Equal(svc.Spec.IPFamilies, old.Spec.IPFamilies) {
			svc.Spec.IPFamilies = nil
		}
		if equalPtr(svc.Spec.IPFamilyPolicy, old.Spec.IPFamilyPolicy) {
			svc.Spec.IPFamilyPolicy = nil
		}
	}
	if needsNodePort(old) && !needsNodePort(svc) {
		had := map[portKey]int32{}
		for _, p := range old.Spec.Ports {
			had[keyOf(p)] = p.NodePort
		}
		for i := range svc.Spec.Ports {
			if p := &svc.Spec.Ports[i]; p.NodePort != 0 && p.NodePort == had[keyOf(*p)] {
				p.NodePort = 0
			}
		}
		if svc.Spec.ExternalTrafficPolicy == old.Spec.ExternalTrafficPolicy && len(svc.Spec.ExternalIPs) == 0 {
			svc.Spec.ExternalTrafficPolicy = ""
		}
	}
	if needsHealthCheckPort(old) && !needsHealthCheckPort(svc) && svc.Spec.HealthCheckNodePort == old.Spec.HealthCheckNodePort {
		svc.Spec.HealthCheckNodePort = 0
	}
	if old.Spec.Type == corev1.ServiceTypeLoadBalancer && svc.Spec.Type != corev1.ServiceTypeLoadBalancer {
		if equalPtr(svc.Spec.AllocateLoadBalancerNodePorts, old.Spec.AllocateLoadBalancerNodePorts) {
			svc.Spec.AllocateLoadBalancerNodePorts = nil
		}
		if equalPtr(svc.Spec.LoadBalancerClass, old.Spec.LoadBalancerClass) {
			svc.Spec.LoadBalancerClass = nil
		}
	}
}

// pairClusterIPs makes spec.clusterIP and spec.clusterIPs say the same when a
// client set or cleared only one of them.
func pairClusterIPs(svc, old *corev1.Service) {
	spec := &svc.Spec
	if old == nil {
		if spec.ClusterIP != "" && len(spec.ClusterIPs) == 0 {
			spec.ClusterIPs = []string{spec.ClusterIP}
		} else if spec.ClusterIP == "" && len(spec.ClusterIPs) > 0 {
			spec.ClusterIP = spec.ClusterIPs[0]
		}
		return
	}
	sameList := slices.Equal(spec.ClusterIPs, old.Spec.ClusterIPs)
	switch {
	case spec.ClusterIP == "" && old.Spec.ClusterIP != "" && sameList:
		spec.ClusterIPs = nil
	case spec.ClusterIP != "" && len(spec.ClusterIPs) == 0:
		spec.ClusterIPs = []string{spec.ClusterIP}
	case spec.ClusterIP != old.Spec.ClusterIP && spec.ClusterIP != "" && sameList:
		spec.ClusterIPs = []string{spec.ClusterIP}
	case spec.ClusterIP == "" && len(spec.ClusterIPs) > 0:
		spec.ClusterIP = spec.ClusterIPs[0]
	}
}

func equalPtr[T comparable](a, b *T) bool {
	if a == nil || b == nil {
		return a == b
	}
	return *a == *b
}

func familyOf(a netip.Addr) corev1.IPFamily {
	if a.Is4() {
		return corev1.IPv4Protocol
	}
	return corev1.IPv6Protocol
}

func otherFamily(f corev1.IPFamily) corev1.IPFamily {
	if f == corev1.IPv4Protocol {
		return corev1.IPv6Protocol
	}
	return corev1.IPv4Protocol
}
