package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"

	"meshd.dev/dns/coredns"
	"meshd.dev/dns/index"
	"meshd.dev/pkg/agent"
	"meshd.dev/pkg/agent/runtime"
	"meshd.dev/pkg/cni"
	"meshd.dev/pkg/datapath"
	"meshd.dev/pkg/exchange"
	"meshd.dev/pkg/join"
	"meshd.dev/pkg/kube"
	"meshd.dev/pkg/mesh"
	"meshd.dev/pkg/reconcile"
	"meshd.dev/pkg/status"
)

const (
	// conflistSuffix is how our network configuration is known as ours.
	conflistSuffix = "-meshd.conflist"
	// reinstallInterval is how soon a plugin or a configuration that somebody
	// else removed is back, as an update of a distribution may.
	reinstallInterval = 10 * time.Second
	renewInterval     = time.Hour
	// publishResync is how soon a node record that somebody else changed is
	// put right.
	publishResync = 30 * time.Second
)

// node is the parts of a machine, whatever its role: cluster state, datapath,
// names, pods, and the board that says how they fare.
type node struct {
	cfg     nodeConfig
	role    string
	cluster ranges
	client  *rest.Config
	log     *slog.Logger
	board   *status.Board
	started time.Time

	api    kubernetes.Interface
	window *kube.Window
	// publishing tells the peers of this node.
	publishing *reconcile.Loop
	published  bool            // once; of the loop alone
	mending    *reconcile.Loop // of what leads to pods
	datapath   *datapath.Datapath
	exchange   *exchange.Exchange
	index      *index.Index
	dns        *coredns.Server

	// installed is what pods are attached by; nil before there is a network.
	installing sync.Mutex
	installed  *installation

	// creds and agent are those of a machine that joined; guest is the rest of
	// one whose pods a kubelet runs.
	creds join.Credentials
	agent *agent.Agent
	guest *guest

	witness *witness
}

// ranges is what is the same on every machine of the cluster. Ranges that are
// not known beforehand are read from the cluster's objects.
type ranges struct {
	pods, services []netip.Prefix
	domain         string
}

// newNode builds the parts of a machine that has joined.
func newNode(cfg nodeConfig, role string, log *slog.Logger) (*node, error) {
	n := &node{cfg: cfg, role: role, log: log, board: &status.Board{}, started: time.Now(),
		creds: join.Credentials{Dir: cfg.state("node")}}
	said, err := n.creds.Cluster()
	if err != nil {
		return nil, err
	}
	if n.cluster.pods, err = prefixes("pod CIDRs of the cluster", said.PodCIDRs); err != nil {
		return nil, err
	}
	if n.cluster.services, err = prefixes("service CIDRs of the cluster", said.ServiceCIDRs); err != nil {
		return nil, err
	}
	n.cluster.domain = said.ClusterDomain
	if n.client, err = n.creds.Config(); err != nil {
		return nil, err
	}
	return n, n.build(n.newDatapath, n.newExchange, n.newDNS, n.newAgent)
}

// build makes the window on the cluster, and then the parts that look through
// it.
func (n *node) build(parts ...func() error) error {
	n.client.QPS, n.client.Burst = 100, 200
	n.client.DisableCompression = n.role == roleServer // the API is this very process
	n.client.UserAgent = "meshd/" + version()
	kube.Patient(n.client, func(err error) { n.window.Away(err) }) // nothing is asked before there is one
	var err error
	if n.api, err = kubernetes.NewForConfig(n.client); err != nil {
		return err
	}
	n.window = kube.New(kube.Config{
		Client: n.api, CacheFile: n.cfg.state("node", "state.json"), ServiceCIDRs: n.guest != nil,
		Board: n.board, Log: n.log.With("part", "kube"),
	})
	n.publishing = reconcile.New(reconcile.Config{
		Name: "publish", Do: n.publish, Resync: publishResync, Log: n.log,
		Report: func(err error) {
			n.board.Report("kube/publish", err, "peers cannot reach this node before its key is on its Node object; is the API up?")
		},
	})
	n.window.Subscribe(n.publishing.Kick)
	n.mending = reconcile.New(reconcile.Config{Name: "pod links", Do: n.mend, Settle: mendSettle, Resync: addressResync, Log: n.log})
	n.witness = newWitness(n)
	for _, build := range parts {
		if err := build(); err != nil {
			return err
		}
	}
	return nil
}

