// Package mesh holds the nouns everything else talks about: nodes, peers'
// keys, pod CIDRs, services, endpoints, and the State they make up together.
//
// Values only: nothing here reads a file, a kernel or an API. A State and all
// that hangs on it is immutable once published; whoever wants another one
// builds another one.
package mesh

// Names and numbers that are ours on every node. Whatever carries one of them
// belongs to meshd; everything else belongs to somebody else.
const (
	// Device is the WireGuard device of a node.
	Device = "mesh0"
	// SecondSuffix ends the name of the device beside it, which is there only
	// while a node of the cluster changes its key.
	SecondSuffix = "-next"
	// ListenPort is the UDP port of Device unless configured otherwise; the
	// second device has the one behind it. Nodes talk about keys on the TCP
	// port of the same number.
	ListenPort = 51820
	// PodLinkPrefix starts the name of every host side veth of a pod.
	PodLinkPrefix = "msh"
	// FirewallTable is the nft table (family inet) owned whole by meshd.
	FirewallTable = "meshd"
	// RouteProtocol marks the routes the datapath owns (rtnetlink rtm_protocol).
	RouteProtocol = 77
	// PodRouteProtocol marks the host routes to local pods, owned by the CNI plugin.
	PodRouteProtocol = 78
	// TunnelOverhead is what WireGuard over IPv6 adds to a packet, in bytes;
	// over IPv4 it is 60, and the difference is not worth a second MTU.
	TunnelOverhead = 80
	// MinMTU is the smallest MTU IPv6 allows (RFC 8200 section 5).
	MinMTU = 1280
)

// Annotations a node publishes about itself on its Node object.
const (
	// AnnotationPublicKey holds the WireGuard public key, base64.
	AnnotationPublicKey = "meshd.dev/public-key"
	// AnnotationEndpoints holds the underlay endpoints of the tunnel:
	// comma-separated host:port, preferred first.
	AnnotationEndpoints = "meshd.dev/endpoints"
	// AnnotationNextKey is there while the node changes its key: the key it
	// changes to and the UDP port it is reached at, "KEY PORT". The same key as
	// AnnotationPublicKey: it changed, and returns to its first device.
	AnnotationNextKey = "meshd.dev/next-key"
	// AnnotationRotateKey has the node change its key if that is this one. An
	// administrator writes it.
	AnnotationRotateKey = "meshd.dev/rotate-key"
	// AnnotationKeyExchange says how peers talk with the node about keys: a
	// TCP port and the SHA-256 of its TLS public key in hex, "PORT PIN".
	AnnotationKeyExchange = "meshd.dev/key-exchange"
)

// Annotations of a pod that the CNI plugin heeds.
const (
	// AnnotationIPs asks for addresses, at most one a family, separated by a
	// comma, out of the ranges of the node the pod runs on.
	AnnotationIPs = "meshd.dev/ips"
	// AnnotationMAC asks for an Ethernet address.
	AnnotationMAC = "meshd.dev/mac"
)
