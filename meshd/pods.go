package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/fsnotify/fsnotify"
	"golang.org/x/sync/errgroup"

	"meshd.dev/pkg/agent/runtime"
	"meshd.dev/pkg/cni"
	"meshd.dev/pkg/datapath"
	"meshd.dev/pkg/mesh"
	"meshd.dev/pkg/reconcile"
)

// The CNI plugin attaches pods without asking the daemon. What the daemon does
// about them it does afterwards: it keeps their elements in the firewall, gives
// back what died without a DEL, and says when addresses run out.

const (
	sweepInterval = time.Minute
	// addressResync is how often the addresses are counted when no record
	// came or went.
	addressResync = 10 * time.Second
	// mendSettle: a pod that goes takes several things with it, one after
	// another, and its record last.
	mendSettle = 100 * time.Millisecond
	// podsSettle is how long records may come and go before they are looked
	// at: the plugin has done what is urgent, and pods start and stop in
	// crowds.
	podsSettle = 300 * time.Millisecond
	// goneSettle is the same for the first that goes after a while. What the
	// firewall then deletes keeps every plugin that ends in the next 10 ms for
	// as long (see del in pkg/cni); right behind a DEL the next ADD is not yet
	// there.
	goneSettle = 5 * time.Millisecond
)

func (n *node) network(net datapath.Network) cni.Network {
	return cni.Network{PodCIDRs: net.PodCIDRs, MTU: net.MTU, DataDir: n.cfg.state("cni"), ReasonFile: n.reasonFile(),
		Table: mesh.FirewallTable, ReservedPorts: n.cfg.ownPorts()}
}

// attached lists the pods of this machine for the firewall.
func (n *node) attached() ([]mesh.LocalPod, error) { return cni.Attached(n.cfg.state("cni")) }

// own is the pod network of this node as far as the cluster's state says it;
// nil before.
func (n *node) own() *cni.Network {
	state := n.window.State()
	if state == nil {
		return nil
	}
	self, _ := state.Node(n.cfg.NodeName)
	if len(self.PodCIDRs) == 0 {
		return nil
	}
	net := n.network(datapath.Network{PodCIDRs: self.PodCIDRs})
	return &net
}

// sweep gives back what pods left behind that are no more.
func (n *node) sweep(ctx context.Context) {
	cfg := cni.SweepConfig{DataDir: n.cfg.state("cni"), Table: mesh.FirewallTable, Import: n.own()}
	report, err := cni.Sweep(ctx, cfg, n.known(ctx))
	if err != nil {
		n.log.Warn("sweep of pod addresses", "err", err)
	}
	n.board.Report("cni/sweep", err, "what is named could not be given back; look at "+cfg.DataDir)
	for _, line := range report.Lines() {
		n.log.Info("swept", "what", line)
	}
	if len(report.Corrupt) > 0 {
		n.log.Error("records that cannot be read", "files", report.Corrupt)
		n.board.Fail("cni/records", "cannot be read: "+strings.Join(report.Corrupt, ", "),
			"their addresses stay taken; a record goes with its pod, a file of host-local when you remove it")
		return
	}
	n.board.OK("cni/records")
}

// known says which containers the runtime has; nil when it cannot be asked,
// and then namespaces and links decide alone. Attachments of others than
// Kubernetes are none of its business.
func (n *node) known(ctx context.Context) func(cni.Record) bool {
	if n.guest != nil {
		return nil // the runtime is the kubelet's
	}
	client, err := runtime.Dial(n.cfg.CRI)
	if err != nil {
		return nil
	}
	defer client.Close()
	ready, err := client.Sandboxes(ctx)
	if err != nil {
		n.log.Debug("sweep without the container runtime", "err", err)
		return nil
	}
	return func(r cni.Record) bool { return ready[r.ContainerID] || r.Pod.Name == "" && r.HostLocal == "" }
}

// watchPods looks at the addresses whenever a record comes or goes, and has
// the firewall look as well.
func (n *node) watchPods(ctx context.Context) error {
	count := reconcile.New(reconcile.Config{Name: "addresses", Do: n.countAddresses, Settle: podsSettle, Resync: addressResync, Log: n.log})
	n.window.Subscribe(count.Kick)
	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error { return count.Run(ctx) })
	group.Go(func() error {
		err := watchFolder(ctx, filepath.Join(n.cfg.state("cni"), "meshd"), func() { count.Kick(); n.datapath.PodsChanged() })
		if err != nil { // it only makes things quicker: both look by themselves as well
			n.log.Warn("pod records are looked at now and then, not as they come and go", "err", err)
		}
		return nil
	})
	return group.Wait()
}

// watchFolder calls kick when files in dir came or went, until ctx ends.
func watchFolder(ctx context.Context, dir string, kick func()) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return fmt.Errorf("folder of pod records: %w", err)
	}
	watch, err := fsnotify.NewWatcher()
	if err != nil {
		return fmt.Errorf("watch pod records: %w", err)
	}
	defer watch.Close()
	if err := watch.Add(dir); err != nil {
		return fmt.Errorf("watch pod records: %w", err)
	}
	var settled <-chan time.Time
	var looked, soon time.Time // when last, and when in a moment
	for {
		select {
		case <-ctx.Done():
			return nil
		case e := <-watch.Events:
			switch {
			case strings.HasPrefix(filepath.Base(e.Name), ".") || e.Has(fsnotify.Write|fsnotify.Chmod):
			case e.Has(fsnotify.Rename|fsnotify.Remove) && time.Since(looked) > podsSettle:
				if !soon.After(looked) {
					settled, soon = time.After(goneSettle), time.Now()
				}
			case settled == nil:
				settled = time.After(podsSettle)
			}
		case <-watch.Errors: // events were lost: look
			settled = time.After(podsSettle)
		case <-settled:
			settled, looked = nil, time.Now()
			kick()
		}
	}
}

// mend puts back what somebody else took from what leads to pods.
func (n *node) mend(context.Context) error {
	did, err := cni.Repair(n.cfg.state("cni"))
	n.board.Report("cni/links", err, "look at `ip route show proto 78` and `ip neigh show nud permanent`, and at who else changes them")
	for _, line := range did {
		n.log.Info("pods", "did", line)
	}
	switch len(did) {
	case 0:
	case 1:
		n.board.Repaired("cni/links", did[0])
	default:
		n.board.Repaired("cni/links", fmt.Sprintf("%d changes, the first: %s", len(did), did[0]))
	}
	return err
}

// countAddresses says on the board when a family has none left.
func (n *node) countAddresses(context.Context) error {
	net := n.own()
	if net == nil {
		return nil // kube/sync and datapath/state say why
	}
	usage, err := cni.Addresses(*net)
	if err != nil {
		return err
	}
	err = cni.Exhausted(usage)
	if err != nil {
		err = errors.Join(err, errors.New("new pods cannot start on this machine"))
	}
	n.board.Report("cni/addresses", err, "delete pods or move them to other machines; `meshctl pods` lists them, `meshctl gc --dry-run` what nobody uses. More per machine takes a larger node CIDR, which is set for the whole cluster")
	return nil
}
