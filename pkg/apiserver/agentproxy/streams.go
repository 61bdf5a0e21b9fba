package agentproxy

import (
	"context"
	"fmt"
	"net/http"
	"net/url"
	"strconv"
	"strings"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/util/proxy"
	"k8s.io/apiserver/pkg/registry/rest"
	translate "k8s.io/apiserver/pkg/util/proxy"
	"k8s.io/streaming/pkg/httpstream/wsstream"
)

// upgrade is a handler that hands the upgraded connection through to the agent.
func (a *agent) upgrade(location *url.URL, r rest.Responder) http.Handler {
	h := proxy.NewUpgradeAwareHandler(location, a.transport, false, true, responder{r, a.node})
	h.UseLocationHost = true
	h.RejectForwardingRedirects = true
	return h
}

// process is a handler for exec and attach. WebSocket clients of protocol v5
// are translated to the agent's SPDY.
func (a *agent) process(path string, q url.Values, s streams, r rest.Responder) http.Handler {
	for k, v := range s.query() {
		q[k] = v
	}
	location := a.url(path, q)
	translator := translate.NewStreamTranslatorHandler(location, a.transport, 0,
		translate.Options{Stdin: s.stdin, Stdout: s.stdout, Stderr: s.stderr, Tty: s.tty})
	return translate.NewTranslatingHandler(a.upgrade(location, r), translator, wsstream.IsWebSocketRequestWithStreamCloseProtocol)
}

// target checks everything about a pod that does not need its node.
func (p *Proxy) target(ctx context.Context, name, container, what string) (*corev1.Pod, string, *agent, error) {
	if err := p.mayCreate(ctx); err != nil {
		return nil, "", nil, err
	}
	pod, err := p.podOf(ctx, name)
	if err != nil {
		return nil, "", nil, err
	}
	if container, err = containerOf(pod, container); err != nil {
		return nil, "", nil, err
	}
	if err := running(pod, what); err != nil {
		return nil, "", nil, err
	}
	a, err := p.agentOf(ctx, pod.Spec.NodeName)
	return pod, container, a, err
}

type execREST struct{ proxy *Proxy }

var _ rest.Connecter = (*execREST)(nil)

func (*execREST) New() runtime.Object      { return &corev1.PodExecOptions{} }
func (*execREST) Destroy()                 {}
func (*execREST) ConnectMethods() []string { return upgradeMethods }
func (*execREST) NewConnectOptions() (runtime.Object, bool, string) {
	return &corev1.PodExecOptions{}, false, ""
}

func (r *execREST) Connect(ctx context.Context, name string, opts runtime.Object, resp rest.Responder) (http.Handler, error) {
	o, ok := opts.(*corev1.PodExecOptions)
	if !ok {
		return nil, fmt.Errorf("exec: unexpected options %T", opts)
	}
	pod, container, a, err := r.proxy.target(ctx, name, o.Container, "exec")
	if err != nil {
		return nil, err
	}
	path := "/exec/" + pod.Namespace + "/" + pod.Name + "/" + container
	return a.process(path, url.Values{"command": o.Command}, streams{o.Stdin, o.Stdout, o.Stderr, o.TTY}, resp), nil
}

type attachREST struct{ proxy *Proxy }

var _ rest.Connecter = (*attachREST)(nil)

func (*attachREST) New() runtime.Object      { return &corev1.PodAttachOptions{} }
func (*attachREST) Destroy()                 {}
func (*attachREST) ConnectMethods() []string { return upgradeMethods }
func (*attachREST) NewConnectOptions() (runtime.Object, bool, string) {
	return &corev1.PodAttachOptions{}, false, ""
}

func (r *attachREST) Connect(ctx context.Context, name string, opts runtime.Object, resp rest.Responder) (http.Handler, error) {
	o, ok := opts.(*corev1.PodAttachOptions)
	if !ok {
		return nil, fmt.Errorf("attach: unexpected options %T", opts)
	}
	pod, container, a, err := r.proxy.target(ctx, name, o.Container, "attach")
	if err != nil {
		return nil, err
	}
	path := "/attach/" + pod.Namespace + "/" + pod.Name + "/" + container
	return a.process(path, url.Values{}, streams{o.Stdin, o.Stdout, o.Stderr, o.TTY}, resp), nil
}

type portForwardREST struct{ proxy *Proxy }

var _ rest.Connecter = (*portForwardREST)(nil)

func (*portForwardREST) New() runtime.Object      { return &corev1.PodPortForwardOptions{} }
func (*portForwardREST) Destroy()                 {}
func (*portForwardREST) ConnectMethods() []string { return upgradeMethods }
func (*portForwardREST) NewConnectOptions() (runtime.Object, bool, string) {
	return &corev1.PodPortForwardOptions{}, false, ""
}

func (r *portForwardREST) Connect(ctx context.Context, name string, opts runtime.Object, resp rest.Responder) (http.Handler, error) {
	o, ok := opts.(*corev1.PodPortForwardOptions)
	if !ok {
		return nil, fmt.Errorf("port-forward: unexpected options %T", opts)
	}
	if err := r.proxy.mayCreate(ctx); err != nil {
		return nil, err
	}
	pod, err := r.proxy.podOf(ctx, name)
	if err != nil {
		return nil, err
	}
	if err := running(pod, "port-forward"); err != nil {
		return nil, err
	}
	a, err := r.proxy.agentOf(ctx, pod.Spec.NodeName)
	if err != nil {
		return nil, err
	}
	q := url.Values{}
	if len(o.Ports) > 0 {
		var ports []string
		for _, p := range o.Ports {
			ports = append(ports, strconv.Itoa(int(p)))
		}
		q.Set(corev1.PortHeader, strings.Join(ports, ","))
	}
	h := a.upgrade(a.url("/portForward/"+pod.Namespace+"/"+pod.Name, q), resp)
	return translate.NewTranslatingHandler(h, translate.NewTunnelingHandler(h), wsstream.IsWebSocketRequestWithTunnelingProtocol), nil
}
