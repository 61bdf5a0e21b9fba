package agentproxy

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net/http"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apiserver/pkg/authorization/authorizer"
	"k8s.io/apiserver/pkg/endpoints/filters"
	"k8s.io/apiserver/pkg/endpoints/request"
	"k8s.io/apiserver/pkg/registry/rest"
)

// Config of a Proxy. Pods, Nodes and TLS are required.
type Config struct {
	Pods, Nodes rest.Getter
	// TLS has the client certificate shown to agents and the CA of theirs
	// (RootCAs). ServerName is set to the node's name for each call.
	TLS *tls.Config
	// Authorizer is asked whether who upgrades a GET may also create. Nil
	// refuses such requests.
	Authorizer authorizer.UnconditionalAuthorizer
	// DialTimeout for each address of a node; default 5 s.
	DialTimeout time.Duration
}

// Proxy reaches agents on behalf of clients of the API.
type Proxy struct {
	pods, nodes rest.Getter
	tls         *tls.Config
	authorizer  authorizer.UnconditionalAuthorizer
	dialTimeout time.Duration
}

// New checks cfg and returns a Proxy.
func New(cfg Config) (*Proxy, error) {
	switch {
	case cfg.Pods == nil || cfg.Nodes == nil:
		return nil, errors.New("agent proxy: want getters of pods and nodes")
	case cfg.TLS == nil || cfg.TLS.RootCAs == nil || cfg.TLS.InsecureSkipVerify:
		return nil, errors.New("agent proxy: want a TLS config with the CA of the agents in RootCAs")
	}
	if cfg.DialTimeout == 0 {
		cfg.DialTimeout = 5 * time.Second
	}
	return &Proxy{cfg.Pods, cfg.Nodes, cfg.TLS, cfg.Authorizer, cfg.DialTimeout}, nil
}

// Storage has the REST storages by resource and subresource.
func (p *Proxy) Storage() map[string]rest.Storage {
	return map[string]rest.Storage{
		"pods/log":         &logREST{proxy: p},
		"pods/exec":        &execREST{proxy: p},
		"pods/attach":      &attachREST{proxy: p},
		"pods/portforward": &portForwardREST{proxy: p},
		"nodes/proxy":      &nodeREST{proxy: p},
	}
}

// mayCreate asks for the right to create when the request came as a GET:
// reading rights do not start processes.
func (p *Proxy) mayCreate(ctx context.Context) error {
	info, ok := request.RequestInfoFrom(ctx)
	if !ok {
		return apierrors.NewInternalError(errors.New("no request info in the context"))
	}
	if info.Verb == "create" {
		return nil
	}
	forbidden := func(why string) error {
		return apierrors.NewForbidden(schema.GroupResource{Group: info.APIGroup, Resource: info.Resource + "/" + info.Subresource}, info.Name, errors.New(why))
	}
	if p.authorizer == nil {
		return forbidden("the right to create is needed, use POST")
	}
	attrs, err := filters.GetAuthorizerAttributes(ctx)
	if err != nil {
		return apierrors.NewInternalError(fmt.Errorf("read authorization attributes: %w", err))
	}
	decision, reason, err := p.authorizer.Authorize(ctx, create{attrs})
	if err != nil {
		return err
	}
	if decision != authorizer.DecisionAllow {
		return forbidden("the right to create is needed: " + reason)
	}
	return nil
}

// create is a request of another verb, seen as create.
type create struct{ authorizer.Attributes }

func (create) GetVerb() string { return "create" }

// upgradeMethods: GET is for WebSocket.
var upgradeMethods = []string{http.MethodGet, http.MethodPost}
