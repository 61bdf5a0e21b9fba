package cni

import (
	"encoding/json"
	"fmt"
	"net"
	"net/netip"
	"path/filepath"
	"strings"
	"time"

	"github.com/containernetworking/cni/pkg/types"
	types100 "github.com/containernetworking/cni/pkg/types/100"
	"github.com/containernetworking/cni/pkg/version"

	"meshd.dev/pkg/cni/rtnl"
)

// conf is the plugin's configuration as it comes on standard input: what
// stands in the conflist, and what the runtime adds.
type conf struct {
	types.PluginConf
	Ranges            []string `json:"ranges"`
	Reserved          []string `json:"reserved"`
	MTU               int      `json:"mtu"`
	DataDir           string   `json:"dataDir"`
	ReadyFile         string   `json:"readyFile"`
	QuarantineSeconds *int     `json:"quarantineSeconds"`
	RuntimeConfig     asked    `json:"runtimeConfig"`
	Args              struct {
		CNI asked `json:"cni"`
	} `json:"args"`

	ranges     []netip.Prefix
	reserved   []netip.Addr
	quarantine time.Duration
	prevResult *types100.Result
}

// asked is what a runtime can ask for one attachment (CNI CONVENTIONS.md).
type asked struct {
	IPs []string `json:"ips"`
	MAC string   `json:"mac"`
}

// defaultQuarantine is longer than a name or a connection to the last pod is
// in use anywhere, and short enough for a small range.
const defaultQuarantine = 10 * time.Second

// maxRanges bounds what one configuration may list.
const maxRanges = 64

// parseConf reads a configuration as far as every verb needs it.
func parseConf(stdin []byte) (*conf, error) {
	c := &conf{}
	if err := json.Unmarshal(stdin, c); err != nil {
		return nil, types.NewError(types.ErrDecodingFailure, "cannot read network configuration", err.Error())
	}
	if c.DataDir == "" {
		c.DataDir = DefaultDataDir
	}
	if !filepath.IsAbs(c.DataDir) {
		return nil, invalid("dataDir", fmt.Sprintf("%q is not an absolute path", c.DataDir))
	}
	if c.Name == "" || c.Name != filepath.Base(c.Name) || c.Name == "." || c.Name == ".." {
		return nil, invalid("name", fmt.Sprintf("%q cannot name a folder", c.Name))
	}
	return c, nil
}

// complete reads the rest of it, which ADD, CHECK and STATUS need. DEL and GC
// work with a configuration that has gone bad.
func (c *conf) complete() error {
	if len(c.Ranges) == 0 {
		return invalid("ranges", "want at least one, like 10.244.1.0/24")
	}
	if len(c.Ranges) > maxRanges {
		return invalid("ranges", fmt.Sprintf("%d of them, at most %d", len(c.Ranges), maxRanges))
	}
	for _, s := range c.Ranges {
		p, err := netip.ParsePrefix(s)
		if err == nil {
			err = validateRange(p)
		}
		if err != nil {
			return invalid("ranges", fmt.Sprintf("%q: %v", s, err))
		}
		c.ranges = append(c.ranges, p)
	}
	for _, s := range c.Reserved {
		a, err := parseAddr(s)
		if err != nil {
			return invalid("reserved", err.Error())
		}
		c.reserved = append(c.reserved, a)
	}
	if err := validateMTU(c.MTU, c.ranges); err != nil {
		return invalid("mtu", err.Error())
	}
	c.quarantine = defaultQuarantine
	if q := c.QuarantineSeconds; q != nil {
		if *q < 0 || *q > 86400 {
			return invalid("quarantineSeconds", fmt.Sprintf("%d: want 0 to 86400", *q))
		}
		c.quarantine = time.Duration(*q) * time.Second
	}
	return c.readPrevResult()
}

func (c *conf) readPrevResult() error {
	if c.RawPrevResult == nil {
		return nil
	}
	if err := version.ParsePrevResult(&c.PluginConf); err != nil {
		return types.NewError(types.ErrDecodingFailure, "cannot read prevResult", err.Error())
	}
	r, err := types100.NewResultFromResult(c.PrevResult)
	if err != nil {
		return types.NewError(types.ErrDecodingFailure, "cannot read prevResult", err.Error())
	}
	c.prevResult = r
	return nil
}

func invalid(key, why string) error {
	return types.NewError(types.ErrInvalidNetworkConfig, "invalid network configuration", key+": "+why)
}

// args are the CNI_ARGS this plugin understands.
type args struct {
	pod  PodRef
	ips  []string
	mac  string
	last string // sandbox, for nothing but being known
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
		case "K8S_POD_INFRA_CONTAINER_ID":
			a.last = value
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

// wishes are the addresses and the MAC that were asked for, by whichever of
// the three ways a runtime has; the more specific one wins.
func (c *conf) wishes(a args) (ips []netip.Addr, mac rtnl.MAC, err error) {
	texts, macText := a.ips, a.mac
	for _, w := range []asked{c.Args.CNI, c.RuntimeConfig} {
		if len(w.IPs) > 0 {
			texts = w.IPs
		}
		if w.MAC != "" {
			macText = w.MAC
		}
	}
	for _, s := range texts {
		a, err := parseAddr(s)
		if err != nil {
			return nil, mac, invalid("ips", err.Error())
		}
		for _, other := range ips {
			if other.Is4() == a.Is4() {
				return nil, mac, invalid("ips", fmt.Sprintf("%s and %s are of one family: want at most one of each", other, a))
			}
		}
		ips = append(ips, a)
	}
	if macText != "" {
		if mac, err = parseMAC(macText); err != nil {
			return nil, mac, invalid("mac", err.Error())
		}
	}
	return ips, mac, nil
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
