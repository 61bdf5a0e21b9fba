package registry

import (
	"context"
	"fmt"

	appsv1 "k8s.io/api/apps/v1"
	autoscalingv1 "k8s.io/api/autoscaling/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/util/managedfields"
	"k8s.io/apiserver/pkg/registry/rest"
	"sigs.k8s.io/structured-merge-diff/v6/fieldpath"

	"meshd.dev/pkg/apiserver/upstream"
)

// Scale says where a kind keeps its replicas.
type Scale struct {
	spec     func(obj runtime.Object) **int32
	status   func(obj runtime.Object) int32
	selector func(obj runtime.Object) *metav1.LabelSelector
}

func deploymentScale() *Scale {
	return &Scale{
		spec:     func(obj runtime.Object) **int32 { return &obj.(*appsv1.Deployment).Spec.Replicas },
		status:   func(obj runtime.Object) int32 { return obj.(*appsv1.Deployment).Status.Replicas },
		selector: func(obj runtime.Object) *metav1.LabelSelector { return obj.(*appsv1.Deployment).Spec.Selector },
	}
}

func replicaSetScale() *Scale {
	return &Scale{
		spec:     func(obj runtime.Object) **int32 { return &obj.(*appsv1.ReplicaSet).Spec.Replicas },
		status:   func(obj runtime.Object) int32 { return obj.(*appsv1.ReplicaSet).Status.Replicas },
		selector: func(obj runtime.Object) *metav1.LabelSelector { return obj.(*appsv1.ReplicaSet).Spec.Selector },
	}
}

func statefulSetScale() *Scale {
	return &Scale{
		spec:     func(obj runtime.Object) **int32 { return &obj.(*appsv1.StatefulSet).Spec.Replicas },
		status:   func(obj runtime.Object) int32 { return obj.(*appsv1.StatefulSet).Status.Replicas },
		selector: func(obj runtime.Object) *metav1.LabelSelector { return obj.(*appsv1.StatefulSet).Spec.Selector },
	}
}

func controllerScale() *Scale {
	return &Scale{
		spec:   func(obj runtime.Object) **int32 { return &obj.(*corev1.ReplicationController).Spec.Replicas },
		status: func(obj runtime.Object) int32 { return obj.(*corev1.ReplicationController).Status.Replicas },
		selector: func(obj runtime.Object) *metav1.LabelSelector {
			return metav1.SetAsLabelSelector(labels.Set(obj.(*corev1.ReplicationController).Spec.Selector))
		},
	}
}

// ScaleView is the scale subresource of a kind: the same Scale for all.
type ScaleView struct {
	rest  *REST
	scale *Scale
}

var (
	_ rest.Patcher                  = &ScaleView{}
	_ rest.GroupVersionKindProvider = &ScaleView{}
)

// ScaleView of r, whose kind has replicas.
func (r *REST) ScaleView() *ScaleView { return &ScaleView{r, r.Kind.Scale} }

// GroupVersionKind implements rest.GroupVersionKindProvider.
func (*ScaleView) GroupVersionKind(schema.GroupVersion) schema.GroupVersionKind {
	return autoscalingv1.SchemeGroupVersion.WithKind("Scale")
}

// New implements rest.Storage.
func (*ScaleView) New() runtime.Object { return &autoscalingv1.Scale{} }

// Destroy does nothing: the store is the parent's.
func (*ScaleView) Destroy() {}

// Get implements rest.Getter.
func (v *ScaleView) Get(ctx context.Context, name string, options *metav1.GetOptions) (runtime.Object, error) {
	obj, err := v.rest.Get(ctx, name, options)
	if err != nil {
		return nil, err
	}
	return v.of(obj)
}

// ConvertToTable implements rest.TableConvertor.
func (v *ScaleView) ConvertToTable(ctx context.Context, obj, options runtime.Object) (*metav1.Table, error) {
	return prints("Name,Desired#,Available#,Age", func(s *autoscalingv1.Scale) []any {
		return []any{s.Name, int64(s.Spec.Replicas), int64(s.Status.Replicas), age(s.CreationTimestamp)}
	}).ConvertToTable(ctx, obj, options)
}

