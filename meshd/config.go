package main

import (
	"cmp"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"github.com/vishvananda/netlink"
	"k8s.io/apimachinery/pkg/util/validation"
	"sigs.k8s.io/yaml"

	"meshd.dev/pkg/mesh"
)

// defaultConfigFile is read when it exists and no --config names another.
const defaultConfigFile = "/etc/meshd/config.yaml"

// nodeConfig is what every machine of a cluster has.
type nodeConfig struct {
	NodeName     string
	NodeIPs      []string
	NodeLabels   map[string]string
	DataDir      string
	RunDir       string
	CRI          string
	CNIConfDir   string
	CNIBinDir    string
	CNIPlugin    string
	CNIConf      string
	ListenPort   int
	KeyRotation  time.Duration
	AgentPort    int
	NoMasquerade []string
	ResolvConf   string
	LogLevel     string
	NoOffloads   bool
	Shortcut     string
	Policies     string

	Endpoints []string

	addrs     []netip.Addr     // NodeIPs, parsed
	direct    []netip.Prefix   // NoMasquerade, parsed
	endpoints []netip.AddrPort // Endpoints, parsed
	apiPort   int              // of a server's API
}

// ownPorts are where this machine is reached; a pod that took one as its host
// port would cut it off.
func (c *nodeConfig) ownPorts() []string {
	ports := []string{fmt.Sprintf("%d/udp", c.ListenPort), fmt.Sprintf("%d/udp", c.ListenPort+1), fmt.Sprintf("%d/tcp", c.ListenPort)}
	if c.AgentPort == 0 { // the kubelet, and the API where it is
		return append(ports, "10250/tcp", "6443/tcp")
	}
	ports = append(ports, fmt.Sprintf("%d/tcp", c.AgentPort))
	if c.apiPort != 0 {
		ports = append(ports, fmt.Sprintf("%d/tcp", c.apiPort))
	}
	return ports
}

// serverConfig is what the first machine decides for the whole cluster.
type serverConfig struct {
	nodeConfig
	Listen        string
	Advertise     string
	PodCIDRs      []string
	ServiceCIDRs  []string
	ClusterDomain string
	TLSSANs       []string
	EtcdEndpoints []string
	NodeGrace     time.Duration
	EvictAfter    time.Duration

	podCIDRs, serviceCIDRs []netip.Prefix
}

// flags of a machine that runs its pods itself.
func (c *nodeConfig) flags(f *pflag.FlagSet) {
	c.networkFlags(f)
	f.StringToStringVar(&c.NodeLabels, "node-label", nil, "labels of the Node object, key=value")
	f.StringVar(&c.CRI, "cri-socket", "", "socket of the container runtime (default the first found of containerd's and CRI-O's)")
	f.BoolVar(&c.NoOffloads, "no-tunnel-offloads", false, "have meshd wireguard, where it carries the tunnels, use no segmentation offloads; for a kernel that loses packets with them")
	f.IntVar(&c.AgentPort, "agent-port", 10250, "TCP port on which the API server reaches this node for logs and exec")
	f.Lookup("cni-conf-dir").Usage += " (default what it says itself)"
	f.Lookup("cni-bin-dir").Usage += " (default what it says itself)"
}

