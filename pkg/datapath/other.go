package datapath

import (
	"sync"
	"time"

	"meshd.dev/pkg/datapath/firewall"
)

// OtherProxy names what it finds of kube-proxy on this machine, or nothing:
// its nft table, its chains made by either iptables, its IPVS device. A
// kube-proxy that ended leaves them behind until `kube-proxy --cleanup` or a
// reboot.
func OtherProxy() (string, error) { return firewall.KubeProxy() }

// other remembers who else translates service addresses.
type other struct {
	mu    sync.Mutex
	name  string
	asked time.Time
}

// otherInterval bounds what looking costs while somebody else changes rules
// all the time.
const otherInterval = 5 * time.Second

// yields reports whether somebody else translates service addresses here.
func (d *Datapath) yields() bool {
	if d.cfg.Yield == nil || !d.cfg.Services {
		return false
	}
	o := &d.other
	o.mu.Lock()
	defer o.mu.Unlock()
	if time.Since(o.asked) < otherInterval {
		return o.name != ""
	}
	name, err := d.cfg.Yield()
	d.cfg.Board.Report("datapath/services", err, "whether kube-proxy is here is not known; --services=on or off decides")
	if err != nil { // before the first answer nobody is contended with
		return o.name != "" || o.asked.IsZero()
	}
	if name != o.name || o.asked.IsZero() {
		if name != "" {
			d.cfg.Log.Info("services are somebody else's on this machine", "found", name)
		} else {
			d.cfg.Log.Info("services are ours on this machine")
		}
	}
	o.name, o.asked = name, time.Now()
	return name != ""
}
