// Package datapath makes this node's kernel carry pod traffic: tunnels to the
// other nodes, routes into them, and the firewall with the services.
//
// Compute turns cluster state into a Wish, purely. A Datapath makes the wish
// true and keeps it true: it looks at the kernel, compares, and does only the
// difference. The packages below it do one subsystem each: wireguard, route,
// firewall.
//
// Order of an Apply: firewall first (it fails closed), then the blackhole
// routes, then the device and its peers, then addresses and routes into it.
// Nothing is taken away when the daemon stops; a starting one adopts what it
// finds.
package datapath

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"

	"meshd.dev/pkg/datapath/firewall"
	"meshd.dev/pkg/datapath/path"
	"meshd.dev/pkg/datapath/route"
	"meshd.dev/pkg/datapath/shortcut"
	"meshd.dev/pkg/datapath/wireguard"
	"meshd.dev/pkg/mesh"
	"meshd.dev/pkg/reconcile"
	"meshd.dev/pkg/status"
)

// Source of cluster state. State is nil until it is known in full.
type Source interface {
	State() *mesh.State
}

// Config of a Datapath. Node, StateDir and Source are required.
type Config struct {
	// Node is the name of this node.
	Node string
	// StateDir holds wireguard.key, the private key of this node.
	StateDir string
	// RunDir holds the log of the userspace process.
	RunDir string
	// Device of the tunnels. Default mesh.Device.
	Device string
	// ListenPort of the tunnels, UDP. Default mesh.ListenPort.
	ListenPort int
	// Services makes this node translate service addresses.
	Services bool
	// Yield, when set, names who else translates service addresses on this
	// machine; empty: nobody. Where somebody does, this node does not. See
	// OtherProxy.
	Yield func() (string, error)
	// ServiceCIDRs, when known, are routed to Device so that service
	// addresses work on nodes without a default route and never leave in
	// clear. Empty: those of the state.
	ServiceCIDRs []netip.Prefix
	// ClusterDNS, when set, says where pods ask names in this state, so that
	// the resolver of this node answers there for as long as it has a socket
	// on the address (see firewall.Config.Resolver).
	ClusterDNS func(*mesh.State) []netip.Addr
	// PodCIDRs of the whole cluster; empty: the union of the nodes'.
	PodCIDRs []netip.Prefix
	// Direct are ranges outside of the cluster that see pods' own addresses.
	Direct []netip.Prefix
	// Keepalive of every peer; 0 sends none. Needed by nodes behind NAT.
	Keepalive time.Duration
	// KeyRotation is how often the node changes its key; 0: when told.
	KeyRotation time.Duration
	// PSK of two keys, see Options. Optional.
	PSK func(node mesh.Node, own, peer mesh.Key) PSK
	// OnKeys is called when Published changed. It must not block. Optional.
	OnKeys func()
	// SpawnUserspace is the command that serves a userspace device; the name
	// of the device is appended: {"/usr/local/bin/meshd", "wireguard"}. Used
	// where the kernel has no WireGuard. Empty: kernel only.
	SpawnUserspace []string
	// DeviceServed says that somebody else starts that process; SpawnUserspace
	// is then for the second device alone, which is there while a key changes.
	DeviceServed bool
	// Pods lists the pods attached on this node, those attached first first;
	// see firewall.New. Their coming and going is seen from the rules, and
	// with the next round at the latest.
	Pods func() ([]mesh.LocalPod, error)
	// NoShortcut between pods of this node; see package shortcut.
	NoShortcut bool
	Source     Source
	// OnReady is called when device, routes and firewall stand and this node
	// has pod CIDRs, and again whenever the Network changes. An error is
	// retried.
	OnReady func(Network) error
	// OnPodLinks is called when something that leads to a pod of this node may
	// have been taken away: a route, a neighbour, or its link is down. It must
	// not block. Optional.
	OnPodLinks func()
	// OnEndpoints is called when Endpoints may have changed. It must not block.
	OnEndpoints func()
	Board       *status.Board
	Log         *slog.Logger
}

