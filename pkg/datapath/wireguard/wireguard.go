// Package wireguard keeps one WireGuard device as wished: its key, port, MTU
// and peers. Kernel and userspace devices go through the same door, wgctrl.
//
// Only differences are sent. A peer that did not change keeps its session;
// peers and allowed IPs are never replaced as a whole, because both open a
// gap in which packets are lost. An allowed IP that is wanted by another peer
// moves there in one step; one that nobody wants is moved to a throw-away
// peer, which is then removed. The endpoint of a peer is set when the wish
// for it changed, or when the tunnel has been silent for SessionLife and the
// endpoint is not the wished one: a peer that roamed is followed meanwhile.
//
// The device outlives the daemon. Where the kernel has no WireGuard, the
// device is served by a process of its own (package userspace), started in
// its own session, which is adopted when it is there and started again when
// it died, with the same link (process.go).
package wireguard

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.zx2c4.com/wireguard/wgctrl"
	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	"meshd.dev/pkg/mesh"
)

// SessionLife is how long WireGuard keeps a session without a new handshake
// (REJECT_AFTER_TIME in its specification).
const SessionLife = 180 * time.Second

// Config of the device: nothing less, nothing more.
type Config struct {
	ListenPort int
	MTU        int
	Peers      []Peer
	// Addrs that the link gets before it is up, and nobody takes away here.
	// Without one Linux refuses IPv4 packets to whose sender another link
	// leads (rp_filter, be it ever so loose), and the first peer with a session
	// may send at once.
	Addrs []netip.Addr
}

// Peer is another node.
type Peer struct {
	Name string
	Key  mesh.Key
	// Endpoint on the underlay; not valid: whatever the peer calls from.
	Endpoint netip.AddrPort
	// AllowedIPs are whole pod CIDRs, never single pods.
	AllowedIPs []netip.Prefix
	// Keepalive 0 means none, KeepaliveAsIs what it is already.
	Keepalive time.Duration
	// PSK is mixed into each handshake; zero: none.
	PSK Secret
	// Fresh and Anew are numbers. With another Fresh a session begins while
	// the one there is goes on, where the device can do that: the kernel's
	// cannot. With another Anew the peer is removed and added again, and what
	// is under way in the old session is lost. FreshAsIs in Fresh leaves the
	// session alone, whatever Anew says.
	Fresh, Anew int
}

// FreshAsIs leaves the session of a peer alone, and with the next number it is
// left alone as well: what is counted meanwhile is another tunnel's.
const FreshAsIs = -1

// begun are the numbers of the sessions last begun with a peer.
type begun struct{ fresh, anew int }

// KeepaliveAsIs leaves the keepalive of a peer alone.
const KeepaliveAsIs time.Duration = -1

// Secret is a preshared key. It does not print.
type Secret [32]byte

// String hides the key.
func (s Secret) String() string {
	if s.IsZero() {
		return "(none)"
	}
	return "(hidden)"
}

// GoString hides it from %#v as well.
func (s Secret) GoString() string { return s.String() }

// IsZero reports whether there is none.
func (s Secret) IsZero() bool { return s == Secret{} }

// Options of a Device. Name and StateDir are required.
type Options struct {
	Name string
	// StateDir holds wireguard.key.
	StateDir string
	// LogDir takes the log of a userspace process; empty: its output is lost.
	LogDir string
	// SpawnUserspace is the command of a userspace device, without its name.
	SpawnUserspace []string
	// Served says that somebody else starts the process of the device Name;
	// SpawnUserspace is then for its Second alone.
	Served bool
	// Died, if there is one, is called when a process has ended that Apply
	// starts again. It must not wait for a method of the Device.
	Died func()
	Log  *slog.Logger
}

// Device is one WireGuard device. Use New. Its methods may be called from any
// goroutine.
type Device struct {
	opts   Options
	ring   *Ring
	second bool

	mu sync.Mutex
	// wished endpoints as last applied, by peer.
	wished map[mesh.Key]netip.AddrPort
	// fresh are the numbers of sessions last begun, by peer.
	fresh map[mesh.Key]begun
	// last is what was last applied as a whole, drift what the device had
	// lost of it before the last Apply.
	last  *Config
	drift []string
	did   int // ops of the last Apply or Follow
	// have is what the device is as far as it was read and changed since; nil:
	// not known. changes counts what may have changed it.
	have    *state
	changes int
	control *wgctrl.Client // opened at first use; nil after an error
	// questions have a lock of their own.
	questions questions
	// child is the userspace process we started, 0 if none or adopted; holder
	// has either.
	child  int
	holder holder
	keyed  time.Time
}

