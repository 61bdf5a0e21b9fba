package nodeauth

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"

	authenticationv1 "k8s.io/api/authentication/v1"
	coordinationv1 "k8s.io/api/coordination/v1"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apiserver/pkg/admission"
)

// PluginName of the admission plugin, as in Kubernetes.
const PluginName = "NodeRestriction"

type restriction struct {
	*admission.Handler
	index *Index
}

// NewAdmission returns the plugin that looks at what agents write.
func NewAdmission(x *Index) admission.ValidationInterface {
	return &restriction{
		Handler: admission.NewHandler(admission.Create, admission.Update, admission.Delete, admission.Connect),
		index:   x,
	}
}

var (
	nodesResource  = corev1.Resource("nodes")
	podsResource   = corev1.Resource("pods")
	tokenResource  = corev1.Resource("serviceaccounts")
	leasesResource = coordinationv1.Resource("leases")
)

// Validate refuses what the node in a's user may not write.
func (r *restriction) Validate(_ context.Context, a admission.Attributes, _ admission.ObjectInterfaces) error {
	node, isNode := NodeName(a.GetUserInfo())
	if !isNode {
		return nil
	}
	var err error
	switch res := a.GetResource().GroupResource(); {
	case node == "":
		err = fmt.Errorf("user %q is not a node", a.GetUserInfo().GetName())
	case res == nodesResource:
		err = r.checkNode(node, a)
	case res == podsResource:
		err = checkPod(node, a)
	case res == leasesResource:
		err = checkLease(node, a)
	case res == tokenResource && a.GetSubresource() == "token":
		err = r.checkToken(node, a)
	}
	if err != nil {
		return admission.NewForbidden(a, fmt.Errorf("node %q: %w", node, err))
	}
	return nil
}

func (r *restriction) checkNode(node string, a admission.Attributes) error {
	switch a.GetOperation() {
	case admission.Create:
		obj, ok := a.GetObject().(*corev1.Node)
		if !ok {
			return unexpected(a.GetObject())
		}
		if obj.Name != node {
			return fmt.Errorf("may not create node %q", obj.Name)
		}
		return errors.Join(checkNewNode(obj), r.checkPublished(node, obj.Annotations, nil))
	case admission.Update:
		obj, ok := a.GetObject().(*corev1.Node)
		old, ok2 := a.GetOldObject().(*corev1.Node)
		if !ok || !ok2 {
			return unexpected(a.GetObject())
		}
		if old.Name != node || a.GetName() != node {
			return fmt.Errorf("may not modify node %q", a.GetName())
		}
		return errors.Join(checkNodeUpdate(obj, old), r.checkPublished(node, obj.Annotations, old.Annotations))
	}
	return fmt.Errorf("may not %s node %q", strings.ToLower(string(a.GetOperation())), a.GetName())
}

func checkNewNode(n *corev1.Node) error {
	switch {
	case n.Spec.PodCIDR != "" || len(n.Spec.PodCIDRs) > 0:
		return fmt.Errorf("may not set spec.podCIDRs, the cluster assigns them")
	case len(n.OwnerReferences) > 0:
		return fmt.Errorf("may not set metadata.ownerReferences")
	case len(n.Finalizers) > 0:
		return fmt.Errorf("may not set metadata.finalizers")
	}
	return errors.Join(checkAnnotations(n.Annotations, nil), checkLabels(n.Labels, nil))
}

func checkNodeUpdate(n, old *corev1.Node) error {
	if !slices.Equal(n.Spec.PodCIDRs, old.Spec.PodCIDRs) || n.Spec.PodCIDR != old.Spec.PodCIDR {
		return fmt.Errorf("may not change spec.podCIDRs, the cluster assigns them")
	}
	if !equality.Semantic.DeepEqual(n.Spec.Taints, old.Spec.Taints) {
		return fmt.Errorf("may not change its taints after registration")
	}
	spec := *n.Spec.DeepCopy()
	if old.Spec.ProviderID == "" {
		spec.ProviderID = "" // may be set once
	}
	if !equality.Semantic.DeepEqual(spec, old.Spec) {
		return fmt.Errorf("may not change its spec after registration")
	}
	if err := sameOwners(&n.ObjectMeta, &old.ObjectMeta); err != nil {
		return err
	}
	return errors.Join(checkAnnotations(n.Annotations, old.Annotations), checkLabels(n.Labels, old.Labels))
}

// checkAnnotations keeps what the cluster writes about a node, such as the key
// it joined with, from the node itself: of our own annotations a node writes
// only what it publishes to its peers.
func checkAnnotations(now, before map[string]string) error {
	for key := range union(now, before) {
		v, is := now[key]
		w, was := before[key]
		if is == was && v == w || slices.Contains(publishedAnnotations, key) {
			continue
		}
		if strings.HasPrefix(key, "meshd.dev/") {
			return fmt.Errorf("may not set or remove the annotation %s on itself", key)
		}
	}
	return nil
}

func sameOwners(n, old *metav1.ObjectMeta) error {
	if !equality.Semantic.DeepEqual(n.OwnerReferences, old.OwnerReferences) {
		return fmt.Errorf("may not change metadata.ownerReferences")
	}
	if !slices.Equal(n.Finalizers, old.Finalizers) {
		return fmt.Errorf("may not change metadata.finalizers")
	}
	return nil
}

