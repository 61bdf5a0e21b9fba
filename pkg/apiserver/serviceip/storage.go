package serviceip

import (
	"context"
	"errors"
	"fmt"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	genericregistry "k8s.io/apiserver/pkg/registry/generic/registry"
	"k8s.io/apiserver/pkg/storage"
	"k8s.io/apiserver/pkg/util/dryrun"
)

// Attach makes every write of services through store go through the Allocator.
// The store must be complete, and copies of it (for services/status) be made
// afterwards, so that they share the wrapped storage.
func (a *Allocator) Attach(store *genericregistry.Store) error {
	if store.Storage.Storage == nil {
		return errors.New("attach service addresses: the store has no storage yet, call CompleteWithOptions first")
	}
	if store.BeginCreate != nil || store.BeginUpdate != nil {
		return errors.New("attach service addresses: the store has Begin hooks already")
	}
	under := store.Storage.Storage
	root := store.KeyRootFunc
	a.list = func(ctx context.Context) ([]corev1.Service, error) { return listServices(ctx, under, root(ctx)) }
	store.Storage.Storage = &settling{Interface: under, a: a}
	store.BeginCreate = a.beginCreate
	store.BeginUpdate = a.beginUpdate
	return nil
}

// listServices reads all services as of now, not from a cache.
func listServices(ctx context.Context, s storage.Interface, root string) ([]corev1.Service, error) {
	var list corev1.ServiceList
	err := s.GetList(ctx, root, storage.ListOptions{Recursive: true, Predicate: storage.Everything}, &list)
	if err != nil {
		return nil, fmt.Errorf("list stored services: %w", err)
	}
	return list.Items, nil
}

func (a *Allocator) beginCreate(ctx context.Context, obj runtime.Object, opts *metav1.CreateOptions) (genericregistry.FinishFunc, error) {
	u, err := a.allocate(ctx, obj.(*corev1.Service), nil, dryrun.IsDryRun(opts.DryRun))
	return finisher(u), err
}

func (a *Allocator) beginUpdate(ctx context.Context, obj, old runtime.Object, opts *metav1.UpdateOptions) (genericregistry.FinishFunc, error) {
	u, err := a.allocate(ctx, obj.(*corev1.Service), old.(*corev1.Service), dryrun.IsDryRun(opts.DryRun))
	return finisher(u), err
}

// finisher undoes what did not get as far as storage. Whatever did is settled
// by settling: on update the hook fires before the write.
func finisher(u undo) genericregistry.FinishFunc {
	return func(_ context.Context, ok bool) {
		if !ok {
			u()
		}
	}
}

// settling is the storage of services; it tells the pool how writes ended.
type settling struct {
	storage.Interface
	a *Allocator
}

// outcome of a write.
type outcome int

const (
	written outcome = iota
	notWritten
	unknown
)

func outcomeOf(err error) outcome {
	switch {
	case err == nil:
		return written
	case storage.IsExist(err), storage.IsNotFound(err), storage.IsConflict(err), storage.IsInvalidObj(err),
		storage.IsInvalidError(err), apierrors.IsConflict(err), apierrors.IsNotFound(err), apierrors.IsInvalid(err):
		return notWritten
	}
	return unknown
}

// Create keeps what obj holds when nobody knows whether it was stored: one
// more reference outlives the undo of the create hook.
func (s *settling) Create(ctx context.Context, key string, obj, out runtime.Object, ttl uint64) error {
	err := s.Interface.Create(ctx, key, obj, out, ttl)
	if outcomeOf(err) == unknown {
		if svc, ok := obj.(*corev1.Service); ok {
			s.a.pool.mu.Lock()
			s.a.pool.claim(svc.UID, holdings(svc))
			s.a.pool.mu.Unlock()
		}
		s.a.doubt(key, err)
	}
	return err
}

// GuaranteedUpdate settles each attempt: what an attempt added is given back
// when the next attempt starts or the write certainly failed; what it removed
// is given back when it was written.
func (s *settling) GuaranteedUpdate(ctx context.Context, key string, dst runtime.Object, ignoreNotFound bool,
	pre *storage.Preconditions, try storage.UpdateFunc, cached runtime.Object) error {
	var last *attempt
	err := s.Interface.GuaranteedUpdate(ctx, key, dst, ignoreNotFound, pre,
		func(in runtime.Object, meta storage.ResponseMeta) (runtime.Object, *uint64, error) {
			s.a.settle(last, notWritten)
			last = nil
			before := attemptOf(in)
			ret, ttl, err := try(in, meta)
			if err == nil {
				last = before.to(ret)
			}
			return ret, ttl, err
		}, cached)
	end := outcomeOf(err)
	if last != nil && end == unknown {
		s.a.doubt(key, err)
	}
	s.a.settle(last, end)
	return err
}

// Delete gives back everything the deleted service held.
func (s *settling) Delete(ctx context.Context, key string, out runtime.Object, pre *storage.Preconditions,
	validate storage.ValidateObjectFunc, cached runtime.Object, opts storage.DeleteOptions) error {
	err := s.Interface.Delete(ctx, key, out, pre, validate, cached, opts)
	if svc, ok := out.(*corev1.Service); ok && err == nil {
		s.a.pool.mu.Lock()
		s.a.pool.forget(svc.UID, holdings(svc))
		s.a.pool.mu.Unlock()
	}
	return err
}
