package apiserver

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"
	"time"

	apiextensions "k8s.io/apiextensions-apiserver/pkg/apiserver"
	"k8s.io/apimachinery/pkg/api/meta"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/util/sets"
	"k8s.io/apiserver/pkg/admission"
	genericopenapi "k8s.io/apiserver/pkg/endpoints/openapi"
	"k8s.io/apiserver/pkg/registry/generic"
	genericapiserver "k8s.io/apiserver/pkg/server"
	"k8s.io/apiserver/pkg/server/dynamiccertificates"
	"k8s.io/apiserver/pkg/server/filters"
	"k8s.io/apiserver/pkg/server/healthz"
	"k8s.io/apiserver/pkg/server/options"
	serverstorage "k8s.io/apiserver/pkg/server/storage"
	"k8s.io/apiserver/pkg/storage/value"
	"k8s.io/apiserver/pkg/storage/value/encrypt/secretbox"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"

	"meshd.dev/pkg/apiserver/etcd"
	"meshd.dev/pkg/apiserver/nodeauth"
	"meshd.dev/pkg/apiserver/openapi"
	"meshd.dev/pkg/apiserver/registry"
	"meshd.dev/pkg/apiserver/serviceaccount"
	"meshd.dev/pkg/apiserver/upstream"
)

// parts are what the server is built from, in the order they are made.
type parts struct {
	codecs    registry.Codecs
	options   generic.RESTOptionsGetter
	generic   *genericapiserver.Config
	client    kubernetes.Interface
	informers informers.SharedInformerFactory
	rbac      *upstream.RBAC
	nodes     *nodeauth.Index
	tokens    *serviceaccount.Tokens
}

// build makes the server out of its parts.
func (s *Server) build() error {
	p := &s.parts
	p.codecs = registry.NewCodecs(registry.NewScheme())
	encrypt, err := secretTransformer(s.cfg.EncryptionKey)
	if err != nil {
		return err
	}
	p.options = etcd.Options{
		Store:   s.store,
		Codec:   storageCodecs(p.codecs),
		Encrypt: map[schema.GroupResource]value.Transformer{{Resource: "secrets"}: encrypt},
	}
	p.generic = genericapiserver.NewConfig(p.codecs.Factory)
	p.generic.EffectiveVersion = newVersion()
	if err := s.serving(); err != nil {
		return err
	}
	s.loopback = p.generic.LoopbackClientConfig
	client, err := kubernetes.NewForConfig(s.Loopback())
	if err != nil {
		return fmt.Errorf("make loopback client: %w", err)
	}
	p.client = client
	p.informers = informers.NewSharedInformerFactoryWithOptions(client, 0, informers.WithTransform(withoutManagedFields))
	if p.nodes, err = s.nodeIndex(); err != nil {
		return err
	}
	p.rbac = upstream.NewRBAC(p.informers.Rbac().V1())
	s.run = append(s.run, upstream.AggregateRoles(p.informers.Rbac().V1(), client))
	if p.tokens, err = s.newTokens(); err != nil {
		return err
	}
	if err := s.access(); err != nil {
		return err
	}
	s.behaviour()
	if err := s.extensions(); err != nil {
		return err
	}
	if err := s.install(); err != nil {
		return err
	}
	return s.discovery()
}

// withoutManagedFields makes objects in our caches smaller; nobody here reads
// who wrote which field.
func withoutManagedFields(obj any) (any, error) {
	if m, err := meta.Accessor(obj); err == nil {
		m.SetManagedFields(nil)
	}
	return obj, nil
}

