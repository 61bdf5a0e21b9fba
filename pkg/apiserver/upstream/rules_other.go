package upstream

import (
	admissionregistrationv1 "k8s.io/api/admissionregistration/v1"
	autoscalingv1 "k8s.io/api/autoscaling/v1"
	autoscalingv2 "k8s.io/api/autoscaling/v2"
	coordinationv1 "k8s.io/api/coordination/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	networkingv1 "k8s.io/api/networking/v1"
	nodev1 "k8s.io/api/node/v1"
	policyv1 "k8s.io/api/policy/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	schedulingv1 "k8s.io/api/scheduling/v1"
	storagev1 "k8s.io/api/storage/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/util/validation/field"
	admissionregistrationvalidation "k8s.io/kubernetes/pkg/apis/admissionregistration/validation"
	"k8s.io/kubernetes/pkg/apis/autoscaling"
	autoscalingvalidation "k8s.io/kubernetes/pkg/apis/autoscaling/validation"
	coordinationvalidation "k8s.io/kubernetes/pkg/apis/coordination/validation"
	discoveryvalidation "k8s.io/kubernetes/pkg/apis/discovery/validation"
	"k8s.io/kubernetes/pkg/apis/networking"
	networkingvalidation "k8s.io/kubernetes/pkg/apis/networking/validation"
	nodevalidation "k8s.io/kubernetes/pkg/apis/node/validation"
	"k8s.io/kubernetes/pkg/apis/policy"
	policyvalidation "k8s.io/kubernetes/pkg/apis/policy/validation"
	"k8s.io/kubernetes/pkg/apis/rbac"
	rbacvalidation "k8s.io/kubernetes/pkg/apis/rbac/validation"
	schedulingvalidation "k8s.io/kubernetes/pkg/apis/scheduling/validation"
	"k8s.io/kubernetes/pkg/apis/storage"
	storagevalidation "k8s.io/kubernetes/pkg/apis/storage/validation"
)

// otherRules are those of the small groups.
func otherRules() map[runtime.Object]Rules {
	return map[runtime.Object]Rules{
		&discoveryv1.EndpointSlice{}: rule(discoveryvalidation.ValidateEndpointSliceCreate, discoveryvalidation.ValidateEndpointSliceUpdate, nil),
		&coordinationv1.Lease{}:      rule(coordinationvalidation.ValidateLease, coordinationvalidation.ValidateLeaseUpdate, nil),
		&networkingv1.NetworkPolicy{}: rule(
			func(o *networking.NetworkPolicy) field.ErrorList {
				return networkingvalidation.ValidateNetworkPolicy(o, networkingvalidation.ValidationOptionsForNetworking(o, nil))
			},
			func(o, old *networking.NetworkPolicy) field.ErrorList {
				return networkingvalidation.ValidateNetworkPolicyUpdate(o, old, networkingvalidation.ValidationOptionsForNetworking(o, old))
			}, nil),
		&networkingv1.Ingress{}:      rule(networkingvalidation.ValidateIngressCreate, networkingvalidation.ValidateIngressUpdate, networkingvalidation.ValidateIngressStatusUpdate),
		&networkingv1.IngressClass{}: rule(networkingvalidation.ValidateIngressClass, networkingvalidation.ValidateIngressClassUpdate, nil),
		&policyv1.PodDisruptionBudget{}: rule(
			func(o *policy.PodDisruptionBudget) field.ErrorList {
				return policyvalidation.ValidatePodDisruptionBudget(o, policyvalidation.PodDisruptionBudgetValidationOptions{})
			},
			func(o, _ *policy.PodDisruptionBudget) field.ErrorList {
				return policyvalidation.ValidatePodDisruptionBudget(o, policyvalidation.PodDisruptionBudgetValidationOptions{AllowInvalidLabelValueInSelector: true})
			},
			func(o, old *policy.PodDisruptionBudget) field.ErrorList {
				return policyvalidation.ValidatePodDisruptionBudgetStatusUpdate(o.Status, old.Status, field.NewPath("status"), schema.GroupVersion{Group: "policy", Version: "v1"})
			}),
		&rbacv1.Role{}:        rule(rbacvalidation.ValidateRole, rbacvalidation.ValidateRoleUpdate, nil),
		&rbacv1.RoleBinding{}: rule(rbacvalidation.ValidateRoleBinding, rbacvalidation.ValidateRoleBindingUpdate, nil),
		&rbacv1.ClusterRole{}: rule(
			func(o *rbac.ClusterRole) field.ErrorList {
				return rbacvalidation.ValidateClusterRole(o, rbacvalidation.ClusterRoleValidationOptions{})
			},
			func(o, old *rbac.ClusterRole) field.ErrorList {
				return rbacvalidation.ValidateClusterRoleUpdate(o, old, rbacvalidation.ClusterRoleValidationOptions{})
			}, nil),
		&rbacv1.ClusterRoleBinding{}:  rule(rbacvalidation.ValidateClusterRoleBinding, rbacvalidation.ValidateClusterRoleBindingUpdate, nil),
		&schedulingv1.PriorityClass{}: rule(schedulingvalidation.ValidatePriorityClass, schedulingvalidation.ValidatePriorityClassUpdate, nil),
		&storagev1.StorageClass{}: rule(
			storagevalidation.ValidateStorageClass,
			func(o, old *storage.StorageClass) field.ErrorList {
				return append(storagevalidation.ValidateStorageClass(o), storagevalidation.ValidateStorageClassUpdate(o, old)...)
			}, nil),
		&storagev1.CSIDriver{}:                                    rule(storagevalidation.ValidateCSIDriver, storagevalidation.ValidateCSIDriverUpdate, nil),
		&storagev1.CSINode{}:                                      rule(storagevalidation.ValidateCSINode, storagevalidation.ValidateCSINodeUpdate, storagevalidation.ValidateCSINodeStatusUpdate),
		&storagev1.VolumeAttachment{}:                             rule(storagevalidation.ValidateVolumeAttachment, storagevalidation.ValidateVolumeAttachmentUpdate, nil),
		&nodev1.RuntimeClass{}:                                    rule(nodevalidation.ValidateRuntimeClass, nodevalidation.ValidateRuntimeClassUpdate, nil),
		&admissionregistrationv1.MutatingWebhookConfiguration{}:   rule(admissionregistrationvalidation.ValidateMutatingWebhookConfiguration, admissionregistrationvalidation.ValidateMutatingWebhookConfigurationUpdate, nil),
		&admissionregistrationv1.ValidatingWebhookConfiguration{}: rule(admissionregistrationvalidation.ValidateValidatingWebhookConfiguration, admissionregistrationvalidation.ValidateValidatingWebhookConfigurationUpdate, nil),
		&autoscalingv2.HorizontalPodAutoscaler{}: rule(
			func(o *autoscaling.HorizontalPodAutoscaler) field.ErrorList {
				return autoscalingvalidation.ValidateHorizontalPodAutoscaler(o, autoscalerOptions())
			},
			func(o, old *autoscaling.HorizontalPodAutoscaler) field.ErrorList {
				return autoscalingvalidation.ValidateHorizontalPodAutoscalerUpdate(o, old, autoscalerOptions())
			},
			autoscalingvalidation.ValidateHorizontalPodAutoscalerStatusUpdate),
		&autoscalingv1.Scale{}: rule(autoscalingvalidation.ValidateScale, nil, nil),
	}
}

func autoscalerOptions() autoscalingvalidation.HorizontalPodAutoscalerSpecValidationOptions {
	return autoscalingvalidation.HorizontalPodAutoscalerSpecValidationOptions{MinReplicasLowerBound: 1}
}
