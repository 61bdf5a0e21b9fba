package agentproxy

// The API server and the agents of these tests are HTTP servers on loopback:
// node n1 has an agent, n2 is down, n3 publishes the address of n1.

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strconv"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/util/httpstream"
	"k8s.io/apimachinery/pkg/util/sets"
	"k8s.io/apiserver/pkg/authentication/user"
	"k8s.io/apiserver/pkg/authorization/authorizer"
	"k8s.io/apiserver/pkg/endpoints/request"
	"k8s.io/apiserver/pkg/registry/rest"
	restclient "k8s.io/client-go/rest"
	"k8s.io/client-go/tools/portforward"
	"k8s.io/client-go/tools/remotecommand"
	"k8s.io/client-go/transport/spdy"
	criportforward "k8s.io/cri-streaming/pkg/streaming/portforward"
	criremote "k8s.io/cri-streaming/pkg/streaming/remotecommand"
	utilexec "k8s.io/utils/exec"
)

// ca signs certificates for the names of nodes.
type ca struct {
	key  *ecdsa.PrivateKey
	cert *x509.Certificate
}

func newCA(t *testing.T) *ca {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	tmpl := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "agents"}, NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	cert, _ := x509.ParseCertificate(der)
	return &ca{key, cert}
}

func (c *ca) pool() *x509.CertPool {
	p := x509.NewCertPool()
	p.AddCert(c.cert)
	return p
}

func (c *ca) issue(t *testing.T, name string) tls.Certificate {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	tmpl := &x509.Certificate{SerialNumber: big.NewInt(2), Subject: pkix.Name{CommonName: name}, DNSNames: []string{name}, NotAfter: time.Now().Add(time.Hour),
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, c.cert, &key.PublicKey, c.key)
	if err != nil {
		t.Fatal(err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
}

// fakeAgent serves the kubelet's paths as our agent does, with the streaming
// library of CRI.
type fakeAgent struct{}

func (fakeAgent) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	part := strings.Split(strings.TrimPrefix(r.URL.Path, "/"), "/")
	switch part[0] {
	case "containerLogs":
		if r.URL.Query().Get("previous") == "true" {
			http.Error(w, `previous terminated container "a" in pod "web" not found`, http.StatusBadRequest)
			return
		}
		fmt.Fprintf(w, "%s?%s\n", r.URL.Path, r.URL.RawQuery)
		if r.URL.Query().Get("follow") == "true" {
			http.NewResponseController(w).Flush()
			<-r.Context().Done()
		}
	case "exec", "attach":
		opts, err := criremote.NewOptions(r)
		if err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		if part[0] == "exec" {
			criremote.ServeExec(w, r, fakeAgent{}, part[2], "", part[3], r.URL.Query()["command"], opts, time.Minute, time.Minute, criremote.SupportedStreamingProtocols)
		} else {
			criremote.ServeAttach(w, r, fakeAgent{}, part[2], "", part[3], opts, time.Minute, time.Minute, criremote.SupportedStreamingProtocols)
		}
	case "portForward":
		opts, err := criportforward.NewV4Options(r)
		if err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		criportforward.ServePortForward(w, r, fakeAgent{}, part[2], "", opts, time.Minute, time.Minute, []string{"portforward.k8s.io"})
	default:
		fmt.Fprintf(w, "agent got %s %s as %s", r.Method, r.URL.RequestURI(), r.TLS.PeerCertificates[0].Subject.CommonName)
	}
}

// ExecInContainer runs "cat", "false" or "size".
func (fakeAgent) ExecInContainer(_ context.Context, pod, _, container string, cmd []string, in io.Reader, out, stderr io.WriteCloser, tty bool, resize <-chan criremote.TerminalSize, _ time.Duration) error {
	switch cmd[0] {
	case "cat":
		fmt.Fprintf(stderr, "%s/%s %q", pod, container, cmd)
		_, err := io.Copy(out, in)
		return err
	case "false":
		return utilexec.CodeExitError{Err: errors.New("exit"), Code: 3}
	case "size":
		s := <-resize
		fmt.Fprintf(out, "%dx%d", s.Width, s.Height)
		return nil
	}
	return fmt.Errorf("no such command")
}

func (fakeAgent) AttachContainer(_ context.Context, pod, _, container string, in io.Reader, out, stderr io.WriteCloser, tty bool, _ <-chan criremote.TerminalSize) error {
	fmt.Fprintf(out, "attached to %s/%s", pod, container)
	return nil
}

func (fakeAgent) PortForward(_ context.Context, pod, _ string, port int32, s io.ReadWriteCloser) error {
	defer s.Close()
	buf := make([]byte, 4)
	if _, err := io.ReadFull(s, buf); err != nil {
		return err
	}
	fmt.Fprintf(s, "%s:%d says %s", pod, port, buf)
	return nil
}

// getter is a rest.Getter of named objects.
type getter map[string]runtime.Object

func (g getter) Get(_ context.Context, name string, _ *metav1.GetOptions) (runtime.Object, error) {
	if o, ok := g[name]; ok {
		return o, nil
	}
	return nil, apierrors.NewNotFound(corev1.Resource("things"), name)
}

func pod(name, node string, phase corev1.PodPhase, containers ...string) *corev1.Pod {
	p := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: name}, Spec: corev1.PodSpec{NodeName: node}, Status: corev1.PodStatus{Phase: phase}}
	for _, c := range containers {
		p.Spec.Containers = append(p.Spec.Containers, corev1.Container{Name: c})
	}
	return p
}

