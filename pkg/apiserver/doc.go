// Package apiserver serves the Kubernetes API: k8s.io/apiserver as a library
// over etcd, which by default runs inside this process and is called without
// a socket. The types of k8s.io/api are stored and served as they are; one
// row of a table describes a kind (package registry).
//
// Our kinds live in the generic server of the apiextensions server, so that
// custom resources share one discovery, one OpenAPI document and one handler
// chain with them and no aggregator is needed.
//
// # Reading the source
//
//	config.go, certs.go   what is given, and whether it fits together
//	server.go             New, Run, Ready: the life of a server
//	build.go              the generic server and its parts, in order
//	access.go             who somebody is, what he may do, what is admitted
//	install.go            each kind's storage, and the subresources of the others
//	crd.go                custom resources and /apis
//	bootstrap.go          what every cluster starts with
//
//	registry        the table of kinds, the one strategy, columns, scale, binding
//	upstream        everything taken from k8s.io/kubernetes: defaults, validation,
//	                RBAC and the default roles
//	etcd            the member in this process, and the storage of a resource
//	openapi         generated; apply, explain and server-side apply need it
//	admit           priority, tolerations, default class, limits, escalation
//	reviews         questions: tokenreviews, subjectaccessreviews and so on
//	serviceip, serviceaccount, nodeauth, agentproxy, eviction
//	                each says in its own doc.go what it does
//	testcerts       the files a server needs, for tests
//
// # Adding a kind
//
// A row in registry, its rules in upstream, its package in openapi/doc.go and
// go generate. TestTable of registry says what is missing.
//
// # What is not here
//
// Aggregated API servers (APIService), certificate requests, priority and
// fairness (there is a limit of requests in flight), auditing, CEL admission
// policies, the resize subresource of pods, the proxy subresources of pods and
// services, autoscaling/v1 (v2 is served). Resource quotas are stored, but
// neither counted nor enforced. Several servers over one store work, except
// that each claims the endpoints of the service kubernetes for itself and that
// service addresses are given out by one of them only (see serviceip).
package apiserver
