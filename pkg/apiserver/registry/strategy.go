package registry

import (
	"context"
	"reflect"

	apiequality "k8s.io/apimachinery/pkg/api/equality"
	"k8s.io/apimachinery/pkg/api/meta"
	"k8s.io/apimachinery/pkg/api/operation"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/util/validation/field"
	"k8s.io/apiserver/pkg/registry/rest"
	"k8s.io/apiserver/pkg/storage/names"
	"sigs.k8s.io/structured-merge-diff/v6/fieldpath"

	"meshd.dev/pkg/apiserver/upstream"
)

// strategy is how objects of a kind are created, updated and deleted.
type strategy struct {
	runtime.ObjectTyper
	names.NameGenerator
	kind     *Kind
	rules    upstream.Rules
	declared rest.DeclarativeValidation
}

func newStrategy(k *Kind, s *runtime.Scheme) *strategy {
	rules, _ := upstream.RulesFor(k.Object)
	return &strategy{ObjectTyper: s, NameGenerator: names.SimpleNameGenerator, kind: k, rules: rules,
		declared: rest.DeclarativeValidation{Scheme: s}}
}

func (s *strategy) NamespaceScoped() bool { return !s.kind.Cluster }

func (s *strategy) PrepareForCreate(_ context.Context, obj runtime.Object) {
	if s.kind.Status && !s.kind.StatusOnCreate {
		clearPart(obj, "Status")
	}
	if m, err := meta.Accessor(obj); err == nil {
		m.SetGeneration(0)
		if s.kind.Generation {
			m.SetGeneration(1)
		}
	}
	if s.kind.Create != nil {
		s.kind.Create(obj)
	}
}

func (s *strategy) PrepareForUpdate(_ context.Context, obj, old runtime.Object) {
	if s.kind.Status {
		copyPart(obj, old, "Status")
	}
	if s.kind.Update != nil {
		s.kind.Update(obj, old)
	}
	s.bump(obj, old)
}

// bump raises the generation when anything but metadata and status changed.
func (s *strategy) bump(obj, old runtime.Object) {
	if !s.kind.Generation || apiequality.Semantic.DeepEqual(wish(obj), wish(old)) {
		return
	}
	m, err := meta.Accessor(obj)
	if err != nil {
		return
	}
	o, err := meta.Accessor(old)
	if err != nil {
		return
	}
	m.SetGeneration(o.GetGeneration() + 1)
}

// wish is a shallow copy of obj without metadata and status.
func wish(obj runtime.Object) any {
	v := reflect.New(reflect.TypeOf(obj).Elem()).Elem()
	v.Set(reflect.ValueOf(obj).Elem())
	for _, name := range []string{"TypeMeta", "ObjectMeta", "Status"} {
		if f := v.FieldByName(name); f.IsValid() {
			f.SetZero()
		}
	}
	return v.Interface()
}

func (s *strategy) Validate(_ context.Context, obj runtime.Object) field.ErrorList {
	if s.rules.Create == nil {
		return nil
	}
	return s.rules.Create(obj)
}

func (s *strategy) ValidateUpdate(_ context.Context, obj, old runtime.Object) field.ErrorList {
	if s.rules.Update == nil {
		return nil
	}
	return s.rules.Update(obj, old)
}

// ValidateDeclaratively adds the checks that Kubernetes generates from tags.
func (s *strategy) ValidateDeclaratively(ctx context.Context, obj, old runtime.Object, errs field.ErrorList, op operation.Type, c rest.DeclarativeValidationConfig) field.ErrorList {
	return s.declared.ValidateDeclaratively(ctx, obj, old, errs, op, c)
}

// DeclarativeValidationConfig gives the options that the generated validation
// of our kinds asks for, as Kubernetes has them by default; an option that is
// not named is an error of every write of the kind.
func (s *strategy) DeclarativeValidationConfig(context.Context, runtime.Object, runtime.Object) rest.DeclarativeValidationConfig {
	return rest.DeclarativeValidationConfig{Options: map[string]bool{
		"WorkloadWithJob": false, "InPlacePodVerticalScalingSchedulerPreemption": false, "HPAScaleToZero": true,
	}, ShortCircuitMismatch: true}
}

func (s *strategy) WarningsOnCreate(context.Context, runtime.Object) []string { return nil }
func (s *strategy) WarningsOnUpdate(context.Context, runtime.Object, runtime.Object) []string {
	return nil
}
func (s *strategy) Canonicalize(runtime.Object)                   {}
func (s *strategy) AllowCreateOnUpdate(context.Context) bool      { return s.kind.CreateOnPut }
func (s *strategy) AllowUnconditionalUpdate(context.Context) bool { return !s.kind.NoUnconditional }

func (s *strategy) DefaultGarbageCollectionPolicy(context.Context) rest.GarbageCollectionPolicy {
	if s.kind.Garbage != "" {
		return s.kind.Garbage
	}
	return rest.DeleteDependents
}

// GetResetFields tells server-side apply that the status is not writable here.
func (s *strategy) GetResetFields() map[fieldpath.APIVersion]*fieldpath.Set {
	if !s.kind.Status {
		return nil
	}
	return s.reset("status")
}

func (s *strategy) reset(paths ...string) map[fieldpath.APIVersion]*fieldpath.Set {
	set := fieldpath.NewSet()
	for _, p := range paths {
		set.Insert(fieldpath.MakePathOrDie(p))
	}
	return map[fieldpath.APIVersion]*fieldpath.Set{fieldpath.APIVersion(s.kind.GroupVersion().String()): set}
}

// statusStrategy writes the status and metadata, never the spec.
type statusStrategy struct{ *strategy }

func (s statusStrategy) PrepareForUpdate(_ context.Context, obj, old runtime.Object) {
	copyPart(obj, old, "Spec")
	m, err := meta.Accessor(obj)
	if err != nil {
		return
	}
	o, err := meta.Accessor(old)
	if err != nil {
		return
	}
	m.SetOwnerReferences(o.GetOwnerReferences())
	m.SetDeletionTimestamp(o.GetDeletionTimestamp())
	if s.kind.UpdateStatus != nil {
		s.kind.UpdateStatus(obj, old)
	}
}

func (s statusStrategy) ValidateUpdate(_ context.Context, obj, old runtime.Object) field.ErrorList {
	if s.rules.Status == nil {
		return nil
	}
	return s.rules.Status(obj, old)
}

func (s statusStrategy) GetResetFields() map[fieldpath.APIVersion]*fieldpath.Set {
	return s.reset("spec")
}

// partStrategy writes through a subresource that has a rule of its own.
type partStrategy struct {
	*strategy
	prepare  func(obj, old runtime.Object)
	validate func(obj, old runtime.Object) field.ErrorList
	locked   []string
}

func (s partStrategy) PrepareForUpdate(_ context.Context, obj, old runtime.Object) {
	s.prepare(obj, old)
	s.bump(obj, old)
}

func (s partStrategy) ValidateUpdate(_ context.Context, obj, old runtime.Object) field.ErrorList {
	return s.validate(obj, old)
}

func (s partStrategy) GetResetFields() map[fieldpath.APIVersion]*fieldpath.Set {
	return s.reset(s.locked...)
}

// graceful gives objects time to end; only pods have it.
type graceful struct {
	*strategy
	check func(obj runtime.Object, options *metav1.DeleteOptions) bool
}

func (g graceful) CheckGracefulDelete(_ context.Context, obj runtime.Object, options *metav1.DeleteOptions) bool {
	return options != nil && g.check(obj, options)
}
