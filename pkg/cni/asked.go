package cni

import (
	"cmp"
	"encoding/json"
	"fmt"
	"math"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"github.com/containernetworking/cni/pkg/types"

	"meshd.dev/pkg/cni/rtnl"
	"meshd.dev/pkg/mesh"
)

// asked is what a runtime can ask for one attachment: the capabilities of
// CNI's CONVENTIONS.md, and the annotations of its pod.
type asked struct {
	IPs          []string
	MAC          string
	PortMappings []portMapping
	Bandwidth    bandwidth
	IPRanges     [][]json.RawMessage
	DNS          askedDNS
	Annotations  map[string]string

	unknown []string
}

// capabilityAnnotations is containerd's and CRI-O's.
const capabilityAnnotations = "io.kubernetes.cri.pod-annotations"

type portMapping struct {
	HostPort      int    `json:"hostPort"`
	ContainerPort int    `json:"containerPort"`
	Protocol      string `json:"protocol"`
	HostIP        string `json:"hostIP"`
}

// bandwidth in bits a second, and bits.
type bandwidth struct {
	IngressRate  uint64 `json:"ingressRate"`
	IngressBurst uint64 `json:"ingressBurst"`
	EgressRate   uint64 `json:"egressRate"`
	EgressBurst  uint64 `json:"egressBurst"`
}

type askedDNS struct {
	Servers  []string `json:"servers"`
	Searches []string `json:"searches"`
	Options  []string `json:"options"`
}

// field finds what a capability's value goes into.
func (a *asked) field(capability string) (value any, ok bool) {
	switch capability {
	case "ips":
		return &a.IPs, true
	case "mac":
		return &a.MAC, true
	case "portMappings":
		return &a.PortMappings, true
	case "bandwidth":
		return &a.Bandwidth, true
	case "ipRanges":
		return &a.IPRanges, true
	case "dns":
		return &a.DNS, true
	case capabilityAnnotations:
		return &a.Annotations, true
	}
	return nil, false
}

func (a *asked) UnmarshalJSON(b []byte) error {
	var values map[string]json.RawMessage
	if err := json.Unmarshal(b, &values); err != nil {
		return err
	}
	for capability, text := range values {
		value, ok := a.field(capability)
		if !ok {
			a.unknown = append(a.unknown, capability)
		} else if err := json.Unmarshal(text, value); err != nil {
			return fmt.Errorf("%s: %w", capability, err)
		}
	}
	slices.Sort(a.unknown)
	return nil
}

// wishes are what was asked for, read and checked.
type wishes struct {
	ips   []netip.Addr
	noted bool // ips are from an annotation of the pod
	mac   rtnl.MAC
	ports []mesh.HostPort
	// toPod and fromPod limit the rate in the two directions, seen from the pod.
	toPod, fromPod limit
	dns            types.DNS
}

// wishes reads what was asked for, by whichever of the ways a runtime has; the
// more specific one wins.
func (c *conf) wishes(a args) (w wishes, err error) {
	r := c.runtime
	if len(r.unknown) > 0 {
		return w, invalid("runtimeConfig", fmt.Sprintf("%.80q is nothing this plugin can do: take it out of its capabilities", r.unknown[0]))
	}
	noted := asked{MAC: r.Annotations[mesh.AnnotationMAC]}
	if s := r.Annotations[mesh.AnnotationIPs]; s != "" {
		noted.IPs = strings.Split(s, ",")
	}
	texts, mac := a.ips, a.mac
	for _, s := range []asked{c.cniArgs, noted, r} {
		if len(s.IPs) > 0 {
			texts = s.IPs
		}
		if s.MAC != "" {
			mac = s.MAC
		}
	}
	w.noted = len(noted.IPs) > 0 && len(r.IPs) == 0
	if w.ips, err = parseIPs(texts); err != nil {
		return w, err
	}
	if mac != "" {
		if w.mac, err = parseMAC(mac); err != nil {
			return w, invalid("mac", err.Error())
		}
	}
	if w.ports, err = c.hostPorts(); err != nil {
		return w, err
	}
	if w.toPod, err = c.newLimit("ingress", r.Bandwidth.IngressRate, r.Bandwidth.IngressBurst); err != nil {
		return w, err
	}
	if w.fromPod, err = c.newLimit("egress", r.Bandwidth.EgressRate, r.Bandwidth.EgressBurst); err != nil {
		return w, err
	}
	w.dns, err = c.resultDNS()
	return w, err
}

