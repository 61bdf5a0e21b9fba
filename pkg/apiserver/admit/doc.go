// Package admit completes and refuses objects between authorization and
// storage, where the answer depends on other objects: the priority of a pod,
// the class of a claim, the limits of a namespace. The plugins of Kubernetes
// for this speak its internal types, which the API server does not use.
package admit