// Network is what the CNI plugin of this node needs to attach pods.
type Network struct {
	PodCIDRs []netip.Prefix
	MTU      int
}

func (c *Config) setDefaults() error {
	c.Device = cmp.Or(c.Device, mesh.Device)
	c.ListenPort = cmp.Or(c.ListenPort, mesh.ListenPort)
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	switch {
	case c.Node == "":
		return errors.New("datapath: no node name")
	case c.StateDir == "":
		return errors.New("datapath: no state folder")
	case c.Source == nil:
		return errors.New("datapath: no source of state")
	}
	return nil
}

// Datapath keeps this node's kernel as the cluster state wants it. Use New.
// Its methods may be called from any goroutine.
type Datapath struct {
	cfg      Config
	device   *wireguard.Device
	second   *wireguard.Device
	firewall *firewall.Table
	routes   *route.Table
	underlay *route.Underlay
	shortcut *shortcut.Shortcut
	loop     *reconcile.Loop
	mtu      atomic.Int64
	tunnels  tunnels
	rotation rotation
	paths    *path.Paths
	// wished is the newest wish, true whether it came true as a whole.
	wished atomic.Pointer[Wish]
	true   atomic.Bool
	dirty  atomic.Uint32 // a dirt
	paired pairs

	// Of the loop alone. last is nil when the last round did not come true.
	begun     bool // something of ours is on this machine
	memo      memo
	last      *followed
	dealt     *mesh.State // with, in the last round
	announced Network
	endpoints []netip.AddrPort
	toldOnce  bool
	timer     *time.Timer // of the second look for flows
	whole     *time.Timer // of the next whole round
	pace      *time.Timer // of the next look at sessions, while a key changes
	moved     time.Time   // when another wish was the last one

	other other
}

// dirt is what may have changed since the last round. Without any a round
// looks at everything.
type dirt uint32

const (
	// anything: look at everything.
	anything dirt = 1 << iota
	// stateDirt: the State and nothing else; podsDirt: the firewall, for the
	// pods or for flows that are to be looked for again; pathsDirt: which way
	// peers are reached; pskDirt: the preshared keys with the nodes of paired.
	stateDirt
	podsDirt
	pathsDirt
	pskDirt
)

// rest between two rounds, during which what changes is gathered.
const rest = 5 * time.Millisecond

// resync is the longest time until something is noticed that neither an event
// of the kernel nor look tells of.
const resync = 10 * time.Second

// New loads or makes the private key; nothing in the kernel changes yet.
func New(cfg Config) (*Datapath, error) {
	if err := cfg.setDefaults(); err != nil {
		return nil, err
	}
	d := &Datapath{cfg: cfg, firewall: firewall.New(cfg.Log, cfg.Pods), routes: route.New(cfg.Log), underlay: route.NewUnderlay(cfg.Device)}
	device, err := wireguard.New(wireguard.Options{
		Name: cfg.Device, StateDir: cfg.StateDir, LogDir: cfg.RunDir, SpawnUserspace: cfg.SpawnUserspace, Served: cfg.DeviceServed,
		Died: d.Kick, Log: cfg.Log,
	})
	if err != nil {
		return nil, fmt.Errorf("datapath: %w", err)
	}
	d.device, d.second = device, device.Second(cfg.Device+mesh.SecondSuffix)
	d.paths = path.New(path.Config{Changed: func() { d.kick(pathsDirt) }, Log: cfg.Log,
		Repaired: func(node, what string) { cfg.Board.Repaired("tunnel/"+node, what) }})
	d.shortcut = shortcut.New(shortcut.Config{Off: cfg.NoShortcut, Pods: cfg.Pods, Board: cfg.Board, Log: cfg.Log})
	d.loop = reconcile.New(reconcile.Config{Name: "datapath", Do: d.apply, Rest: rest, Resync: resync, Log: cfg.Log})
	if old := device.CorruptKey(); old != "" {
		cfg.Log.Error("private key was corrupt", "moved to", old)
		cfg.Board.Fail("datapath/key", "the private key file was corrupt; it was moved to "+old+" and a new key was made",
			"look why the disk lost it; peers learn the new key by themselves, and this line goes away with the next start")
	}
	return d, nil
}

