package controller

import (
	"context"
	"errors"
	"fmt"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/cache"

	"meshd.dev/pkg/controller/upstream"
	"meshd.dev/pkg/reconcile"
)

// namespaces empties those that are being deleted. It waits a moment first,
// for creations that were under way, and comes again each second while there
// is something left.
type namespaces struct {
	informer cache.SharedIndexInformer
	empty    func(context.Context, string) error
	loop     *reconcile.Loop
}

const (
	namespaceSettle = 500 * time.Millisecond
	namespaceResync = time.Second
)

func newNamespaces(ctx context.Context, p *plane, rc *rest.Config) (*namespaces, error) {
	empty, err := upstream.NewEmptier(ctx, rc)
	if err != nil {
		return nil, err
	}
	c := &namespaces{informer: p.shared.Core().V1().Namespaces().Informer(), empty: empty}
	c.loop = p.loop("namespaces", c.do, func(cfg *reconcile.Config) {
		cfg.Settle, cfg.Resync = namespaceSettle, namespaceResync
	})
	watch(c.informer, c.loop.Kick, func(old, new any) bool {
		return old.(*corev1.Namespace).DeletionTimestamp.IsZero() && !new.(*corev1.Namespace).DeletionTimestamp.IsZero()
	})
	return c, nil
}

func (c *namespaces) Run(ctx context.Context) error {
	if !synced(ctx, c.informer) {
		return nil
	}
	return c.loop.Run(ctx)
}

func (c *namespaces) do(ctx context.Context) error {
	var errs []error
	for _, o := range c.informer.GetStore().List() {
		ns := o.(*corev1.Namespace)
		if ns.DeletionTimestamp.IsZero() {
			continue
		}
		if err := c.empty(ctx, ns.Name); err != nil && !errors.Is(err, upstream.ErrContent) {
			errs = append(errs, fmt.Errorf("empty namespace %s: %w", ns.Name, err))
		}
	}
	return errors.Join(errs...)
}
