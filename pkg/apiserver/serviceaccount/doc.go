// Package serviceaccount makes and checks the tokens of service accounts and
// gives pods theirs.
//
// Wiring:
//
//	key, err := serviceaccount.LoadKey(cfg.ServiceAccountKey)
//	tokens, err := serviceaccount.New(serviceaccount.Config{
//		Issuer: "https://kubernetes.default.svc." + cfg.ClusterDomain, Key: key})
//	authn := union.New(x509, bearertoken.New(tokens.Authenticator()))
//	genericConfig.Authentication.APIAudiences = tokens.Audiences()
//	// once the stores stand; until then every token is refused
//	tokens.Attach(serviceaccount.Stores{ServiceAccounts: saStore, Pods: podStore, Secrets: secretStore, Nodes: nodeStore})
//	coreV1Storage["serviceaccounts/token"] = tokens.REST()
//	admit := admission.NewChainHandler(..., tokens.Admission()) // first of the mutating plugins for pods
//	for path, h := range tokens.Discovery() { mux.Handle(path, h) } // behind authentication and RBAC
//
// The name of the admission plugin is "ServiceAccount". The scheme must know
// authentication.k8s.io/v1 in the version of the subresource: the body of
// serviceaccounts/token is a TokenRequest of that group.
//
// A token carries the account's UID and, when bound, the pod's (with its
// node), the node's or the secret's; it is refused once one of them is gone.
// Answers are remembered for ten seconds, as in Kubernetes. Unlike Kubernetes,
// the tokens the admission plugin asks for really end after 3607 seconds: our
// agent renews them, and no client that never reads its token file again is
// carried for a year.
//
// Not here: tokens in Secrets (type kubernetes.io/service-account-token), the
// annotation kubernetes.io/enforce-mountable-secrets (deprecated), tokens
// bound to webhook configurations.
package serviceaccount