// Kick says that something changed. It never blocks.
func (d *Datapath) Kick() { d.kick(anything) }

// StateChanged says that the State did, and PodsChanged that Config.Pods did.
// Either is a Kick that costs what changed.
func (d *Datapath) StateChanged() { d.kick(stateDirt) }
func (d *Datapath) PodsChanged()  { d.kick(podsDirt) }

// PSKChanged says that Config.PSK has another answer for a node. That costs as
// much as a change of that node.
func (d *Datapath) PSKChanged(node string) {
	d.paired.add(node)
	d.kick(pskDirt)
}

// pairs are nodes with which the preshared key is another one.
type pairs struct {
	mu    sync.Mutex
	nodes map[string]bool
}

func (p *pairs) add(node string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.nodes == nil {
		p.nodes = map[string]bool{}
	}
	p.nodes[node] = true
}

// take all: the round that begins deals with them.
func (p *pairs) take() (nodes map[string]bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	nodes, p.nodes = p.nodes, nil
	return nodes
}

func (d *Datapath) kick(what dirt) {
	d.dirty.Or(uint32(what))
	d.loop.Kick()
}

// kickAll is for events of the kernel that are not of our own making.
func (d *Datapath) kickAll() {
	d.underlay.Forget()
	d.kick(anything)
}

// PublicKey of this node; others need it before they can talk to us.
func (d *Datapath) PublicKey() mesh.Key { return d.device.PublicKey() }

// MTU of the device as last applied; 0 before.
func (d *Datapath) MTU() int { return int(d.mtu.Load()) }

// Run applies the state, again on every Kick and whenever somebody else
// changes what is ours, until ctx ends. The device and all rules stay.
func (d *Datapath) Run(ctx context.Context) error {
	d.timer = time.AfterFunc(time.Hour, d.PodsChanged)
	defer d.timer.Stop()
	d.pace = time.AfterFunc(time.Hour, d.Kick)
	defer d.pace.Stop()
	d.whole = time.AfterFunc(time.Hour, d.kickAll)
	defer d.whole.Stop()
	defer d.close()
	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error { return d.watch(ctx) })
	group.Go(func() error { return d.watchPassage(ctx) })
	group.Go(func() error { return watchPods(ctx, d.cfg.OnPodLinks, d.cfg.Log) })
	group.Go(func() error { return d.loop.Run(ctx) })
	group.Go(func() error { return d.paths.Run(ctx) })
	group.Go(func() error { return d.look(ctx) })
	group.Go(func() error { return d.shortcut.Run(ctx) })
	return group.Wait()
}

// close the sockets that rounds keep open.
func (d *Datapath) close() {
	d.firewall.Close()
	_ = d.routes.Close()
	d.underlay.Close()
	d.device.Close()
	d.second.Close()
}

// Plan lists what Run would do now, as the commands a person would type.
// Nothing changes.
func (d *Datapath) Plan() ([]string, error) {
	state := d.cfg.Source.State()
	if state == nil {
		return nil, errNoState
	}
	keys, over := d.device.Ring().Keys(), map[string]bool(nil)
	if others, changing := d.others(state, keys); changing {
		over = overSecond(keys, others, d.sessions(keys), time.Now())
	}
	c, err := d.compute(state, keys, over, nil)
	if err != nil {
		return nil, err
	}
	wish := c.wish
	fw, err1 := d.firewall.Plan(wish.Firewall)
	wg, err2 := d.device.Plan(wish.WireGuard)
	second, err3 := d.planSecond(wish)
	rt, err4 := d.routes.Plan(wish.Route)
	short, err5 := d.shortcut.Plan()
	return slices.Concat(fw, wg, second, rt, short), errors.Join(err1, err2, err3, err4, err5)
}

func (d *Datapath) planSecond(wish Wish) ([]string, error) {
	if wish.Second == nil {
		return d.second.PlanRemove()
	}
	return d.second.Plan(*wish.Second)
}

// errNoState: nothing may be decided, least of all what to remove.
var errNoState = errors.New("the state of the cluster is not known yet")