func node(name, addr string, port int, conditions ...corev1.NodeCondition) *corev1.Node {
	n := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name}, Status: corev1.NodeStatus{Conditions: conditions}}
	n.Status.Addresses = []corev1.NodeAddress{{Type: corev1.NodeHostName, Address: "127.0.0.9"}, {Type: corev1.NodeInternalIP, Address: addr}}
	n.Status.DaemonEndpoints.KubeletEndpoint.Port = int32(port)
	return n
}

// api serves the storages of a Proxy at the paths of the Kubernetes API.
type api struct {
	*testing.T
	storage map[string]rest.Storage
	codec   runtime.ParameterCodec
	url     string
}

func start(t *testing.T) *api {
	t.Helper()
	authority := newCA(t)
	srv := httptest.NewUnstartedServer(fakeAgent{})
	srv.TLS = &tls.Config{Certificates: []tls.Certificate{authority.issue(t, "n1")}, ClientCAs: authority.pool(), ClientAuth: tls.RequireAndVerifyClientCert}
	srv.StartTLS()
	t.Cleanup(srv.Close)
	_, p, _ := net.SplitHostPort(srv.Listener.Addr().String())
	port, _ := strconv.Atoi(p)

	closed, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	down := closed.Addr().(*net.TCPAddr).Port
	closed.Close()

	web := pod("web", "n1", corev1.PodRunning, "a")
	two := pod("two", "n1", corev1.PodRunning, "a", "b")
	two.Spec.InitContainers = []corev1.Container{{Name: "i"}}
	pending := pod("pending", "", corev1.PodPending, "a")
	pending.Status.Conditions = []corev1.PodCondition{{Type: corev1.PodScheduled, Status: corev1.ConditionFalse, Message: "0/1 nodes are available"}}
	proxy, err := New(Config{
		Pods: getter{"web": web, "two": two, "pending": pending, "done": pod("done", "n1", corev1.PodSucceeded, "a"),
			"dark": pod("dark", "n2", corev1.PodRunning, "a"), "fooled": pod("fooled", "n3", corev1.PodRunning, "a"),
			"odd": pod("odd", "n4", corev1.PodRunning, "a"), "orphan": pod("orphan", "n9", corev1.PodRunning, "a")},
		Nodes: getter{"n1": node("n1", "127.0.0.1", port), "n3": node("n3", "127.0.0.1", port), "n4": node("n4", "169.254.169.254", 80),
			"n2": node("n2", "127.0.0.1", down, corev1.NodeCondition{Type: corev1.NodeReady, Status: corev1.ConditionUnknown,
				LastTransitionTime: metav1.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC), Reason: "NodeStatusUnknown", Message: "no lease"})},
		TLS: &tls.Config{RootCAs: authority.pool(), Certificates: []tls.Certificate{authority.issue(t, "apiserver")}},
		Authorizer: authorizer.AuthorizerFunc(func(_ context.Context, a authorizer.Attributes) (authorizer.Decision, string, error) {
			if a.GetUser().GetName() == "admin" && a.GetVerb() == "create" {
				return authorizer.DecisionAllow, "", nil
			}
			return authorizer.DecisionNoOpinion, "no", nil
		}),
	})
	if err != nil {
		t.Fatal(err)
	}
	scheme := runtime.NewScheme()
	corev1.AddToScheme(scheme)
	if err := AddToScheme(scheme); err != nil {
		t.Fatal(err)
	}
	a := &api{T: t, storage: proxy.Storage(), codec: runtime.NewParameterCodec(scheme)}
	front := httptest.NewServer(a)
	t.Cleanup(front.Close)
	a.url = front.URL
	return a
}

