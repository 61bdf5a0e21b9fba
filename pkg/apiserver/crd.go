package apiserver

import (
	"cmp"
	"net/url"
	"slices"
	"sync"

	apiextensionsv1 "k8s.io/apiextensions-apiserver/pkg/apis/apiextensions/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured/unstructuredscheme"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/serializer/cbor"
	"k8s.io/apimachinery/pkg/runtime/serializer/recognizer"
	"k8s.io/apimachinery/pkg/version"
	"k8s.io/apiserver/pkg/endpoints/discovery"
	"k8s.io/apiserver/pkg/endpoints/discovery/aggregated"
	"k8s.io/apiserver/pkg/util/proxy"
	corelisters "k8s.io/client-go/listers/core/v1"
	"k8s.io/client-go/tools/cache"
)

// unstructuredCodec writes custom resources as JSON; what once was written as
// CBOR it still reads.
func unstructuredCodec() runtime.Codec {
	c := cbor.NewSerializer(unstructuredscheme.NewUnstructuredCreator(), unstructuredscheme.NewUnstructuredObjectTyper())
	return runtime.NewCodec(unstructured.UnstructuredJSONScheme, recognizer.NewDecoder(c, unstructured.UnstructuredJSONScheme))
}

// serviceResolver finds the conversion webhooks of custom resources.
type serviceResolver struct{ services corelisters.ServiceLister }

// ResolveEndpoint implements webhook.ServiceResolver.
func (r serviceResolver) ResolveEndpoint(namespace, name string, port int32) (*url.URL, error) {
	return proxy.ResolveCluster(r.services, namespace, name, port)
}

// discovery serves /apis, which the server for custom resources leaves to an
// aggregator that is not here, and keeps the groups of custom resources in
// the list of old clients (kubectl before 1.26).
func (s *Server) discovery() error {
	g := s.crds.GenericAPIServer
	wrapped := aggregated.WrapAggregatedDiscoveryToHandler(g.DiscoveryGroupManager, g.AggregatedDiscoveryGroupManager, nil)
	g.Handler.GoRestfulContainer.Add(wrapped.GenerateWebService("/apis", metav1.APIGroupList{}))
	crds := s.crds.Informers.Apiextensions().V1().CustomResourceDefinitions()
	list := &customGroups{manager: g.DiscoveryGroupManager, ours: map[string]bool{}, shown: map[string]bool{}}
	for _, gv := range s.parts.codecs.Scheme.PrioritizedVersionsAllGroups() {
		list.ours[gv.Group] = true
	}
	list.ours[apiextensionsv1.GroupName] = true
	sync := func() {
		all, err := crds.Lister().List(labels.Everything())
		if err == nil {
			list.set(all)
		}
	}
	_, err := crds.Informer().AddEventHandler(cache.ResourceEventHandlerFuncs{
		AddFunc:    func(any) { sync() },
		UpdateFunc: func(_, _ any) { sync() },
		DeleteFunc: func(any) { sync() },
	})
	return err
}

// customGroups are the groups of custom resources in the list at /apis.
type customGroups struct {
	manager discovery.GroupManager
	ours    map[string]bool

	mu    sync.Mutex
	shown map[string]bool
}

// set makes the list show the groups of crds and no others.
func (c *customGroups) set(crds []*apiextensionsv1.CustomResourceDefinition) {
	c.mu.Lock()
	defer c.mu.Unlock()
	versions := map[string][]string{}
	for _, crd := range crds {
		if c.ours[crd.Spec.Group] || !established(crd) {
			continue
		}
		for _, v := range crd.Spec.Versions {
			if v.Served && !slices.Contains(versions[crd.Spec.Group], v.Name) {
				versions[crd.Spec.Group] = append(versions[crd.Spec.Group], v.Name)
			}
		}
	}
	for group, names := range versions {
		slices.SortFunc(names, func(a, b string) int {
			return cmp.Or(version.CompareKubeAwareVersionStrings(b, a), cmp.Compare(a, b))
		})
		g := metav1.APIGroup{Name: group}
		for _, name := range names {
			g.Versions = append(g.Versions, metav1.GroupVersionForDiscovery{GroupVersion: group + "/" + name, Version: name})
		}
		g.PreferredVersion = g.Versions[0]
		c.manager.AddGroup(g)
		c.shown[group] = true
	}
	for group := range c.shown {
		if _, ok := versions[group]; !ok {
			c.manager.RemoveGroup(group)
			delete(c.shown, group)
		}
	}
}

func established(crd *apiextensionsv1.CustomResourceDefinition) bool {
	return slices.ContainsFunc(crd.Status.Conditions, func(c apiextensionsv1.CustomResourceDefinitionCondition) bool {
		return c.Type == apiextensionsv1.Established && c.Status == apiextensionsv1.ConditionTrue
	})
}