// agentLabels under kubernetes.io and k8s.io are for the node to set; besides
// them it may use every label outside of those domains.
var agentLabels = []string{
	corev1.LabelHostname, corev1.LabelOSStable, corev1.LabelArchStable,
	corev1.LabelInstanceTypeStable, corev1.LabelTopologyZone, corev1.LabelTopologyRegion,
	corev1.LabelInstanceType, corev1.LabelFailureDomainBetaZone, corev1.LabelFailureDomainBetaRegion,
	"beta.kubernetes.io/os", "beta.kubernetes.io/arch",
}

// mayLabel reports whether a node may set or remove the label on itself.
func mayLabel(key string) bool {
	domain, _, found := strings.Cut(key, "/")
	if !found || slices.Contains(agentLabels, key) {
		return true
	}
	under := func(d string) bool { return domain == d || strings.HasSuffix(domain, "."+d) }
	if under("kubelet.kubernetes.io") || under("node.kubernetes.io") {
		return true
	}
	return !under("kubernetes.io") && !under("k8s.io")
}

func checkLabels(now, before map[string]string) error {
	var bad []string
	for key := range union(now, before) {
		v, is := now[key]
		w, was := before[key]
		if (is != was || v != w) && !mayLabel(key) {
			bad = append(bad, key)
		}
	}
	if len(bad) > 0 {
		slices.Sort(bad)
		return fmt.Errorf("may not set or remove the labels %s on itself", strings.Join(bad, ", "))
	}
	return nil
}

func union(a, b map[string]string) map[string]string {
	u := maps.Clone(a)
	if u == nil {
		u = map[string]string{}
	}
	maps.Copy(u, b)
	return u
}

func checkPod(node string, a admission.Attributes) error {
	op, sub := a.GetOperation(), a.GetSubresource()
	switch {
	case op == admission.Delete && sub == "":
		return boundTo(node, a)
	case op == admission.Update && sub == "status":
		if err := boundTo(node, a); err != nil {
			return err
		}
		return checkPodStatus(a)
	case op == admission.Create && sub == "":
		return fmt.Errorf("may not create pods")
	}
	what := "pods"
	if sub != "" {
		what += "/" + sub
	}
	return fmt.Errorf("may not %s %s", strings.ToLower(string(op)), what)
}

// boundTo looks at the stored pod, not at the index.
func boundTo(node string, a admission.Attributes) error {
	old, ok := a.GetOldObject().(*corev1.Pod)
	if !ok {
		return unexpected(a.GetOldObject())
	}
	if old.Spec.NodeName != node {
		return fmt.Errorf("pod %s/%s is not bound to it", old.Namespace, old.Name)
	}
	return nil
}

func checkPodStatus(a admission.Attributes) error {
	pod, ok := a.GetObject().(*corev1.Pod)
	old, ok2 := a.GetOldObject().(*corev1.Pod)
	if !ok || !ok2 {
		return unexpected(a.GetObject())
	}
	if !maps.Equal(pod.Labels, old.Labels) {
		return fmt.Errorf("may not change the labels of a pod through pods/status")
	}
	if pod.Spec.NodeName != old.Spec.NodeName || pod.Spec.ServiceAccountName != old.Spec.ServiceAccountName {
		return fmt.Errorf("may not change the spec of a pod through pods/status")
	}
	return sameOwners(&pod.ObjectMeta, &old.ObjectMeta)
}

func checkLease(node string, a admission.Attributes) error {
	name := a.GetName()
	if obj, ok := a.GetObject().(*coordinationv1.Lease); ok {
		name = obj.Name
	}
	if a.GetOperation() == admission.Delete || a.GetNamespace() != corev1.NamespaceNodeLease || name != node {
		return fmt.Errorf("may only create and update the lease %s/%s", corev1.NamespaceNodeLease, node)
	}
	return nil
}

// checkToken wants a token bound to a pod of the node that runs as the service
// account.
func (r *restriction) checkToken(node string, a admission.Attributes) error {
	tr, ok := a.GetObject().(*authenticationv1.TokenRequest)
	if !ok {
		return unexpected(a.GetObject())
	}
	b := tr.Spec.BoundObjectRef
	if b == nil || b.Kind != "Pod" || b.APIVersion != "v1" || b.Name == "" || b.UID == "" {
		return fmt.Errorf("may only request tokens bound to a pod: want spec.boundObjectRef with apiVersion v1, kind Pod, name and uid")
	}
	if !r.index.HasSynced() {
		return fmt.Errorf("the pods of the nodes are not known yet, try again")
	}
	p, found := r.index.pod(node, a.GetNamespace(), b.Name)
	if !found || p.uid != b.UID || p.serviceAccount != a.GetName() {
		return fmt.Errorf("has no pod %s/%s with UID %s that runs as service account %q", a.GetNamespace(), b.Name, b.UID, a.GetName())
	}
	return nil
}

func unexpected(obj any) error { return fmt.Errorf("unexpected type %T", obj) }