// New loads or makes the private key.
func New(opts Options) (*Device, error) {
	if opts.Log == nil {
		opts.Log = slog.New(slog.DiscardHandler)
	}
	ring, err := OpenRing(opts.StateDir)
	if err != nil {
		return nil, err
	}
	return &Device{opts: opts, ring: ring, wished: map[mesh.Key]netip.AddrPort{}, fresh: map[mesh.Key]begun{}}, nil
}

// Second is another device of the same node, which has the next key while the
// node changes its key.
func (d *Device) Second(name string) *Device {
	opts := d.opts
	opts.Name = name
	return &Device{opts: opts, ring: d.ring, second: true, wished: map[mesh.Key]netip.AddrPort{}, fresh: map[mesh.Key]begun{}}
}

func (d *Device) spawnCommand() []string {
	if d.opts.Served && !d.second {
		return nil
	}
	return d.opts.SpawnUserspace
}

// Ring of the node's private keys.
func (d *Device) Ring() *Ring { return d.ring }

// PublicKey of the device.
func (d *Device) PublicKey() mesh.Key { return mesh.Key(d.ring.secret(d.second).PublicKey()) }

// CorruptKey is where a corrupt private key file was put, or empty.
func (d *Device) CorruptKey() string { return d.ring.SetAside() }

// Keyed is when this process set the private key of a device that was there
// already; zero if it did not. Sessions made before it are dead.
func (d *Device) Keyed() time.Time {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.keyed
}

// Remove takes the device away, if it is there.
func (d *Device) Remove(ctx context.Context) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	op := deleteOp{d.opts.Name}
	there, err := d.exists()
	if err != nil || !there {
		d.bury() // what was taken away a round ago
		return err
	}
	if err := op.do(ctx, d); err != nil {
		return fmt.Errorf("%s: %w", op, err)
	}
	clear(d.wished)
	d.changed(op)
	d.holder.letGo()
	d.opts.Log.Info("wireguard", "did", op.String())
	return nil
}

// PlanRemove lists what Remove would do.
func (d *Device) PlanRemove() ([]string, error) {
	if there, err := d.exists(); err != nil || !there {
		return nil, err
	}
	return []string{deleteOp{d.opts.Name}.String()}, nil
}

// Apply makes cfg so.
func (d *Device) Apply(ctx context.Context, cfg Config) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.reap()
	have, err := d.read()
	if err != nil {
		return err
	}
	if d.drift = nil; d.last != nil {
		d.drift = d.lost(*d.last, have)
	}
	d.last, d.have = nil, &have
	err = d.do(ctx, d.diff(cfg, have, time.Now()))
	d.hold()
	if err == nil {
		d.last = &cfg
		clear(d.wished)
		clear(d.fresh)
		for _, p := range cfg.Peers {
			d.remember(p)
		}
	}
	return err
}

// hold the process that serves the device, if it would be ours to start it
// again. Without that it is still noticed when it is gone, and its link with it.
func (d *Device) hold() {
	if len(d.spawnCommand()) == 0 {
		return
	}
	if err := d.holder.hold(d.opts.Name, d.opts.Died); err != nil {
		d.opts.Log.Debug("hold the process of the device", "device", d.opts.Name, "err", err)
	}
}

// do the ops in order.
func (d *Device) do(ctx context.Context, ops []op) error {
	var errs []error
	d.did = len(ops)
	for _, op := range ops {
		if _, knocks := op.(knockOp); knocks && d.child != 0 {
			continue // a process of ours greets whom it is told of
		}
		err := op.do(ctx, d)
		d.changed(op)
		if err != nil {
			d.have = nil
			errs = append(errs, fmt.Errorf("%s: %w", op, err))
			if op.vital() {
				break
			}
			continue
		}
		d.opts.Log.Info("wireguard", "did", op.String())
	}
	return errors.Join(errs...)
}

