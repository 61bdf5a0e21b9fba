package agentproxy

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apiserver/pkg/registry/rest"
)

// DefaultPort is where an agent listens when its Node does not say.
const DefaultPort = 10250

// An agent is one node's, with the transport that reaches it and nothing else.
type agent struct {
	node      string
	addrs     []string // host:port, own addresses of the node
	transport *http.Transport
}

// agentOf reads the Node and makes a transport for its agent.
func (p *Proxy) agentOf(ctx context.Context, node string) (*agent, error) {
	obj, err := p.nodes.Get(ctx, node, &metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		return nil, apierrors.NewServiceUnavailable(fmt.Sprintf("node %q is not part of the cluster any more", node))
	}
	if err != nil {
		return nil, err
	}
	n, ok := obj.(*corev1.Node)
	if !ok {
		return nil, apierrors.NewInternalError(fmt.Errorf("node %q: unexpected type %T", node, obj))
	}
	return newAgent(n, p.tls, p.dialTimeout)
}

func newAgent(n *corev1.Node, config *tls.Config, timeout time.Duration) (*agent, error) {
	port := int(n.Status.DaemonEndpoints.KubeletEndpoint.Port)
	if port == 0 {
		port = DefaultPort
	}
	a := &agent{node: n.Name}
	for _, addr := range ownAddrs(n) {
		a.addrs = append(a.addrs, net.JoinHostPort(addr.String(), strconv.Itoa(port)))
	}
	if len(a.addrs) == 0 {
		return nil, apierrors.NewServiceUnavailable(fmt.Sprintf("node %q has no usable InternalIP address in its status; its agent has not registered yet", n.Name))
	}
	config = config.Clone()
	config.ServerName = n.Name
	health := nodeHealth(n)
	a.transport = &http.Transport{
		TLSClientConfig: config,
		DialContext: func(ctx context.Context, network, addr string) (net.Conn, error) {
			return a.dial(ctx, addr, timeout, health)
		},
		TLSHandshakeTimeout: timeout,
		DisableKeepAlives:   true, // made for one request
	}
	return a, nil
}

// ownAddrs are the addresses of a node where an agent can be.
func ownAddrs(n *corev1.Node) []netip.Addr {
	var addrs []netip.Addr
	for _, a := range n.Status.Addresses {
		ip, err := netip.ParseAddr(a.Address)
		if a.Type != corev1.NodeInternalIP || err != nil {
			continue
		}
		if ip = ip.Unmap(); ip.IsUnspecified() || ip.IsMulticast() || ip.IsLinkLocalUnicast() || slices.Contains(addrs, ip) {
			continue
		}
		addrs = append(addrs, ip)
	}
	return addrs
}

// dial tries the addresses of the agent one after the other. It refuses any
// address it was not made for.
func (a *agent) dial(ctx context.Context, addr string, timeout time.Duration, health string) (net.Conn, error) {
	if addr != a.addrs[0] {
		return nil, fmt.Errorf("dial %s: not the agent of node %q", addr, a.node)
	}
	d := net.Dialer{Timeout: timeout}
	var errs []string
	for _, own := range a.addrs {
		c, err := d.DialContext(ctx, "tcp", own)
		if err == nil {
			return c, nil
		}
		var op *net.OpError
		if errors.As(err, &op) {
			err = op.Err
		}
		errs = append(errs, fmt.Sprintf("%s: %v", own, err))
	}
	return nil, &unreachable{fmt.Sprintf("node %q does not answer (%s); %s", a.node, strings.Join(errs, "; "), health)}
}

// nodeHealth says what the cluster thinks of the node, and since when.
func nodeHealth(n *corev1.Node) string {
	for _, c := range n.Status.Conditions {
		if c.Type != corev1.NodeReady {
			continue
		}
		since := c.LastTransitionTime.UTC().Format(time.RFC3339)
		if c.Status == corev1.ConditionTrue {
			return "the node counts as ready since " + since
		}
		return strings.TrimSpace(fmt.Sprintf("the node is not ready since %s: %s %s", since, c.Reason, c.Message))
	}
	return "the node has never reported its health"
}

// unreachable is an agent that could not be dialed.
type unreachable struct{ msg string }

func (e *unreachable) Error() string { return e.msg }

// explain makes errors of the transport fit for a client of the API.
func explain(node string, err error) error {
	if err == nil || apierrors.ReasonForError(err) != metav1.StatusReasonUnknown {
		return err
	}
	var down *unreachable
	if errors.As(err, &down) {
		return apierrors.NewServiceUnavailable(down.msg)
	}
	var cert *tls.CertificateVerificationError
	if errors.As(err, &cert) {
		return apierrors.NewServiceUnavailable(fmt.Sprintf("what answers for node %q is not its agent: %v", node, cert.Err))
	}
	var u *url.Error
	if errors.As(err, &u) {
		err = u.Err // without the address, which says nothing to a user
	}
	return apierrors.NewInternalError(fmt.Errorf("agent of node %q: %w", node, err))
}

func (a *agent) url(path string, query url.Values) *url.URL {
	return &url.URL{Scheme: "https", Host: a.addrs[0], Path: path, RawQuery: query.Encode()}
}

// responder explains errors before it hands them on.
type responder struct {
	rest.Responder
	node string
}

func (r responder) Error(_ http.ResponseWriter, _ *http.Request, err error) {
	r.Responder.Error(explain(r.node, err))
}