func parseIPs(texts []string) (ips []netip.Addr, err error) {
	for _, s := range texts {
		a, err := parseAddr(strings.TrimSpace(s))
		if err != nil {
			return nil, invalid("ips", err.Error())
		}
		for _, other := range ips {
			if other.Is4() == a.Is4() {
				return nil, invalid("ips", fmt.Sprintf("%s and %s are of one family: want at most one of each", other, a))
			}
		}
		ips = append(ips, a)
	}
	return ips, nil
}

// parseAddr takes 10.1.2.3 and 10.1.2.3/24 alike.
func parseAddr(s string) (netip.Addr, error) {
	bare, _, _ := strings.Cut(s, "/")
	a, err := netip.ParseAddr(bare)
	if err != nil || a.Zone() != "" {
		return a, fmt.Errorf("%.80q is not an address like 10.244.1.5 or fd00::5", s)
	}
	return a.Unmap(), nil
}

func parseMAC(s string) (mac rtnl.MAC, err error) {
	hw, err := net.ParseMAC(s)
	if err != nil || len(hw) != len(mac) || hw[0]&1 != 0 {
		return mac, fmt.Errorf("%.80q is not a unicast Ethernet address like 0e:12:34:56:78:9a", s)
	}
	return rtnl.MAC(hw), nil
}

// maxPorts bounds the host ports of one attachment: its record has to stay
// far below maxRecord.
const maxPorts = 256

func (c *conf) hostPorts() ([]mesh.HostPort, error) {
	list := c.runtime.PortMappings
	if len(list) == 0 {
		return nil, nil
	}
	if c.Table == "" {
		return nil, invalid("portMappings", `host ports are in an nft table: name it with "table", or chain portmap behind this plugin and leave the capability to it`)
	}
	if len(list) > maxPorts {
		return nil, invalid("portMappings", fmt.Sprintf("%d of them, at most %d", len(list), maxPorts))
	}
	var ports []mesh.HostPort
	for _, m := range list {
		p, err := m.parse()
		if err != nil {
			return nil, invalid("portMappings", err.Error())
		}
		if own := portText(p); slices.Contains(c.ReservedPorts, own) {
			return nil, types.NewError(CodePortTaken, "host port is taken", own+" is one that this machine itself is reached at (reservedPorts)")
		}
		for _, other := range ports {
			if p.HostIP == other.HostIP && p.Protocol == other.Protocol && p.HostPort == other.HostPort && p != other {
				return nil, invalid("portMappings", fmt.Sprintf("host port %d/%s leads to both %d and %d", p.HostPort, p.Protocol, other.Port, p.Port))
			}
		}
		if !slices.Contains(ports, p) {
			ports = append(ports, p)
		}
	}
	return ports, nil
}

func (m portMapping) parse() (p mesh.HostPort, err error) {
	if m.HostPort < 1 || m.HostPort > math.MaxUint16 || m.ContainerPort < 1 || m.ContainerPort > math.MaxUint16 {
		return p, fmt.Errorf("hostPort %d to containerPort %d: want 1 to 65535", m.HostPort, m.ContainerPort)
	}
	p.HostPort, p.Port, p.Protocol = uint16(m.HostPort), uint16(m.ContainerPort), mesh.Protocol(strings.ToUpper(m.Protocol))
	if p.Protocol == "" {
		p.Protocol = mesh.TCP
	}
	if p.Protocol.Number() == 0 {
		return p, fmt.Errorf("protocol %.80q: want tcp, udp or sctp", m.Protocol)
	}
	if m.HostIP == "" {
		return p, nil
	}
	if p.HostIP, err = netip.ParseAddr(m.HostIP); err != nil || p.HostIP.Zone() != "" {
		return p, fmt.Errorf("hostIP %.80q: want an address of this node", m.HostIP)
	}
	p.HostIP = p.HostIP.Unmap()
	return p, nil
}

// portText is how reservedPorts has a port: 51820/udp.
func portText(p mesh.HostPort) string {
	return fmt.Sprintf("%d/%s", p.HostPort, strings.ToLower(string(p.Protocol)))
}

func validatePorts(texts []string) error {
	for _, s := range texts {
		number, protocol, _ := strings.Cut(s, "/")
		n, err := strconv.ParseUint(number, 10, 16)
		if p := (mesh.HostPort{Protocol: mesh.Protocol(strings.ToUpper(protocol)), HostPort: uint16(n)}); err != nil || n == 0 || p.Protocol.Number() == 0 || portText(p) != s {
			return fmt.Errorf("port %.80q: want one like 51820/udp", s)
		}
	}
	return nil
}

