package exchange

import (
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"math/big"
	"time"

	"meshd.dev/pkg/mesh"
	"meshd.dev/pkg/pki"
)

// Identity is the TLS key of this node.
type Identity struct {
	cert tls.Certificate
	Pin  mesh.Pin
}

// LoadIdentity reads the key at path, mode 0600, and makes one when there is
// none. The certificate around it is made anew each time: only the key counts.
func LoadIdentity(path string) (Identity, error) {
	key, err := pki.LoadOrCreateKey(path)
	if err != nil {
		return Identity{}, fmt.Errorf("key exchange: %w", err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "meshd key exchange"},
		NotBefore: time.Unix(0, 0), NotAfter: time.Date(9999, 12, 31, 23, 59, 59, 0, time.UTC), // RFC 5280: no end
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		return Identity{}, fmt.Errorf("key exchange: make certificate: %w", err)
	}
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		return Identity{}, fmt.Errorf("key exchange: make certificate: %w", err)
	}
	return Identity{cert: tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key, Leaf: leaf}, Pin: pinOf(leaf)}, nil
}

func pinOf(c *x509.Certificate) mesh.Pin { return sha256.Sum256(c.RawSubjectPublicKeyInfo) }

// config is what both ends share. accept looks at the pin of the other.
func (id Identity) config(accept func(mesh.Pin) error) *tls.Config {
	return &tls.Config{
		Certificates: []tls.Certificate{id.cert},
		MinVersion:   tls.VersionTLS13,
		// Nothing but a hybrid with ML-KEM: what is recorded stays closed.
		CurvePreferences:       []tls.CurveID{tls.X25519MLKEM768},
		ClientAuth:             tls.RequireAnyClientCert,
		InsecureSkipVerify:     true, // pins take the place of authorities, in VerifyConnection
		SessionTicketsDisabled: true,
		VerifyConnection: func(s tls.ConnectionState) error {
			if len(s.PeerCertificates) == 0 {
				return errors.New("the peer showed no certificate")
			}
			if s.CurveID != tls.X25519MLKEM768 {
				return fmt.Errorf("key agreement is %v, want X25519MLKEM768", s.CurveID)
			}
			return accept(pinOf(s.PeerCertificates[0]))
		},
	}
}
