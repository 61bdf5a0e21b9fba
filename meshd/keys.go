package main

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"

	clientcmdapi "k8s.io/client-go/tools/clientcmd/api"

	"k8s.io/client-go/tools/clientcmd"

	"meshd.dev/pkg/durable"
	"meshd.dev/pkg/join"
	"meshd.dev/pkg/pki"
)

// serverKeys are the certificate authority and the paths of what it signed.
type serverKeys struct {
	ca                      *pki.CA
	caCert                  string
	servingCert, servingKey string
	agentsCert, agentsKey   string
	serviceAccountKey       string
	encryptionKey           string
	adminCert, adminKey     string
}

func (k serverKeys) roots() *x509.CertPool {
	pool := x509.NewCertPool()
	pool.AddCert(k.ca.Cert)
	return pool
}

// agentTLS dials agents; the certificate is read at each dial, so that a
// renewed one is used.
func (k serverKeys) agentTLS() *tls.Config {
	return &tls.Config{
		RootCAs: k.roots(), MinVersion: tls.VersionTLS13,
		GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
			pair, err := tls.LoadX509KeyPair(k.agentsCert, k.agentsKey)
			return &pair, err
		},
	}
}

// prepareKeys makes what is missing below DATA-DIR/pki, the administrator's
// kubeconfig, and this machine's own credentials as a node.
func prepareKeys(cfg serverConfig) (serverKeys, error) {
	dir := cfg.state("pki")
	k := serverKeys{caCert: cfg.state("pki", "ca.crt"), serviceAccountKey: cfg.state("pki", "service-account.key"), encryptionKey: cfg.state("pki", "encryption.key")}
	if err := keysWithData(cfg, k); err != nil {
		return k, err
	}
	var err error
	if k.ca, err = pki.LoadOrCreateCA(dir, "meshd-ca"); err != nil {
		return k, err
	}
	if _, err = pki.LoadOrCreateKey(k.serviceAccountKey); err != nil {
		return k, err
	}
	if _, err = pki.LoadOrCreateSecret(k.encryptionKey, 32); err != nil {
		return k, err
	}
	if k.servingCert, k.servingKey, err = k.ca.Keep(dir, "apiserver", cfg.servingIdentity()); err != nil {
		return k, err
	}
	if k.agentsCert, k.agentsKey, err = k.ca.Keep(dir, "apiserver-agent-client", pki.Identity{User: "meshd-apiserver", Groups: []string{"system:masters"}}); err != nil {
		return k, err
	}
	if k.adminCert, k.adminKey, err = k.ca.Keep(dir, "admin", pki.Identity{User: "admin", Groups: []string{"system:masters"}}); err != nil {
		return k, err
	}
	if err := writeAdminKubeconfig(cfg, k); err != nil {
		return k, err
	}
	return k, prepareOwnNode(cfg, k)
}

// keysWithData refuses to make anew what the data of a cluster depends on: no
// Secret could be read again, no node would be known.
func keysWithData(cfg serverConfig, k serverKeys) error {
	if _, err := os.Stat(cfg.state("etcd", "member")); err != nil {
		return nil // no data yet
	}
	for _, path := range []string{k.caCert, cfg.state("pki", "ca.key"), k.serviceAccountKey, k.encryptionKey} {
		if _, err := os.Stat(path); errors.Is(err, os.ErrNotExist) {
			return fmt.Errorf("%s is missing, and the cluster in %s cannot be read without it: restore it from a backup, or remove %s to begin a new cluster", path, cfg.state("etcd"), cfg.DataDir)
		}
	}
	return nil
}

// servingIdentity names everything the API is reached by.
func (c serverConfig) servingIdentity() pki.Identity {
	id := pki.Identity{
		User:      "meshd-apiserver",
		DNSNames:  []string{join.ServerName, "kubernetes.default", "kubernetes.default.svc", "kubernetes.default.svc." + c.ClusterDomain, "localhost", c.NodeName},
		Addresses: []netip.Addr{netip.MustParseAddr("127.0.0.1"), netip.IPv6Loopback(), netip.MustParseAddr(c.Advertise)},
	}
	for _, a := range c.addrs {
		if a.String() != c.Advertise {
			id.Addresses = append(id.Addresses, a)
		}
	}
	for _, p := range c.serviceCIDRs {
		id.Addresses = append(id.Addresses, p.Addr().Next())
	}
	for _, san := range c.TLSSANs {
		if a, err := netip.ParseAddr(san); err == nil {
			id.Addresses = append(id.Addresses, a)
		} else {
			id.DNSNames = append(id.DNSNames, san)
		}
	}
	return id
}

// writeAdminKubeconfig writes a file that works on this machine and, being
// whole in itself, wherever it is copied to.
func writeAdminKubeconfig(cfg serverConfig, k serverKeys) error {
	kc := clientcmdapi.NewConfig()
	kc.Clusters["meshd"] = &clientcmdapi.Cluster{
		Server:        "https://" + net.JoinHostPort(cfg.Advertise, cfg.port()),
		TLSServerName: join.ServerName, CertificateAuthority: k.caCert,
	}
	kc.AuthInfos["admin"] = &clientcmdapi.AuthInfo{ClientCertificate: k.adminCert, ClientKey: k.adminKey}
	kc.Contexts["meshd"] = &clientcmdapi.Context{Cluster: "meshd", AuthInfo: "admin"}
	kc.CurrentContext = "meshd"
	if err := clientcmdapi.FlattenConfig(kc); err != nil {
		return fmt.Errorf("admin kubeconfig: %w", err)
	}
	b, err := clientcmd.Write(*kc)
	if err != nil {
		return fmt.Errorf("admin kubeconfig: %w", err)
	}
	_, err = durable.WriteFileIfChanged(cfg.state("admin.kubeconfig"), b, 0o600)
	return err
}

// prepareOwnNode gives the server its credentials as a node without a token:
// it holds the CA.
func prepareOwnNode(cfg serverConfig, k serverKeys) error {
	creds := join.Credentials{Dir: cfg.state("node")}
	cluster := cfg.cluster()
	cluster.Servers = []string{net.JoinHostPort(cfg.localAPI(), cfg.port())}
	return creds.SignOwn(k.ca, cfg.NodeName, cluster)
}

// localAPI is how this machine reaches its own API server.
func (c serverConfig) localAPI() string {
	host, _, _ := net.SplitHostPort(c.Listen)
	if addr, err := netip.ParseAddr(host); err == nil && !addr.IsUnspecified() {
		return host
	}
	return "127.0.0.1"
}