// networkFlags are those of every machine.
func (c *nodeConfig) networkFlags(f *pflag.FlagSet) {
	f.String("config", "", "YAML file of flags by name (default "+defaultConfigFile+" if it exists)")
	f.StringVar(&c.NodeName, "node-name", "", "name of this node (default the host name)")
	f.StringSliceVar(&c.NodeIPs, "node-ip", nil, "addresses by which the other machines reach this one, preferred first (default the one of the default route)")
	f.StringVar(&c.DataDir, "data-dir", "/var/lib/meshd", "folder of all state")
	f.StringVar(&c.RunDir, "run-dir", "/run/meshd", "folder of sockets")
	f.StringVar(&c.CNIConfDir, "cni-conf-dir", "", "folder the container runtime reads network configurations from")
	f.StringVar(&c.CNIBinDir, "cni-bin-dir", "", "folder the container runtime runs CNI plugins from")
	f.StringVar(&c.CNIConf, "cni-conf-name", "10"+conflistSuffix, "file of our network configuration there; the container runtime takes the first by name")
	f.StringVar(&c.CNIPlugin, "cni-plugin", "", "our CNI plugin, to be installed there (default the file mesh beside this program)")
	f.StringSliceVar(&c.Endpoints, "endpoint", nil, "address:port at which the other machines reach this one's tunnel, before --node-ip and the addresses of its links; as an address translator forwards it")
	f.IntVar(&c.ListenPort, "listen-port", mesh.ListenPort, "UDP port of the tunnels")
	f.DurationVar(&c.KeyRotation, "key-rotation", 0, "how often to change the tunnels' key; 0 only when told by meshctl keys rotate")
	f.StringVar(&c.Shortcut, "shortcut", "auto", "carry packets between pods of this machine past its own stack: auto, where the kernel can (tcx, Linux 6.6), or off")
	f.StringSliceVar(&c.NoMasquerade, "no-masquerade", nil, "address ranges outside of the cluster that see pods' own addresses instead of this node's; they need routes to them")
	f.StringVar(&c.Policies, "network-policies", "warn", "what to say of NetworkPolicies, which meshd does not enforce: warn, or ignore where something else does")
	f.StringVar(&c.ResolvConf, "resolv-conf", "", "file naming the upstream resolvers (default systemd-resolved's, else /etc/resolv.conf)")
	f.StringVar(&c.LogLevel, "log-level", "info", "debug, info, warn or error")
}

func (c *serverConfig) flags(f *pflag.FlagSet) {
	c.nodeConfig.flags(f)
	f.StringVar(&c.Listen, "listen", ":6443", "address and port of the Kubernetes API")
	f.StringVar(&c.Advertise, "advertise-address", "", "address by which the others reach the API (default the first --node-ip)")
	f.StringSliceVar(&c.PodCIDRs, "pod-cidr", []string{"10.244.0.0/16", "fd00:10:244::/48"}, "address ranges of pods, one a family; nodes get a /24 or /64 each")
	f.StringSliceVar(&c.ServiceCIDRs, "service-cidr", []string{"10.96.0.0/16", "fd00:10:96::/112"}, "address ranges of services, one a family; the first family is the default of services")
	f.StringVar(&c.ClusterDomain, "cluster-domain", "cluster.local", "DNS zone of the cluster")
	f.StringSliceVar(&c.TLSSANs, "tls-san", nil, "further names and addresses in the API's certificate")
	f.StringSliceVar(&c.EtcdEndpoints, "etcd-endpoints", nil, "use this etcd instead of the embedded one")
	f.DurationVar(&c.NodeGrace, "node-grace-period", 0, "how long a node may be silent before its endpoints are taken out (default 4s)")
	f.DurationVar(&c.EvictAfter, "evict-after", 0, "how long after that its pods are replaced elsewhere (default 5s)")
}

// readConfigFile gives every flag that is not on the command line the value
// the configuration file has for it.
func readConfigFile(cmd *cobra.Command) error {
	path, err := cmd.Flags().GetString("config")
	if err != nil {
		return err
	}
	explicit := path != ""
	if !explicit {
		path = defaultConfigFile
	}
	b, err := os.ReadFile(path)
	if errors.Is(err, os.ErrNotExist) && !explicit {
		return nil
	}
	if err != nil {
		return fmt.Errorf("configuration: %w", err)
	}
	if err := applyConfig(b, cmd.Flags()); err != nil {
		return fmt.Errorf("configuration %s: %w", path, err)
	}
	return nil
}

func applyConfig(b []byte, flags *pflag.FlagSet) error {
	var values map[string]any
	if err := yaml.UnmarshalStrict(b, &values); err != nil {
		return err
	}
	var errs []error
	for name, value := range values {
		flag := flags.Lookup(name)
		switch {
		case flag == nil || name == "config" || name == "help":
			errs = append(errs, fmt.Errorf("%s: no such setting; known are %s", name, strings.Join(flagNames(flags), ", ")))
			continue
		case flag.Changed:
			continue
		}
		for _, text := range settingTexts(value) {
			if err := flags.Set(name, text); err != nil {
				errs = append(errs, fmt.Errorf("%s: %w", name, err))
			}
		}
	}
	return errors.Join(errs...)
}

