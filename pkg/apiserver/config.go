package apiserver

import (
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"strconv"
)

// Config says where the API listens, where its data lives and whom it trusts.
type Config struct {
	// Listen is host:port of the only port that is opened.
	Listen string
	// AdvertiseAddress is where the others reach this server; it becomes the
	// endpoint of the Service "kubernetes", unless it is a loopback one.
	AdvertiseAddress netip.Addr
	// DataDir holds the embedded etcd (DataDir/etcd). It must exist or be
	// creatable.
	DataDir string
	// EtcdEndpoints name an etcd that runs elsewhere. Empty: embedded.
	EtcdEndpoints []string

	// CACert, ServingCert, ServingKey and ClientCA are PEM files: the CA that
	// signed the serving certificate, that certificate and its key, and the
	// CA whose client certificates are believed.
	CACert, ServingCert, ServingKey, ClientCA string
	// ServiceAccountKey is a PEM file with an ECDSA or RSA private key that
	// signs service-account tokens.
	ServiceAccountKey string
	// EncryptionKey is a file of 32 bytes with which Secrets are encrypted at
	// rest (secretbox).
	EncryptionKey string

	// ServiceCIDRs are the ranges of service addresses, at most one a family;
	// the first is the primary one.
	ServiceCIDRs []netip.Prefix
	// ClusterDomain is the DNS zone of the cluster; default cluster.local.
	ClusterDomain string
	// AgentTLS is used to dial agents; its ServerName is set to the node's
	// name for each call.
	AgentTLS *tls.Config
	// Handlers are extra paths, served before authentication on the same
	// port. The request's TLS peer certificates are visible but unverified.
	Handlers map[string]http.Handler
	// Log may be nil.
	Log *slog.Logger
}

// Defaults fills what has a usual value.
func (c *Config) Defaults() {
	if c.Listen == "" {
		c.Listen = ":6443"
	}
	if c.ClusterDomain == "" {
		c.ClusterDomain = "cluster.local"
	}
	if len(c.ServiceCIDRs) == 0 {
		c.ServiceCIDRs = []netip.Prefix{netip.MustParsePrefix("10.96.0.0/16")}
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
}

// Validate says everything that is wrong with c.
func (c *Config) Validate() error {
	var errs []error
	bad := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }
	if _, port, err := net.SplitHostPort(c.Listen); err != nil {
		bad("listen address %q: want host:port", c.Listen)
	} else if n, err := strconv.ParseUint(port, 10, 16); err != nil || n == 0 {
		bad("listen address %q: want a port from 1 to 65535", c.Listen)
	}
	if !c.AdvertiseAddress.IsValid() || c.AdvertiseAddress.IsUnspecified() {
		bad("advertise address %q: want an address other machines reach", c.AdvertiseAddress)
	}
	if c.DataDir == "" && len(c.EtcdEndpoints) == 0 {
		bad("data dir: want a folder, or etcd endpoints")
	}
	for name, file := range map[string]string{
		"CA certificate": c.CACert, "serving certificate": c.ServingCert, "serving key": c.ServingKey,
		"client CA": c.ClientCA, "service account key": c.ServiceAccountKey, "encryption key": c.EncryptionKey,
	} {
		if file == "" {
			bad("%s: want a file", name)
		}
	}
	if len(c.ServiceCIDRs) > 2 || len(c.ServiceCIDRs) == 2 && c.ServiceCIDRs[0].Addr().Is4() == c.ServiceCIDRs[1].Addr().Is4() {
		bad("service CIDRs %v: want at most one of each family", c.ServiceCIDRs)
	}
	return errors.Join(errs...)
}
