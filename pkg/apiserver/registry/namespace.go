package registry

import (
	"context"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	genericregistry "k8s.io/apiserver/pkg/registry/generic/registry"
	"k8s.io/apiserver/pkg/registry/rest"
	"k8s.io/apiserver/pkg/storage"
	storeerr "k8s.io/apiserver/pkg/storage/errors"
	"k8s.io/apiserver/pkg/util/dryrun"

	"meshd.dev/pkg/apiserver/upstream"
)

func namespaceKind() *Kind {
	return &Kind{Version: "v1", Resource: "namespaces", Short: []string{"ns"}, Object: &corev1.Namespace{}, List: &corev1.NamespaceList{},
		Cluster: true, Status: true,
		Create: func(obj runtime.Object) {
			ns := obj.(*corev1.Namespace)
			ns.Status.Phase = corev1.NamespaceActive
			for _, f := range ns.Spec.Finalizers {
				if f == corev1.FinalizerKubernetes {
					return
				}
			}
			ns.Spec.Finalizers = append(ns.Spec.Finalizers, corev1.FinalizerKubernetes)
		},
		Update: func(obj, old runtime.Object) {
			obj.(*corev1.Namespace).Spec.Finalizers = old.(*corev1.Namespace).Spec.Finalizers
		},
		Fields: func(obj runtime.Object) fields.Set {
			ns := obj.(*corev1.Namespace)
			return fields.Set{"status.phase": string(ns.Status.Phase), "name": ns.Name}
		},
		Print: prints("Name,Status,Age", func(ns *corev1.Namespace) []any {
			return []any{ns.Name, string(ns.Status.Phase), age(ns.CreationTimestamp)}
		})}
}

// Namespaces serves namespaces. Deleting one only says that it shall go; it
// is gone when its last finalizer is, after the namespace controller has
// emptied it. The whole collection cannot be deleted: a slip must not end a
// cluster.
type Namespaces struct {
	namespaceDoor
	rest *REST
}

// namespaceDoor is what of a store namespaces show as it is.
type namespaceDoor interface {
	rest.StorageWithReadiness
	rest.Scoper
	rest.Lister
	rest.Getter
	rest.Creater
	rest.Updater
	rest.Watcher
	rest.ShortNamesProvider
	rest.SingularNameProvider
	rest.ResetFieldsStrategy
	rest.StorageVersionProvider
}

var _ rest.GracefulDeleter = Namespaces{}

// NewNamespaces serves the namespaces of r.
func NewNamespaces(r *REST) Namespaces {
	r.ShouldDeleteDuringUpdate = func(ctx context.Context, key string, obj, existing runtime.Object) bool {
		ns, ok := obj.(*corev1.Namespace)
		return ok && len(ns.Spec.Finalizers) == 0 && genericregistry.ShouldDeleteDuringUpdate(ctx, key, obj, existing)
	}
	return Namespaces{r, r}
}

// Delete implements rest.GracefulDeleter.
func (n Namespaces) Delete(ctx context.Context, name string, validate rest.ValidateObjectFunc, options *metav1.DeleteOptions) (runtime.Object, bool, error) {
	obj, err := n.Get(ctx, name, &metav1.GetOptions{})
	if err != nil {
		return nil, false, err
	}
	ns := obj.(*corev1.Namespace)
	if options == nil {
		options = metav1.NewDeleteOptions(0)
	}
	if options.Preconditions == nil {
		options.Preconditions = &metav1.Preconditions{}
	}
	if options.Preconditions.UID == nil {
		options.Preconditions.UID = &ns.UID
	}
	if ns.DeletionTimestamp.IsZero() {
		return n.terminate(ctx, name, validate, options)
	}
	if len(ns.Spec.Finalizers) > 0 {
		return ns, false, nil
	}
	return n.rest.Delete(ctx, name, validate, options)
}

// terminate marks a namespace as going.
func (n Namespaces) terminate(ctx context.Context, name string, validate rest.ValidateObjectFunc, options *metav1.DeleteOptions) (runtime.Object, bool, error) {
	key, err := n.rest.KeyFunc(ctx, name)
	if err != nil {
		return nil, false, err
	}
	pre := &storage.Preconditions{UID: options.Preconditions.UID, ResourceVersion: options.Preconditions.ResourceVersion}
	out := &corev1.Namespace{}
	err = n.rest.Storage.GuaranteedUpdate(ctx, key, out, false, pre, storage.SimpleUpdate(func(obj runtime.Object) (runtime.Object, error) {
		ns := obj.(*corev1.Namespace)
		if err := validate(ctx, ns); err != nil {
			return nil, err
		}
		if ns.DeletionTimestamp.IsZero() {
			now := metav1.Now()
			ns.DeletionTimestamp = &now
		}
		ns.Status.Phase = corev1.NamespaceTerminating
		return ns, nil
	}), dryrun.IsDryRun(options.DryRun), nil)
	if err == nil {
		return out, false, nil
	}
	namespaces := schema.GroupResource{Resource: "namespaces"}
	err = storeerr.InterpretUpdateError(storeerr.InterpretGetError(err, namespaces, name), namespaces, name)
	if _, ok := err.(apierrors.APIStatus); !ok {
		err = apierrors.NewInternalError(err)
	}
	return nil, false, err
}

// FinalizeView is the finalize subresource: the only way to take a finalizer
// off a namespace's spec.
func (n Namespaces) FinalizeView() *View {
	return n.rest.view(partStrategy{
		strategy: n.rest.strategy,
		prepare: func(obj, old runtime.Object) {
			obj.(*corev1.Namespace).Status = old.(*corev1.Namespace).Status
		},
		validate: upstream.ValidateFinalize,
		locked:   []string{"status"},
	})
}