func (d *Datapath) clusterDNS(state *mesh.State) []netip.Addr {
	if d.cfg.ClusterDNS == nil {
		return nil
	}
	return d.cfg.ClusterDNS(state)
}

func (d *Datapath) compute(state *mesh.State, keys wireguard.Keys, over map[string]bool, m *memo) (computation, error) {
	return compute(state, d.cfg.Node, Options{
		ClusterDNS: d.clusterDNS(state),
		Device:     d.cfg.Device, ListenPort: d.cfg.ListenPort, Services: d.cfg.Services && !d.yields(),
		ServiceCIDRs: d.cfg.ServiceCIDRs, PodCIDRs: d.cfg.PodCIDRs, Direct: d.cfg.Direct, Keepalive: d.cfg.Keepalive,
		PathMTU: d.underlay.PathMTU,
		LinkMTU: d.underlay.DefaultMTU(), OwnAddresses: d.underlay.OwnAddresses(),
		Paths: d.paths.Choices(),
		Keys:  keys, Second: d.cfg.Device + mesh.SecondSuffix, OverSecond: over, PSK: d.cfg.PSK, OnDevice: d.onDevice(),
		memo: m,
	})
}

// onDevice looks at the device when it is asked first.
func (d *Datapath) onDevice() func(mesh.Key) bool {
	peers := sync.OnceValue(func() map[mesh.Key]wireguard.Stats {
		stats, _, _ := d.device.Stats() // none: nothing to keep
		return stats
	})
	return func(k mesh.Key) bool { _, ok := peers()[k]; return ok }
}

// stillOnDevice is onDevice for a round that only follows: as far as is known.
// To read a thousand peers takes ten times as long as all the rest.
func (d *Datapath) stillOnDevice() func(mesh.Key) bool {
	read := d.onDevice()
	return func(k mesh.Key) bool {
		if has, known := d.device.Has(k); known {
			return has
		}
		return read(k)
	}
}

// apply is one round. The parts do not wait for each other's success, except
// that nothing is announced before all stand.
func (d *Datapath) apply(ctx context.Context) error {
	what := dirt(d.dirty.Swap(0))
	paired := d.paired.take()
	state := d.cfg.Source.State()
	if state == nil {
		d.cfg.Board.Fail("datapath/state", errNoState.Error(), "wait for the API server, or look why it cannot be reached")
		return nil // whoever has it will kick
	}
	if what != 0 && what&anything == 0 {
		if done, err := d.follow(ctx, state, what, paired); done {
			return err
		}
	}
	return d.applyAll(ctx, state)
}

// applyAll is a whole round: everything is computed and read.
func (d *Datapath) applyAll(ctx context.Context, state *mesh.State) error {
	began := time.Now()
	if d.whole != nil {
		d.whole.Reset(resync)
	}
	d.last = nil
	keys, over, err := d.turn(ctx, state, began)
	d.reportKeys(err)
	if err != nil {
		return err
	}
	c, err := d.compute(state, keys, over, &d.memo)
	d.cfg.Board.Report("datapath/state", err, "change the pod CIDRs, then restart meshd")
	if err != nil {
		return err
	}
	wish := c.wish
	d.movedAway()
	var held *Wish // what held until now
	if d.true.Swap(false) {
		held = d.wished.Load()
	}
	if held == nil || !held.same(wish) {
		d.moved = began
	}
	if ok, err := d.begin(wish); !ok {
		return err
	}
	err = d.applyFirewall(ctx, wish)
	if err != nil && !d.begun {
		return err // no tunnel without a firewall
	}
	d.begun = true
	routes, err2 := d.applyLinks(ctx, wish)
	d.told(state, "whole", began, len(routes)+d.device.Did())
	d.became(wish)
	d.repaired(held, wish, routes)
	d.report(d.Tunnels())
	if err := errors.Join(err, err2); err != nil {
		return err
	}
	d.last = &followed{state, c}
	d.cameTrue(keys, &wish)
	if wish.Second != nil && d.pace != nil {
		d.pace.Reset(nextLook(began.Sub(d.moved), time.Since(began)))
	}
	d.mtu.Store(int64(wish.WireGuard.MTU))
	return d.announce(Network{PodCIDRs: wish.PodCIDRs, MTU: wish.WireGuard.MTU})
}

