// Package etcd is where the API server keeps its objects: an etcd member
// inside this process, called without socket or gRPC, or a client of an etcd
// that runs elsewhere. Options hands it to the registries of
// k8s.io/apiserver; all kinds share one client and one compactor.
//
// The stock storage factory and its health probe dial; neither is used here.
package etcd