// ServeHTTP does what the handlers of k8s.io/apiserver do around a storage.
// The user is "admin", or who the header User says.
func (a *api) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	resolver := request.RequestInfoFactory{APIPrefixes: sets.NewString("api"), GrouplessAPIPrefixes: sets.NewString("api")}
	info, err := resolver.NewRequestInfo(r)
	if err != nil {
		http.Error(w, err.Error(), 500)
		return
	}
	who := r.Header.Get("User")
	if who == "" {
		who = "admin"
	}
	ctx := request.WithRequestInfo(request.WithUser(r.Context(), &user.DefaultInfo{Name: who}), info)
	resp := responderFunc(func(err error) {
		var s apierrors.APIStatus
		if !errors.As(err, &s) {
			err = apierrors.NewInternalError(err)
			errors.As(err, &s)
		}
		http.Error(w, s.Status().Message, int(s.Status().Code))
	})
	switch st := a.storage[info.Resource+"/"+info.Subresource].(type) {
	case rest.Connecter:
		opts, withPath, key := st.NewConnectOptions()
		q := r.URL.Query()
		if withPath && len(info.Parts) > 3 {
			q.Set(key, strings.Join(info.Parts[3:], "/"))
		}
		if err := a.codec.DecodeParameters(q, corev1.SchemeGroupVersion, opts); err != nil {
			resp(err)
			return
		}
		h, err := st.Connect(ctx, info.Name, opts, resp)
		if err != nil {
			resp(err)
			return
		}
		h.ServeHTTP(w, r.WithContext(ctx))
	case rest.GetterWithOptions:
		opts, _, _ := st.NewGetOptions()
		if err := a.codec.DecodeParameters(r.URL.Query(), corev1.SchemeGroupVersion, opts); err != nil {
			resp(err)
			return
		}
		obj, err := st.Get(ctx, info.Name, opts)
		if err != nil {
			resp(err)
			return
		}
		body, flush, mime, err := obj.(rest.ResourceStreamer).InputStream(ctx, "v1", "")
		if err != nil {
			resp(err)
			return
		}
		defer body.Close()
		w.Header().Set("Content-Type", mime)
		var out io.Writer = w
		if flush {
			out = flusher{w}
		}
		io.Copy(out, body)
	default:
		http.NotFound(w, r)
	}
}

type flusher struct{ http.ResponseWriter }

func (f flusher) Write(b []byte) (int, error) {
	n, err := f.ResponseWriter.Write(b)
	http.NewResponseController(f.ResponseWriter).Flush()
	return n, err
}

type responderFunc func(error)

func (f responderFunc) Error(err error)            { f(err) }
func (f responderFunc) Object(int, runtime.Object) {}

