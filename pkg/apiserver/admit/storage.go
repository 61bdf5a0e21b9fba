package admit

import (
	"context"

	corev1 "k8s.io/api/core/v1"
	storagev1 "k8s.io/api/storage/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apiserver/pkg/admission"
	storagelisters "k8s.io/client-go/listers/storage/v1"
)

// isDefaultClass marks the storage class of claims that name none.
const isDefaultClass = "storageclass.kubernetes.io/is-default-class"

// StorageClass gives claims that name no class the default one.
type StorageClass struct {
	*admission.Handler
	classes storagelisters.StorageClassLister
}

// NewStorageClass returns the plugin.
func NewStorageClass(classes storagelisters.StorageClassLister) StorageClass {
	return StorageClass{admission.NewHandler(admission.Create), classes}
}

// Admit implements admission.MutationInterface.
func (s StorageClass) Admit(_ context.Context, a admission.Attributes, _ admission.ObjectInterfaces) error {
	if a.GetSubresource() != "" || a.GetResource().GroupResource() != (schema.GroupResource{Resource: "persistentvolumeclaims"}) {
		return nil
	}
	claim, ok := a.GetObject().(*corev1.PersistentVolumeClaim)
	if !ok || claim.Spec.StorageClassName != nil || claim.Annotations[corev1.BetaStorageClassAnnotation] != "" {
		return nil
	}
	all, err := s.classes.List(labels.Everything())
	if err != nil {
		return admission.NewForbidden(a, err)
	}
	if def := defaultClass(all); def != nil {
		claim.Spec.StorageClassName = &def.Name
	}
	return nil
}

// defaultClass is the newest one that is marked; names break ties.
func defaultClass(all []*storagev1.StorageClass) *storagev1.StorageClass {
	var def *storagev1.StorageClass
	for _, c := range all {
		if c.Annotations[isDefaultClass] != "true" {
			continue
		}
		switch {
		case def == nil, def.CreationTimestamp.Before(&c.CreationTimestamp):
			def = c
		case def.CreationTimestamp.Equal(&c.CreationTimestamp) && c.Name < def.Name:
			def = c
		}
	}
	return def
}
