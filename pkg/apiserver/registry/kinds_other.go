package registry

import (
	"fmt"
	"strings"

	admissionregistrationv1 "k8s.io/api/admissionregistration/v1"
	autoscalingv2 "k8s.io/api/autoscaling/v2"
	coordinationv1 "k8s.io/api/coordination/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	networkingv1 "k8s.io/api/networking/v1"
	nodev1 "k8s.io/api/node/v1"
	policyv1 "k8s.io/api/policy/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	schedulingv1 "k8s.io/api/scheduling/v1"
	storagev1 "k8s.io/api/storage/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
)

func networkKinds() []*Kind {
	return []*Kind{
		{Group: "discovery.k8s.io", Version: "v1", Resource: "endpointslices", Object: &discoveryv1.EndpointSlice{}, List: &discoveryv1.EndpointSliceList{}, Generation: true,
			Print: prints("Name,AddressType,Ports,Endpoints,Age", func(e *discoveryv1.EndpointSlice) []any {
				return []any{e.Name, string(e.AddressType), slicePorts(e), sliceAddresses(e), age(e.CreationTimestamp)}
			})},
		{Group: "networking.k8s.io", Version: "v1", Resource: "networkpolicies", Singular: "networkpolicy", Short: []string{"netpol"},
			Object: &networkingv1.NetworkPolicy{}, List: &networkingv1.NetworkPolicyList{}, Generation: true,
			Print: prints("Name,Pod-Selector,Age", func(p *networkingv1.NetworkPolicy) []any {
				return []any{p.Name, metav1.FormatLabelSelector(&p.Spec.PodSelector), age(p.CreationTimestamp)}
			})},
		{Group: "networking.k8s.io", Version: "v1", Resource: "ingresses", Singular: "ingress", Short: []string{"ing"},
			Object: &networkingv1.Ingress{}, List: &networkingv1.IngressList{}, Status: true, Generation: true,
			Print: prints("Name,Class,Hosts,Address,Ports,Age", func(i *networkingv1.Ingress) []any {
				var hosts, addresses []string
				for _, r := range i.Spec.Rules {
					if r.Host != "" {
						hosts = append(hosts, r.Host)
					}
				}
				if len(hosts) == 0 {
					hosts = []string{"*"}
				}
				for _, a := range i.Status.LoadBalancer.Ingress {
					addresses = append(addresses, a.IP+a.Hostname)
				}
				ports := "80"
				if len(i.Spec.TLS) > 0 {
					ports = "80, 443"
				}
				return []any{i.Name, orNone(deref(i.Spec.IngressClassName)), few(hosts), strings.Join(addresses, ","), ports, age(i.CreationTimestamp)}
			})},
		{Group: "networking.k8s.io", Version: "v1", Resource: "ingressclasses", Object: &networkingv1.IngressClass{}, List: &networkingv1.IngressClassList{}, Cluster: true, Generation: true,
			Print: prints("Name,Controller,Parameters,Age", func(i *networkingv1.IngressClass) []any {
				params := "<none>"
				if p := i.Spec.Parameters; p != nil {
					params = p.Kind + "." + deref(p.APIGroup) + "/" + p.Name
				}
				return []any{i.Name, i.Spec.Controller, params, age(i.CreationTimestamp)}
			})},
	}
}

func slicePorts(e *discoveryv1.EndpointSlice) string {
	if len(e.Ports) == 0 {
		return "<unset>"
	}
	var ports []string
	for _, p := range e.Ports {
		if p.Port == nil {
			ports = append(ports, "*")
		} else {
			ports = append(ports, itoa(*p.Port))
		}
	}
	return few(ports)
}

func sliceAddresses(e *discoveryv1.EndpointSlice) string {
	if len(e.Endpoints) == 0 {
		return "<unset>"
	}
	var out []string
	for _, ep := range e.Endpoints {
		out = append(out, ep.Addresses...)
	}
	return few(out)
}