func (v *ScaleView) of(obj runtime.Object) (*autoscalingv1.Scale, error) {
	m, err := meta.Accessor(obj)
	if err != nil {
		return nil, err
	}
	selector, err := metav1.LabelSelectorAsSelector(v.scale.selector(obj))
	if err != nil {
		return nil, apierrors.NewBadRequest(err.Error())
	}
	s := &autoscalingv1.Scale{ObjectMeta: metav1.ObjectMeta{
		Name: m.GetName(), Namespace: m.GetNamespace(), UID: m.GetUID(),
		ResourceVersion: m.GetResourceVersion(), CreationTimestamp: m.GetCreationTimestamp(),
	}}
	s.Spec.Replicas = deref(*v.scale.spec(obj))
	s.Status = autoscalingv1.ScaleStatus{Replicas: v.scale.status(obj), Selector: selector.String()}
	return s, nil
}

// Update implements rest.Updater.
func (v *ScaleView) Update(ctx context.Context, name string, info rest.UpdatedObjectInfo, create rest.ValidateObjectFunc, update rest.ValidateObjectUpdateFunc, _ bool, options *metav1.UpdateOptions) (runtime.Object, bool, error) {
	obj, _, err := v.rest.Update(ctx, name, scaleInfo{info, v, name}, v.onCreate(create), v.onUpdate(update), false, options)
	if err != nil {
		return nil, false, err
	}
	s, err := v.of(obj)
	return s, false, err
}

// onCreate and onUpdate show admission the scale, not the object behind it.
func (v *ScaleView) onCreate(f rest.ValidateObjectFunc) rest.ValidateObjectFunc {
	return func(ctx context.Context, obj runtime.Object) error {
		s, err := v.of(obj)
		if err != nil {
			return err
		}
		return f(ctx, s)
	}
}

func (v *ScaleView) onUpdate(f rest.ValidateObjectUpdateFunc) rest.ValidateObjectUpdateFunc {
	return func(ctx context.Context, obj, old runtime.Object) error {
		s, err := v.of(obj)
		if err != nil {
			return err
		}
		o, err := v.of(old)
		if err != nil {
			return err
		}
		return f(ctx, s, o)
	}
}

// scaleInfo turns an update of a scale into one of its object.
type scaleInfo struct {
	rest.UpdatedObjectInfo
	view *ScaleView
	name string
}

// UpdatedObject implements rest.UpdatedObjectInfo.
func (i scaleInfo) UpdatedObject(ctx context.Context, old runtime.Object) (runtime.Object, error) {
	obj := old.DeepCopyObject()
	m, err := meta.Accessor(obj)
	if err != nil {
		return nil, err
	}
	if m.GetResourceVersion() == "" {
		return nil, apierrors.NewNotFound(i.view.rest.Kind.GroupResource(), i.name)
	}
	oldScale, err := i.view.of(obj)
	if err != nil {
		return nil, err
	}
	gv := i.view.rest.Kind.GroupVersion()
	paths := managedfields.ResourcePathMappings{gv.String(): fieldpath.MakePathOrDie("spec", "replicas")}
	handler := managedfields.NewScaleHandler(m.GetManagedFields(), gv, paths)
	if oldScale.ManagedFields, err = handler.ToSubresource(); err != nil {
		return nil, err
	}
	updated, err := i.UpdatedObjectInfo.UpdatedObject(ctx, oldScale)
	if err != nil {
		return nil, err
	}
	s, ok := updated.(*autoscalingv1.Scale)
	if !ok {
		return nil, apierrors.NewBadRequest(fmt.Sprintf("expected a Scale, got %T", updated))
	}
	if err := i.check(s, oldScale); err != nil {
		return nil, err
	}
	*i.view.scale.spec(obj) = &s.Spec.Replicas
	m.SetResourceVersion(s.ResourceVersion)
	entries, err := handler.ToParent(s.ManagedFields)
	if err != nil {
		return nil, err
	}
	m.SetManagedFields(entries)
	return obj, nil
}

func (i scaleInfo) check(s, old *autoscalingv1.Scale) error {
	if rules, ok := upstream.RulesFor(s); ok {
		if errs := rules.Create(s); len(errs) > 0 {
			return apierrors.NewInvalid(schema.GroupKind{Group: autoscalingv1.GroupName, Kind: "Scale"}, i.name, errs)
		}
	}
	if s.UID != "" && s.UID != old.UID {
		return apierrors.NewConflict(i.view.rest.Kind.GroupResource(), i.name, fmt.Errorf("precondition failed: UID in precondition: %v, UID in object meta: %v", s.UID, old.UID))
	}
	return nil
}