func (n *node) newDatapath() error {
	self, err := os.Executable()
	if err != nil {
		return err
	}
	cfg := datapath.Config{
		Node:           n.cfg.NodeName,
		StateDir:       n.cfg.state("node"),
		RunDir:         n.cfg.RunDir,
		ListenPort:     n.cfg.ListenPort,
		Services:       true,
		PodCIDRs:       n.cluster.pods,
		ServiceCIDRs:   n.cluster.services,
		Direct:         n.cfg.direct,
		SpawnUserspace: userspaceCommand(self, n.cfg.NoOffloads),
		Pods:           n.attached,
		NoShortcut:     n.cfg.Shortcut == "off",
		Source:         n.window,
		OnReady:        n.networkReady,
		OnEndpoints:    func() { n.publishing.Kick() },
		OnPodLinks:     n.mending.Kick,
		KeyRotation:    n.cfg.KeyRotation,
		PSK:            n.psk,
		OnKeys:         n.keysChanged,
		Board:          n.board,
		Log:            n.log.With("part", "datapath"),
	}
	if n.guest != nil {
		n.guest.fit(&cfg)
	}
	port := uint16(n.cfg.ListenPort)
	if did, err := datapath.ReservePorts(port, port+1); err != nil {
		n.log.Warn("a connection of this machine may take a port of the tunnels", "err", err)
	} else if did != "" {
		n.log.Info("ports", "did", did)
	}
	if n.datapath, err = datapath.New(cfg); err != nil {
		return err
	}
	n.window.Subscribe(n.datapath.StateChanged)
	return nil
}

// networkReady lets the container runtime attach pods: the plugin first, the
// configuration that calls it last.
func (n *node) networkReady(net datapath.Network) error {
	if n.guest == nil {
		n.dns.SetListen(meshAddrs(net.PodCIDRs))
	}
	err := n.announce(net)
	n.board.Report("cni/conflist", err, "is the container runtime running? else mend what is named; --cni-conf-dir and --cni-bin-dir say other folders")
	if n.guest != nil {
		n.guest.loop.Kick()
	}
	return err
}

func (n *node) announce(net datapath.Network) error {
	conf, bin, err := n.cniFolders()
	if err != nil {
		return err
	}
	n.installing.Lock()
	defer n.installing.Unlock()
	n.installed = &installation{net: net, conf: filepath.Join(conf, n.cfg.CNIConf), bin: bin}
	return n.install()
}

// installation is what is put where for the container runtime.
type installation struct {
	net       datapath.Network
	conf, bin string
}

// reinstall puts back what somebody else removed.
func (n *node) reinstall(context.Context) {
	n.installing.Lock()
	defer n.installing.Unlock()
	if n.installed == nil {
		return // nothing was announced yet
	}
	if err := n.install(); err != nil {
		n.board.Fail("cni/conflist", err.Error(), "mend what is named; nothing new can be attached meanwhile")
		return
	}
	n.board.OK("cni/conflist")
}

// install is for who holds the lock.
func (n *node) install() error {
	i := n.installed
	if _, err := cni.Install(n.cfg.CNIPlugin, i.bin); err != nil {
		return err
	}
	if _, err := cni.InstallLoopback(n.cfg.CNIPlugin, i.bin); err != nil {
		return err
	}
	changed, err := cni.WriteConflist(i.conf, n.network(i.net))
	if changed {
		n.log.Info("pods can be attached", "podCIDRs", i.net.PodCIDRs, "mtu", i.net.MTU, "conflist", i.conf)
	}
	return err
}

// cniFolders are those of the flags, else those the runtime itself names,
// else the usual ones.
func (n *node) cniFolders() (conf, bin string, err error) {
	conf, bin = n.cfg.CNIConfDir, n.cfg.CNIBinDir
	if conf != "" && bin != "" || n.guest != nil {
		return conf, bin, nil
	}
	saidConf, saidBin, err := runtime.CNIFolders(context.Background(), n.cfg.CRI)
	if errors.Is(err, runtime.ErrNoFolders) {
		saidConf, saidBin, err = "/etc/cni/net.d", "/opt/cni/bin", nil
	}
	return cmp.Or(conf, saidConf), cmp.Or(bin, saidBin), err
}

func meshAddrs(podCIDRs []netip.Prefix) []netip.Addr {
	return mesh.Node{PodCIDRs: podCIDRs}.MeshAddrs()
}

func (n *node) newDNS() error {
	var err error
	if n.index, err = index.New(index.Config{Zone: n.cluster.domain}); err != nil {
		return err
	}
	cfg := coredns.Config{Zone: n.cluster.domain, Index: n.index, Clients: n.cluster.pods, Board: n.board, Log: n.log.With("part", "dns")}
	if n.cfg.ResolvConf != "" {
		cfg.ResolvConf = []string{n.cfg.ResolvConf}
	}
	if n.dns, err = coredns.New(cfg); err != nil {
		return err
	}
	n.window.Subscribe(n.names)
	n.names() // what the disk knows
	return nil
}

// names gives the resolver the newest state.
func (n *node) names() {
	state := n.window.State()
	if state == nil {
		return
	}
	n.index.Apply(state)
	if n.guest != nil {
		n.guest.serveNames(state)
	}
}

