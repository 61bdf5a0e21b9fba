package registry

import (
	"context"
	"fmt"

	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apiserver/pkg/registry/generic"
	genericregistry "k8s.io/apiserver/pkg/registry/generic/registry"
	"k8s.io/apiserver/pkg/registry/rest"
	"k8s.io/apiserver/pkg/storage"
	"k8s.io/client-go/tools/cache"
	"sigs.k8s.io/structured-merge-diff/v6/fieldpath"
)

// REST serves one kind.
type REST struct {
	*genericregistry.Store
	Kind *Kind
	// strategy makes further subresources.
	strategy *strategy
}

var (
	_ rest.StandardStorage      = &REST{}
	_ rest.ShortNamesProvider   = &REST{}
	_ rest.CategoriesProvider   = &REST{}
	_ rest.SingularNameProvider = &REST{}
)

// ShortNames implements rest.ShortNamesProvider.
func (r *REST) ShortNames() []string { return r.Kind.Short }

// Categories implements rest.CategoriesProvider.
func (r *REST) Categories() []string { return r.Kind.Categories }

// NewREST opens the storage of k.
func NewREST(k *Kind, s *runtime.Scheme, options generic.RESTOptionsGetter) (*REST, error) {
	st := newStrategy(k, s)
	store := &genericregistry.Store{
		NewFunc:                   k.new,
		NewListFunc:               k.newList,
		DefaultQualifiedResource:  k.GroupResource(),
		SingularQualifiedResource: schema.GroupResource{Group: k.Group, Resource: k.singular()},
		PredicateFunc:             k.predicate,
		CreateStrategy:            st,
		UpdateStrategy:            st,
		DeleteStrategy:            st,
		ResetFieldsStrategy:       st,
		TableConvertor:            k.printer(),
		ReturnDeletedObject:       true,
	}
	if k.GroupResource() == (schema.GroupResource{Resource: "pods"}) {
		store.DeleteStrategy = graceful{st, checkPodDelete}
	}
	if k.TTL > 0 {
		store.TTLFunc = func(runtime.Object, uint64, bool) (uint64, error) { return k.TTL, nil }
	}
	if err := store.CompleteWithOptions(k.storeOptions(options)); err != nil {
		return nil, fmt.Errorf("open storage of %s: %w", k.GroupResource(), err)
	}
	return &REST{Store: store, Kind: k, strategy: st}, nil
}

// storeOptions sort the watch cache by k.Index, so that a node's watch of its
// own pods does not look at all pods.
func (k *Kind) storeOptions(options generic.RESTOptionsGetter) *generic.StoreOptions {
	o := &generic.StoreOptions{RESTOptions: options, AttrFunc: k.attrs}
	if k.Index == "" {
		return o
	}
	value := func(obj runtime.Object) string { return k.Fields(obj)[k.Index] }
	o.TriggerFunc = storage.IndexerFuncs{k.Index: value}
	o.Indexers = &cache.Indexers{storage.FieldIndex(k.Index): func(obj any) ([]string, error) {
		return []string{value(obj.(runtime.Object))}, nil
	}}
	return o
}

// attrs are the labels and fields selectors look at.
func (k *Kind) attrs(obj runtime.Object) (labels.Set, fields.Set, error) {
	m, err := meta.Accessor(obj)
	if err != nil {
		return nil, nil, fmt.Errorf("read labels of %T: %w", obj, err)
	}
	set := fields.Set{"metadata.name": m.GetName()}
	if !k.Cluster {
		set["metadata.namespace"] = m.GetNamespace()
	}
	if k.Fields != nil {
		for name, value := range k.Fields(obj) {
			set[name] = value
		}
	}
	return m.GetLabels(), set, nil
}

func (k *Kind) predicate(label labels.Selector, field fields.Selector) storage.SelectionPredicate {
	p := storage.SelectionPredicate{Label: label, Field: field, GetAttrs: k.attrs}
	if k.Index != "" {
		p.IndexFields = []string{k.Index}
	}
	return p
}

// View is a subresource that reads like its parent and writes a part of it.
type View struct{ store *genericregistry.Store }

var (
	_ rest.Patcher             = &View{}
	_ rest.ResetFieldsStrategy = &View{}
)

// view of r whose updates go through update.
func (r *REST) view(update interface {
	rest.RESTUpdateStrategy
	rest.ResetFieldsStrategy
}) *View {
	store := *r.Store
	store.UpdateStrategy, store.ResetFieldsStrategy = update, update
	return &View{&store}
}

// StatusView is the status subresource of r.
func (r *REST) StatusView() *View { return r.view(statusStrategy{r.strategy}) }

// New implements rest.Storage.
func (v *View) New() runtime.Object { return v.store.New() }

// Destroy does nothing: the store is the parent's.
func (v *View) Destroy() {}

// Get implements rest.Getter.
func (v *View) Get(ctx context.Context, name string, options *metav1.GetOptions) (runtime.Object, error) {
	return v.store.Get(ctx, name, options)
}

// Update implements rest.Updater; a subresource never creates.
func (v *View) Update(ctx context.Context, name string, info rest.UpdatedObjectInfo, create rest.ValidateObjectFunc, update rest.ValidateObjectUpdateFunc, _ bool, options *metav1.UpdateOptions) (runtime.Object, bool, error) {
	return v.store.Update(ctx, name, info, create, update, false, options)
}

// GetResetFields implements rest.ResetFieldsStrategy.
func (v *View) GetResetFields() map[fieldpath.APIVersion]*fieldpath.Set {
	return v.store.GetResetFields()
}

// ConvertToTable implements rest.TableConvertor.
func (v *View) ConvertToTable(ctx context.Context, obj, options runtime.Object) (*metav1.Table, error) {
	return v.store.ConvertToTable(ctx, obj, options)
}
