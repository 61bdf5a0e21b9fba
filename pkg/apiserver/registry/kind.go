package registry

import (
	"fmt"
	"reflect"
	"strings"

	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apiserver/pkg/registry/rest"
)

// Kind is a row of the table: one stored resource.
type Kind struct {
	// Group and Version name where it is served; the version is also what is
	// written to disk.
	Group, Version string
	// Resource is the plural name in paths.
	Resource, Singular string
	Short, Categories  []string
	// Object and List are empty values of the type.
	Object, List runtime.Object
	// Cluster is set for what lives in no namespace.
	Cluster bool
	// Status is set for what has a status subresource.
	Status bool
	// Generation is set for what counts changes of its spec.
	Generation bool
	// StatusOnCreate keeps the status a creator sends.
	StatusOnCreate bool
	// Scale is nil for what has no replicas.
	Scale *Scale
	// TTL in seconds after which an object vanishes; 0 is never.
	TTL uint64
	// Garbage is what happens to dependents when a deleter says nothing;
	// empty means they are deleted.
	Garbage rest.GarbageCollectionPolicy
	// NoUnconditional refuses updates without resource version.
	NoUnconditional bool
	// CreateOnPut lets PUT create.
	CreateOnPut bool

	// Fields are what selectors may name, beside name and namespace.
	Fields func(obj runtime.Object) fields.Set
	// Index names the one field watchers are sorted by.
	Index string
	// Print is what kubectl shows; nil is name and age.
	Print *printer

	// Create and Update finish an object before it is validated.
	Create func(obj runtime.Object)
	Update func(obj, old runtime.Object)
	// UpdateStatus is Update for the status subresource.
	UpdateStatus func(obj, old runtime.Object)
}

// GroupResource of k.
func (k *Kind) GroupResource() schema.GroupResource {
	return schema.GroupResource{Group: k.Group, Resource: k.Resource}
}

// GroupVersion of k.
func (k *Kind) GroupVersion() schema.GroupVersion {
	return schema.GroupVersion{Group: k.Group, Version: k.Version}
}

func (k *Kind) singular() string {
	if k.Singular != "" {
		return k.Singular
	}
	return strings.ToLower(reflect.TypeOf(k.Object).Elem().Name())
}

func (k *Kind) new() runtime.Object {
	return reflect.New(reflect.TypeOf(k.Object).Elem()).Interface().(runtime.Object)
}
func (k *Kind) newList() runtime.Object {
	return reflect.New(reflect.TypeOf(k.List).Elem()).Interface().(runtime.Object)
}

// Kinds is the table.
func Kinds() []*Kind {
	var all []*Kind
	for _, part := range [][]*Kind{coreKinds(), appsKinds(), batchKinds(), networkKinds(), otherKinds(), clusterKinds()} {
		all = append(all, part...)
	}
	return all
}

// Find returns the row of resource.
func Find(kinds []*Kind, resource schema.GroupResource) (*Kind, error) {
	for _, k := range kinds {
		if k.GroupResource() == resource {
			return k, nil
		}
	}
	return nil, fmt.Errorf("no kind for %s", resource)
}

// part returns the field name of the object (Spec, Status); it panics for a
// kind that has none, which is an error in the table.
func part(obj runtime.Object, name string) reflect.Value {
	return reflect.ValueOf(obj).Elem().FieldByName(name)
}

// copyPart sets a field of obj to that of old.
func copyPart(obj, old runtime.Object, name string) {
	if f := part(obj, name); f.IsValid() {
		f.Set(part(old, name))
	}
}

func clearPart(obj runtime.Object, name string) {
	if f := part(obj, name); f.IsValid() {
		f.SetZero()
	}
}

func (k *Kind) printer() *printer {
	if k.Print == nil {
		return plain
	}
	return k.Print
}

// Cells are what kubectl shows of obj, in the order of the columns.
func (k *Kind) Cells(obj runtime.Object) []any { return k.printer().cells(obj) }