// begin reports whether to go on. A machine that has nothing of ours gets
// nothing before it can have all of it: a table without a tunnel, or a tunnel
// for no pods, would be in the way of whatever network it has.
func (d *Datapath) begin(wish Wish) (bool, error) {
	if d.begun {
		return true, nil
	}
	there, err := firewall.Exists()
	d.reportFirewall(err)
	if err != nil || there {
		d.begun = there
		return there, err
	}
	if len(wish.PodCIDRs) == 0 {
		return false, nil // who waits for them says so, and the state will kick
	}
	err = d.device.Possible()
	d.reportDevice(err)
	return err == nil, err
}

func (d *Datapath) reportFirewall(err error) {
	d.cfg.Board.Report("datapath/firewall", err, "see `nft list table inet meshd`, and whether the kernel has nf_tables with nat, fib and numgen, and socket unless --cluster-dns=off")
}

func (d *Datapath) reportDevice(err error) {
	d.cfg.Board.Report("datapath/device", err, fmt.Sprintf("see `wg show %s` and the log in %s", d.cfg.Device, d.cfg.RunDir))
}

// became tells those who look at the peers what is wished of them now.
func (d *Datapath) became(wish Wish) {
	d.wished.Store(&wish)
	d.tunnels.set(wish)
	d.paths.Set(wish.Targets, wish.Own)
}

func (d *Datapath) cameTrue(keys wireguard.Keys, wish *Wish) {
	d.true.Store(true)
	if d.rotation.done(keys, *wish) && d.cfg.OnKeys != nil {
		d.cfg.OnKeys()
	}
}

func (d *Datapath) applyFirewall(ctx context.Context, wish Wish) error {
	again, err := d.firewall.Apply(ctx, wish.Firewall)
	d.reportFirewall(err)
	if !again.IsZero() && d.timer != nil {
		d.timer.Reset(time.Until(again))
	}
	if err == nil {
		d.shortcut.Kick()
	}
	return err
}

// applyLinks lays the blackholes before there is a device to go around. What
// is sent over the second device is moved away from it before it goes.
func (d *Datapath) applyLinks(ctx context.Context, wish Wish) (did []string, err error) {
	did, routes := d.routes.Apply(wish.Route)
	device := d.device.Apply(ctx, wish.WireGuard)
	d.reportDevice(device)
	if wish.Second != nil {
		// Without it keys cannot change; all else goes on.
		err := d.second.Apply(ctx, *wish.Second)
		d.cfg.Board.Report("datapath/second", err, "another node's key cannot change before this stands: see the log of meshd and what listens on UDP port "+fmt.Sprint(d.SecondPort()))
	}
	if errors.Is(routes, route.ErrNoDevice) || wish.Second != nil {
		var more []string
		more, routes = d.routes.Apply(wish.Route)
		did = append(did, more...)
	}
	if wish.Second == nil && routes == nil {
		device = errors.Join(device, d.second.Remove(ctx))
		d.cfg.Board.Clear("datapath/second")
	}
	d.cfg.Board.Report("datapath/routes", routes, fmt.Sprintf("see `ip route show proto %d` and `ip address show %s`", mesh.RouteProtocol, d.cfg.Device))
	return did, errors.Join(device, routes)
}

// announce tells the CNI side what it may use, whenever that changed.
func (d *Datapath) announce(n Network) error {
	same := d.toldOnce && n.MTU == d.announced.MTU && slices.Equal(n.PodCIDRs, d.announced.PodCIDRs)
	if d.cfg.OnReady == nil || len(n.PodCIDRs) == 0 || same {
		return nil
	}
	if err := d.cfg.OnReady(n); err != nil {
		return fmt.Errorf("announce pod network: %w", err)
	}
	d.announced, d.toldOnce = Network{slices.Clone(n.PodCIDRs), n.MTU}, true
	return nil
}
