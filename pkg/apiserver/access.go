package apiserver

import (
	"fmt"

	"go.opentelemetry.io/otel/trace/noop"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/sets"
	"k8s.io/apiserver/pkg/admission"
	"k8s.io/apiserver/pkg/admission/initializer"
	"k8s.io/apiserver/pkg/admission/plugin/namespace/lifecycle"
	webhookinit "k8s.io/apiserver/pkg/admission/plugin/webhook/initializer"
	"k8s.io/apiserver/pkg/admission/plugin/webhook/mutating"
	"k8s.io/apiserver/pkg/admission/plugin/webhook/validating"
	apiserverapi "k8s.io/apiserver/pkg/apis/apiserver"
	"k8s.io/apiserver/pkg/authentication/authenticator"
	"k8s.io/apiserver/pkg/authentication/group"
	"k8s.io/apiserver/pkg/authentication/request/anonymous"
	"k8s.io/apiserver/pkg/authentication/request/bearertoken"
	"k8s.io/apiserver/pkg/authentication/request/union"
	"k8s.io/apiserver/pkg/authentication/request/x509"
	"k8s.io/apiserver/pkg/authentication/user"
	"k8s.io/apiserver/pkg/authorization/authorizer"
	"k8s.io/apiserver/pkg/authorization/authorizerfactory"
	authorizerunion "k8s.io/apiserver/pkg/authorization/union"
	"k8s.io/apiserver/pkg/server/dynamiccertificates"
	utilfeature "k8s.io/apiserver/pkg/util/feature"
	"k8s.io/apiserver/pkg/util/webhook"

	"meshd.dev/pkg/apiserver/admit"
	"meshd.dev/pkg/apiserver/nodeauth"
)

// publicPaths are what a stranger may read.
var publicPaths = []string{"/healthz", "/livez", "/readyz", "/version"}

// authenticator believes client certificates and service-account tokens; a request without credentials
// is anonymous on the public paths and refused elsewhere.
func (s *Server) authenticator(ca dynamiccertificates.CAContentProvider) (authenticator.Request, error) {
	known := union.New(
		x509.NewDynamic(ca.VerifyOptions, nodeauth.UserOf),
		bearertoken.New(s.parts.tokens.Authenticator()),
	)
	var public []apiserverapi.AnonymousAuthCondition
	for _, path := range publicPaths {
		public = append(public, apiserverapi.AnonymousAuthCondition{Path: path})
	}
	return union.NewFailOnError(group.NewAuthenticatedGroupAdder(known), anonymous.NewAuthenticator(public)), nil
}

// nodeIndex knows the nodes, and which needs what because of its pods.
func (s *Server) nodeIndex() (*nodeauth.Index, error) {
	index := nodeauth.NewIndex()
	core := s.parts.informers.Core().V1()
	nodes, err := core.Nodes().Informer().AddEventHandler(index.Nodes())
	if err != nil {
		return nil, fmt.Errorf("watch nodes: %w", err)
	}
	pods, err := core.Pods().Informer().AddEventHandler(index.Pods())
	if err != nil {
		return nil, fmt.Errorf("watch pods: %w", err)
	}
	claims, err := core.PersistentVolumeClaims().Informer().AddEventHandler(index.Claims())
	if err != nil {
		return nil, fmt.Errorf("watch claims: %w", err)
	}
	index.SyncedBy(nodes.HasSynced, pods.HasSynced, claims.HasSynced)
	return index, nil
}

// authorizer lets system:masters do anything, an agent what its pods need,
// and asks RBAC about the others.
func (s *Server) authorizer() (authorizer.Authorizer, error) {
	a, err := authorizerunion.New(
		authorizerunion.NamedAuthorizer{AuthorizerName: "masters", Authorizer: authorizerfactory.NewPrivilegedGroups(user.SystemPrivilegedGroup)},
		authorizerunion.NamedAuthorizer{AuthorizerName: "node", Authorizer: nodeauth.NewAuthorizer(s.parts.nodes)},
		authorizerunion.NamedAuthorizer{AuthorizerName: "rbac", Authorizer: s.parts.rbac},
	)
	if err != nil {
		return nil, fmt.Errorf("chain authorizers: %w", err)
	}
	return a, nil
}

// admission are the plugins that see each write, in order: first what is
// refused outright, then what completes objects, then the cluster's webhooks,
// which see the completed ones.
func (s *Server) admission(a authorizer.Authorizer) ([]admission.Interface, error) {
	namespaces, err := lifecycle.NewLifecycle(sets.New(metav1.NamespaceDefault, metav1.NamespaceSystem, metav1.NamespacePublic))
	if err != nil {
		return nil, fmt.Errorf("make admission: %w", err)
	}
	mutate, err := mutating.NewMutatingWebhook(nil)
	if err != nil {
		return nil, fmt.Errorf("make admission: %w", err)
	}
	validate, err := validating.NewValidatingAdmissionWebhook(nil)
	if err != nil {
		return nil, fmt.Errorf("make admission: %w", err)
	}
	informers := s.parts.informers
	plugins := []admission.Interface{
		namespaces,
		nodeauth.NewAdmission(s.parts.nodes),
		admit.NewEscalation(a, s.parts.rbac),
		s.parts.tokens.Admission(),
		admit.NewPriority(informers.Scheduling().V1().PriorityClasses().Lister()),
		admit.NewStorageClass(informers.Storage().V1().StorageClasses().Lister()),
		admit.NewLimits(informers.Core().V1().LimitRanges().Lister()),
		mutate,
		validate,
	}
	for _, init := range []admission.PluginInitializer{
		initializer.New(s.parts.client, nil, informers, a, utilfeature.DefaultFeatureGate, s.parts.generic.EffectiveVersion, s.parts.generic.DrainedNotify(), nil),
		webhookinit.NewPluginInitializer(s.webhookAuth(), serviceResolver{informers.Core().V1().Services().Lister()}),
	} {
		for _, p := range plugins {
			init.Initialize(p)
		}
	}
	if err := validated(plugins); err != nil {
		return nil, fmt.Errorf("make admission: %w", err)
	}
	return plugins, nil
}

// webhookAuth says how the server calls webhooks: without credentials, unless
// the webhook is the server itself.
func (s *Server) webhookAuth() webhook.AuthenticationInfoResolverWrapper {
	return webhook.NewDefaultAuthenticationInfoResolverWrapper(nil, nil, s.loopback, noop.NewTracerProvider())
}

// validated lets each plugin say whether it has all it needs.
func validated(plugins []admission.Interface) error {
	for _, p := range plugins {
		if v, ok := p.(admission.InitializationValidator); ok {
			if err := v.ValidateInitialization(); err != nil {
				return err
			}
		}
	}
	return nil
}
