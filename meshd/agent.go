package main

import (
	"context"
	"fmt"
	"net/netip"
	"os"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"golang.org/x/sync/errgroup"
	"k8s.io/apimachinery/pkg/util/validation"

	"meshd.dev/pkg/status"
)

// agentConfig is what `meshd agent` needs to know besides what the cluster
// says.
type agentConfig struct {
	nodeConfig
	apiConfig
	PodCIDRs       []string
	ServiceCIDRs   []string
	ClusterDomain  string
	ClusterDNS     []string
	Services       string
	SpawnUserspace bool

	podCIDRs, serviceCIDRs []netip.Prefix
	clusterDNS             []netip.Addr // empty: those of the service kube-dns, or none
}

func agentCommand() *cobra.Command {
	cfg := &agentConfig{}
	cmd := &cobra.Command{
		Use:   "agent",
		Short: "Be the network of this node of an existing Kubernetes cluster",
		Long: `Agent runs on every node of a Kubernetes cluster, beside its kubelet, mostly as
the DaemonSet of manifests/. It reads nodes, services, their endpoints, its own
pods and policies from the Kubernetes API, publishes this node's key on its Node object, keeps tunnels,
routes, firewall and resolver, and installs the CNI plugin for the kubelet.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := readConfigFile(cmd); err != nil {
				return err
			}
			if err := cfg.complete(); err != nil {
				return err
			}
			return runAgent(cmd.Context(), *cfg)
		},
	}
	cfg.flags(cmd.Flags())
	return cmd
}

func (c *agentConfig) flags(f *pflag.FlagSet) {
	c.networkFlags(f)
	f.Lookup("node-name").Usage = "name of this machine's Node object (default the host name)"
	f.Lookup("node-ip").Usage = "addresses by which the other machines reach this one, preferred first (default the internal addresses of the Node object)"
	f.Lookup("cni-conf-dir").DefValue, c.CNIConfDir = "/etc/cni/net.d", "/etc/cni/net.d"
	f.Lookup("cni-bin-dir").DefValue, c.CNIBinDir = "/opt/cni/bin", "/opt/cni/bin"
	c.apiFlags(f)
	f.StringSliceVar(&c.PodCIDRs, "pod-cidr", nil, "address ranges of all pods of the cluster, one a family (default the ones of the nodes together)")
	f.StringSliceVar(&c.ServiceCIDRs, "service-cidr", nil, "address ranges of services, one a family (default what the cluster says)")
	f.StringVar(&c.ClusterDomain, "cluster-domain", "cluster.local", "DNS zone of the cluster, as the kubelets have it")
	f.StringSliceVar(&c.ClusterDNS, "cluster-dns", []string{"auto"}, "addresses the kubelets give pods as their resolver, to be answered by this node's own: addresses, auto for those of the service kube-system/kube-dns, or off")
	f.StringVar(&c.Services, "services", "auto", "translate service addresses: on, off, or auto: unless kube-proxy is found on this machine")
	f.BoolVar(&c.SpawnUserspace, "spawn-userspace", true, "start meshd wireguard where the kernel has no WireGuard; false where something else runs it, as the DaemonSet meshd-wireguard does")
}

func (c *agentConfig) complete() error {
	if err := c.completeNetwork(); err != nil {
		return err
	}
	if errs := validation.IsDNS1123Subdomain(c.NodeName); len(errs) > 0 {
		return fmt.Errorf("node name %q: %s; give the name of the Node object as --node-name", c.NodeName, strings.Join(errs, "; "))
	}
	var err error
	if len(c.PodCIDRs) > 0 {
		if c.podCIDRs, err = prefixes("--pod-cidr", c.PodCIDRs); err != nil {
			return err
		}
	}
	if len(c.ServiceCIDRs) > 0 {
		if c.serviceCIDRs, err = prefixes("--service-cidr", c.ServiceCIDRs); err != nil {
			return err
		}
	}
	if !c.clusterDNSIs("auto") && !c.clusterDNSIs("off") {
		for _, text := range c.ClusterDNS {
			addr, err := netip.ParseAddr(text)
			if err != nil {
				return fmt.Errorf("--cluster-dns %q: want addresses, auto or off: %w", text, err)
			}
			c.clusterDNS = append(c.clusterDNS, addr.Unmap())
		}
	}
	switch c.Services {
	case "on", "off", "auto":
	default:
		return fmt.Errorf("--services %q: want on, off or auto", c.Services)
	}
	return nil
}

func (c *agentConfig) clusterDNSIs(word string) bool {
	return len(c.ClusterDNS) == 1 && c.ClusterDNS[0] == word
}

func runAgent(ctx context.Context, cfg agentConfig) error {
	log, err := cfg.logger()
	if err != nil {
		return err
	}
	quietLibraries(log)
	frugal()
	if err := lockState(cfg.DataDir); err != nil {
		return err
	}
	client, err := cfg.client()
	if err != nil {
		return err
	}
	n := &node{
		cfg: cfg.nodeConfig, role: roleGuest, client: client, log: log, board: &status.Board{}, started: time.Now(),
		cluster: ranges{pods: cfg.podCIDRs, services: cfg.serviceCIDRs, domain: cfg.ClusterDomain},
	}
	n.guest = &guest{node: n, cfg: cfg}
	if err := n.build(n.newDatapath, n.newExchange, n.newDNS); err != nil {
		return err
	}
	group, ctx := errgroup.WithContext(ctx)
	n.run(ctx, group)
	log.Info("meshd agent runs", "node", cfg.NodeName, "api", client.Host, "kubernetes", os.Getenv("KUBERNETES_SERVICE_HOST") != "")
	notifyReady()
	return group.Wait()
}
