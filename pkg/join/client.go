package join

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"k8s.io/client-go/rest"

	"meshd.dev/pkg/durable"
	"meshd.dev/pkg/pki"
)

// ServerName is in the certificate of every API server, whatever address it is
// reached by.
const ServerName = "kubernetes"

// DefaultPort of the API server.
const DefaultPort = "6443"

// Credentials is the folder in which a node keeps who it is: node.crt,
// node.key, ca.crt and cluster.json.
type Credentials struct{ Dir string }

func (c Credentials) path(name string) string { return filepath.Join(c.Dir, name) }

// Cert, Key and CA are paths of PEM files.
func (c Credentials) Cert() string { return c.path("node.crt") }
func (c Credentials) Key() string  { return c.path("node.key") }
func (c Credentials) CA() string   { return c.path("ca.crt") }

// Joined reports whether this machine has joined a cluster.
func (c Credentials) Joined() bool {
	_, err := os.Stat(c.path("cluster.json")) // written last
	return err == nil
}

// Node is the name this machine joined under.
func (c Credentials) Node() (string, error) {
	cert, err := pki.LoadCert(c.Cert())
	if err != nil {
		return "", err
	}
	return strings.TrimPrefix(cert.Subject.CommonName, "system:node:"), nil
}

// Cluster reads what the server said at joining.
func (c Credentials) Cluster() (Cluster, error) {
	var cl Cluster
	b, err := os.ReadFile(c.path("cluster.json"))
	if err != nil {
		return cl, fmt.Errorf("node credentials: %w", err)
	}
	if err := json.Unmarshal(b, &cl); err != nil {
		return cl, fmt.Errorf("node credentials %s: %w; join again with a new token", c.path("cluster.json"), err)
	}
	if len(cl.Servers) == 0 {
		return cl, fmt.Errorf("node credentials %s: no servers; join again with a new token", c.path("cluster.json"))
	}
	return cl, nil
}

// Config reaches the API as this node. Certificate files are read again when
// they change.
func (c Credentials) Config() (*rest.Config, error) {
	cl, err := c.Cluster()
	if err != nil {
		return nil, err
	}
	return &rest.Config{
		Host: "https://" + cl.Servers[0],
		TLSClientConfig: rest.TLSClientConfig{
			ServerName: ServerName, CAFile: c.CA(), CertFile: c.Cert(), KeyFile: c.Key(),
		},
	}, nil
}

// Join asks server (host or host:port) for a certificate for node and keeps it.
func (c Credentials) Join(ctx context.Context, server string, t Token, node string) error {
	server = withPort(server)
	if _, port, err := net.SplitHostPort(server); err != nil {
		return Refused{Text: err.Error()}
	} else if n, err := strconv.ParseUint(port, 10, 16); err != nil || n == 0 {
		return Refused{Text: fmt.Sprintf("server %s: port %q: want 1 to 65535", server, port)}
	}
	verify := func(state tls.ConnectionState) error { return trust(state.PeerCertificates, t.CAHash) }
	// The CA is not known yet: VerifyConnection decides by the token's hash.
	tlsConfig := &tls.Config{InsecureSkipVerify: true, VerifyConnection: verify, MinVersion: tls.VersionTLS13}
	resp, err := c.ask(ctx, server, JoinPath, tlsConfig, request{Token: t.ID + "." + t.Secret, Node: node})
	if err != nil {
		return fmt.Errorf("join %s as %s: %w", server, node, err)
	}
	return c.keepFrom(server, resp)
}

// Renew replaces the certificate when it is past half of its life.
func (c Credentials) Renew(ctx context.Context) error {
	cert, err := pki.LoadCert(c.Cert())
	if err != nil {
		return fmt.Errorf("renew node certificate: %w", err)
	}
	if !pki.HalfSpent(cert) {
		return nil
	}
	config, err := c.Config()
	if err != nil {
		return err
	}
	tlsConfig, err := rest.TLSConfigFor(config)
	if err != nil {
		return fmt.Errorf("renew node certificate: %w", err)
	}
	node, err := c.Node()
	if err != nil {
		return err
	}
	resp, err := c.ask(ctx, strings.TrimPrefix(config.Host, "https://"), RenewPath, tlsConfig, request{Node: node})
	if err != nil {
		return fmt.Errorf("renew node certificate: %w", err)
	}
	return c.keepFrom(strings.TrimPrefix(config.Host, "https://"), resp)
}

// keepFrom keeps what server answered, and server as the first way to the API:
// what it advertises need not be reachable from here.
func (c Credentials) keepFrom(server string, r response) error {
	r.Cluster.Servers = append([]string{server}, slices.DeleteFunc(r.Cluster.Servers, func(s string) bool { return s == server })...)
	return c.keep(r)
}