// secretTransformer encrypts with the key in file. What was not encrypted
// with it is refused, not passed through.
func secretTransformer(file string) (value.Transformer, error) {
	b, err := os.ReadFile(file)
	if err != nil {
		return nil, fmt.Errorf("read encryption key: %w", err)
	}
	if len(b) != 32 {
		return nil, fmt.Errorf("read encryption key %s: %d bytes, want 32", file, len(b))
	}
	return value.NewPrefixTransformers(errors.New("not encrypted with our key"), value.PrefixTransformer{
		Prefix:      []byte("k8s:enc:secretbox:v1:meshd:"),
		Transformer: secretbox.NewSecretboxTransformer([32]byte(b)),
	}), nil
}

// storageCodecs writes our kinds as protobuf in the version they are served
// in, and the definitions of custom resources as their own server does.
func storageCodecs(c registry.Codecs) func(schema.GroupResource) (runtime.Codec, error) {
	kinds := registry.Kinds()
	return func(gr schema.GroupResource) (runtime.Codec, error) {
		codecs := runtime.StorageSerializer(c.Factory)
		media, gv := "application/vnd.kubernetes.protobuf", schema.GroupVersion{}
		if gr.Group == "apiextensions.k8s.io" {
			codecs, media = apiextensions.Codecs, "application/json"
			gv = schema.GroupVersion{Group: gr.Group, Version: "v1"}
		} else {
			k, err := registry.Find(kinds, gr)
			if err != nil {
				return nil, fmt.Errorf("storage codec: %w", err)
			}
			gv = k.GroupVersion()
		}
		codec, _, err := serverstorage.NewStorageCodec(serverstorage.StorageCodecConfig{
			StorageMediaType:  media,
			StorageSerializer: codecs,
			StorageVersion:    gv,
			MemoryVersion:     schema.GroupVersion{Group: gr.Group, Version: runtime.APIVersionInternal},
		})
		return codec, err
	}
}

// serving sets up the port: certificates are read again when they change.
func (s *Server) serving() error {
	c := options.NewSecureServingOptions()
	c.Listener = s.listener
	c.ServerCert.CertKey = options.CertKey{CertFile: s.cfg.ServingCert, KeyFile: s.cfg.ServingKey}
	c.MinTLSVersion = "VersionTLS12"
	if err := c.WithLoopback().ApplyTo(&s.parts.generic.SecureServing, &s.parts.generic.LoopbackClientConfig); err != nil {
		return fmt.Errorf("set up serving: %w", err)
	}
	// The loopback client is the server's own: it is not throttled, nor is what
	// it is told compressed.
	s.parts.generic.LoopbackClientConfig.QPS = -1
	s.parts.generic.LoopbackClientConfig.DisableCompression = true
	s.parts.generic.LoopbackClientConfig.WarningHandler = rest.NoWarnings{}
	s.parts.generic.PublicAddress = s.cfg.AdvertiseAddress.AsSlice()
	return nil
}

// access decides who somebody is and what he may do.
func (s *Server) access() error {
	ca, err := dynamiccertificates.NewDynamicCAContentFromFile("client-ca", s.cfg.ClientCA)
	if err != nil {
		return fmt.Errorf("read client CA: %w", err)
	}
	g := s.parts.generic
	if err := g.Authentication.ApplyClientCert(ca, g.SecureServing); err != nil {
		return fmt.Errorf("trust client CA: %w", err)
	}
	g.Authentication.APIAudiences = s.parts.tokens.Audiences()
	if g.Authentication.Authenticator, err = s.authenticator(ca); err != nil {
		return err
	}
	if g.Authorization.Authorizer, err = s.authorizer(); err != nil {
		return err
	}
	g.RuleResolver = s.parts.rbac
	plugins, err := s.admission(g.Authorization.Authorizer)
	if err != nil {
		return err
	}
	g.AdmissionControl = admission.NewChainHandler(plugins...)
	return nil
}

// newTokens makes the tokens of service accounts, which the cluster's own
// name for the API issues and takes.
func (s *Server) newTokens() (*serviceaccount.Tokens, error) {
	key, err := serviceaccount.LoadKey(s.cfg.ServiceAccountKey)
	if err != nil {
		return nil, err
	}
	return serviceaccount.New(serviceaccount.Config{Issuer: "https://kubernetes.default.svc." + s.cfg.ClusterDomain, Key: key})
}

