package apiserver

import (
	"fmt"
	"maps"
	"slices"

	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apiserver/pkg/registry/rest"
	genericapiserver "k8s.io/apiserver/pkg/server"

	"meshd.dev/pkg/apiserver/agentproxy"
	"meshd.dev/pkg/apiserver/eviction"
	"meshd.dev/pkg/apiserver/registry"
	"meshd.dev/pkg/apiserver/reviews"
	"meshd.dev/pkg/apiserver/serviceaccount"
	"meshd.dev/pkg/apiserver/serviceip"
)

// storages are the resources of each group version.
type storages map[schema.GroupVersion]map[string]rest.Storage

func (s storages) add(gv schema.GroupVersion, resource string, r rest.Storage) {
	if s[gv] == nil {
		s[gv] = map[string]rest.Storage{}
	}
	s[gv][resource] = r
}

// install opens the storage of each kind and serves it.
func (s *Server) install() error {
	p := &s.parts
	all := storages{}
	stores := map[string]*registry.REST{}
	for _, k := range registry.Kinds() {
		r, err := registry.NewREST(k, p.codecs.Scheme, p.options)
		if err != nil {
			return err
		}
		stores[k.GroupResource().String()] = r
		if k.Resource == "services" {
			if err := s.serviceAddresses(r); err != nil {
				return err
			}
		}
		all.add(k.GroupVersion(), k.Resource, r)
		if k.Status {
			all.add(k.GroupVersion(), k.Resource+"/status", r.StatusView())
		}
		if k.Scale != nil {
			all.add(k.GroupVersion(), k.Resource+"/scale", r.ScaleView())
		}
	}
	core := schema.GroupVersion{Version: "v1"}
	namespaces := registry.NewNamespaces(stores["namespaces"])
	all.add(core, "namespaces", namespaces)
	all.add(core, "namespaces/status", stores["namespaces"].StatusView())
	all.add(core, "namespaces/finalize", namespaces.FinalizeView())
	budgets := stores["poddisruptionbudgets.policy"]
	all.add(core, "pods/eviction", eviction.New(eviction.Config{Pods: stores["pods"], Budgets: budgets, BudgetStatus: budgets.StatusView()}))
	binding := registry.NewBinding(stores["pods"])
	all.add(core, "pods/binding", binding)
	all.add(core, "bindings", registry.Bindings{Binding: binding})
	all.add(core, "pods/ephemeralcontainers", stores["pods"].EphemeralView())
	all.add(schema.GroupVersion{Group: "events.k8s.io", Version: "v1"}, "events", stores["events"])
	p.tokens.Attach(serviceaccount.Stores{ServiceAccounts: stores["serviceaccounts"], Pods: stores["pods"], Secrets: stores["secrets"], Nodes: stores["nodes"]})
	all.add(core, "serviceaccounts/token", p.tokens.REST())
	for path, h := range p.tokens.Discovery() {
		s.crds.GenericAPIServer.Handler.NonGoRestfulMux.Handle(path, h)
	}
	if err := s.agents(all[core], stores); err != nil {
		return err
	}
	g := p.generic
	all[schema.GroupVersion{Group: "authentication.k8s.io", Version: "v1"}] = reviews.Authentication(g.Authentication.Authenticator, g.Authentication.APIAudiences)
	all[schema.GroupVersion{Group: "authorization.k8s.io", Version: "v1"}] = reviews.Authorization(g.Authorization.Authorizer, p.rbac)
	return s.serve(all)
}

// agents serves what an agent answers: logs, exec and the like.
func (s *Server) agents(core map[string]rest.Storage, stores map[string]*registry.REST) error {
	if s.cfg.AgentTLS == nil {
		return nil
	}
	proxy, err := agentproxy.New(agentproxy.Config{
		Pods: stores["pods"], Nodes: stores["nodes"],
		TLS: s.cfg.AgentTLS, Authorizer: s.parts.generic.Authorization.Authorizer,
	})
	if err != nil {
		return err
	}
	maps.Copy(core, proxy.Storage())
	return nil
}

// serviceAddresses gives services their addresses and ports.
func (s *Server) serviceAddresses(services *registry.REST) error {
	ips, err := serviceip.New(serviceip.Config{CIDRs: s.cfg.ServiceCIDRs, Log: s.cfg.Log})
	if err != nil {
		return fmt.Errorf("allocate service addresses: %w", err)
	}
	if err := ips.Attach(services.Store); err != nil {
		return fmt.Errorf("allocate service addresses: %w", err)
	}
	s.run = append(s.run, ips.Run)
	return s.bootstrap(ips.First())
}

// serve installs each group version in the server of custom resources.
func (s *Server) serve(all storages) error {
	var groups []*genericapiserver.APIGroupInfo
	versions := slices.SortedFunc(maps.Keys(all), func(a, b schema.GroupVersion) int {
		return slices.Compare([]string{a.Group, a.Version}, []string{b.Group, b.Version})
	})
	for _, gv := range versions {
		info := genericapiserver.NewDefaultAPIGroupInfo(gv.Group, s.parts.codecs.Scheme, s.parts.codecs.Parameter, s.parts.codecs.Factory)
		info.PrioritizedVersions = []schema.GroupVersion{gv}
		info.VersionedResourcesStorageMap[gv.Version] = all[gv]
		if gv.Group == "" {
			if err := s.crds.GenericAPIServer.InstallLegacyAPIGroup(genericapiserver.DefaultLegacyAPIPrefix, &info); err != nil {
				return fmt.Errorf("install %s: %w", gv, err)
			}
			continue
		}
		groups = append(groups, &info)
	}
	if err := s.crds.GenericAPIServer.InstallAPIGroups(groups...); err != nil {
		return fmt.Errorf("install groups: %w", err)
	}
	return nil
}