func (a *api) get(path string) string {
	a.Helper()
	resp, err := http.Get(a.url + path)
	if err != nil {
		a.Fatal(err)
	}
	defer resp.Body.Close()
	b, _ := io.ReadAll(resp.Body)
	return fmt.Sprintf("%d %s", resp.StatusCode, strings.TrimSpace(string(b)))
}

func TestLogsAndErrors(t *testing.T) {
	a := start(t)
	for _, c := range []struct{ path, want string }{
		{"pods/web/log", "200 /containerLogs/default/web/a?"},
		{"pods/two/log?container=b&tailLines=5&timestamps=true&sinceSeconds=7&limitBytes=9", "200 /containerLogs/default/two/b?limitBytes=9&sinceSeconds=7&tailLines=5&timestamps=true"},
		{"pods/two/log?container=i&sinceTime=2026-01-02T03:04:05Z", "200 /containerLogs/default/two/i?sinceTime=2026-01-02T03%3A04%3A05Z"},
		{"pods/web/log?previous=true", `400 previous terminated container "a" in pod "web" not found`},
		{"pods/two/log", "400 a container name must be specified for pod two, choose one of: [a b] or one of the init containers: [i]"},
		{"pods/two/log?container=x", "400 container x is not valid for pod two, choose one of: [a b] or one of the init containers: [i]"},
		{"pods/web/log?tailLines=-1", `422 PodLogOptions "web" is invalid: tailLines: Invalid value: -1: must be at least 0`},
		{"pods/web/log?tailLines=many", `500 Internal error occurred: query parameter tailLines="many": want a whole number`},
		{"pods/pending/log", "400 pod pending is not assigned to a node yet: 0/1 nodes are available"},
		{"pods/none/log", `404 things "none" not found`},
		{"pods/dark/log", `503 node "n2" does not answer (127.0.0.1:PORT: connect: connection refused); the node is not ready since 2026-01-02T03:04:05Z: NodeStatusUnknown no lease`},
		{"pods/fooled/log", `503 what answers for node "n3" is not its agent: x509: certificate is valid for n1, not n3`},
		{"pods/odd/log", `503 node "n4" has no usable InternalIP address in its status; its agent has not registered yet`},
		{"pods/orphan/log", `503 node "n9" is not part of the cluster any more`},
		{"pods/web/exec?command=cat&stdin=true", "400 Upgrade request required"},
		{"pods/done/exec?command=cat", "400 cannot exec: pod done has ended, its phase is Succeeded"},
	} {
		got := a.get("/api/v1/namespaces/default/" + c.path)
		if i := strings.Index(got, "127.0.0.1:"); i > 0 {
			j := i + 10
			for j < len(got) && got[j] >= '0' && got[j] <= '9' {
				j++
			}
			got = got[:i+10] + "PORT" + got[j:]
		}
		if got != c.want {
			t.Errorf("%s\n got %s\nwant %s", c.path, got, c.want)
		}
	}
}

func TestLogsFollow(t *testing.T) {
	a := start(t)
	ctx, cancel := context.WithCancel(t.Context())
	req, _ := http.NewRequestWithContext(ctx, "GET", a.url+"/api/v1/namespaces/default/pods/web/log?follow", nil)
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	line := make([]byte, 64)
	n, _ := resp.Body.Read(line)
	if got := string(line[:n]); got != "/containerLogs/default/web/a?follow=true\n" {
		t.Errorf("first line %q", got)
	}
	cancel() // the agent's handler ends with it, or the servers never close
	resp.Body.Close()
}

