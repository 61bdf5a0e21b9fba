package apiserver

import (
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"os"
)

// checkServing says early, and in words, what clients would see as a TLS
// error: a serving certificate that the cluster's CA does not vouch for.
func checkServing(cfg Config) error {
	pair, err := tls.LoadX509KeyPair(cfg.ServingCert, cfg.ServingKey)
	if err != nil {
		return fmt.Errorf("read serving certificate %s and key %s: %w", cfg.ServingCert, cfg.ServingKey, err)
	}
	ca, err := os.ReadFile(cfg.CACert)
	if err != nil {
		return fmt.Errorf("read CA certificate: %w", err)
	}
	opts := x509.VerifyOptions{Roots: x509.NewCertPool(), Intermediates: x509.NewCertPool(), KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}}
	if !opts.Roots.AppendCertsFromPEM(ca) {
		return fmt.Errorf("read CA certificate %s: no certificate in it, want PEM", cfg.CACert)
	}
	for _, der := range pair.Certificate[1:] {
		if c, err := x509.ParseCertificate(der); err == nil {
			opts.Intermediates.AddCert(c)
		}
	}
	if _, err := pair.Leaf.Verify(opts); err != nil {
		return fmt.Errorf("check serving certificate %s against CA %s: %w", cfg.ServingCert, cfg.CACert, err)
	}
	return nil
}
