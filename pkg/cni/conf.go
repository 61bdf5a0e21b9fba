package cni

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/containernetworking/cni/pkg/types"
	types100 "github.com/containernetworking/cni/pkg/types/100"
	"github.com/containernetworking/cni/pkg/version"
)

// conf is the plugin's configuration as it comes on standard input: what
// stands in the conflist, and what the runtime adds.
//
// What is seldom there, or not of use to every verb, is kept as text until it
// is wanted: encoding/json takes a third of a millisecond to learn all the
// types behind it, there or not, which is a twentieth of an ADD.
type conf struct {
	CNIVersion        string            `json:"cniVersion"`
	Name              string            `json:"name"`
	Ranges            []json.RawMessage `json:"ranges"`
	Reserved          []string          `json:"reserved"`
	ReservedPorts     []string          `json:"reservedPorts"`
	MTU               int               `json:"mtu"`
	DataDir           string            `json:"dataDir"`
	ReadyFile         string            `json:"readyFile"`
	ReasonFile        string            `json:"reasonFile"`
	Table             string            `json:"table"`
	HostLocalDir      *string           `json:"hostLocalDir"`
	QuarantineSeconds *int              `json:"quarantineSeconds"`
	DNS               json.RawMessage   `json:"dns"`
	RuntimeConfig     json.RawMessage   `json:"runtimeConfig"`
	Args              json.RawMessage   `json:"args"`
	PrevResult        json.RawMessage   `json:"prevResult"`
	ValidAttachments  json.RawMessage   `json:"cni.dev/valid-attachments"`
	// Attachments is what an early text of the specification called it.
	Attachments json.RawMessage `json:"cni.dev/attachments"`

	ranges     []span
	reserved   []netip.Addr
	quarantine time.Duration
	dns        types.DNS
	// runtime and cniArgs are what was asked for in runtimeConfig and args.cni.
	runtime, cniArgs asked
	prevResult       *types100.Result
}

// decode reads text, if there is any, into v.
func decode(key string, text json.RawMessage, v any) error {
	if len(text) == 0 {
		return nil
	}
	if err := json.Unmarshal(text, v); err != nil {
		return types.NewError(types.ErrDecodingFailure, "cannot read network configuration", key+": "+err.Error())
	}
	return nil
}

// rangeText is a range as it is written: "10.244.1.0/24", or as host-local
// has it.
type rangeText struct {
	Subnet     string `json:"subnet"`
	RangeStart string `json:"rangeStart"`
	RangeEnd   string `json:"rangeEnd"`
	Gateway    string `json:"gateway"`
}

func readRange(text json.RawMessage) (r rangeText, err error) {
	if len(text) > 0 && text[0] == '"' {
		err = json.Unmarshal(text, &r.Subnet)
	} else {
		err = json.Unmarshal(text, &r)
	}
	return r, err
}

const (
	// defaultQuarantine is longer than a name or a connection to the last pod
	// is in use anywhere, and short enough for a small range.
	defaultQuarantine = 10 * time.Second
	// defaultHostLocalDir is host-local's own.
	defaultHostLocalDir = "/var/lib/cni/networks"
	// maxRanges bounds what one configuration may list.
	maxRanges = 64
)

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
	if !isName(c.Name) {
		return nil, invalid("name", fmt.Sprintf("%.200q: want a letter or digit, and then letters, digits and any of _ . -", c.Name))
	}
	return c, nil
}

// store of the network.
func (c *conf) store() store {
	s := openStore(c.DataDir, c.Name)
	s.hostLocal = defaultHostLocalDir
	if c.HostLocalDir != nil {
		s.hostLocal = *c.HostLocalDir
	}
	return s
}

