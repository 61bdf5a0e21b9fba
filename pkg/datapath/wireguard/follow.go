package wireguard

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"time"

	"golang.zx2c4.com/wireguard/wgctrl"
	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	"meshd.dev/pkg/mesh"
)

// ErrNotKnown: the last Apply or Follow did not come true, or the device is
// gone. Apply has to be called.
var ErrNotKnown = errors.New("the device is not as it was wished before")

// Follow makes cfg so, which differs from what was last applied in the peers
// with these keys alone, and says what it did. Of the device it knows what Apply
// or Look read last and what was done since, and only where that is not enough
// it reads. So what it costs depends on the peers that changed; that somebody
// else changes the device is Look's business.
func (d *Device) Follow(ctx context.Context, cfg Config, keys []mesh.Key) (did []string, err error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.last == nil {
		return nil, ErrNotKnown
	}
	if d.have == nil {
		have, err := d.read()
		if err != nil {
			return nil, err
		}
		d.have = &have
	}
	if d.have.backend == "" {
		return nil, ErrNotKnown
	}
	now := cfg
	now.Peers = nil
	for _, p := range cfg.Peers {
		if slices.Contains(keys, p.Key) {
			now.Peers = append(now.Peers, p)
		}
	}
	have := *d.have
	have.peers = make(map[mesh.Key]peer, len(keys))
	for _, k := range keys {
		if p, ok := d.have.peers[k]; ok {
			have.peers[k] = p
		}
	}
	ops := d.diff(now, have, time.Now())
	d.last = nil
	if err := d.do(ctx, ops); err != nil {
		return nil, err
	}
	d.last = &cfg
	for _, k := range keys {
		delete(d.wished, k)
		delete(d.fresh, k)
	}
	for _, p := range now.Peers {
		d.remember(p)
	}
	return printed(ops), nil
}

// Has reports whether the device has this peer, as far as Follow knows it.
func (d *Device) Has(k mesh.Key) (has, known bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.have == nil {
		return false, false
	}
	_, has = d.have.peers[k]
	return has, true
}

// changed keeps what is known of the device true after an op was done.
func (d *Device) changed(o op) {
	d.changes++
	if d.have == nil {
		return
	}
	switch o := o.(type) {
	case peerOp:
		o.change(d.have.peers)
	case removeOp:
		delete(d.have.peers, o.key)
	default:
		d.have = nil
	}
}

// change in peers what the op changed in the device's.
func (o peerOp) change(peers map[mesh.Key]peer) {
	p := peers[o.key]
	if o.again {
		p = peer{}
	}
	if o.endpoint.IsValid() {
		p.Endpoint = o.endpoint
	}
	for k, other := range peers { // an allowed IP moves here from whoever had it
		if i := slices.IndexFunc(other.allowed, func(a netip.Prefix) bool { return slices.Contains(o.allow, a) }); i >= 0 && k != o.key {
			other.allowed = slices.DeleteFunc(slices.Clone(other.allowed), func(a netip.Prefix) bool { return slices.Contains(o.allow, a) })
			peers[k] = other
		}
	}
	p.allowed = append(slices.Clip(p.allowed), o.allow...)
	if o.keepalive != nil {
		p.keepalive = *o.keepalive
	}
	if o.psk != nil {
		p.psk = *o.psk
	}
	peers[o.key] = p
}

// configure sends cfg to the device, whatever serves it, over a client that
// stays open: opening one asks the kernel what it can.
func (d *Device) configure(cfg wgtypes.Config) error {
	if d.control == nil {
		c, err := wgctrl.New()
		if err != nil {
			return fmt.Errorf("open wireguard control: %w", err)
		}
		d.control = c
	}
	client := d.control
	_, err := ask(&d.questions, d.opts.Name, func() (struct{}, error) { return struct{}{}, client.ConfigureDevice(d.opts.Name, cfg) })
	if errors.Is(err, errSilent) {
		d.control = nil // it is in use yet; what it has open goes with it
	} else if err != nil {
		d.hangUp()
	}
	return err
}

// hangUp: the next client finds what can be reached then.
func (d *Device) hangUp() {
	if d.control != nil {
		_ = d.control.Close()
		d.control = nil
	}
}

// Close gives back what Apply and Follow keep open. The device stays while its
// process does.
func (d *Device) Close() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.hangUp()
	d.holder.letGo()
}