// settingTexts is a YAML value as the words one would type for it.
func settingTexts(value any) []string {
	switch v := value.(type) {
	case []any:
		texts := make([]string, len(v))
		for i, e := range v {
			texts[i] = fmt.Sprint(e)
		}
		return []string{strings.Join(texts, ",")}
	case map[string]any:
		var texts []string
		for k, e := range v {
			texts = append(texts, fmt.Sprintf("%s=%v", k, e))
		}
		slices.Sort(texts)
		return texts
	}
	return []string{fmt.Sprint(value)}
}

func flagNames(flags *pflag.FlagSet) (names []string) {
	flags.VisitAll(func(f *pflag.Flag) {
		if f.Name != "config" && f.Name != "help" {
			names = append(names, f.Name)
		}
	})
	return names
}

// complete fills in what depends on the machine and checks everything.
func (c *nodeConfig) complete() error {
	if err := c.completeNetwork(); err != nil {
		return err
	}
	if errs := validation.IsDNS1123Label(c.NodeName); len(errs) > 0 {
		return fmt.Errorf("node name %q: %s; give another --node-name", c.NodeName, strings.Join(errs, "; "))
	}
	if len(c.addrs) == 0 {
		addr, err := defaultAddress()
		if err != nil {
			return fmt.Errorf("address of this node: %w; give --node-ip", err)
		}
		c.addrs = []netip.Addr{addr}
	}
	if c.AgentPort < 1 || c.AgentPort > 65535 {
		return fmt.Errorf("--agent-port %d: want 1 to 65535", c.AgentPort)
	}
	if c.CRI == "" {
		c.CRI = findCRI()
	}
	var err error
	c.CRI, err = filepath.Abs(strings.TrimPrefix(c.CRI, "unix://"))
	return err
}

// completeNetwork does so for the settings every machine has.
func (c *nodeConfig) completeNetwork() error {
	if c.NodeName == "" {
		host, err := os.Hostname()
		if err != nil {
			return fmt.Errorf("node name: %w; give --node-name", err)
		}
		c.NodeName = strings.ToLower(host)
	}
	for _, text := range c.NodeIPs {
		addr, err := netip.ParseAddr(text)
		if err != nil {
			return fmt.Errorf("--node-ip %q: want an IPv4 or IPv6 address: %w", text, err)
		}
		c.addrs = append(c.addrs, addr.Unmap())
	}
	for _, text := range c.Endpoints {
		e, err := netip.ParseAddrPort(text)
		if err != nil || e.Port() == 0 || !e.Addr().IsGlobalUnicast() {
			return fmt.Errorf("--endpoint %q: want address:port of a unicast address, as 198.51.100.7:51820 or [2001:db8::7]:51820", text)
		}
		c.endpoints = append(c.endpoints, netip.AddrPortFrom(e.Addr().Unmap(), e.Port()))
	}
	if c.Policies != "" && c.Policies != "warn" && c.Policies != "ignore" {
		return fmt.Errorf("--network-policies %q: want warn or ignore", c.Policies)
	}
	for _, text := range c.NoMasquerade {
		p, err := parsePrefix("--no-masquerade", text)
		if err != nil {
			return err
		}
		c.direct = append(c.direct, p)
	}
	if c.KeyRotation != 0 && c.KeyRotation < minKeyRotation {
		return fmt.Errorf("--key-rotation %s: want at least %s, or 0 for never by itself", c.KeyRotation, minKeyRotation)
	}
	if c.Shortcut != "auto" && c.Shortcut != "off" {
		return fmt.Errorf("--shortcut %q: want auto or off", c.Shortcut)
	}
	if c.ListenPort < 1 || c.ListenPort > 65534 {
		return fmt.Errorf("--listen-port %d: want 1 to 65534, for the port behind it is used while a key changes", c.ListenPort)
	}
	c.CNIConf = cmp.Or(c.CNIConf, "10"+conflistSuffix)
	if !strings.HasSuffix(c.CNIConf, conflistSuffix) || c.CNIConf != filepath.Base(c.CNIConf) {
		return fmt.Errorf("--cni-conf-name %q: want a name that ends in %s, by which it is known as ours", c.CNIConf, conflistSuffix)
	}
	if c.CNIPlugin == "" {
		self, err := os.Executable()
		if err != nil {
			return err
		}
		c.CNIPlugin = filepath.Join(filepath.Dir(self), "mesh")
	}
	for _, dir := range []*string{&c.DataDir, &c.RunDir} {
		abs, err := filepath.Abs(*dir)
		if err != nil {
			return err
		}
		*dir = abs
	}
	return nil
}

