package cni

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"meshd.dev/pkg/durable"
	"meshd.dev/pkg/mesh"
)

// PluginType is the plugin's type in a network configuration and the name of
// its binary.
const PluginType = "mesh"

// DefaultDataDir is where records live unless the configuration says otherwise.
const DefaultDataDir = "/var/lib/meshd/cni"

// Network is what a conflist says about the pods of this node.
type Network struct {
	// Name of the network; "meshd" if empty. Records live in DataDir/Name.
	Name string
	// PodCIDRs are this node's own, masked; pods get one address a family.
	PodCIDRs []netip.Prefix
	// MTU of the pods' interfaces in bytes; 0 leaves the kernel's default.
	MTU int
	// DataDir holds the records; DefaultDataDir if empty.
	DataDir string
	// ReadyFile, if set, makes STATUS depend on the daemon: see the plugin's README.
	ReadyFile string
	// ReasonFile, if set, is where the daemon writes what it lacks: errors of
	// ADD and STATUS that are about the machine quote it.
	ReasonFile string
	// Table of the firewall in which pods are admitted and have their host
	// ports; empty for none.
	Table string
	// ReservedPorts of this machine are no pod's host ports: "51820/udp".
	ReservedPorts []string
}

// conflist is the network configuration list of the CNI specification 1.1,
// section 1. cniVersion stays at 1.0.0 because containerd 1.6 knows no later
// one and knows no cniVersions either.
type conflist struct {
	CNIVersion  string           `json:"cniVersion"`
	CNIVersions []string         `json:"cniVersions"`
	Name        string           `json:"name"`
	Plugins     []conflistPlugin `json:"plugins"`
}

type conflistPlugin struct {
	Type          string          `json:"type"`
	Ranges        []netip.Prefix  `json:"ranges"`
	MTU           int             `json:"mtu,omitempty"`
	DataDir       string          `json:"dataDir"`
	ReadyFile     string          `json:"readyFile,omitempty"`
	ReasonFile    string          `json:"reasonFile,omitempty"`
	Table         string          `json:"table,omitempty"`
	ReservedPorts []string        `json:"reservedPorts,omitempty"`
	Capabilities  map[string]bool `json:"capabilities"`
}

// WriteConflist makes path say n: by temporary file and rename, and only when
// it says something else now. The runtime takes the network for ready from
// then on, so write it when the datapath stands.
func WriteConflist(path string, n Network) (changed bool, err error) {
	text, err := n.conflist()
	if err != nil {
		return false, err
	}
	if changed, err = durable.WriteFileIfChanged(path, text, 0o644); err != nil {
		return false, fmt.Errorf("network configuration: %w", err)
	}
	return changed, nil
}

func (n Network) conflist() ([]byte, error) {
	n.setDefaults()
	if err := n.validate(); err != nil {
		return nil, fmt.Errorf("network %s: %w", n.Name, err)
	}
	list := conflist{
		CNIVersion:  "1.0.0",
		CNIVersions: []string{"0.4.0", "1.0.0", "1.1.0"},
		Name:        n.Name,
		Plugins: []conflistPlugin{{
			Type: PluginType, Ranges: n.PodCIDRs, MTU: n.MTU, DataDir: n.DataDir, ReadyFile: n.ReadyFile, ReasonFile: n.ReasonFile,
			Table: n.Table, ReservedPorts: n.ReservedPorts, Capabilities: n.capabilities(),
		}},
	}
	text, err := json.MarshalIndent(list, "", "  ")
	return append(text, '\n'), err
}

func (n *Network) setDefaults() {
	if n.Name == "" {
		n.Name = "meshd"
	}
	if n.DataDir == "" {
		n.DataDir = DefaultDataDir
	}
}

// capabilities are those a runtime may use. Ranges and DNS are the node's.
func (n Network) capabilities() map[string]bool {
	c := map[string]bool{"ips": true, "mac": true, "bandwidth": true, capabilityAnnotations: true}
	if n.Table != "" {
		c["portMappings"] = true
	}
	return c
}

func (n Network) validate() error {
	if len(n.PodCIDRs) == 0 {
		return errors.New("no pod CIDR: want at least one")
	}
	for _, p := range n.PodCIDRs {
		if err := validateRange(p); err != nil {
			return fmt.Errorf("pod CIDR %s: %w", p, err)
		}
	}
	if !filepath.IsAbs(n.DataDir) {
		return fmt.Errorf("data directory %q: want an absolute path", n.DataDir)
	}
	if err := errors.Join(validateTable(n.Table), validatePorts(n.ReservedPorts)); err != nil {
		return err
	}
	return validateMTU(n.MTU, spans(n.PodCIDRs))
}

func spans(ps []netip.Prefix) []span {
	all := make([]span, len(ps))
	for i, p := range ps {
		all[i].prefix = p
	}
	return all
}

// validateMTU refuses what the kernel would take and then silently run
// without IPv6.
func validateMTU(mtu int, ranges []span) error {
	if mtu == 0 {
		return nil
	}
	least := 576
	for _, p := range ranges {
		if p.prefix.Addr().Is6() {
			least = mesh.MinMTU
		}
	}
	if mtu < least || mtu > 65535 {
		return fmt.Errorf("mtu %d: want %d to 65535, or 0 for the kernel's default", mtu, least)
	}
	return nil
}

// Install puts the plugin binary src into binDir as "mesh", by temporary file
// and rename, and only when what is there differs: a runtime may be starting
// it at this moment.
func Install(src, binDir string) (changed bool, err error) {
	return install(src, binDir, PluginType)
}

func install(src, binDir, name string) (changed bool, err error) {
	dst := filepath.Join(binDir, name)
	if same, err := equalFiles(src, dst); err == nil && same && unix.Access(dst, unix.X_OK) == nil {
		return false, nil
	}
	want, err := os.ReadFile(src)
	if err != nil {
		return false, fmt.Errorf("install plugin: %w", err)
	}
	if err := durable.WriteFile(dst, want, 0o755); err != nil {
		return false, fmt.Errorf("install plugin: %w", err)
	}
	return true, nil
}

// equalFiles compares contents without holding them: it is asked every few
// seconds about megabytes.
func equalFiles(a, b string) (bool, error) {
	var files [2]*os.File
	var sizes [2]int64
	for i, path := range []string{a, b} {
		f, err := os.Open(path)
		if err != nil {
			return false, err
		}
		defer f.Close()
		info, err := f.Stat()
		if err != nil {
			return false, err
		}
		files[i], sizes[i] = f, info.Size()
	}
	if sizes[0] != sizes[1] {
		return false, nil
	}
	var parts [2][]byte
	for i := range parts {
		parts[i] = make([]byte, 32<<10)
	}
	for {
		var n [2]int
		var errs [2]error
		for i, f := range files {
			n[i], errs[i] = io.ReadFull(f, parts[i])
		}
		if !bytes.Equal(parts[0][:n[0]], parts[1][:n[1]]) {
			return false, nil
		}
		for _, err := range errs {
			if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
				return errors.Is(errs[0], errs[1]), nil
			}
			if err != nil {
				return false, err
			}
		}
	}
}
