package serviceip

import (
	"context"
	"encoding/json"
	"errors"
	"maps"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	"k8s.io/apimachinery/pkg/util/validation/field"
	genericregistry "k8s.io/apiserver/pkg/registry/generic/registry"
	"k8s.io/apiserver/pkg/storage"
	"k8s.io/apiserver/pkg/storage/names"
)

// memory is a storage.Interface on a map, with compare-and-swap as etcd has it
// and faults a test can order.
type memory struct {
	storage.Interface
	mu   sync.Mutex
	data map[string][]byte
	rev  map[string]uint64
	last uint64

	// fault is asked before each write; it may be nil.
	fault func(op, key string) fault
}

type fault int

const (
	none    fault = iota
	refused       // not applied, caller learns a timeout
	lost          // applied, caller learns a timeout
)

var errTimeout = errors.New("etcdserver: request timed out")

func newMemory() *memory { return &memory{data: map[string][]byte{}, rev: map[string]uint64{}} }

func (m *memory) Versioner() storage.Versioner { return storage.APIObjectVersioner{} }
func (m *memory) ReadinessCheck() error        { return nil }

func (m *memory) ask(op, key string) fault {
	if m.fault == nil {
		return none
	}
	return m.fault(op, key)
}

func (m *memory) put(op, key string, obj, out runtime.Object, expect uint64) error {
	f := m.ask(op, key)
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.rev[key] != expect {
		if expect == 0 {
			return storage.NewKeyExistsError(key, 0)
		}
		return storage.NewResourceVersionConflictsError(key, 0)
	}
	if f == refused {
		return errTimeout
	}
	b, err := json.Marshal(obj)
	if err != nil {
		return err
	}
	m.last++
	m.data[key], m.rev[key] = b, m.last
	if f == lost {
		return errTimeout
	}
	return m.decode(key, out)
}

func (m *memory) decode(key string, out runtime.Object) error {
	svc := out.(*corev1.Service)
	*svc = corev1.Service{}
	if err := json.Unmarshal(m.data[key], svc); err != nil {
		return err
	}
	svc.ResourceVersion = strconv.FormatUint(m.rev[key], 10)
	return nil
}

func (m *memory) Create(_ context.Context, key string, obj, out runtime.Object, _ uint64) error {
	return m.put("create", key, obj, out, 0)
}

func (m *memory) Get(_ context.Context, key string, o storage.GetOptions, out runtime.Object) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.rev[key] == 0 {
		if o.IgnoreNotFound {
			*out.(*corev1.Service) = corev1.Service{}
			return nil
		}
		return storage.NewKeyNotFoundError(key, 0)
	}
	return m.decode(key, out)
}

func (m *memory) GetList(_ context.Context, root string, _ storage.ListOptions, out runtime.Object) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	list := out.(*corev1.ServiceList)
	for _, key := range slices.Sorted(maps.Keys(m.data)) {
		var svc corev1.Service
		if !strings.HasPrefix(key, root) {
			continue
		}
		if err := m.decode(key, &svc); err != nil {
			return err
		}
		list.Items = append(list.Items, svc)
	}
	return nil
}

func (m *memory) GuaranteedUpdate(ctx context.Context, key string, dst runtime.Object, ignore bool, pre *storage.Preconditions, try storage.UpdateFunc, _ runtime.Object) error {
	for {
		cur := &corev1.Service{}
		if err := m.Get(ctx, key, storage.GetOptions{IgnoreNotFound: ignore}, cur); err != nil {
			return err
		}
		if err := pre.Check(key, cur); err != nil {
			return err
		}
		rev, _ := m.Versioner().ObjectResourceVersion(cur)
		ret, _, err := try(cur, storage.ResponseMeta{ResourceVersion: rev})
		if err != nil {
			return err
		}
		err = m.put("update", key, ret, dst, rev)
		if storage.IsConflict(err) || storage.IsExist(err) {
			continue
		}
		return err
	}
}

func (m *memory) Delete(_ context.Context, key string, out runtime.Object, pre *storage.Preconditions, _ storage.ValidateObjectFunc, _ runtime.Object, _ storage.DeleteOptions) error {
	f := m.ask("delete", key)
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.rev[key] == 0 {
		return storage.NewKeyNotFoundError(key, 0)
	}
	if f == refused {
		return errTimeout
	}
	if err := m.decode(key, out); err != nil {
		return err
	}
	delete(m.data, key)
	delete(m.rev, key)
	if f == lost {
		return errTimeout
	}
	return nil
}

// strategy lets through what the allocator lets through; a service with the
// label invalid=true fails validation afterwards.
type strategy struct {
	runtime.ObjectTyper
	names.NameGenerator
}

func (strategy) NamespaceScoped() bool                                            { return true }
func (strategy) PrepareForCreate(context.Context, runtime.Object)                 {}
func (strategy) PrepareForUpdate(context.Context, runtime.Object, runtime.Object) {}
func (strategy) Canonicalize(runtime.Object)                                      {}
func (strategy) AllowCreateOnUpdate(context.Context) bool                         { return true }
func (strategy) AllowUnconditionalUpdate(context.Context) bool                    { return true }
func (strategy) WarningsOnCreate(context.Context, runtime.Object) []string        { return nil }
func (strategy) WarningsOnUpdate(context.Context, runtime.Object, runtime.Object) []string {
	return nil
}
func (strategy) Validate(_ context.Context, obj runtime.Object) field.ErrorList {
	if obj.(*corev1.Service).Labels["invalid"] == "true" {
		return field.ErrorList{field.Invalid(field.NewPath("metadata", "labels"), "true", "the test says so")}
	}
	return nil
}
func (s strategy) ValidateUpdate(ctx context.Context, obj, _ runtime.Object) field.ErrorList {
	return s.Validate(ctx, obj)
}

// newStore is a generic store of services over m.
func newStore(t *testing.T, m *memory) *genericregistry.Store {
	t.Helper()
	scheme := runtime.NewScheme()
	if err := corev1.AddToScheme(scheme); err != nil {
		t.Fatal(err)
	}
	codec := serializer.NewCodecFactory(scheme).LegacyCodec(corev1.SchemeGroupVersion)
	st := strategy{scheme, names.SimpleNameGenerator}
	gr := corev1.Resource("services")
	return &genericregistry.Store{
		NewFunc:                  func() runtime.Object { return &corev1.Service{} },
		NewListFunc:              func() runtime.Object { return &corev1.ServiceList{} },
		DefaultQualifiedResource: gr, SingularQualifiedResource: corev1.Resource("service"),
		CreateStrategy: st, UpdateStrategy: st, DeleteStrategy: st,
		KeyRootFunc: func(ctx context.Context) string {
			return genericregistry.NamespaceKeyRootFunc(ctx, "/services")
		},
		KeyFunc: func(ctx context.Context, name string) (string, error) {
			return genericregistry.NamespaceKeyFunc(ctx, "/services", name)
		},
		ObjectNameFunc: func(obj runtime.Object) (string, error) { return obj.(*corev1.Service).Name, nil },
		PredicateFunc: func(l labels.Selector, f fields.Selector) storage.SelectionPredicate {
			return storage.SelectionPredicate{Label: l, Field: f, GetAttrs: storage.DefaultNamespaceScopedAttr}
		},
		Storage:             genericregistry.DryRunnableStorage{Storage: m, Codec: codec},
		ReturnDeletedObject: true,
	}
}
