package nodeauth

import (
	"sync"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apiserver/pkg/authentication/user"
	"k8s.io/client-go/tools/cache"
)

// An Index knows which nodes there are, which pods are bound to which node and
// what they refer to.
// It is fed by informers; see the package comment.
type Index struct {
	mu sync.RWMutex
	// members: name of each Node object to who it is
	members map[string]member
	// nodes: node name, then pod
	nodes map[string]map[types.NamespacedName]podRefs
	// claims: PersistentVolumeClaim to the name of its volume
	claims map[types.NamespacedName]string
	synced []cache.InformerSynced
	// open: node name to what it has open
	open map[string]map[*standing]bool
	// changed is closed and replaced on each change
	changed chan struct{}
}

// member is what a Node object says of its node.
type member struct {
	// identity is the hash of the key it joined with; empty: nobody joined.
	identity string
	// key is the one its peers know it by, next the one it changes to.
	key, next publicKey
}

// podRefs is what one pod entitles its node to read.
type podRefs struct {
	uid            types.UID
	serviceAccount string
	// refs are names in the pod's namespace; empty once the pod has ended.
	refs map[ref]bool
}

type ref struct {
	kind refKind
	name string
}

type refKind string

const (
	secretRef    refKind = "secrets"
	configMapRef refKind = "configmaps"
	claimRef     refKind = "persistentvolumeclaims"
)

// NewIndex returns an empty Index that is not synced.
func NewIndex() *Index {
	return &Index{
		members: map[string]member{},
		nodes:   map[string]map[types.NamespacedName]podRefs{},
		claims:  map[types.NamespacedName]string{},
		open:    map[string]map[*standing]bool{},
		changed: make(chan struct{}),
	}
}

// SyncedBy tells the index who knows whether it has seen everything. Until it
// was called, and all functions say so, the index is not synced.
func (x *Index) SyncedBy(synced ...cache.InformerSynced) {
	x.mu.Lock()
	defer x.mu.Unlock()
	x.synced = synced
}

// HasSynced reports whether the index has seen every node, pod and claim once.
func (x *Index) HasSynced() bool {
	x.mu.RLock()
	synced := x.synced
	x.mu.RUnlock()
	for _, s := range synced {
		if !s() {
			return false
		}
	}
	return len(synced) > 0
}

// Nodes is the handler for an informer of all Nodes.
func (x *Index) Nodes() cache.ResourceEventHandler { return eachOf(x.setNode) }

// Pods is the handler for an informer of all pods.
func (x *Index) Pods() cache.ResourceEventHandler {
	return cache.ResourceEventHandlerFuncs{
		AddFunc: func(obj any) { x.setPod(nil, podOf(obj)) },
		UpdateFunc: func(old, obj any) {
			x.setPod(podOf(old), podOf(obj))
		},
		DeleteFunc: func(obj any) { x.setPod(podOf(obj), nil) },
	}
}

// Claims is the handler for an informer of all PersistentVolumeClaims.
func (x *Index) Claims() cache.ResourceEventHandler { return eachOf(x.setClaim) }

// eachOf gives set each object of its type, and says when it is gone.
func eachOf[T any](set func(obj T, gone bool)) cache.ResourceEventHandler {
	pass := func(obj any, gone bool) {
		if d, ok := obj.(cache.DeletedFinalStateUnknown); ok {
			obj = d.Obj
		}
		if o, ok := obj.(T); ok {
			set(o, gone)
		}
	}
	return cache.ResourceEventHandlerFuncs{
		AddFunc:    func(obj any) { pass(obj, false) },
		UpdateFunc: func(_, obj any) { pass(obj, false) },
		DeleteFunc: func(obj any) { pass(obj, true) },
	}
}

func podOf(obj any) *corev1.Pod {
	if d, ok := obj.(cache.DeletedFinalStateUnknown); ok {
		obj = d.Obj
	}
	p, _ := obj.(*corev1.Pod)
	return p
}

func keyOf(ns, name string) types.NamespacedName {
	return types.NamespacedName{Namespace: ns, Name: name}
}

