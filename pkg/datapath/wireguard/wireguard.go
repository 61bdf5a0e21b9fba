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
// it died.
package wireguard

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

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
}

// Peer is another node.
type Peer struct {
	Name string
	Key  mesh.Key
	// Endpoint on the underlay; not valid: whatever the peer calls from.
	Endpoint netip.AddrPort
	// AllowedIPs are whole pod CIDRs, never single pods.
	AllowedIPs []netip.Prefix
	// Keepalive 0 means none.
	Keepalive time.Duration
}

// Options of a Device. Name and StateDir are required.
type Options struct {
	Name string
	// StateDir holds wireguard.key.
	StateDir string
	// LogDir takes the log of a userspace process; empty: its output is lost.
	LogDir string
	// SpawnUserspace is the command of a userspace device, without its name.
	SpawnUserspace []string
	Log            *slog.Logger
}

// Device is one WireGuard device. Use New. Its methods may be called from any
// goroutine.
type Device struct {
	opts     Options
	key      wgtypes.Key
	freshKey bool
	setAside string

	mu sync.Mutex
	// wished endpoints as last applied, by peer.
	wished map[mesh.Key]netip.AddrPort
	// child is the userspace process we started, 0 if none or adopted.
	child int
}

// New loads or makes the private key.
func New(opts Options) (*Device, error) {
	if opts.Log == nil {
		opts.Log = slog.New(slog.DiscardHandler)
	}
	key, fresh, setAside, err := loadKey(filepath.Join(opts.StateDir, "wireguard.key"))
	if err != nil {
		return nil, err
	}
	return &Device{opts: opts, key: key, freshKey: fresh, setAside: setAside, wished: map[mesh.Key]netip.AddrPort{}}, nil
}

// PublicKey of this node.
func (d *Device) PublicKey() mesh.Key { return mesh.Key(d.key.PublicKey()) }

// CorruptKey is where a corrupt private key file was put, or empty.
func (d *Device) CorruptKey() string { return d.setAside }

// Apply makes cfg so.
func (d *Device) Apply(ctx context.Context, cfg Config) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.reap()
	have, err := d.read()
	if err != nil {
		return err
	}
	var errs []error
	for _, op := range d.diff(cfg, have, time.Now()) {
		if err := op.do(ctx, d); err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", op, err))
			if op.vital() {
				return errors.Join(errs...)
			}
			continue
		}
		d.opts.Log.Info("wireguard", "did", op.String())
	}
	if len(errs) == 0 {
		clear(d.wished)
		for _, p := range cfg.Peers {
			d.wished[p.Key] = p.Endpoint
		}
	}
	return errors.Join(errs...)
}

// Plan lists what Apply would do.
func (d *Device) Plan(cfg Config) ([]string, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	have, err := d.read()
	if err != nil {
		return nil, err
	}
	var lines []string
	for _, op := range d.diff(cfg, have, time.Now()) {
		lines = append(lines, op.String())
	}
	return lines, nil
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
	stats := make(map[mesh.Key]Stats, len(have.peers))
	for k, p := range have.peers {
		stats[k] = p.Stats
	}
	return stats, have.backend, nil
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
	psk       bool
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
		if op := d.setPeer(p, old, known, now); op != nil {
			ops = append(ops, *op)
		}
	}
	ops = append(ops, d.unset(cfg, have)...)
	if have.backend == "" && (!d.freshKey || len(d.wished) > 0) {
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
		ops = append(ops, createOp{name: name, mtu: cfg.MTU, spawn: d.opts.SpawnUserspace})
	}
	if fresh || have.key != d.key || have.port != cfg.ListenPort || have.mark != 0 {
		ops = append(ops, identityOp{name: name, key: d.key, port: cfg.ListenPort})
	}
	if fresh || have.mtu != cfg.MTU {
		ops = append(ops, mtuOp{name, cfg.MTU})
	}
	if fresh || !have.up {
		ops = append(ops, upOp{name})
	}
	return ops
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
func (d *Device) setPeer(p Peer, old peer, known bool, now time.Time) *peerOp {
	op := peerOp{name: d.opts.Name, peer: p.Name, key: p.Key, added: !known}
	if p.Endpoint.IsValid() && p.Endpoint != old.Endpoint {
		before, remembered := d.wished[p.Key]
		changed := remembered && before != p.Endpoint
		silent := now.Sub(old.Handshake) > SessionLife
		if !known || !old.Endpoint.IsValid() || changed || silent {
			op.endpoint = p.Endpoint
		}
	}
	for _, a := range p.AllowedIPs {
		if !slices.Contains(old.allowed, a) {
			op.allow = append(op.allow, a)
		}
	}
	if p.Keepalive != old.keepalive {
		op.keepalive = &p.Keepalive
	}
	op.dropPSK = old.psk
	if known && !op.endpoint.IsValid() && len(op.allow) == 0 && op.keepalive == nil && !op.dropPSK {
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

type identityOp struct {
	name string
	key  wgtypes.Key
	port int
}

func (o identityOp) vital() bool { return true }
func (o identityOp) String() string {
	return fmt.Sprintf("wg set %s private-key wireguard.key listen-port %d fwmark 0", o.name, o.port)
}

type mtuOp struct {
	name string
	mtu  int
}

func (o mtuOp) vital() bool    { return false }
func (o mtuOp) String() string { return fmt.Sprintf("ip link set %s mtu %d", o.name, o.mtu) }

type upOp struct{ name string }

func (o upOp) vital() bool    { return true }
func (o upOp) String() string { return "ip link set " + o.name + " up" }

// peerOp adds to a peer; it never takes away.
type peerOp struct {
	name, peer string
	key        mesh.Key
	added      bool
	endpoint   netip.AddrPort
	allow      []netip.Prefix
	keepalive  *time.Duration
	dropPSK    bool
}

func (o peerOp) vital() bool { return false }
func (o peerOp) String() string {
	s := fmt.Sprintf("wg set %s peer %s", o.name, o.key)
	if o.dropPSK {
		s += " preshared-key /dev/null"
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
