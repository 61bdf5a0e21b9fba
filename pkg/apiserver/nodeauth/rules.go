package nodeauth

import (
	"strings"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/selection"
	"k8s.io/apiserver/pkg/authorization/authorizer"
)

// A rule allows verbs on a resource when its scope says so. needsPods marks a
// scope that depends on the index.
type rule struct {
	group, resource string // resource may have a subresource: "pods/status"
	verbs           string // separated by spaces
	scope           scope
	needsPods       bool
}

// A scope looks at names only: node is the one asking.
type scope func(x *Index, node string, a authorizer.Attributes) bool

// rules are all an agent may do. Where a resource has several, one suffices.
var rules = []rule{
	// What every node needs of the cluster: peers, services, policies.
	{"", "nodes", "get list watch", anyone, false},
	{"", "services", "get list watch", anyone, false},
	{"", "namespaces", "get list watch", anyone, false},
	{"discovery.k8s.io", "endpointslices", "get list watch", anyone, false},
	{"networking.k8s.io", "networkpolicies", "get list watch", anyone, false},
	{"node.k8s.io", "runtimeclasses", "get list watch", anyone, false},

	// Its own records. The Node object is made when it joins, never by itself:
	// deleting it shuts the node out, whatever certificate it still holds.
	{"", "nodes", "update patch", ownName, false},
	{"", "nodes/status", "get update patch", ownName, false},
	{"coordination.k8s.io", "leases", "create", ownLease, false},
	{"coordination.k8s.io", "leases", "get update patch", ownLease, false},
	{"", "events", "create patch", anyone, false},
	{"events.k8s.io", "events", "create patch", anyone, false},

	// Its pods.
	{"", "pods", "list watch", selectsOwnNode, false},
	{"", "pods", "get delete", ownPod, true},
	{"", "pods/status", "get update patch", ownPod, true},

	// What its pods need.
	{"", "secrets", "get list watch", referred(secretRef), true},
	{"", "configmaps", "get list watch", referred(configMapRef), true},
	{"", "persistentvolumeclaims", "get list watch", referred(claimRef), true},
	{"", "persistentvolumes", "get list watch", ownVolume, true},
	{"", "serviceaccounts", "get", ownServiceAccount, true},
	{"", "serviceaccounts/token", "create", ownServiceAccount, true},
}

func (r rule) covers(a authorizer.Attributes) bool {
	res := a.GetResource()
	if s := a.GetSubresource(); s != "" {
		res += "/" + s
	}
	if r.group != a.GetAPIGroup() || r.resource != res {
		return false
	}
	for verb := range strings.FieldsSeq(r.verbs) {
		if verb == a.GetVerb() {
			return true
		}
	}
	return false
}

func anyone(*Index, string, authorizer.Attributes) bool { return true }

func ownName(_ *Index, node string, a authorizer.Attributes) bool { return a.GetName() == node }

func ownLease(_ *Index, node string, a authorizer.Attributes) bool {
	if a.GetNamespace() != corev1.NamespaceNodeLease {
		return false
	}
	return a.GetName() == node || a.GetVerb() == "create" && a.GetName() == ""
}

// selectsOwnNode wants the field selector spec.nodeName=NODE, so that the
// stream never carries another node's pod.
func selectsOwnNode(_ *Index, node string, a authorizer.Attributes) bool {
	reqs, err := a.GetFieldSelector()
	if err != nil {
		return false
	}
	for _, r := range reqs {
		if r.Field == "spec.nodeName" && r.Value == node && (r.Operator == selection.Equals || r.Operator == selection.DoubleEquals) {
			return true
		}
	}
	return false
}

func ownPod(x *Index, node string, a authorizer.Attributes) bool {
	return a.GetName() != "" && x.hasPod(node, a.GetNamespace(), a.GetName())
}

// referred needs the name; a list or watch has one when its field selector is
// metadata.name=NAME.
func referred(kind refKind) scope {
	return func(x *Index, node string, a authorizer.Attributes) bool {
		return a.GetName() != "" && a.GetNamespace() != "" && x.refers(node, a.GetNamespace(), ref{kind, a.GetName()})
	}
}

func ownVolume(x *Index, node string, a authorizer.Attributes) bool {
	return x.mountsVolume(node, a.GetName())
}

func ownServiceAccount(x *Index, node string, a authorizer.Attributes) bool {
	return a.GetName() != "" && x.usesServiceAccount(node, a.GetNamespace(), a.GetName())
}