// remember what was applied to a peer.
func (d *Device) remember(p Peer) {
	d.wished[p.Key] = p.Endpoint
	if p.Fresh != FreshAsIs {
		d.fresh[p.Key] = begun{p.Fresh, p.Anew}
	}
}

// Drift lists what the last Apply would have had to do if nothing else had
// been wished since the one before: what somebody else has changed.
func (d *Device) Drift() []string {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.drift
}

// Did counts what the last Apply or Follow did.
func (d *Device) Did() int {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.did
}

// Plan lists what Apply would do.
func (d *Device) Plan(cfg Config) ([]string, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	have, err := d.read()
	if err != nil {
		return nil, err
	}
	return d.plan(cfg, have), nil
}

func (d *Device) plan(cfg Config, have state) []string {
	return printed(d.diff(cfg, have, time.Now()))
}

// lost is what have lacks of cfg, which was applied, by somebody else's doing.
// That a peer roamed is its own; at no time at all it has not been silent since.
func (d *Device) lost(cfg Config, have state) []string {
	return printed(d.diff(cfg, have, time.Time{}))
}

func printed(ops []op) (lines []string) {
	for _, op := range ops {
		lines = append(lines, op.String())
	}
	return lines
}

// Look reads the device once: the counters of its peers, and what Apply would
// do.
func (d *Device) Look(cfg Config) (map[mesh.Key]Stats, []string, error) {
	d.mu.Lock()
	changes := d.changes
	d.mu.Unlock()
	have, err := d.read() // takes a while with many peers, and nobody waits for it
	if err != nil {
		return nil, nil, err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.changes != changes { // changed while it was read: the next look tells
		return have.stats(), nil, nil
	}
	d.have = &have
	return have.stats(), d.plan(cfg, have), nil
}

// Backend of a device.
type Backend string

const (
	Kernel    Backend = "kernel"
	Userspace Backend = "userspace"
)

// Stats of a peer, as the device counts them.
type Stats struct {
	Endpoint  netip.AddrPort
	Handshake time.Time
	Rx, Tx    int64
}

// Stats of every peer the device knows; ErrNoDevice without one.
func (d *Device) Stats() (map[mesh.Key]Stats, Backend, error) {
	have, err := d.read()
	if err != nil {
		return nil, "", err
	}
	if have.backend == "" {
		return nil, "", ErrNoDevice
	}
	return have.stats(), have.backend, nil
}

func (s state) stats() map[mesh.Key]Stats {
	stats := make(map[mesh.Key]Stats, len(s.peers))
	for k, p := range s.peers {
		stats[k] = p.Stats
	}
	return stats
}

// ErrNoDevice: there is no such device yet.
var ErrNoDevice = errors.New("device does not exist")

// state is what the device is.
type state struct {
	backend Backend // empty: no device
	up      bool
	mtu     int
	key     wgtypes.Key
	port    int
	mark    int
	peers   map[mesh.Key]peer
}

type peer struct {
	Stats
	allowed   []netip.Prefix
	keepalive time.Duration
	psk       Secret
}

// op is one change, printed as the command a person would type. When a vital
// one fails, the rest makes no sense.
type op interface {
	String() string
	do(context.Context, *Device) error
	vital() bool
}

// diff: the device, then what is added or moved, then what is removed.
func (d *Device) diff(cfg Config, have state, now time.Time) []op {
	ops := d.setDevice(cfg, have)
	for _, p := range cfg.Peers {
		old, known := have.peers[p.Key]
		if op := d.setPeer(p, old, known, have.backend, now); op != nil {
			ops = append(ops, *op)
		}
	}
	ops = append(ops, d.unset(cfg, have)...)
	if have.backend == "" && (!d.ring.Fresh() || len(d.wished) > 0) {
		// The others may still use the sessions of the device that died. They
		// cannot when they never heard of our key, and then a handshake would
		// only be lost and be in the way of the next for five seconds.
		knock := knockOp{name: d.opts.Name}
		for _, p := range cfg.Peers {
			if p.Endpoint.IsValid() {
				knock.peers = append(knock.peers, p)
			}
		}
		if len(knock.peers) > 0 {
			ops = append(ops, knock)
		}
	}
	return ops
}

// setDevice makes the link and what is the device's own.
func (d *Device) setDevice(cfg Config, have state) (ops []op) {
	name := d.opts.Name
	fresh := have.backend == ""
	if fresh {
		ops = append(ops, createOp{name: name, mtu: cfg.MTU, spawn: d.spawnCommand()})
	}
	if op := d.setIdentity(cfg, have); op != nil {
		ops = append(ops, *op)
	}
	if fresh || have.mtu != cfg.MTU {
		ops = append(ops, mtuOp{name, cfg.MTU})
	}
	if fresh || !have.up {
		ops = append(ops, upOp{name, cfg.Addrs})
	}
	return ops
}

// setIdentity names only what differs: a userspace device binds its socket
// anew for a port it is told, even if it is the one it has.
func (d *Device) setIdentity(cfg Config, have state) *identityOp {
	op, differs := identityOp{name: d.opts.Name, file: currentFile}, false
	if d.second && d.ring.Keys().Stage() != Steady {
		op.file = nextFile
	}
	if key := d.ring.secret(d.second); have.key != key {
		op.key, op.old, differs = &key, have.backend != "", true
	}
	if have.port != cfg.ListenPort {
		op.port, differs = &cfg.ListenPort, true
	}
	if have.mark != 0 {
		op.mark, differs = new(int), true
	}
	if !differs {
		return nil
	}
	return &op
}

// unset takes away allowed IPs and peers nobody wants.
func (d *Device) unset(cfg Config, have state) (ops []op) {
	wanted := map[mesh.Key]bool{}
	owned := map[netip.Prefix]bool{}
	for _, p := range cfg.Peers {
		wanted[p.Key] = true
		for _, a := range p.AllowedIPs {
			owned[a] = true
		}
	}
	var stray []netip.Prefix
	var gone []op
	for _, k := range sortedKeys(have.peers) {
		if !wanted[k] {
			gone = append(gone, removeOp{d.opts.Name, k})
			continue
		}
		for _, a := range have.peers[k].allowed {
			if !owned[a] {
				stray = append(stray, a)
			}
		}
	}
	if len(stray) > 0 {
		ops = append(ops, strayOp{d.opts.Name, stray})
	}
	return append(ops, gone...)
}

// setPeer is the op that makes old into p, or nil.
func (d *Device) setPeer(p Peer, old peer, known bool, on Backend, now time.Time) *peerOp {
	last, remembered := d.fresh[p.Key]
	fresh := known && remembered && p.Fresh != FreshAsIs && last != begun{p.Fresh, p.Anew}
	again := fresh && (last.anew != p.Anew || on == Kernel)
	if again {
		old, known = peer{}, false
	}
	op := peerOp{name: d.opts.Name, peer: p.Name, key: p.Key, added: !known, again: again}
	if p.Endpoint.IsValid() && p.Endpoint != old.Endpoint {
		before, remembered := d.wished[p.Key]
		changed := remembered && before != p.Endpoint
		silent := old.Handshake.IsZero() || now.Sub(old.Handshake) > SessionLife
		if !known || !old.Endpoint.IsValid() || changed || silent {
			op.endpoint = p.Endpoint
		}
	}
	if fresh && !again { // a userspace device calls at an endpoint that it is told
		op.endpoint = p.Endpoint
		if !op.endpoint.IsValid() {
			op.endpoint = old.Endpoint
		}
	}
	for _, a := range p.AllowedIPs {
		if !slices.Contains(old.allowed, a) {
			op.allow = append(op.allow, a)
		}
	}
	if p.Keepalive != old.keepalive && p.Keepalive != KeepaliveAsIs {
		op.keepalive = &p.Keepalive
	}
	if p.PSK != old.psk {
		op.psk = &p.PSK
	}
	if known && !op.endpoint.IsValid() && len(op.allow) == 0 && op.keepalive == nil && op.psk == nil {
		return nil
	}
	return &op
}

func sortedKeys[V any](m map[mesh.Key]V) []mesh.Key {
	keys := make([]mesh.Key, 0, len(m))
	for k := range m {
		keys = append(keys, k)
	}
	slices.SortFunc(keys, func(a, b mesh.Key) int { return cmp.Compare(a.String(), b.String()) })
	return keys
}

type createOp struct {
	name  string
	mtu   int
	spawn []string
}

func (o createOp) vital() bool { return true }
func (o createOp) String() string {
	s := "ip link add " + o.name + " type wireguard"
	if len(o.spawn) > 0 {
		s += " || " + strings.Join(o.spawn, " ") + " " + o.name + " &"
	}
	return s
}

// identityOp sets the private key, the port or the mark of the device. An old
// device had another key before.
type identityOp struct {
	name, file string
	key        *wgtypes.Key
	port, mark *int
	old        bool
}

func (o identityOp) vital() bool { return true }
func (o identityOp) String() string {
	s := "wg set " + o.name
	if o.key != nil {
		s += " private-key " + o.file
	}
	if o.port != nil {
		s += fmt.Sprintf(" listen-port %d", *o.port)
	}
	if o.mark != nil {
		s += fmt.Sprintf(" fwmark %d", *o.mark)
	}
	return s
}

type deleteOp struct{ name string }

func (o deleteOp) vital() bool    { return true }
func (o deleteOp) String() string { return "ip link del " + o.name }

type mtuOp struct {
	name string
	mtu  int
}

func (o mtuOp) vital() bool    { return false }
func (o mtuOp) String() string { return fmt.Sprintf("ip link set %s mtu %d", o.name, o.mtu) }

type upOp struct {
	name  string
	addrs []netip.Addr
}

func (o upOp) vital() bool { return true }
func (o upOp) String() string {
	text := ""
	for _, a := range o.addrs {
		text += fmt.Sprintf("ip address replace %s/%d dev %s; ", a, a.BitLen(), o.name)
	}
	return text + "ip link set " + o.name + " up"
}

// peerOp adds to a peer, or begins anew with it; otherwise it never takes
// away.
type peerOp struct {
	name, peer string
	key        mesh.Key
	added      bool
	again      bool // remove it first: its session begins anew
	endpoint   netip.AddrPort
	allow      []netip.Prefix
	keepalive  *time.Duration
	psk        *Secret
}

func (o peerOp) vital() bool { return false }
func (o peerOp) String() string {
	s := fmt.Sprintf("wg set %s peer %s", o.name, o.key)
	if o.again {
		s += fmt.Sprintf(" remove peer %s", o.key)
	}
	switch {
	case o.psk == nil:
	case o.psk.IsZero():
		s += " preshared-key /dev/null"
	default:
		s += " preshared-key (hidden)"
	}
	if o.endpoint.IsValid() {
		s += " endpoint " + o.endpoint.String()
	}
	if o.keepalive != nil {
		s += fmt.Sprintf(" persistent-keepalive %d", int(o.keepalive.Seconds()))
	}
	if len(o.allow) > 0 {
		s += " allowed-ips +" + join(o.allow, ",+")
	}
	return s + " # " + o.peer
}

// strayOp takes away allowed IPs nobody shall have, by way of a throw-away
// peer: wgctrl cannot remove one otherwise.
type strayOp struct {
	name  string
	stray []netip.Prefix
}

func (o strayOp) vital() bool { return false }
func (o strayOp) String() string {
	return fmt.Sprintf("wg set %s peer $THROWAWAY allowed-ips %s peer $THROWAWAY remove", o.name, join(o.stray, ","))
}

type removeOp struct {
	name string
	key  mesh.Key
}

func (o removeOp) vital() bool    { return false }
func (o removeOp) String() string { return fmt.Sprintf("wg set %s peer %s remove", o.name, o.key) }

// knockOp makes the device shake hands with peers now instead of at the next
// packet: a keepalive is sent when it is switched on.
type knockOp struct {
	name  string
	peers []Peer
}

func (o knockOp) vital() bool { return false }
func (o knockOp) String() string {
	s := "wg set " + o.name
	for _, p := range o.peers {
		s += fmt.Sprintf(" peer %s persistent-keepalive 1", p.Key)
	}
	return s + " # for a moment"
}

func join(ps []netip.Prefix, sep string) string {
	s := make([]string, len(ps))
	for i, p := range ps {
		s[i] = p.String()
	}
	return strings.Join(s, sep)
}