// complete reads the rest of it, which ADD, CHECK and STATUS need. DEL and GC
// work with a configuration that has gone bad.
func (c *conf) complete() error {
	if err := c.readAsked(); err != nil {
		return err
	}
	if err := c.readRanges(); err != nil {
		return err
	}
	if err := decode("dns", c.DNS, &c.dns); err != nil {
		return err
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
	if err := validateTable(c.Table); err != nil {
		return invalid("table", err.Error())
	}
	if err := validatePorts(c.ReservedPorts); err != nil {
		return invalid("reservedPorts", err.Error())
	}
	if d := c.HostLocalDir; d != nil && *d != "" && !filepath.IsAbs(*d) {
		return invalid("hostLocalDir", fmt.Sprintf("%q is not an absolute path", *d))
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

// readAsked reads what the runtime asks for.
func (c *conf) readAsked() error {
	if err := decode("runtimeConfig", c.RuntimeConfig, &c.runtime); err != nil {
		return err
	}
	var args struct {
		CNI json.RawMessage `json:"cni"`
	}
	if err := decode("args", c.Args, &args); err != nil {
		return err
	}
	return decode("args.cni", args.CNI, &c.cniArgs)
}

// validAttachments are what GC leaves: none, if there is no list, as cnitool
// means it.
func (c *conf) validAttachments() (valid []types.GCAttachment, err error) {
	text := c.ValidAttachments
	if text == nil {
		text = c.Attachments
	}
	err = decode("cni.dev/valid-attachments", text, &valid)
	return valid, err
}

// readRanges: those a runtime gives take the place of those in the conflist,
// family by family, because a pod gets one address of each.
func (c *conf) readRanges() error {
	all, err := parseRanges("ranges", c.Ranges)
	if err != nil {
		return err
	}
	for _, set := range c.runtime.IPRanges {
		given, err := parseRanges("ipRanges", set)
		if err != nil {
			return err
		}
		for i, r := range given {
			if !r.sameFamily(given[0]) {
				return invalid("ipRanges", fmt.Sprintf("%s and %s are in one set: want one family in each", given[0], r))
			}
			if i == 0 && slices.ContainsFunc(c.ranges, r.sameFamily) {
				return invalid("ipRanges", "two sets of one family: a pod gets one address of each")
			}
		}
		c.ranges = append(c.ranges, given...)
	}
	given := slices.Clone(c.ranges)
	for _, r := range all {
		if !slices.ContainsFunc(given, r.sameFamily) {
			c.ranges = append(c.ranges, r)
		}
	}
	switch {
	case len(c.ranges) == 0:
		return invalid("ranges", "want at least one, like 10.244.1.0/24")
	case len(c.ranges) > maxRanges:
		return invalid("ranges", fmt.Sprintf("%d of them, at most %d", len(c.ranges), maxRanges))
	}
	return nil
}

func parseRanges(key string, texts []json.RawMessage) ([]span, error) {
	if len(texts) > maxRanges {
		return nil, invalid(key, fmt.Sprintf("%d of them, at most %d", len(texts), maxRanges))
	}
	var all []span
	for _, text := range texts {
		t, err := readRange(text)
		if err != nil {
			return nil, types.NewError(types.ErrDecodingFailure, "cannot read network configuration", key+": "+err.Error())
		}
		r, err := t.parse()
		if err != nil {
			return nil, invalid(key, fmt.Sprintf("%q: %v", t.Subnet, err))
		}
		all = append(all, r)
	}
	return all, nil
}

func (t rangeText) parse() (r span, err error) {
	if r.prefix, err = netip.ParsePrefix(t.Subnet); err != nil {
		return r, err
	}
	if err := validateRange(r.prefix); err != nil {
		return r, err
	}
	if t.Gateway != "" {
		return r, fmt.Errorf("gateway %.80s: pods of this network have %s and %s for a gateway; leave it out", t.Gateway, gateway4, gateway6)
	}
	for _, end := range []struct {
		key, text string
		to        *netip.Addr
	}{{"rangeStart", t.RangeStart, &r.first}, {"rangeEnd", t.RangeEnd, &r.last}} {
		if end.text == "" {
			continue
		}
		a, err := parseAddr(end.text)
		if err != nil || !r.prefix.Contains(a) {
			return r, fmt.Errorf("%s %.80q is not an address in it", end.key, end.text)
		}
		*end.to = a
	}
	if r.first.IsValid() && r.last.IsValid() && r.last.Less(r.first) {
		return r, fmt.Errorf("rangeStart %s is behind rangeEnd %s", r.first, r.last)
	}
	return r, nil
}

func validateTable(name string) error {
	if len(name) > 64 || strings.ContainsFunc(name, func(r rune) bool { return r <= ' ' || r > '~' }) {
		return fmt.Errorf("%.80q cannot name an nft table", name)
	}
	return nil
}

func (c *conf) readPrevResult() error {
	conf := types.PluginConf{CNIVersion: c.CNIVersion}
	if err := decode("prevResult", c.PrevResult, &conf.RawPrevResult); err != nil || conf.RawPrevResult == nil {
		return err
	}
	if err := version.ParsePrevResult(&conf); err != nil {
		return types.NewError(types.ErrDecodingFailure, "cannot read prevResult", err.Error())
	}
	r, err := types100.NewResultFromResult(conf.PrevResult)
	if err != nil {
		return types.NewError(types.ErrDecodingFailure, "cannot read prevResult", err.Error())
	}
	c.prevResult = r
	return nil
}

func invalid(key, why string) error {
	return types.NewError(types.ErrInvalidNetworkConfig, "invalid network configuration", key+": "+why)
}