func TestNodeProxy(t *testing.T) {
	a := start(t)
	for _, c := range []struct{ path, want string }{
		{"n1/proxy/metrics/resource?x=y", "200 agent got GET /metrics/resource?x=y as apiserver"},
		{"n1:22/proxy/", `400 node "n1": only the port of the agent, PORT, can be reached`},
		{"http:n1:10255/proxy/", `400 node "http:n1:10255": want NAME, NAME:PORT or https:NAME:PORT with the port of the agent`},
		{"n7/proxy/", `503 node "n7" is not part of the cluster any more`},
	} {
		got := a.get("/api/v1/nodes/" + c.path)
		if head, rest, ok := strings.Cut(got, "of the agent, "); ok {
			_, tail, _ := strings.Cut(rest, ",")
			got = head + "of the agent, PORT," + tail
		}
		if got != c.want {
			t.Errorf("%s\n got %s\nwant %s", c.path, got, c.want)
		}
	}
}

// dialects are the ways kubectl 1.20 to 1.37 start a process.
var dialects = map[string]func(*restclient.Config, *url.URL) (remotecommand.Executor, error){
	"SPDY": func(c *restclient.Config, u *url.URL) (remotecommand.Executor, error) {
		return remotecommand.NewSPDYExecutor(c, "POST", u)
	},
	"WebSocket v5": func(c *restclient.Config, u *url.URL) (remotecommand.Executor, error) {
		return remotecommand.NewWebSocketExecutor(c, "GET", u.String())
	},
	"WebSocket v4": func(c *restclient.Config, u *url.URL) (remotecommand.Executor, error) {
		return remotecommand.NewWebSocketExecutorForProtocols(c, "GET", u.String(), "v4.channel.k8s.io")
	},
}

type oneSize struct{ sent bool }

func (s *oneSize) Next() *remotecommand.TerminalSize {
	if s.sent {
		return nil
	}
	s.sent = true
	return &remotecommand.TerminalSize{Width: 80, Height: 25}
}

func TestExecAndAttach(t *testing.T) {
	a := start(t)
	big := strings.Repeat("0123456789abcdef", 1<<16) // 1 MiB through every dialect
	for name, dialect := range dialects {
		for _, c := range []struct {
			path, stdin string
			tty         bool
			out, stderr string
			err         string
		}{
			{path: "pods/web/exec?command=cat&command=a+b&stdin=true&stdout=true&stderr=true", stdin: big, out: big, stderr: `web/a ["cat" "a b"]`},
			{path: "pods/web/exec?command=false&stdout=true", err: "exit code 3"},
			{path: "pods/web/exec?command=nonsense&stdout=true", err: "no such command"},
			{path: "pods/web/exec?command=size&stdout=true&tty=true", tty: true, out: "80x25"},
			{path: "pods/two/attach?container=b&stdout=true", out: "attached to two/b"},
			{path: "pods/dark/exec?command=cat&stdout=true", err: `node "n2" does not answer`},
			{path: "pods/two/exec?command=cat&stdout=true", err: "choose one of"},
		} {
			if name == "WebSocket v4" && c.stdin != "" {
				continue // v4 cannot half-close: cat never ends
			}
			u, _ := url.Parse(a.url + "/api/v1/namespaces/default/" + c.path)
			ex, err := dialect(&restclient.Config{Host: a.url}, u)
			if err != nil {
				t.Fatal(err)
			}
			var out, stderr bytes.Buffer
			opts := remotecommand.StreamOptions{Stdout: &out, Tty: c.tty}
			if c.stdin != "" {
				opts.Stdin = strings.NewReader(c.stdin)
			}
			if c.stderr != "" {
				opts.Stderr = &stderr
			}
			if c.tty {
				opts.TerminalSizeQueue = &oneSize{}
			}
			err = ex.StreamWithContext(t.Context(), opts)
			switch {
			case c.err == "" && err != nil:
				t.Errorf("%s %s: %v", name, c.path, err)
			case c.err != "" && (err == nil || !strings.Contains(err.Error(), c.err)) && !refusedUpgrade(name, err):
				t.Errorf("%s %s: error %v, want a part %q", name, c.path, err, c.err)
			case out.String() != c.out || stderr.String() != c.stderr:
				t.Errorf("%s %s: out %d bytes, want %d; stderr %q, want %q", name, c.path, out.Len(), len(c.out), stderr.String(), c.stderr)
			}
		}
	}
}

