package upstream

import (
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/util/validation/field"
	podutil "k8s.io/kubernetes/pkg/api/pod"
	"k8s.io/kubernetes/pkg/apis/core"
	"k8s.io/kubernetes/pkg/apis/core/validation"
)

// coreRules are those of the group without a name.
func coreRules() map[runtime.Object]Rules {
	v1 := schema.GroupVersion{Version: "v1"}
	return map[runtime.Object]Rules{
		&corev1.Pod{}: rule(
			func(o *core.Pod) field.ErrorList { return validation.ValidatePodCreate(o, podOptions(o, nil)) },
			func(o, old *core.Pod) field.ErrorList {
				return validation.ValidatePodUpdate(o, old, podOptions(o, old))
			},
			func(o, old *core.Pod) field.ErrorList {
				return validation.ValidatePodStatusUpdate(o, old, podOptions(o, old))
			}),
		&corev1.Service{}: rule(validation.ValidateServiceCreate, validation.ValidateServiceUpdate, validation.ValidateServiceStatusUpdate),
		&corev1.Node{}: rule(
			validation.ValidateNode,
			func(o, old *core.Node) field.ErrorList {
				return append(validation.ValidateNode(o), validation.ValidateNodeUpdate(o, old)...)
			},
			validation.ValidateNodeUpdate),
		&corev1.Namespace{}: rule(
			validation.ValidateNamespace,
			func(o, old *core.Namespace) field.ErrorList {
				return append(validation.ValidateNamespace(o), validation.ValidateNamespaceUpdate(o, old)...)
			},
			validation.ValidateNamespaceStatusUpdate),
		&corev1.ConfigMap{}:      rule(validation.ValidateConfigMap, validation.ValidateConfigMapUpdate, nil),
		&corev1.Secret{}:         rule(validation.ValidateSecret, validation.ValidateSecretUpdate, nil),
		&corev1.ServiceAccount{}: rule(validation.ValidateServiceAccount, validation.ValidateServiceAccountUpdate, nil),
		&corev1.Endpoints{}:      rule(validation.ValidateEndpointsCreate, validation.ValidateEndpointsUpdate, nil),
		&corev1.Event{}: rule(
			func(o *core.Event) field.ErrorList { return validation.ValidateEventCreate(o, v1) },
			func(o, old *core.Event) field.ErrorList { return validation.ValidateEventUpdate(o, old, v1) }, nil),
		&corev1.PersistentVolume{}: rule(
			func(o *core.PersistentVolume) field.ErrorList {
				return validation.ValidatePersistentVolume(o, validation.ValidationOptionsForPersistentVolume(o, nil))
			},
			func(o, old *core.PersistentVolume) field.ErrorList {
				opts := validation.ValidationOptionsForPersistentVolume(o, old)
				return append(validation.ValidatePersistentVolume(o, opts), validation.ValidatePersistentVolumeUpdate(o, old, opts)...)
			},
			validation.ValidatePersistentVolumeStatusUpdate),
		&corev1.PersistentVolumeClaim{}: rule(
			func(o *core.PersistentVolumeClaim) field.ErrorList {
				return validation.ValidatePersistentVolumeClaim(o, validation.ValidationOptionsForPersistentVolumeClaim(o, nil))
			},
			func(o, old *core.PersistentVolumeClaim) field.ErrorList {
				return validation.ValidatePersistentVolumeClaimUpdate(o, old, validation.ValidationOptionsForPersistentVolumeClaim(o, old))
			},
			func(o, old *core.PersistentVolumeClaim) field.ErrorList {
				return validation.ValidatePersistentVolumeClaimStatusUpdate(o, old, validation.ValidationOptionsForPersistentVolumeClaim(o, old))
			}),
		&corev1.LimitRange{}: rule(validation.ValidateLimitRange,
			func(o, _ *core.LimitRange) field.ErrorList { return validation.ValidateLimitRange(o) }, nil),
		&corev1.ResourceQuota{}: rule(validation.ValidateResourceQuota, validation.ValidateResourceQuotaUpdate, validation.ValidateResourceQuotaStatusUpdate),
		&corev1.PodTemplate{}: rule(
			func(o *core.PodTemplate) field.ErrorList {
				return validation.ValidatePodTemplate(o, podutil.GetValidationOptionsFromPodTemplate(&o.Template, nil))
			},
			func(o, old *core.PodTemplate) field.ErrorList {
				return validation.ValidatePodTemplateUpdate(o, old, podutil.GetValidationOptionsFromPodTemplate(&o.Template, &old.Template))
			}, nil),
		&corev1.ReplicationController{}: rule(
			func(o *core.ReplicationController) field.ErrorList {
				return validation.ValidateReplicationController(o, podutil.GetValidationOptionsFromPodTemplate(o.Spec.Template, nil))
			},
			func(o, old *core.ReplicationController) field.ErrorList {
				return validation.ValidateReplicationControllerUpdate(o, old, podutil.GetValidationOptionsFromPodTemplate(o.Spec.Template, old.Spec.Template))
			},
			validation.ValidateReplicationControllerStatusUpdate),
		&corev1.Binding{}: rule(validation.ValidatePodBinding, nil, nil),
	}
}

// podOptions are what a pod may use; an update may keep what its old self
// used. old is nil for a create.
func podOptions(pod, old *core.Pod) validation.PodValidationOptions {
	var opts validation.PodValidationOptions
	if old == nil {
		opts = podutil.GetValidationOptionsFromPodSpecAndMeta(&pod.Spec, nil, &pod.ObjectMeta, nil)
	} else {
		opts = podutil.GetValidationOptionsFromPodSpecAndMeta(&pod.Spec, &old.Spec, &pod.ObjectMeta, &old.ObjectMeta)
	}
	opts.ResourceIsPod = true
	return opts
}

// ValidateFinalize checks a change of a namespace's finalizers.
func ValidateFinalize(obj, old runtime.Object) field.ErrorList {
	return rule[core.Namespace](nil, validation.ValidateNamespaceFinalizeUpdate, nil).Update(obj, old)
}

// ValidateEphemeralContainers checks a change of a pod's ephemeral containers.
func ValidateEphemeralContainers(obj, old runtime.Object) field.ErrorList {
	return rule[core.Pod](nil, func(o, old *core.Pod) field.ErrorList {
		return validation.ValidatePodEphemeralContainersUpdate(o, old, podOptions(o, old))
	}, nil).Update(obj, old)
}