func otherKinds() []*Kind {
	return []*Kind{
		{Group: "coordination.k8s.io", Version: "v1", Resource: "leases", Object: &coordinationv1.Lease{}, List: &coordinationv1.LeaseList{}, CreateOnPut: true, NoUnconditional: true,
			Print: prints("Name,Holder,Age", func(l *coordinationv1.Lease) []any {
				return []any{l.Name, deref(l.Spec.HolderIdentity), age(l.CreationTimestamp)}
			})},
		{Group: "policy", Version: "v1", Resource: "poddisruptionbudgets", Short: []string{"pdb"}, Object: &policyv1.PodDisruptionBudget{}, List: &policyv1.PodDisruptionBudgetList{}, Status: true, Generation: true,
			Print: prints("Name,Min Available,Max Unavailable,Allowed Disruptions#,Age", func(p *policyv1.PodDisruptionBudget) []any {
				show := func(v *intstr.IntOrString) string {
					if v == nil {
						return "N/A"
					}
					return v.String()
				}
				return []any{p.Name, show(p.Spec.MinAvailable), show(p.Spec.MaxUnavailable), int64(p.Status.DisruptionsAllowed), age(p.CreationTimestamp)}
			})},
		{Group: "rbac.authorization.k8s.io", Version: "v1", Resource: "roles", Object: &rbacv1.Role{}, List: &rbacv1.RoleList{}, CreateOnPut: true,
			Print: prints("Name,Created At", func(r *rbacv1.Role) []any { return []any{r.Name, created(r.CreationTimestamp)} })},
		{Group: "rbac.authorization.k8s.io", Version: "v1", Resource: "rolebindings", Object: &rbacv1.RoleBinding{}, List: &rbacv1.RoleBindingList{}, CreateOnPut: true,
			Print: prints("Name,Role,Age|Users,Groups,ServiceAccounts", func(b *rbacv1.RoleBinding) []any {
				return append([]any{b.Name, b.RoleRef.Kind + "/" + b.RoleRef.Name, age(b.CreationTimestamp)}, subjects(b.Subjects)...)
			})},
		{Group: "rbac.authorization.k8s.io", Version: "v1", Resource: "clusterroles", Object: &rbacv1.ClusterRole{}, List: &rbacv1.ClusterRoleList{}, Cluster: true, CreateOnPut: true,
			Print: prints("Name,Created At", func(r *rbacv1.ClusterRole) []any { return []any{r.Name, created(r.CreationTimestamp)} })},
		{Group: "rbac.authorization.k8s.io", Version: "v1", Resource: "clusterrolebindings", Object: &rbacv1.ClusterRoleBinding{}, List: &rbacv1.ClusterRoleBindingList{}, Cluster: true, CreateOnPut: true,
			Print: prints("Name,Role,Age|Users,Groups,ServiceAccounts", func(b *rbacv1.ClusterRoleBinding) []any {
				return append([]any{b.Name, b.RoleRef.Kind + "/" + b.RoleRef.Name, age(b.CreationTimestamp)}, subjects(b.Subjects)...)
			})},
		{Group: "scheduling.k8s.io", Version: "v1", Resource: "priorityclasses", Short: []string{"pc"}, Object: &schedulingv1.PriorityClass{}, List: &schedulingv1.PriorityClassList{}, Cluster: true, Generation: true,
			Print: prints("Name,Value#,Global-Default,Age|PreemptionPolicy", func(p *schedulingv1.PriorityClass) []any {
				return []any{p.Name, int64(p.Value), fmt.Sprint(p.GlobalDefault), age(p.CreationTimestamp), string(deref(p.PreemptionPolicy))}
			})},
		{Group: "storage.k8s.io", Version: "v1", Resource: "storageclasses", Short: []string{"sc"}, Object: &storagev1.StorageClass{}, List: &storagev1.StorageClassList{}, Cluster: true,
			Print: prints("Name,Provisioner,ReclaimPolicy,VolumeBindingMode,AllowVolumeExpansion,Age", func(s *storagev1.StorageClass) []any {
				name := s.Name
				if s.Annotations["storageclass.kubernetes.io/is-default-class"] == "true" {
					name += " (default)"
				}
				return []any{name, s.Provisioner, string(deref(s.ReclaimPolicy)), string(deref(s.VolumeBindingMode)), fmt.Sprint(deref(s.AllowVolumeExpansion)), age(s.CreationTimestamp)}
			})},
		{Group: "autoscaling", Version: "v2", Resource: "horizontalpodautoscalers", Short: []string{"hpa"}, Categories: []string{"all"},
			Object: &autoscalingv2.HorizontalPodAutoscaler{}, List: &autoscalingv2.HorizontalPodAutoscalerList{}, Status: true,
			Print: prints("Name,Reference,MinPods,MaxPods#,Replicas#,Age", func(h *autoscalingv2.HorizontalPodAutoscaler) []any {
				low := "<unset>"
				if h.Spec.MinReplicas != nil {
					low = itoa(*h.Spec.MinReplicas)
				}
				return []any{h.Name, h.Spec.ScaleTargetRef.Kind + "/" + h.Spec.ScaleTargetRef.Name, low, int64(h.Spec.MaxReplicas), int64(h.Status.CurrentReplicas), age(h.CreationTimestamp)}
			})},
	}
}