// refusedUpgrade: the WebSocket client does not print the body of an answer
// that is not an upgrade.
func refusedUpgrade(dialect string, err error) bool {
	return strings.HasPrefix(dialect, "WebSocket") && err != nil && strings.Contains(err.Error(), "bad handshake")
}

// TestReadersStartNothing: the right to get pods/exec is not enough.
func TestReadersStartNothing(t *testing.T) {
	a := start(t)
	req, _ := http.NewRequest("GET", a.url+"/api/v1/namespaces/default/pods/web/exec?command=cat", nil)
	req.Header.Set("User", "reader")
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusForbidden {
		t.Errorf("status %d, want 403", resp.StatusCode)
	}
}

func TestPortForward(t *testing.T) {
	a := start(t)
	u, _ := url.Parse(a.url + "/api/v1/namespaces/default/pods/web/portforward")
	cfg := &restclient.Config{Host: a.url}
	tr, up, err := spdy.RoundTripperFor(cfg)
	if err != nil {
		t.Fatal(err)
	}
	tunnel, err := portforward.NewSPDYOverWebsocketDialer(u, cfg)
	if err != nil {
		t.Fatal(err)
	}
	direct := spdy.NewDialer(up, &http.Client{Transport: tr}, "POST", u)
	for name, dialer := range map[string]httpstream.Dialer{"SPDY": direct, "SPDY in WebSocket": tunnel} {
		t.Run(name, func(t *testing.T) {
			stop, ready := make(chan struct{}), make(chan struct{})
			fw, err := portforward.New(dialer, []string{"0:8080"}, stop, ready, io.Discard, io.Discard)
			if err != nil {
				t.Fatal(err)
			}
			done := make(chan error, 1)
			go func() { done <- fw.ForwardPorts() }()
			select {
			case <-ready:
			case err := <-done:
				t.Fatal(err)
			}
			ports, err := fw.GetPorts()
			if err != nil {
				t.Fatal(err)
			}
			for range 3 {
				c, err := net.Dial("tcp", fmt.Sprintf("127.0.0.1:%d", ports[0].Local))
				if err != nil {
					t.Fatal(err)
				}
				c.Write([]byte("ping"))
				b, _ := io.ReadAll(c)
				c.Close()
				if string(b) != "web:8080 says ping" {
					t.Errorf("got %q", b)
				}
			}
			close(stop)
			if err := <-done; err != nil {
				t.Error(err)
			}
		})
	}
}

func TestDialsOnlyItsOwnNode(t *testing.T) {
	a, err := newAgent(node("n1", "10.0.0.1", 0), &tls.Config{}, time.Second)
	if err != nil {
		t.Fatal(err)
	}
	if got := strings.Join(a.addrs, " "); got != "10.0.0.1:10250" {
		t.Errorf("addresses %s", got)
	}
	for _, addr := range []string{"10.0.0.2:10250", "10.0.0.1:22", "localhost:10250"} {
		if _, err := a.transport.DialContext(t.Context(), "tcp", addr); err == nil || !strings.Contains(err.Error(), "not the agent of node") {
			t.Errorf("dial %s: %v", addr, err)
		}
	}
	if a.transport.TLSClientConfig.ServerName != "n1" {
		t.Error("the server's name is not checked")
	}
}

func FuzzDecodeQuery(f *testing.F) {
	f.Add("container=a&follow&tailLines=3&sinceTime=2026-01-02T03:04:05Z&command=x&ports=1&ports=2")
	f.Fuzz(func(t *testing.T, query string) {
		q, err := url.ParseQuery(query)
		if err != nil {
			return
		}
		for _, into := range []any{&corev1.PodLogOptions{}, &corev1.PodExecOptions{}, &corev1.PodPortForwardOptions{}, &corev1.NodeProxyOptions{}} {
			_ = decodeQuery(q, into)
		}
	})
}
