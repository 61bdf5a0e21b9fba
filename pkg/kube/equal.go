package kube

import (
	"slices"

	"meshd.dev/pkg/mesh"
)

func same(a, b *mesh.State) bool {
	return a != nil && slices.Equal(a.Services, b.Services) && slices.Equal(a.Namespaces, b.Namespaces) &&
		slices.Equal(a.ServiceCIDRs, b.ServiceCIDRs) &&
		slices.EqualFunc(a.Nodes, b.Nodes, mesh.Node.Equal)
}

func equalService(a, b *mesh.Service) bool {
	return a.Namespace == b.Namespace && a.Name == b.Name && a.Headless == b.Headless && a.ExternalName == b.ExternalName &&
		a.AffinityTimeout == b.AffinityTimeout && a.LocalOnly == b.LocalOnly &&
		slices.Equal(a.ClusterIPs, b.ClusterIPs) && slices.Equal(a.Ports, b.Ports) &&
		slices.EqualFunc(a.Endpoints, b.Endpoints, equalEndpoint)
}

func equalEndpoint(a, b mesh.Endpoint) bool {
	return a.Addr == b.Addr && a.Hostname == b.Hostname && a.Node == b.Node && a.Pod == b.Pod &&
		a.Ready == b.Ready && a.Serving == b.Serving && a.Terminating == b.Terminating && slices.Equal(a.Ports, b.Ports)
}