func (c *serverConfig) complete() error {
	if err := c.nodeConfig.complete(); err != nil {
		return err
	}
	var err error
	if c.podCIDRs, err = prefixes("--pod-cidr", c.PodCIDRs); err != nil {
		return err
	}
	if c.serviceCIDRs, err = prefixes("--service-cidr", c.ServiceCIDRs); err != nil {
		return err
	}
	for _, p := range c.podCIDRs {
		for _, s := range c.serviceCIDRs {
			if p.Overlaps(s) {
				return fmt.Errorf("--pod-cidr %s and --service-cidr %s overlap", p, s)
			}
		}
		for _, a := range c.addrs {
			if p.Contains(a) {
				return fmt.Errorf("--pod-cidr %s contains this machine's own address %s; choose another range", p, a)
			}
		}
	}
	if c.Advertise == "" {
		c.Advertise = c.addrs[0].String()
	}
	if _, err := netip.ParseAddr(c.Advertise); err != nil {
		return fmt.Errorf("--advertise-address %q: want an address: %w", c.Advertise, err)
	}
	if _, _, err := net.SplitHostPort(c.Listen); err != nil {
		return fmt.Errorf("--listen %q: want address:port or :port: %w", c.Listen, err)
	}
	return nil
}

// prefixes reads at most one prefix a family.
func prefixes(flag string, texts []string) ([]netip.Prefix, error) {
	var list []netip.Prefix
	for _, text := range texts {
		p, err := parsePrefix(flag, text)
		if err != nil {
			return nil, err
		}
		if slices.ContainsFunc(list, func(q netip.Prefix) bool { return q.Addr().Is4() == p.Addr().Is4() }) {
			return nil, fmt.Errorf("%s: more than one range of a family", flag)
		}
		list = append(list, p)
	}
	if len(list) == 0 {
		return nil, fmt.Errorf("%s: want at least one range", flag)
	}
	return list, nil
}

// parsePrefix reads one, without bits behind its length.
func parsePrefix(flag, text string) (netip.Prefix, error) {
	p, err := netip.ParsePrefix(text)
	if err != nil {
		return p, fmt.Errorf("%s %q: want address/bits: %w", flag, text, err)
	}
	if p != p.Masked() {
		return p, fmt.Errorf("%s %s: has bits behind its length; %s would be right", flag, p, p.Masked())
	}
	return p, nil
}

// defaultAddress is the source address of the default route.
func defaultAddress() (netip.Addr, error) {
	for _, probe := range []string{"192.0.2.1", "2001:db8::1"} { // documentation addresses; no packet is sent
		routes, err := netlink.RouteGet(net.ParseIP(probe))
		if err != nil || len(routes) == 0 {
			continue
		}
		if addr, ok := netip.AddrFromSlice(routes[0].Src); ok && !addr.IsLoopback() {
			return addr.Unmap(), nil
		}
	}
	return netip.Addr{}, errors.New("no default route")
}

func findCRI() string {
	known := []string{"/run/containerd/containerd.sock", "/run/crio/crio.sock"}
	for _, path := range known {
		if _, err := os.Stat(path); err == nil {
			return path
		}
	}
	return known[0]
}

func (c *nodeConfig) logger() (*slog.Logger, error) {
	var level slog.Level
	if err := level.UnmarshalText([]byte(c.LogLevel)); err != nil {
		return nil, fmt.Errorf("--log-level %q: want debug, info, warn or error", c.LogLevel)
	}
	return slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: level})), nil
}

func (c *nodeConfig) state(parts ...string) string {
	return filepath.Join(append([]string{c.DataDir}, parts...)...)
}
