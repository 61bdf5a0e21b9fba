// Package apiserver serves the Kubernetes API: k8s.io/apiserver as a library
// over etcd, which by default runs inside this process and is called without
// a socket. The types of k8s.io/api are stored and served as they are; one
// row of a table describes a kind (package registry).
//
// Our kinds live in the generic server of the apiextensions server, so that
// custom resources share one discovery, one OpenAPI document and one handler
// chain with them and no aggregator is needed.
//
// Everything taken from k8s.io/kubernetes (defaults, validation, the RBAC
// authorizer, the default roles) is fenced into package upstream.
package apiserver