func (n *node) newAgent() error {
	var err error
	n.agent, err = agent.New(agent.Config{
		NodeName:      n.cfg.NodeName,
		Client:        n.client,
		CRI:           n.cfg.CRI,
		StateDir:      n.cfg.state("agent"),
		NodeIPs:       n.cfg.addrs,
		Labels:        n.cfg.NodeLabels,
		Listen:        fmt.Sprintf(":%d", n.cfg.AgentPort),
		ServingCert:   n.creds.Cert(),
		ServingKey:    n.creds.Key(),
		ClientCA:      n.creds.CA(),
		ClusterDNS:    n.resolvers,
		ClusterDomain: n.cluster.domain,
		Board:         n.board,
		Log:           n.log.With("part", "agent"),
	})
	return err
}

// resolvers are this node's own mesh addresses, where its resolver listens.
func (n *node) resolvers() []netip.Addr {
	state := n.window.State()
	if state == nil {
		return nil
	}
	self, _ := state.Node(n.cfg.NodeName)
	return self.MeshAddrs()
}

// run runs everything until ctx ends or a part fails.
func (n *node) run(ctx context.Context, group *errgroup.Group) {
	n.hostConfig()
	parts := map[string]func(context.Context) error{
		"kube":     n.window.Run,
		"datapath": n.datapath.Run,
		"dns":      n.dns.Run,
		"publish":  n.publishing.Run,
		"exchange": n.exchange.Run,
		"status":   n.serveStatus,
		"sweep":    every(sweepInterval, n.sweep),
		"pods":     n.watchPods,
		"mending":  n.mending.Run,
		"cni":      every(reinstallInterval, n.reinstall),
		"local":    n.witness.local.Run,
		"witness":  n.witness.loop.Run,
	}
	if n.guest != nil {
		maps.Copy(parts, n.guest.parts())
	} else {
		parts["agent"] = n.agent.Run
		parts["renew"] = every(renewInterval, n.renew)
	}
	for name, part := range parts {
		group.Go(func() error {
			if err := part(ctx); err != nil {
				return fmt.Errorf("%s: %w", name, err)
			}
			return nil
		})
	}
}

// publish tells the peers our key and where to reach us, and waits quietly
// for the node to be registered first.
func (n *node) publish(ctx context.Context) error {
	record, known := n.record()
	if !known {
		return nil // the datapath will kick
	}
	if state := n.window.State(); n.published && state != nil { // the watch tells when that is no longer so
		if self, _ := state.Node(n.cfg.NodeName); record.Stands(self) {
			return nil
		}
	}
	err := kube.Publish(ctx, n.api, n.cfg.NodeName, record)
	n.published = err == nil
	return err
}

func (n *node) renew(ctx context.Context) {
	if n.role == roleServer { // the server signs its own at start
		return
	}
	err := n.creds.Renew(ctx)
	n.board.Report("node/certificate", err, "the certificate is good for another half of its life; if this stays, join again with a new token")
}

func every(d time.Duration, do func(context.Context)) func(context.Context) error {
	return func(ctx context.Context) error {
		ticker := time.NewTicker(d)
		defer ticker.Stop()
		for {
			do(ctx)
			select {
			case <-ctx.Done():
				return nil
			case <-ticker.C:
			}
		}
	}
}

func (n *node) serveStatus(ctx context.Context) error {
	return status.Serve(ctx, filepath.Join(n.cfg.RunDir, "meshd.sock"), map[string]func() any{
		"/status": func() any { return n.document() },
		"/plan":   func() any { return n.plan() },
		"/keys":   func() any { return n.keys() },

		"POST /keys/rotate": n.rotate,
	})
}

func (n *node) document() status.Document {
	return status.Document{
		Node: n.cfg.NodeName, Role: n.role, Version: version(), Time: time.Now(), Started: n.started,
		Checks: n.board.Checks(), Tunnels: n.datapath.Tunnels(), Repairs: n.board.Repairs(),
	}
}

// Plan is the answer to /plan.
type plan struct {
	Ops   []string `json:"ops"`
	Error string   `json:"error,omitempty"`
}

func (n *node) plan() plan {
	ops, err := n.datapath.Plan()
	if err != nil {
		return plan{ops, err.Error()}
	}
	return plan{Ops: ops}
}

// lockPatience: the threads of a process that was killed hold its files for a
// moment after it counts as gone.
const lockPatience = 2 * time.Second

// lockState makes sure that one daemon alone works on a state folder. The lock
// goes with the process.
func lockState(dir string) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("state folder: %w", err)
	}
	fd, err := unix.Open(filepath.Join(dir, "lock"), unix.O_CREAT|unix.O_RDWR|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return fmt.Errorf("state folder: open %s/lock: %w", dir, err)
	}
	for end := time.Now().Add(lockPatience); ; time.Sleep(lockPatience / 100) {
		err := unix.Flock(fd, unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			return nil
		}
		if !errors.Is(err, unix.EWOULDBLOCK) || time.Now().After(end) {
			return errors.Join(fmt.Errorf("state folder %s: another meshd works on it; stop that one, or give this one its own --data-dir and --run-dir", dir), unix.Close(fd))
		}
	}
}
