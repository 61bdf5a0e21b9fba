package nodeauth

import (
	"bytes"
	"strings"
	"testing"

	authenticationv1 "k8s.io/api/authentication/v1"
	coordinationv1 "k8s.io/api/coordination/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apiserver/pkg/admission"
	"k8s.io/apiserver/pkg/authentication/user"

	"meshd.dev/pkg/mesh"
)

func node(name string, change ...func(*corev1.Node)) *corev1.Node {
	n := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name, Labels: map[string]string{"kubernetes.io/hostname": name, "node-role.kubernetes.io/control-plane": ""}}}
	n.Annotations = map[string]string{identityAnnotation: "key of " + name}
	n.Spec.PodCIDR, n.Spec.PodCIDRs = "10.244.1.0/24", []string{"10.244.1.0/24"}
	n.Spec.Taints = []corev1.Taint{{Key: "a", Effect: corev1.TaintEffectNoSchedule}}
	for _, c := range change {
		c(n)
	}
	return n
}

func bare(n *corev1.Node) {
	n.Annotations, n.Spec.PodCIDR, n.Spec.PodCIDRs, n.Labels = nil, "", nil, nil
}

func label(key, value string) func(*corev1.Node) {
	return func(n *corev1.Node) {
		labels := map[string]string{}
		for k, v := range n.Labels {
			labels[k] = v
		}
		if labels[key] = value; value == "-" {
			delete(labels, key)
		}
		n.Labels = labels
	}
}

// published gives a node a key of 32 times the same byte, and endpoints.
func published(key byte, endpoints string) func(*corev1.Node) *corev1.Node {
	return func(n *corev1.Node) *corev1.Node {
		n.Annotations = map[string]string{identityAnnotation: "key of " + n.Name, keyAnnotation: mesh.Key(bytes.Repeat([]byte{key}, 32)).String()}
		if endpoints != "" {
			n.Annotations[endpointsAnnotation] = endpoints
		}
		return n
	}
}

func lease(ns, name string) *coordinationv1.Lease {
	return &coordinationv1.Lease{ObjectMeta: metav1.ObjectMeta{Namespace: ns, Name: name}}
}

func token(ref *authenticationv1.BoundObjectReference) *authenticationv1.TokenRequest {
	return &authenticationv1.TokenRequest{Spec: authenticationv1.TokenRequestSpec{BoundObjectRef: ref}}
}

func podRef(name, uid string) *authenticationv1.BoundObjectReference {
	return &authenticationv1.BoundObjectReference{APIVersion: "v1", Kind: "Pod", Name: name, UID: types.UID(uid)}
}

func changed(p *corev1.Pod, change func(*corev1.Pod)) *corev1.Pod { change(p); return p }