// limit of a rate, as the kernel takes it: bytes a second, bytes.
type limit struct {
	Rate  uint64 `json:"rate"`
	Burst uint32 `json:"burst"`
}

const (
	// noBurst and more is what containerd and CRI-O send for "none was asked
	// for": a burst of 256 MB, and no limit before that.
	noBurst = math.MaxInt32
	// leastRate, in bits a second, is what Kubernetes' own check lets through.
	leastRate = 1000
	// leastBurst lets one aggregated segment through whole.
	leastBurst = 64 << 10
	// queueTime is how long a packet may wait for its turn.
	queueTime = 25 // ms
)

func (c *conf) newLimit(way string, rate, burst uint64) (limit, error) {
	switch {
	case rate == 0 && burst == 0:
		return limit{}, nil
	case rate < leastRate:
		return limit{}, invalid("bandwidth", fmt.Sprintf("%sRate %d: want bits a second, at least %d", way, rate, leastRate))
	}
	l := limit{Rate: rate / 8, Burst: uint32(burst / 8)}
	if burst == 0 || burst >= noBurst {
		l.Burst = uint32(min(max(l.Rate/10, leastBurst), math.MaxInt32)) // a tenth of a second
	}
	if least := cmp.Or(c.MTU, 1500) + 100; int(l.Burst) < least {
		return limit{}, invalid("bandwidth", fmt.Sprintf("%sBurst %d: no packet would fit; want at least %d bits", way, burst, least*8))
	}
	return l, nil
}

// tbf on a link.
func (l limit) tbf(index int, name string) rtnl.Tbf {
	queue := min(l.Rate*queueTime/1000, math.MaxInt32)
	return rtnl.Tbf{Index: index, Name: name, Rate: l.Rate, Burst: l.Burst, Limit: uint32(queue) + l.Burst}
}

// resultDNS: what the runtime says, else what the conflist says.
func (c *conf) resultDNS() (types.DNS, error) {
	d := c.runtime.DNS
	if len(d.Servers)+len(d.Searches)+len(d.Options) == 0 {
		return c.dns, nil
	}
	for _, s := range d.Servers {
		if _, err := netip.ParseAddr(s); err != nil {
			return types.DNS{}, invalid("dns", fmt.Sprintf("server %.80q: want an address", s))
		}
	}
	return types.DNS{Nameservers: d.Servers, Search: d.Searches, Options: d.Options, Domain: c.dns.Domain}, nil
}

// args are the CNI_ARGS this plugin understands.
type args struct {
	pod PodRef
	ips []string
	mac string
}

// maxArg bounds a value; Kubernetes' longest names have 253 bytes.
const maxArg = 1024

// parseArgs reads CNI_ARGS: KEY=VALUE pairs parted by semicolons. A key that
// is not known is an error unless IgnoreUnknown is set, as for other plugins.
func parseArgs(s string) (args, error) {
	var a args
	var unknown []string
	ignore := false
	for pair := range strings.SplitSeq(s, ";") {
		if pair == "" {
			continue
		}
		key, value, ok := strings.Cut(pair, "=")
		if !ok || len(value) > maxArg {
			return args{}, badArgs("%.80q is not KEY=VALUE with at most %d bytes", pair, maxArg)
		}
		switch key {
		case "IgnoreUnknown":
			v := strings.ToLower(value)
			ignore = v == "1" || v == "true"
		case "K8S_POD_NAMESPACE":
			a.pod.Namespace = value
		case "K8S_POD_NAME":
			a.pod.Name = value
		case "K8S_POD_UID":
			a.pod.UID = value
		case "K8S_POD_INFRA_CONTAINER_ID": // known, and of no use
		case "IP":
			a.ips = strings.Split(value, ",")
		case "MAC":
			a.mac = value
		default:
			unknown = append(unknown, key)
		}
	}
	if len(unknown) > 0 && !ignore {
		return args{}, badArgs("unknown key %.80q (IgnoreUnknown=1 allows it)", unknown[0])
	}
	return a, nil
}

func badArgs(format string, v ...any) error {
	return types.NewError(types.ErrInvalidEnvironmentVariables, "invalid CNI_ARGS", fmt.Sprintf(format, v...))
}
