package apiserver_test

import (
	"context"
	"crypto/sha256"
	"crypto/tls"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/klog/v2"

	"meshd.dev/pkg/apiserver"
	"meshd.dev/pkg/apiserver/testcerts"
)

// cluster is a running API server and clients of it. Services are of
// 10.96.0.0/16 and fd00:10:96::/112; the server says it is 192.0.2.1.
type cluster struct {
	t      *testing.T
	ca     *testcerts.CA
	cfg    apiserver.Config
	server *apiserver.Server
	admin  kubernetes.Interface
	stop   func()
}

func init() { klog.SetSlogLogger(slog.New(slog.DiscardHandler)) }

// files makes the certificates and the configuration of a server.
func files(t *testing.T) (*testcerts.CA, apiserver.Config) {
	t.Helper()
	ca, err := testcerts.New(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	return ca, apiserver.Config{
		Listen: freeAddr(t), AdvertiseAddress: netip.MustParseAddr("192.0.2.1"), DataDir: t.TempDir(),
		CACert: ca.File("ca.crt"), ClientCA: ca.File("ca.crt"),
		ServingCert: ca.File("serving.crt"), ServingKey: ca.File("serving.key"),
		ServiceAccountKey: ca.File("sa.key"), EncryptionKey: ca.File("secret.key"),
		ServiceCIDRs: []netip.Prefix{netip.MustParsePrefix("10.96.0.0/16"), netip.MustParsePrefix("fd00:10:96::/112")},
	}
}

func freeAddr(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}

// start runs a server until the test ends or stop is called.
func start(t *testing.T, ca *testcerts.CA, cfg apiserver.Config) *cluster {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	server, err := apiserver.New(ctx, cfg)
	if err != nil {
		cancel()
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- server.Run(ctx) }()
	c := &cluster{t: t, ca: ca, cfg: cfg, server: server}
	stopped := false
	c.stop = func() {
		if stopped {
			return
		}
		stopped = true
		cancel()
		if err := <-ended; err != nil {
			t.Errorf("run: %v", err)
		}
	}
	t.Cleanup(c.stop)
	select {
	case <-server.Ready():
	case err := <-ended:
		ended <- nil
		t.Fatalf("the server ended before it was ready: %v", err)
	case <-time.After(time.Minute):
		t.Fatal("not ready after a minute")
	}
	c.admin = kubernetes.NewForConfigOrDie(c.as("admin", "system:masters"))
	return c
}

// as is a client with a certificate.
func (c *cluster) as(user string, groups ...string) *rest.Config {
	c.t.Helper()
	cert, key, err := c.ca.Client(user, groups...)
	if err != nil {
		c.t.Fatal(err)
	}
	return &rest.Config{Host: "https://" + c.cfg.Listen, QPS: -1, WarningHandler: rest.NoWarnings{},
		TLSClientConfig: rest.TLSClientConfig{CAData: c.ca.PEM, CertData: cert, KeyData: key}}
}

func (c *cluster) client(user string, groups ...string) kubernetes.Interface {
	return kubernetes.NewForConfigOrDie(c.as(user, groups...))
}

// agent is the client of a node, and the Node object that joining makes of the
// key it holds.
func (c *cluster) agent(name string) (kubernetes.Interface, *corev1.Node) {
	c.t.Helper()
	config := c.as("system:node:"+name, "system:nodes")
	pair, err := tls.X509KeyPair(config.CertData, config.KeyData)
	if err != nil {
		c.t.Fatal(err)
	}
	identity := fmt.Sprintf("%x", sha256.Sum256(pair.Leaf.RawSubjectPublicKeyInfo))
	return kubernetes.NewForConfigOrDie(config), &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name, Annotations: map[string]string{"meshd.dev/identity": identity}}}
}

func (c *cluster) dynamic() dynamic.Interface {
	return dynamic.NewForConfigOrDie(c.as("admin", "system:masters"))
}

// get reads a path without credentials.
func (c *cluster) get(path string) int {
	c.t.Helper()
	config := &rest.Config{Host: "https://" + c.cfg.Listen, TLSClientConfig: rest.TLSClientConfig{CAData: c.ca.PEM}}
	client, err := rest.HTTPClientFor(config)
	if err != nil {
		c.t.Fatal(err)
	}
	defer client.CloseIdleConnections()
	resp, err := client.Get(config.Host + path)
	if err != nil {
		c.t.Fatal(err)
	}
	resp.Body.Close()
	return resp.StatusCode
}
