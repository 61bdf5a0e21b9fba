package mesh

import (
	"encoding/base64"
	"encoding/hex"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"
)

// Key is a WireGuard public key (Curve25519, 32 bytes). The zero Key means
// "not published yet".
type Key [32]byte

// ParseKey reads the base64 form wg(8) prints.
func ParseKey(s string) (Key, error) {
	var k Key
	b, err := base64.StdEncoding.DecodeString(s)
	if err != nil {
		return k, fmt.Errorf("public key %q: want 32 bytes in base64: %w", s, err)
	}
	if len(b) != len(k) {
		return k, fmt.Errorf("public key %q: want 32 bytes, have %d", s, len(b))
	}
	copy(k[:], b)
	return k, nil
}

// String is the base64 form; the zero Key is "(none)", as wg(8) has it.
func (k Key) String() string {
	if k.IsZero() {
		return "(none)"
	}
	return base64.StdEncoding.EncodeToString(k[:])
}

// IsZero reports whether no key was published.
func (k Key) IsZero() bool { return k == Key{} }

// MarshalText and UnmarshalText let a Key be a JSON string.
func (k Key) MarshalText() ([]byte, error) {
	if k.IsZero() {
		return nil, nil
	}
	return []byte(k.String()), nil
}

func (k *Key) UnmarshalText(b []byte) error {
	if len(b) == 0 {
		*k = Key{}
		return nil
	}
	p, err := ParseKey(string(b))
	*k = p
	return err
}

// Node is one machine of the cluster as the others see it.
type Node struct {
	Name string
	UID  string
	// Addresses by which other machines reach it on the underlay (Node
	// status addresses of type InternalIP).
	Addresses []netip.Addr
	// PodCIDRs are the prefixes its pods take their addresses from, given by
	// the cluster, never by the node itself. Masked; at most one a family.
	PodCIDRs []netip.Prefix
	// PublicKey is zero until the node published it.
	PublicKey Key
	// NextKey is zero unless the node changes its key; it is reached with it
	// at NextPort of the same addresses.
	NextKey  Key
	NextPort uint16
	// LeaveKey is a key the node shall change, if it still has it.
	LeaveKey Key
	// Exchange is how to talk with it about keys; zero: not at all.
	Exchange Exchange
	// Endpoints of its tunnel on the underlay, preferred first.
	Endpoints []netip.AddrPort
	// Ready is the Node's Ready condition.
	Ready bool
}

// Equal reports whether two nodes are the same in everything.
func (n Node) Equal(o Node) bool {
	return n.Name == o.Name && n.UID == o.UID && n.PublicKey == o.PublicKey && n.NextKey == o.NextKey && n.NextPort == o.NextPort &&
		n.LeaveKey == o.LeaveKey && n.Exchange == o.Exchange && n.Ready == o.Ready &&
		slices.Equal(n.Addresses, o.Addresses) && slices.Equal(n.PodCIDRs, o.PodCIDRs) && slices.Equal(n.Endpoints, o.Endpoints)
}

// Exchange is where a node is asked about keys, and how it is known there.
type Exchange struct {
	Port uint16
	// Pin is the SHA-256 of its TLS public key.
	Pin Pin
}

// Pin is a hash by which a public key is known, 64 hex digits.
type Pin [32]byte

func (p Pin) String() string { return hex.EncodeToString(p[:]) }

// MarshalText and UnmarshalText let a Pin be a JSON string.
func (p Pin) MarshalText() ([]byte, error) { return []byte(p.String()), nil }

func (p *Pin) UnmarshalText(b []byte) error {
	if len(b) != 2*len(p) {
		return fmt.Errorf("pin: want %d hex digits, have %d characters", 2*len(p), len(b))
	}
	if _, err := hex.Decode(p[:], b); err != nil {
		return fmt.Errorf("pin: want hex digits: %w", err)
	}
	return nil
}

// MeshAddrs are the node's own addresses inside the mesh: the first address
// after the network address of each of its pod CIDRs. They sit on Device, the
// node's resolver listens on them, and they are the source of what the node
// itself sends to pods of other nodes.
func (n Node) MeshAddrs() []netip.Addr {
	addrs := make([]netip.Addr, 0, len(n.PodCIDRs))
	for _, p := range n.PodCIDRs {
		addrs = append(addrs, MeshAddr(p))
	}
	return addrs
}

// MeshAddr is the address of the node that owns podCIDR.
func MeshAddr(podCIDR netip.Prefix) netip.Addr { return podCIDR.Masked().Addr().Next() }

// Protocol of a service port, spelled as Kubernetes spells it.
type Protocol string

const (
	TCP  Protocol = "TCP"
	UDP  Protocol = "UDP"
	SCTP Protocol = "SCTP"
)

// Service is a Kubernetes Service together with the endpoints behind it.
type Service struct {
	Namespace, Name string
	// ClusterIPs is empty for headless services and for ExternalName.
	ClusterIPs []netip.Addr
	Headless   bool
	// ExternalName is a DNS name, for services of that type only.
	ExternalName string
	Ports        []ServicePort
	// Endpoints in a stable order, of every EndpointSlice of the service.
	Endpoints []Endpoint
	// AffinityTimeout of sessionAffinity ClientIP in seconds; 0 without it.
	AffinityTimeout int32
	// LocalOnly is internalTrafficPolicy Local.
	LocalOnly bool
}

// ServicePort is one port of a Service.
type ServicePort struct {
	Name     string
	Protocol Protocol
	Port     uint16
	NodePort uint16
}

// Endpoint is one address behind a service.
type Endpoint struct {
	Addr     netip.Addr
	Hostname string
	Node     string
	Pod      string
	// Ready endpoints take traffic. Serving without Ready is a terminating
	// one that still answers.
	Ready, Serving, Terminating bool
	// Ports by the name of the service's port; the number is the pod's.
	Ports []EndpointPort
}

// EndpointPort is the pod side of a ServicePort of the same Name.
type EndpointPort struct {
	Name     string
	Protocol Protocol
	Port     uint16
}

// State is all the cluster state a node's datapath and resolver need.
// Immutable. A *Service whose content did not change keeps its pointer from
// one State to the next, so that consumers find changes by comparing pointers.
type State struct {
	// Nodes sorted by name.
	Nodes []Node
	// Services sorted by namespace, then name.
	Services []*Service
	// Namespaces sorted.
	Namespaces []string
	// ServiceCIDRs are the ranges the cluster gives service addresses from,
	// sorted; empty where nobody asks the cluster for them.
	ServiceCIDRs []netip.Prefix
	// Heard is when the first event came of what is new since the State
	// before; zero where none did.
	Heard time.Time `json:"-"`
}

// Node finds a node by name.
func (s *State) Node(name string) (Node, bool) {
	i, ok := slices.BinarySearchFunc(s.Nodes, name, func(n Node, name string) int { return strings.Compare(n.Name, name) })
	if !ok {
		return Node{}, false
	}
	return s.Nodes[i], true
}