// behaviour is everything else the generic server asks for.
func (s *Server) behaviour() {
	g := s.parts.generic
	g.RESTOptionsGetter = s.parts.options
	g.MergedResourceConfig = apiextensions.DefaultAPIResourceConfigSource()
	g.EnableProfiling = false
	// Long requests that are not watches: what is proxied to agents.
	g.LongRunningFunc = filters.BasicLongRunningRequestCheck(
		sets.NewString("watch", "proxy"), sets.NewString("attach", "exec", "proxy", "log", "portforward"))
	// Watches end at once when the server does; waiting for them would keep the
	// port closed for a minute.
	g.ShutdownWatchTerminationGracePeriod = time.Second
	g.AddHealthChecks(healthz.NamedCheck("etcd", func(r *http.Request) error {
		ctx, cancel := context.WithTimeout(r.Context(), 2*time.Second)
		defer cancel()
		return s.store.Probe(ctx)
	}))
	namer := genericopenapi.NewDefinitionNamer(s.parts.codecs.Scheme, apiextensions.Scheme)
	g.OpenAPIConfig = genericapiserver.DefaultOpenAPIConfig(openapi.GetOpenAPIDefinitions, namer)
	g.OpenAPIConfig.Info.Title = "meshd"
	g.OpenAPIV3Config = genericapiserver.DefaultOpenAPIV3Config(openapi.GetOpenAPIDefinitions, namer)
	g.OpenAPIV3Config.Info.Title = "meshd"
	g.BuildHandlerChainFunc = func(api http.Handler, c *genericapiserver.Config) http.Handler {
		return withHandlers(s.cfg.Handlers, genericapiserver.DefaultBuildHandlerChain(nodeauth.EndWithNode(s.parts.nodes, api), c))
	}
}

// maxHandlerBody bounds what an unknown caller may send to an extra handler.
const maxHandlerBody = 1 << 20

// withHandlers serves the paths of extra in front of next, before anybody is
// asked who he is. A path that ends in a slash stands for what is below it.
func withHandlers(extra map[string]http.Handler, next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		h, ok := extra[r.URL.Path]
		for path, below := range extra {
			if !ok && path[len(path)-1] == '/' && len(r.URL.Path) > len(path) && r.URL.Path[:len(path)] == path {
				h, ok = below, true
			}
		}
		if !ok {
			next.ServeHTTP(w, r)
			return
		}
		r.Body = http.MaxBytesReader(w, r.Body, maxHandlerBody)
		h.ServeHTTP(w, r)
	})
}

// extensions makes the server for custom resources, into which ours move.
func (s *Server) extensions() error {
	p := &s.parts
	crdOptions := etcd.Options{Store: s.store, Codec: func(schema.GroupResource) (runtime.Codec, error) { return unstructuredCodec(), nil }}
	cfg := apiextensions.Config{
		GenericConfig: &genericapiserver.RecommendedConfig{Config: *p.generic, SharedInformerFactory: p.informers},
		ExtraConfig: apiextensions.ExtraConfig{
			CRDRESTOptionsGetter: crdOptions,
			MasterCount:          1,
			ServiceResolver:      serviceResolver{p.informers.Core().V1().Services().Lister()},
			AuthResolverWrapper:  s.webhookAuth(),
		},
	}
	var err error
	if s.crds, err = cfg.Complete().New(genericapiserver.NewEmptyDelegate()); err != nil {
		return fmt.Errorf("make server of custom resources: %w", err)
	}
	s.crds.GenericAPIServer.ShutdownTimeout = shutdownTimeout
	return nil
}

// shutdownTimeout bounds how long the end waits for requests that do not end
// by themselves, such as following logs.
const shutdownTimeout = 2 * time.Second
