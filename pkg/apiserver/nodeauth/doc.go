// Package nodeauth says what the agent of a node may do: what it needs for the
// pods bound to it, and nothing about any other node. An agent is the user
// system:node:NAME in the group system:nodes.
//
// Wiring:
//
//	index := nodeauth.NewIndex()
//	nodes, _ := factory.Core().V1().Nodes().Informer().AddEventHandler(index.Nodes())
//	pods, _ := factory.Core().V1().Pods().Informer().AddEventHandler(index.Pods())
//	claims, _ := factory.Core().V1().PersistentVolumeClaims().Informer().AddEventHandler(index.Claims())
//	index.SyncedBy(nodes.HasSynced, pods.HasSynced, claims.HasSynced)
//	authz := union.New(nodeauth.NewAuthorizer(index), rbac)      // before RBAC
//	admit := admission.NewChainHandler(..., nodeauth.NewAdmission(index))
//	authn := x509.NewDynamic(ca.VerifyOptions, nodeauth.UserOf)
//	handler = nodeauth.EndWithNode(index, handler)               // behind authorization
//
// The authorizer decides by names only, from the table in rules.go; the
// admission plugin looks at what is written: a node cannot give itself pod
// CIDRs, taints, protected labels or owners, touch another Node, Lease or Pod,
// or get a token for a service account none of its pods uses. What it publishes
// to its peers must be readable, and its public key no other node's; two nodes
// that publish the same new key in the same moment both get it.
//
// A node without a Node object was removed, or has not joined: it is denied
// every request about a resource, whatever certificate it holds. So is one
// whose certificate is of another key than the annotation meshd.dev/identity
// of its Node says: the name belongs to the machine that joined last, and a
// Node that nobody joined as is nobody's. What a node has open when its Node
// is deleted, a watch above all, ends with it.
//
// Nothing that depends on pods is allowed before the index is synced, and
// nothing at all to a node the index has not seen by then. The
// authorizer answers NoOpinion, not Deny, to what it does not allow a node, so that
// the roles of every authenticated user (discovery, self reviews) still come
// from RBAC; do not bind a role with secrets to system:authenticated. A member
// of system:nodes without a node's name is denied everything.
//
// An agent learns of a pod from its watch and may ask for the pod's Secrets
// before the index has heard of it, and a machine that has just joined asks
// before the index has heard of its Node. The authorizer therefore waits up to a
// second for the index to change before it refuses either.
//
// Not allowed, where a kubelet is: creating mirror pods, TokenReview and
// SubjectAccessReview (the agent trusts the client CA), CSI objects, DRA,
// certificate requests (certificates come from the join handler).
package nodeauth
