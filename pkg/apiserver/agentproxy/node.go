package agentproxy

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"strings"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/runtime"
	utilnet "k8s.io/apimachinery/pkg/util/net"
	"k8s.io/apimachinery/pkg/util/proxy"
	"k8s.io/apiserver/pkg/registry/rest"
)

type nodeREST struct{ proxy *Proxy }

var _ rest.Connecter = (*nodeREST)(nil)

func (*nodeREST) New() runtime.Object { return &corev1.NodeProxyOptions{} }
func (*nodeREST) Destroy()            {}
func (*nodeREST) ConnectMethods() []string {
	return []string{"GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS"}
}
func (*nodeREST) NewConnectOptions() (runtime.Object, bool, string) {
	return &corev1.NodeProxyOptions{}, true, "path"
}

// Connect proxies to the agent of the node id names, as NAME, NAME:PORT or
// https:NAME:PORT. Only the agent's port can be named: the node's other ports
// are none of ours.
func (r *nodeREST) Connect(ctx context.Context, id string, opts runtime.Object, resp rest.Responder) (http.Handler, error) {
	o, ok := opts.(*corev1.NodeProxyOptions)
	if !ok {
		return nil, fmt.Errorf("node proxy: unexpected options %T", opts)
	}
	scheme, node, port, valid := utilnet.SplitSchemeNamePort(id)
	if !valid || scheme == "http" || node == "" {
		return nil, apierrors.NewBadRequest(fmt.Sprintf("node %q: want NAME, NAME:PORT or https:NAME:PORT with the port of the agent", id))
	}
	a, err := r.proxy.agentOf(ctx, node)
	if err != nil {
		return nil, err
	}
	if _, own, _ := net.SplitHostPort(a.addrs[0]); port != "" && port != own {
		return nil, apierrors.NewBadRequest(fmt.Sprintf("node %q: only the port of the agent, %s, can be reached", node, own))
	}
	location := a.url("/"+strings.TrimPrefix(o.Path, "/"), nil)
	h := proxy.NewUpgradeAwareHandler(location, a.transport, true, false, responder{resp, node})
	h.UseLocationHost = true
	return h, nil
}