func (c Credentials) keep(r response) error {
	cluster, err := json.MarshalIndent(r.Cluster, "", "  ")
	if err != nil {
		return err
	}
	for _, f := range []struct {
		path    string
		content []byte
	}{{c.CA(), []byte(r.CA)}, {c.Cert(), []byte(r.Cert)}, {c.path("node.kubeconfig"), c.kubeconfig(r.Cluster)}, {c.path("cluster.json"), append(cluster, '\n')}} {
		if _, err := durable.WriteFileIfChanged(f.path, f.content, 0o600); err != nil {
			return err
		}
	}
	return nil
}

// kubeconfig lets a person on this machine ask the API as the node.
func (c Credentials) kubeconfig(cl Cluster) []byte {
	return fmt.Appendf(nil, `apiVersion: v1
kind: Config
clusters: [{name: meshd, cluster: {server: %q, tls-server-name: %s, certificate-authority: %q}}]
users: [{name: node, user: {client-certificate: %q, client-key: %q}}]
contexts: [{name: meshd, context: {cluster: meshd, user: node}}]
current-context: meshd
`, "https://"+cl.Servers[0], ServerName, c.CA(), c.Cert(), c.Key())
}

func (c Credentials) ask(ctx context.Context, server, path string, tlsConfig *tls.Config, req request) (response, error) {
	var resp response
	key, err := pki.LoadOrCreateKey(c.Key())
	if err != nil {
		return resp, err
	}
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{Subject: pkix.Name{CommonName: nodeUser(req.Node)}}, key)
	if err != nil {
		return resp, err
	}
	req.CSR = string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: der}))
	body, err := json.Marshal(req)
	if err != nil {
		return resp, err
	}
	client := &http.Client{Timeout: 30 * time.Second, Transport: &http.Transport{TLSClientConfig: tlsConfig, DisableKeepAlives: true}}
	hr, err := http.NewRequestWithContext(ctx, http.MethodPost, "https://"+server+path, bytes.NewReader(body))
	if err != nil {
		return resp, err
	}
	answer, err := client.Do(hr)
	if err != nil {
		return resp, err
	}
	defer answer.Body.Close()
	text, err := io.ReadAll(io.LimitReader(answer.Body, 1<<20))
	if err != nil {
		return resp, err
	}
	if answer.StatusCode != http.StatusOK {
		return resp, Refused{answer.StatusCode, strings.TrimSpace(string(text))}
	}
	if err := json.Unmarshal(text, &resp); err != nil {
		return resp, fmt.Errorf("answer of the server: %w", err)
	}
	return resp, nil
}

// Refused is the server's own word that it will not; asking again is of no use
// unless Code is 500 or more.
type Refused struct {
	Code int
	Text string
}

func (r Refused) Error() string { return "refused: " + r.Text }

// ErrNotTrusted says that the server is not one of the token's cluster.
var ErrNotTrusted = errors.New("the server's CA is not the one in the token: the token is of another cluster, or somebody sits in between")

// trust accepts a chain that ends in the CA of that hash.
func trust(chain []*x509.Certificate, caHash string) error {
	if len(chain) == 0 {
		return errors.New("the server showed no certificate")
	}
	i := slices.IndexFunc(chain, func(c *x509.Certificate) bool { return c.IsCA && pki.Hash(c) == caHash })
	if i < 0 {
		return ErrNotTrusted
	}
	roots := x509.NewCertPool()
	roots.AddCert(chain[i])
	_, err := chain[0].Verify(x509.VerifyOptions{Roots: roots, DNSName: ServerName})
	return err
}

func withPort(server string) string {
	server = strings.TrimSuffix(strings.TrimPrefix(server, "https://"), "/")
	if _, _, err := net.SplitHostPort(server); err == nil {
		return server
	}
	return net.JoinHostPort(strings.Trim(server, "[]"), DefaultPort)
}

// SignOwn gives the machine that holds the CA its credentials without a token.
func (c Credentials) SignOwn(ca *pki.CA, node string, cluster Cluster) error {
	if err := CheckName(node); err != nil {
		return err
	}
	if _, _, err := ca.Keep(c.Dir, "node", NodeIdentity(node)); err != nil {
		return err
	}
	cert, err := os.ReadFile(c.Cert())
	if err != nil {
		return err
	}
	return c.keep(response{Cert: string(cert), CA: string(pki.EncodeCert(ca.Cert)), Cluster: cluster})
}