func (x *Index) setNode(n *corev1.Node, gone bool) {
	key, _ := parseKey(n.Annotations[keyAnnotation]) // what is no key is nobody's
	next, _ := parseNextKey(n.Annotations[nextKeyAnnotation])
	is := member{identity: n.Annotations[identityAnnotation], key: key, next: next}
	x.mu.Lock()
	defer x.mu.Unlock()
	was, known := x.members[n.Name]
	switch {
	case gone:
		delete(x.members, n.Name)
		x.endOpen(n.Name, "")
	case known && was == is:
		return // a heartbeat
	default:
		x.members[n.Name] = is
		x.endOpen(n.Name, is.identity)
	}
	x.broadcast()
}

func (x *Index) setPod(old, pod *corev1.Pod) {
	x.mu.Lock()
	defer x.mu.Unlock()
	if old != nil && old.Spec.NodeName != "" && (pod == nil || pod.Spec.NodeName != old.Spec.NodeName) {
		node := x.nodes[old.Spec.NodeName]
		delete(node, keyOf(old.Namespace, old.Name))
		if len(node) == 0 {
			delete(x.nodes, old.Spec.NodeName)
		}
	}
	if pod != nil && pod.Spec.NodeName != "" {
		node := x.nodes[pod.Spec.NodeName]
		if node == nil {
			node = map[types.NamespacedName]podRefs{}
			x.nodes[pod.Spec.NodeName] = node
		}
		node[keyOf(pod.Namespace, pod.Name)] = refsOf(pod)
	}
	x.broadcast()
}

func (x *Index) setClaim(c *corev1.PersistentVolumeClaim, gone bool) {
	x.mu.Lock()
	defer x.mu.Unlock()
	if gone || c.Spec.VolumeName == "" {
		delete(x.claims, keyOf(c.Namespace, c.Name))
	} else {
		x.claims[keyOf(c.Namespace, c.Name)] = c.Spec.VolumeName
	}
	x.broadcast()
}

func (x *Index) broadcast() {
	close(x.changed)
	x.changed = make(chan struct{})
}

// next is closed at the next change.
func (x *Index) next() <-chan struct{} {
	x.mu.RLock()
	defer x.mu.RUnlock()
	return x.changed
}

// member finds the Node object of that name.
func (x *Index) member(node string) (member, bool) {
	x.mu.RLock()
	defer x.mu.RUnlock()
	m, ok := x.members[node]
	return m, ok
}

// isMember reports whether there is a Node object of that name and the user
// holds the key that joined under it.
func (x *Index) isMember(node string, u user.Info) bool {
	m, ok := x.member(node)
	return ok && m.identity != "" && m.identity == identityOf(u)
}

// keyOwner returns a node other than the named one that carries the key.
func (x *Index) keyOwner(key publicKey, except string) (node string, found bool) {
	x.mu.RLock()
	defer x.mu.RUnlock()
	for name, m := range x.members {
		if (m.key == key || m.next == key) && name != except {
			return name, true
		}
	}
	return "", false
}

// hasPod reports whether the pod is bound to the node.
func (x *Index) hasPod(node, ns, name string) bool {
	_, ok := x.pod(node, ns, name)
	return ok
}

func (x *Index) pod(node, ns, name string) (podRefs, bool) {
	x.mu.RLock()
	defer x.mu.RUnlock()
	p, ok := x.nodes[node][keyOf(ns, name)]
	return p, ok
}

// refers reports whether a pod of the node in namespace ns needs the object.
func (x *Index) refers(node, ns string, r ref) bool {
	return x.anyPod(node, func(key types.NamespacedName, p podRefs) bool {
		return key.Namespace == ns && p.refs[r]
	})
}

// usesServiceAccount reports whether a pod of the node runs as ns/name.
func (x *Index) usesServiceAccount(node, ns, name string) bool {
	return x.anyPod(node, func(key types.NamespacedName, p podRefs) bool {
		return key.Namespace == ns && p.serviceAccount == name && p.refs != nil
	})
}

// mountsVolume reports whether a pod of the node has a claim on the
// PersistentVolume.
func (x *Index) mountsVolume(node, volume string) bool {
	return volume != "" && x.anyPod(node, func(key types.NamespacedName, p podRefs) bool {
		for r := range p.refs {
			if r.kind == claimRef && x.claims[keyOf(key.Namespace, r.name)] == volume {
				return true
			}
		}
		return false
	})
}

func (x *Index) anyPod(node string, is func(types.NamespacedName, podRefs) bool) bool {
	x.mu.RLock()
	defer x.mu.RUnlock()
	for key, p := range x.nodes[node] {
		if is(key, p) {
			return true
		}
	}
	return false
}
