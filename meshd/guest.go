package main

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"meshd.dev/pkg/datapath"
	"meshd.dev/pkg/kube"
	"meshd.dev/pkg/mesh"
	"meshd.dev/pkg/reconcile"
	"meshd.dev/pkg/status"
)

// guest is what a node does in a Kubernetes cluster that somebody else runs,
// beyond what every node does.
type guest struct {
	node *node
	cfg  agentConfig
	// listen is where the resolver was last told to; of serveNames alone.
	listen []netip.Addr
	// entitled: all rights were there once; of checkRights alone.
	entitled bool
	loop     *reconcile.Loop // of check; nil before the node runs
}

// fit changes what the datapath of such a node does otherwise.
func (g *guest) fit(cfg *datapath.Config) {
	cfg.Services = g.cfg.Services != "off"
	if g.cfg.Services == "auto" {
		cfg.Yield = datapath.OtherProxy
	}
	cfg.DeviceServed = !g.cfg.SpawnUserspace
	cfg.ClusterDNS = g.clusterDNS
}

// clusterDNS are the addresses at which this node's resolver stands in for
// the cluster's: every distribution calls that service kube-dns, because
// clients look for it by that name.
func (g *guest) clusterDNS(state *mesh.State) []netip.Addr {
	if g.cfg.clusterDNSIs("off") {
		return nil
	}
	if !g.cfg.clusterDNSIs("auto") {
		return g.cfg.clusterDNS
	}
	for _, s := range state.Services {
		if s.Namespace == "kube-system" && s.Name == "kube-dns" {
			return s.ClusterIPs
		}
	}
	return nil
}

// serveNames has the resolver answer where this state says, and whom.
func (g *guest) serveNames(state *mesh.State) {
	self, _ := state.Node(g.cfg.NodeName)
	listen := self.MeshAddrs()
	if len(listen) > 0 {
		listen = append(listen, g.clusterDNS(state)...)
	}
	if !slices.Equal(listen, g.listen) {
		g.listen = listen
		g.node.dns.SetListen(listen)
	}
	g.node.dns.SetClients(g.podCIDRs(state))
}

// podCIDRs of the whole cluster, as the flag or the nodes say. They may ask
// this node's resolver, and so may this machine itself.
func (g *guest) podCIDRs(state *mesh.State) []netip.Prefix {
	if len(g.cfg.podCIDRs) > 0 {
		return g.cfg.podCIDRs
	}
	all := []netip.Prefix{netip.MustParsePrefix("127.0.0.0/8"), netip.MustParsePrefix("::1/128")} // never empty: that would be everybody
	for _, n := range state.Nodes {
		all = append(all, n.PodCIDRs...)
	}
	return all
}

// addresses of this machine on the underlay: those of the flag, or the Node
// object's.
func (n *node) addresses() []netip.Addr {
	if len(n.cfg.addrs) > 0 {
		return n.cfg.addrs
	}
	if state := n.window.State(); state != nil {
		self, _ := state.Node(n.cfg.NodeName)
		return self.Addresses
	}
	return nil
}

// check looks at what the cluster must give this node, and tells the cluster
// how its network does.
func (g *guest) check(ctx context.Context) error {
	g.checkPodCIDRs()
	err := g.node.window.PublishNetwork(ctx, g.node.cfg.NodeName, g.network())
	g.node.board.Report("kube/condition", err, "Kubernetes may keep pods away from this node; may these credentials patch nodes/status?")
	return err
}

// checkInterval is how soon the Node says what only the board does.
const checkInterval = 5 * time.Second

// parts of such a node, besides those of every one.
func (g *guest) parts() map[string]func(context.Context) error {
	g.loop = reconcile.New(reconcile.Config{Name: "cluster", Do: g.check, Resync: checkInterval, MinBackoff: time.Second, Log: g.node.log})
	g.node.window.Subscribe(g.loop.Kick)
	return map[string]func(context.Context) error{"cluster": g.loop.Run, "rights": every(publishResync, g.checkRights)}
}

// checkRights until there are all of them.
func (g *guest) checkRights(ctx context.Context) {
	if g.entitled {
		return
	}
	err := missingRights(ctx, g.node.api)
	if errors.Is(err, errUnasked) {
		return // kube/sync says that the API is away
	}
	g.node.board.Report("kube/rights", err, "grant them: `kubectl apply -f manifests/base/rbac.yaml` makes the ClusterRole and binds it to the service account meshd/meshd")
	g.entitled = err == nil
}

// checkPodCIDRs: without them no pod can be attached here, and the one who
// gives them is the cluster.
func (g *guest) checkPodCIDRs() {
	state := g.node.window.State()
	if state == nil {
		return // kube/sync says why
	}
	self, ok := state.Node(g.cfg.NodeName)
	switch {
	case !ok:
		g.node.board.Fail("kube/node", fmt.Sprintf("the cluster has no Node %q", g.cfg.NodeName),
			"give the name of this machine's Node object as --node-name; `kubectl get nodes` lists them")
	case len(self.PodCIDRs) == 0:
		g.node.board.Fail("kube/node", fmt.Sprintf("Node %s has no spec.podCIDRs: this cluster gives its nodes no pod ranges, so no pod can be attached here", g.cfg.NodeName),
			"start kube-controller-manager with --allocate-node-cidrs=true and --cluster-cidr=RANGE (kubeadm: networking.podSubnet)")
	default:
		g.node.board.OK("kube/node")
	}
}

// network is the condition of this node: up as soon as the container runtime
// has our configuration, and from then on, whatever meshd is about.
func (g *guest) network() kube.Network {
	n := g.node
	// What keeps the condition from being written is of no use in it.
	checks := slices.DeleteFunc(n.board.Checks(), func(c status.Check) bool { return c.Name == "kube/condition" })
	if _, err := os.Stat(filepath.Join(g.cfg.CNIConfDir, g.cfg.CNIConf)); err != nil {
		return kube.Network{Reason: "MeshdIsNotUp", Message: kube.Short(strings.Join(hindrances(checks), "; "), maxMessage)}
	}
	if path, err := preferred(g.cfg.CNIConfDir, g.cfg.CNIConf); err == nil && path != "" {
		// The other network may well work: nobody is kept away from it.
		return kube.Network{Up: true, Reason: "AnotherNetworkIsPreferred", Message: "meshd is up, but the container runtime attaches pods by " + path}
	}
	return kube.Network{Up: true, Reason: "MeshdIsUp", Message: "meshd attaches pods on this node"}
}

// maxMessage is what a condition's message may take.
const maxMessage = 1024
