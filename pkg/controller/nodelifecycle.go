package controller

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"time"

	coordinationv1 "k8s.io/api/coordination/v1"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/client-go/tools/cache"
	"k8s.io/client-go/tools/record"

	"meshd.dev/pkg/controller/liveness"
	"meshd.dev/pkg/reconcile"
)

// nodeLifecycle notices nodes that fall silent and moves their work.
//
// A node is lost when its lease in kube-node-lease was not renewed for the
// grace period (package liveness has the arithmetic). Then its conditions
// become Unknown, it gets the unreachable taints, and its pods stop being
// Ready, which takes them out of every service. EvictAfter later its pods are
// deleted, gracefully, so that those who own them make new ones elsewhere; a
// toleration of the pod's own says how long it wants to wait instead. Some
// pods stay: those of a DaemonSet, who tolerate this for ever; those nobody
// would replace; and those of a StatefulSet, because the old one may well be
// running on a machine that is merely cut off, and two of one identity are
// worse than none: a person who knows that the machine is off deletes the
// Node, and with it they go.
//
// When more than half of three or more nodes vanish together the fault is
// probably ours: nothing is deleted then until enough of them are back.
//
// A node that renews again loses the taints; its Ready condition and that of
// its pods is for its agent to say.
type nodeLifecycle struct {
	plane               *plane
	nodes, pods, leases cache.SharedIndexInformer
	recorder            record.EventRecorder
	loop                *reconcile.Loop
	echo                *echo
	now                 func() time.Time
	// firstSeen is when a NoExecute taint that is not ours was first seen; the
	// moment in the taint itself is another machine's clock.
	firstSeen map[taintOn]time.Time

	mu     sync.Mutex
	ledger *liveness.Ledger
}

// blindAfter is how long our own lease may be without an echo before the
// board says that failures go unnoticed.
const blindAfter = 10 * time.Second

func newNodeLifecycle(p *plane) *nodeLifecycle {
	c := &nodeLifecycle{
		plane:     p,
		nodes:     p.shared.Core().V1().Nodes().Informer(),
		pods:      p.shared.Core().V1().Pods().Informer(),
		leases:    p.leases.Coordination().V1().Leases().Informer(),
		recorder:  p.recorder("node-controller"),
		now:       time.Now,
		firstSeen: map[taintOn]time.Time{},
		ledger:    liveness.New(liveness.Config{Grace: p.cfg.NodeGracePeriod}),
	}
	c.echo = newEcho(p, c.ledger.Beat())
	c.loop = p.loop("nodelifecycle", c.do, func(cfg *reconcile.Config) { cfg.Resync = time.Second })
	_, _ = c.leases.AddEventHandler(cache.ResourceEventHandlerFuncs{
		AddFunc:    c.renewed,
		UpdateFunc: func(_, obj any) { c.renewed(obj) },
	})
	watch(c.nodes, c.loop.Kick, func(old, new any) bool { return nodeMatters(old.(*corev1.Node), new.(*corev1.Node)) })
	return c
}

// renewed tells the ledger of a lease, at the moment it comes in.
func (c *nodeLifecycle) renewed(obj any) {
	lease := obj.(*coordinationv1.Lease)
	if lease.Spec.RenewTime == nil {
		return
	}
	stamp := lease.Spec.RenewTime.String()
	c.mu.Lock()
	defer c.mu.Unlock()
	if lease.Name == echoLease {
		if c.echo.isOurs(lease) {
			c.ledger.Echo(c.now())
			c.loop.Kick()
		}
		return
	}
	was := c.ledger.Judge(lease.Name).State
	c.ledger.Renewed(lease.Name, stamp)
	if was != c.ledger.Judge(lease.Name).State {
		c.loop.Kick()
	}
}

func (c *nodeLifecycle) Run(ctx context.Context) error {
	if !synced(ctx, c.nodes, c.pods, c.leases) {
		return nil
	}
	done := make(chan error, 1)
	go func() { done <- c.echo.run(ctx) }()
	err := c.loop.Run(ctx)
	return errors.Join(err, <-done)
}

func (c *nodeLifecycle) do(ctx context.Context) error {
	v := c.view()
	c.report(v)
	var errs []error
	for _, s := range v.plan() {
		if err := s.do(ctx, c); err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", s, err))
		}
	}
	return errors.Join(errs...)
}

// view is what the plan is made from.
func (c *nodeLifecycle) view() view {
	v := view{
		nodes:      nodesOf(c.nodes.GetStore()),
		pods:       map[string][]*corev1.Pod{},
		verdicts:   map[string]liveness.Verdict{},
		evictAfter: c.plane.cfg.EvictAfter,
		taintedFor: map[taintOn]time.Duration{},
		now:        c.now(),
	}
	names := make([]string, 0, len(v.nodes))
	for _, n := range v.nodes {
		names = append(names, n.Name)
	}
	for _, p := range podsOf(c.pods.GetStore()) {
		if p.Spec.NodeName != "" {
			v.pods[p.Spec.NodeName] = append(v.pods[p.Spec.NodeName], p)
		}
	}
	c.age(&v)
	c.mu.Lock()
	defer c.mu.Unlock()
	c.ledger.Expect(names)
	for _, n := range names {
		v.verdicts[n] = c.ledger.Judge(n)
	}
	v.storm = c.ledger.Storm()
	v.blind = c.ledger.Blind(v.now)
	return v
}

// age fills in how long each foreign NoExecute taint has been there.
func (c *nodeLifecycle) age(v *view) {
	for _, n := range v.nodes {
		for _, t := range n.Spec.Taints {
			if t.Effect != corev1.TaintEffectNoExecute || ours(t) {
				continue
			}
			on := taintOn{n.UID, t.Key, t.Value}
			if _, ok := c.firstSeen[on]; !ok {
				c.firstSeen[on] = v.now
			}
			v.taintedFor[on] = v.now.Sub(c.firstSeen[on])
		}
	}
	for on := range c.firstSeen {
		if _, ok := v.taintedFor[on]; !ok {
			delete(c.firstSeen, on)
		}
	}
}

// report puts on the board what a person should know.
func (c *nodeLifecycle) report(v view) {
	board := c.plane.cfg.Board
	if len(v.storm) > 0 {
		board.Fail("controller/eviction", fmt.Sprintf("%d of %d nodes vanished together (%s): their pods are not replaced, because the fault may be on this side", len(v.storm), len(v.nodes), strings.Join(v.storm, ", ")),
			"repair the network between this machine and them; for machines that are really gone, meshctl kubectl delete node NAME")
	} else {
		board.OK("controller/eviction")
	}
	if v.blind > blindAfter {
		board.Fail("controller/heartbeat", fmt.Sprintf("our own lease was not renewed for %s: no node can be found lost meanwhile", v.blind.Round(time.Second)), "see why the API server does not take writes (its disk, etcd)")
	} else {
		board.OK("controller/heartbeat")
	}
	for _, n := range v.nodes {
		name := "node/" + n.Name
		if v.verdicts[n.Name].State == liveness.Lost {
			board.Fail(name, "its agent does not renew its lease", "see whether the machine runs, meshd runs on it, and reaches this one")
		} else {
			board.OK(name)
		}
	}
	c.clearGone(v)
}

// clearGone takes nodes that were deleted off the board.
func (c *nodeLifecycle) clearGone(v view) {
	for _, check := range c.plane.cfg.Board.Checks() {
		name, ok := strings.CutPrefix(check.Name, "node/")
		if _, exists := v.verdicts[name]; ok && !exists {
			c.plane.cfg.Board.Clear(check.Name)
		}
	}
}