func TestAdmission(t *testing.T) {
	const ok = ""
	owner := []metav1.OwnerReference{{Kind: "Pod", Name: "x"}}
	for _, c := range []struct {
		name     string
		op       admission.Operation
		resource string
		obj, old runtime.Object
		reqName  string
		want     string
	}{
		{"registers", "CREATE", "nodes", node("n1", bare), nil, "", ok},
		{"registers with taints and a role of its own domain", "CREATE", "nodes", node("n1", bare, label("example.org/x", "y")), nil, "", ok},
		{"registers another node", "CREATE", "nodes", node("n2", bare), nil, "", `may not create node "n2"`},
		{"registers with a pod CIDR", "CREATE", "nodes", node("n1", bare, func(n *corev1.Node) { n.Spec.PodCIDRs = []string{"10.244.0.0/16"} }), nil, "", "the cluster assigns them"},
		{"registers as control plane", "CREATE", "nodes", node("n1", bare, label("node-role.kubernetes.io/control-plane", "")), nil, "", "may not set or remove the labels node-role.kubernetes.io/control-plane on itself"},
		{"registers with an owner", "CREATE", "nodes", node("n1", bare, func(n *corev1.Node) { n.OwnerReferences = owner }), nil, "", "ownerReferences"},
		{"publishes its key and endpoints", "UPDATE", "nodes", published(1, "192.0.2.1:51820,[2001:db8::1]:51820")(node("n1")), node("n1"), "n1", ok},
		{"takes another identity", "UPDATE", "nodes", node("n1", func(n *corev1.Node) { n.Annotations = map[string]string{"meshd.dev/identity": "k"} }), node("n1"), "n1", "may not set or remove the annotation meshd.dev/identity"},
		{"registers with an identity", "CREATE", "nodes", node("n1", bare, func(n *corev1.Node) { n.Annotations = map[string]string{"meshd.dev/identity": "k"} }), nil, "", "may not set or remove the annotation meshd.dev/identity"},
		{"changes its pod CIDR", "UPDATE", "nodes", node("n1", func(n *corev1.Node) { n.Spec.PodCIDRs = []string{"10.244.2.0/24"} }), node("n1"), "n1", "may not change spec.podCIDRs"},
		{"changes its pod CIDR through status", "UPDATE", "nodes/status", node("n1", func(n *corev1.Node) { n.Spec.PodCIDR = "" }), node("n1"), "n1", "may not change spec.podCIDRs"},
		{"removes a taint", "UPDATE", "nodes", node("n1", func(n *corev1.Node) { n.Spec.Taints = nil }), node("n1"), "n1", "may not change its taints"},
		{"uncordons itself", "UPDATE", "nodes", node("n1"), node("n1", func(n *corev1.Node) { n.Spec.Unschedulable = true }), "n1", "may not change its spec"},
		{"sets its provider ID once", "UPDATE", "nodes", node("n1", func(n *corev1.Node) { n.Spec.ProviderID = "x" }), node("n1"), "n1", ok},
		{"changes its provider ID", "UPDATE", "nodes", node("n1", func(n *corev1.Node) { n.Spec.ProviderID = "x" }), node("n1", func(n *corev1.Node) { n.Spec.ProviderID = "y" }), "n1", "may not change its spec"},
		{"sets a zone", "UPDATE", "nodes", node("n1", label("topology.kubernetes.io/zone", "z")), node("n1"), "n1", ok},
		{"sets a restricted label", "UPDATE", "nodes", node("n1", label("node-restriction.kubernetes.io/x", "y")), node("n1"), "n1", "node-restriction.kubernetes.io/x"},
		{"removes a restricted label", "UPDATE", "nodes/status", node("n1", label("node-role.kubernetes.io/control-plane", "-")), node("n1"), "n1", "node-role.kubernetes.io/control-plane"},
		{"takes a finalizer", "UPDATE", "nodes", node("n1", func(n *corev1.Node) { n.Finalizers = []string{"x/y"} }), node("n1"), "n1", "finalizers"},
		{"modifies another node", "UPDATE", "nodes/status", node("n2"), node("n2"), "n2", `may not modify node "n2"`},
		{"deletes itself", "DELETE", "nodes", nil, node("n1"), "n1", "may not delete node"},

		{"creates a pod", "CREATE", "pods", pod("default", "mirror", "n1"), nil, "", "may not create pods"},
		{"updates a pod", "UPDATE", "pods", pod("default", "mine", "n1"), pod("default", "mine", "n1"), "mine", "may not update pods"},
		{"reports its pod", "UPDATE", "pods/status", pod("default", "mine", "n1"), pod("default", "mine", "n1"), "mine", ok},
		{"reports another's pod", "UPDATE", "pods/status", pod("default", "theirs", "n2"), pod("default", "theirs", "n2"), "theirs", "pod default/theirs is not bound to it"},
		{"reports an unbound pod", "UPDATE", "pods/status", pod("default", "waiting", "n1"), pod("default", "waiting", ""), "waiting", "is not bound to it"},
		{"moves labels into a service", "UPDATE", "pods/status", changed(pod("default", "mine", "n1"), func(p *corev1.Pod) { p.Labels = map[string]string{"app": "bank"} }), pod("default", "mine", "n1"), "mine", "may not change the labels"},
		{"adopts a pod", "UPDATE", "pods/status", changed(pod("default", "mine", "n1"), func(p *corev1.Pod) { p.OwnerReferences = owner }), pod("default", "mine", "n1"), "mine", "ownerReferences"},
		{"deletes its pod", "DELETE", "pods", nil, pod("default", "mine", "n1"), "mine", ok},
		{"deletes another's pod", "DELETE", "pods", nil, pod("default", "theirs", "n2"), "theirs", "is not bound to it"},
		{"evicts", "CREATE", "pods/eviction", nil, nil, "mine", "may not create pods/eviction"},
		{"execs", "CONNECT", "pods/exec", nil, nil, "mine", "may not connect pods/exec"},

		{"creates its lease", "CREATE", "leases", lease("kube-node-lease", "n1"), nil, "", ok},
		{"renews its lease", "UPDATE", "leases", lease("kube-node-lease", "n1"), lease("kube-node-lease", "n1"), "n1", ok},
		{"creates another's lease", "CREATE", "leases", lease("kube-node-lease", "n2"), nil, "", "may only create and update the lease kube-node-lease/n1"},
		{"takes a leader's lease", "UPDATE", "leases", lease("kube-system", "n1"), lease("kube-system", "n1"), "n1", "may only create and update"},

		{"token for its pod", "CREATE", "serviceaccounts/token", token(podRef("mine", "uid-default-mine")), nil, "mine", ok},
		{"token for another account", "CREATE", "serviceaccounts/token", token(podRef("mine", "uid-default-mine")), nil, "theirs", `runs as service account "theirs"`},
		{"token with an older UID", "CREATE", "serviceaccounts/token", token(podRef("mine", "uid-old")), nil, "mine", "has no pod default/mine with UID uid-old"},
		{"token for another's pod", "CREATE", "serviceaccounts/token", token(podRef("theirs", "uid-default-theirs")), nil, "theirs", "has no pod default/theirs"},
		{"token bound to nothing", "CREATE", "serviceaccounts/token", token(nil), nil, "mine", "may only request tokens bound to a pod"},
		{"token without UID", "CREATE", "serviceaccounts/token", token(podRef("mine", "")), nil, "mine", "may only request tokens bound to a pod"},

		{"an event", "CREATE", "events", &corev1.Event{}, nil, "", ok},
	} {
		for _, who := range []user.Info{nodeUser("n1"), &user.DefaultInfo{Name: "admin", Groups: []string{"system:masters"}}} {
			want := c.want
			if who.GetName() == "admin" {
				want = ok
			}
			res, sub, _ := strings.Cut(c.resource, "/")
			gvr := schema.GroupVersionResource{Version: "v1", Resource: res}
			ns := ""
			for _, o := range []runtime.Object{c.obj, c.old} {
				if l, isLease := o.(*coordinationv1.Lease); isLease {
					gvr.Group, ns = "coordination.k8s.io", l.Namespace
				}
			}
			if res == "serviceaccounts" || res == "pods" {
				ns = "default"
			}
			a := admission.NewAttributesRecord(c.obj, c.old, schema.GroupVersionKind{Version: "v1", Kind: "X"}, ns, c.reqName, gvr, sub, c.op, nil, false, who)
			err := NewAdmission(testIndex()).Validate(t.Context(), a, nil)
			switch {
			case want == ok && err != nil:
				t.Errorf("%s as %s: %v", c.name, who.GetName(), err)
			case want != ok && (err == nil || !strings.Contains(err.Error(), want)):
				t.Errorf("%s as %s:\n got %v\nwant a part %q", c.name, who.GetName(), err, want)
			}
		}
	}
}
