package upstream

import (
	"k8s.io/apimachinery/pkg/api/meta"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/metadata/metadatainformer"
)

// graphInformers gives the garbage collector its view of every kind: whole
// objects where some controller holds them in memory anyway, and otherwise
// only metadata, so that the contents of every Secret and ConfigMap of the
// cluster are not in memory for the sake of their owner references.
type graphInformers struct {
	typed    informers.SharedInformerFactory
	metadata metadatainformer.SharedInformerFactory
}

var held = map[schema.GroupVersionResource]bool{
	pods: true, nodes: true, namespaces: true, services: true, accounts: true, claims: true,
	deployments: true, replicasets: true, daemonsets: true, statefulsets: true, revisions: true,
	jobs: true, cronjobs: true, slices: true, budgets: true,
}

// ForResource is part of informerfactory.InformerFactory.
func (g *graphInformers) ForResource(resource schema.GroupVersionResource) (informers.GenericInformer, error) {
	if held[resource] {
		return g.typed.ForResource(resource)
	}
	return g.metadata.ForResource(resource), nil
}

// Start is part of informerfactory.InformerFactory.
func (g *graphInformers) Start(stop <-chan struct{}) {
	g.typed.Start(stop)
	g.metadata.Start(stop)
}

// trimMetadata drops what nobody here reads and what is often half an object.
func trimMetadata(obj any) (any, error) {
	if m, err := meta.Accessor(obj); err == nil {
		m.SetManagedFields(nil)
	}
	return obj, nil
}