// clusterKinds are what storage drivers, runtimes and admission webhooks say
// of themselves.
func clusterKinds() []*Kind {
	return []*Kind{
		{Group: "storage.k8s.io", Version: "v1", Resource: "csidrivers", Object: &storagev1.CSIDriver{}, List: &storagev1.CSIDriverList{}, Cluster: true},
		{Group: "storage.k8s.io", Version: "v1", Resource: "csinodes", Object: &storagev1.CSINode{}, List: &storagev1.CSINodeList{}, Cluster: true, Status: true,
			Print: prints("Name,Drivers#,Age", func(n *storagev1.CSINode) []any {
				return []any{n.Name, int64(len(n.Spec.Drivers)), age(n.CreationTimestamp)}
			})},
		{Group: "storage.k8s.io", Version: "v1", Resource: "volumeattachments", Object: &storagev1.VolumeAttachment{}, List: &storagev1.VolumeAttachmentList{}, Cluster: true, Status: true,
			Print: prints("Name,Attacher,PV,Node,Attached,Age", func(a *storagev1.VolumeAttachment) []any {
				return []any{a.Name, a.Spec.Attacher, deref(a.Spec.Source.PersistentVolumeName), a.Spec.NodeName, fmt.Sprint(a.Status.Attached), age(a.CreationTimestamp)}
			})},
		{Group: "node.k8s.io", Version: "v1", Resource: "runtimeclasses", Object: &nodev1.RuntimeClass{}, List: &nodev1.RuntimeClassList{}, Cluster: true,
			Print: prints("Name,Handler,Age", func(r *nodev1.RuntimeClass) []any { return []any{r.Name, r.Handler, age(r.CreationTimestamp)} })},
		{Group: "admissionregistration.k8s.io", Version: "v1", Resource: "mutatingwebhookconfigurations", Categories: []string{"api-extensions"},
			Object: &admissionregistrationv1.MutatingWebhookConfiguration{}, List: &admissionregistrationv1.MutatingWebhookConfigurationList{}, Cluster: true, Generation: true,
			Print: prints("Name,Webhooks#,Age", func(c *admissionregistrationv1.MutatingWebhookConfiguration) []any {
				return []any{c.Name, int64(len(c.Webhooks)), age(c.CreationTimestamp)}
			})},
		{Group: "admissionregistration.k8s.io", Version: "v1", Resource: "validatingwebhookconfigurations", Categories: []string{"api-extensions"},
			Object: &admissionregistrationv1.ValidatingWebhookConfiguration{}, List: &admissionregistrationv1.ValidatingWebhookConfigurationList{}, Cluster: true, Generation: true,
			Print: prints("Name,Webhooks#,Age", func(c *admissionregistrationv1.ValidatingWebhookConfiguration) []any {
				return []any{c.Name, int64(len(c.Webhooks)), age(c.CreationTimestamp)}
			})},
	}
}

func created(t metav1.Time) string { return t.UTC().Format("2006-01-02T15:04:05Z") }

// subjects are the users, groups and service accounts of a binding.
func subjects(all []rbacv1.Subject) []any {
	var users, groups, accounts []string
	for _, s := range all {
		switch s.Kind {
		case rbacv1.UserKind:
			users = append(users, s.Name)
		case rbacv1.GroupKind:
			groups = append(groups, s.Name)
		case rbacv1.ServiceAccountKind:
			accounts = append(accounts, s.Namespace+"/"+s.Name)
		}
	}
	return []any{strings.Join(users, ", "), strings.Join(groups, ", "), strings.Join(accounts, ", ")}
}
