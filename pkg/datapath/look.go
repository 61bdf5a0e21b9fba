package datapath

import (
	"context"
	"fmt"
	"reflect"
	"slices"
	"time"

	"meshd.dev/pkg/datapath/route"
)

// lookEvery is how often the device and the sysctls are looked at: of what
// becomes of them no event tells. With very many peers less often, for each
// look reads them all.
func lookEvery(peers int) time.Duration {
	return max(250*time.Millisecond, min(time.Duration(peers)*time.Millisecond, time.Second))
}

// look tells the paths how the peers fare, and kicks when something is not as
// it was made.
func (d *Datapath) look(ctx context.Context) error {
	timer := time.NewTimer(lookEvery(0))
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-timer.C:
		}
		peers := 0
		if w := d.wished.Load(); w != nil {
			peers = len(w.WireGuard.Peers)
			d.lookAt(w)
		}
		timer.Reset(lookEvery(peers))
	}
}

func (d *Datapath) lookAt(w *Wish) {
	stats, ops, err := d.device.Look(w.WireGuard)
	if d.true.Load() && d.wished.Load() == w && (err != nil || len(ops) > 0 || !route.SysctlsHold(w.Route)) {
		d.Kick() // else it is being tried again already
	}
	if err != nil {
		return
	}
	if stats, watched, err := d.merge(stats); err == nil {
		d.paths.Stats(watched)
		d.report(d.tunnels.list(stats, "", d.paths.Report))
	}
}

// same reports whether two wishes ask the same of the kernel.
func (w *Wish) same(o Wish) bool {
	return w.Keys == o.Keys && w.sameFirewall(o) && reflect.DeepEqual(w.Route, o.Route) && reflect.DeepEqual(w.WireGuard, o.WireGuard) && reflect.DeepEqual(w.Second, o.Second)
}

func (w *Wish) sameFirewall(o Wish) bool {
	f, g := w.Firewall, o.Firewall
	groups := slices.Equal(f.Groups, g.Groups)
	f.Groups, g.Groups = nil, nil
	return groups && reflect.DeepEqual(f, g)
}

// repaired names what had to be done though nothing else was wished of a part.
// held is what held as a whole before; nil: nothing did.
func (d *Datapath) repaired(held *Wish, wish Wish, routes []string) {
	d.noteRepair("datapath/device", d.device.Drift())
	if held == nil {
		return
	}
	if did := d.firewall.Did(); did != "" && held.sameFirewall(wish) {
		d.noteRepair("datapath/firewall", []string{did})
	}
	if reflect.DeepEqual(held.Route, wish.Route) {
		d.noteRepair("datapath/routes", routes)
	}
}

func (d *Datapath) noteRepair(part string, did []string) {
	switch len(did) {
	case 0:
	case 1:
		d.cfg.Board.Repaired(part, did[0])
	default:
		d.cfg.Board.Repaired(part, fmt.Sprintf("%d changes, the first: %s", len(did), did[0]))
	}
}
