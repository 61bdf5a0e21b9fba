// Package upstream is the only package of the API server that imports
// k8s.io/kubernetes: defaults, validation, the RBAC authorizer and the roles
// every cluster starts with. Those packages promise no compatibility; an
// upgrade of Kubernetes is a change of this folder, and each import can be
// replaced by code of ours without touching another one.
package upstream
