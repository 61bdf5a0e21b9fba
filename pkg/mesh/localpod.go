package mesh

import (
	"encoding/binary"
	"net/netip"
	"strconv"
	"strings"
)

// LocalPod is a pod attached on this node, as the firewall has to know it.
type LocalPod struct {
	// Link is the host's end of its veth pair.
	Link  string
	Addrs []netip.Addr
	// HostPorts of this node that lead to the pod.
	HostPorts []HostPort
}

// HostPort is a port of the node that leads to a port of a pod.
type HostPort struct {
	// HostIP is the node's address it is open on. The zero Addr: on all;
	// 0.0.0.0 or ::, on all of that family.
	HostIP   netip.Addr `json:"hostIP,omitzero"`
	Protocol Protocol   `json:"protocol"`
	HostPort uint16     `json:"hostPort"`
	// Port of the pod.
	Port uint16 `json:"port"`
}

// Sets of the table FirewallTable that say which pods this node has admitted.
// Both the CNI plugin and the daemon put elements into them, so what an
// element looks like is said here alone. Each name is followed by the family,
// 4 or 6.
const (
	// PodSet has link . address: who may send from a link, and to whom it leads.
	PodSet = "pod"
	// HostPortMap has address . protocol . port : address . port, the first
	// address unspecified for all of the node's.
	HostPortMap = "hostport"
	// HairpinSet has address . address of pods that may come back to
	// themselves through a host port.
	HairpinSet = "hairpin"
)

// Chains of that table whose rules hold pods to the sets: without any one of
// them a pod is not protected, whatever the sets say.
const (
	// AntispoofChain sends what comes from a pod's link to PodChain, which
	// drops what is not admitted.
	AntispoofChain = "antispoof"
	PodChain       = "pod"
	// LeavingChain drops what goes to a pod that is not admitted.
	LeavingChain = "leaving"
)

// SetElement is an element of one of those sets, as the kernel has it.
type SetElement struct {
	Set        string
	Key, Value string
}

// layouts of keys and values: link, address, protocol (t), port.
var layouts = map[string][2]string{PodSet: {"la", ""}, HostPortMap: {"atp", "ap"}, HairpinSet: {"aa", ""}}

// String is the element as nft(8) writes it.
func (e SetElement) String() string {
	set, family := e.Set[:max(0, len(e.Set)-1)], e.Set[max(0, len(e.Set)-1):]
	size := 16
	if family == "4" {
		size = 4
	}
	text := fieldTexts(layouts[set][0], e.Key, size)
	if e.Value != "" {
		text += " : " + fieldTexts(layouts[set][1], e.Value, size)
	}
	return text
}

// fieldTexts reads the fields of a layout; addresses have size bytes.
func fieldTexts(layout, b string, size int) string {
	var texts []string
	for _, field := range layout {
		n := map[rune]int{'l': linkNameLen, 'a': size, 't': 4, 'p': 4}[field]
		if len(b) < n {
			break
		}
		var text string
		switch value := []byte(b[:n]); field {
		case 'l':
			text = strconv.Quote(strings.TrimRight(b[:n], "\x00"))
		case 'a':
			a, _ := netip.AddrFromSlice(value)
			text = a.String()
		case 't':
			text = protocolName(value[0])
		case 'p':
			text = strconv.Itoa(int(binary.BigEndian.Uint16(value)))
		}
		texts, b = append(texts, text), b[n:]
	}
	return strings.Join(texts, " . ")
}

func protocolName(number byte) string {
	for p, n := range protocolNumber {
		if n == number {
			return strings.ToLower(string(p))
		}
	}
	return strconv.Itoa(int(number))
}

// protocolNumber of Internet protocols.
var protocolNumber = map[Protocol]byte{TCP: 6, UDP: 17, SCTP: 132}

// Number of the protocol in packets; 0 for none that is known.
func (p Protocol) Number() byte { return protocolNumber[p] }

// linkNameLen is IFNAMSIZ.
const linkNameLen = 16

// Elements are all that p has in the sets.
func (p LocalPod) Elements() []SetElement {
	var all []SetElement
	for _, a := range p.Addrs {
		family := "6"
		if a.Is4() {
			family = "4"
		}
		all = append(all, SetElement{Set: PodSet + family, Key: joinFields(append([]byte(p.Link), make([]byte, linkNameLen-min(len(p.Link), linkNameLen))...), a.AsSlice())})
		open := false
		for _, h := range p.HostPorts {
			on := h.HostIP
			if !on.IsValid() {
				on = unspecified(a)
			}
			if on.Is4() != a.Is4() {
				continue
			}
			open = true
			all = append(all, SetElement{
				Set:   HostPortMap + family,
				Key:   joinFields(on.AsSlice(), []byte{h.Protocol.Number()}, binary.BigEndian.AppendUint16(nil, h.HostPort)),
				Value: joinFields(a.AsSlice(), binary.BigEndian.AppendUint16(nil, h.Port)),
			})
		}
		if open {
			all = append(all, SetElement{Set: HairpinSet + family, Key: joinFields(a.AsSlice(), a.AsSlice())})
		}
	}
	return all
}

func unspecified(a netip.Addr) netip.Addr {
	if a.Is4() {
		return netip.IPv4Unspecified()
	}
	return netip.IPv6Unspecified()
}

// joinFields pads each field to the kernel's registers of four bytes.
func joinFields(fields ...[]byte) string {
	var b []byte
	for _, f := range fields {
		b = append(b, f...)
		for len(b)%4 != 0 {
			b = append(b, 0)
		}
	}
	return string(b)
}
