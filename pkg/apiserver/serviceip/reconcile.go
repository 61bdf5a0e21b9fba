package serviceip

import (
	"context"
	"fmt"
	"slices"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"
)

// settleTime is how long a held item must be missing from storage before it is
// given back: longer than any write can be on its way.
const settleTime = 2 * time.Minute

// An attempt is one try of an update, as far as addresses are concerned.
type attempt struct {
	uid            types.UID
	before         []item
	added, removed []item
}

// attemptOf remembers a stored service before the update function changes it.
func attemptOf(in any) *attempt {
	svc, ok := in.(*corev1.Service)
	if !ok {
		return &attempt{}
	}
	return &attempt{uid: svc.UID, before: holdings(svc)}
}

func (t *attempt) to(ret any) *attempt {
	svc, ok := ret.(*corev1.Service)
	if !ok {
		return nil
	}
	if t.uid == "" { // created by an update
		t.uid = svc.UID
	}
	after := holdings(svc)
	t.added, t.removed = without(after, t.before), without(t.before, after)
	return t
}

// settle tells the pool how an attempt ended.
func (a *Allocator) settle(t *attempt, end outcome) {
	if t == nil {
		return
	}
	a.pool.mu.Lock()
	defer a.pool.mu.Unlock()
	switch end {
	case written:
		a.pool.drop(t.uid, t.removed)
	case notWritten:
		a.pool.drop(t.uid, t.added)
	}
}

// doubt asks for an early comparison after a write with unknown outcome.
func (a *Allocator) doubt(key string, err error) {
	a.log.Warn("outcome of a service write unknown, its addresses stay held until storage is read again", "key", key, "err", err)
	select {
	case a.kick <- struct{}{}:
	default:
	}
}

// load fills the pool before the first write. The caller holds the lock.
func (a *Allocator) load(ctx context.Context) error {
	if a.pool.loaded {
		return nil
	}
	if a.list == nil {
		return fmt.Errorf("service addresses: not attached to a store")
	}
	svcs, err := a.list(ctx)
	if err != nil {
		return err
	}
	a.adopt(svcs)
	a.pool.loaded = true
	return nil
}

// adopt holds everything stored services have; the oldest wins a clash.
func (a *Allocator) adopt(svcs []corev1.Service) (seen map[item]types.UID) {
	seen = map[item]types.UID{}
	slices.SortStableFunc(svcs, func(x, y corev1.Service) int {
		return x.CreationTimestamp.Time.Compare(y.CreationTimestamp.Time)
	})
	for i := range svcs {
		svc := &svcs[i]
		for _, it := range holdings(svc) {
			if _, twice := seen[it]; twice {
				a.log.Error("two services have the same "+it.String()+"; delete and create one of them again",
					"namespace", svc.Namespace, "service", svc.Name)
				continue
			}
			seen[it] = svc.UID
			h := a.pool.held[it]
			if h != nil && h.uid == svc.UID {
				h.missing = time.Time{}
				continue
			}
			if a.pool.loaded {
				a.log.Warn("a stored service has an "+it.String()+" that was not held for it", "namespace", svc.Namespace, "service", svc.Name)
			}
			a.pool.held[it] = &hold{uid: svc.UID, refs: 1}
		}
	}
	return seen
}

// Reconcile compares the pool with the stored services once. It holds the lock
// over the list, so writes of services wait for it.
func (a *Allocator) Reconcile(ctx context.Context) error { return a.reconcile(ctx, time.Now()) }

func (a *Allocator) reconcile(ctx context.Context, now time.Time) error {
	a.pool.mu.Lock()
	defer a.pool.mu.Unlock()
	if !a.pool.loaded {
		return a.load(ctx)
	}
	svcs, err := a.list(ctx)
	if err != nil {
		return err
	}
	seen := a.adopt(svcs)
	for it, h := range a.pool.held {
		if seen[it] == h.uid {
			continue
		}
		switch {
		case h.missing.IsZero():
			h.missing = now
		case now.Sub(h.missing) >= settleTime:
			delete(a.pool.held, it)
			a.log.Info("gave back an " + it.String() + " that no stored service has")
		}
	}
	return nil
}

// Run compares the pool with storage every Resync, and sooner after a write
// whose outcome is unknown, until ctx ends.
func (a *Allocator) Run(ctx context.Context) error {
	next := time.Duration(0)
	for {
		timer := time.NewTimer(next)
		select {
		case <-ctx.Done():
			timer.Stop()
			return nil
		case <-a.kick:
			timer.Stop()
		case <-timer.C:
		}
		next = a.resync
		if err := a.Reconcile(ctx); err != nil && ctx.Err() == nil {
			a.log.Warn("compare service addresses with storage", "err", err)
			next = 5 * time.Second
		} else if a.anyMissing() {
			next = settleTime + time.Second
		}
	}
}

func (a *Allocator) anyMissing() bool {
	a.pool.mu.Lock()
	defer a.pool.mu.Unlock()
	for _, h := range a.pool.held {
		if !h.missing.IsZero() {
			return true
		}
	}
	return false
}
