// Package pki makes and keeps the keys and certificates of a cluster: one CA
// that lives on the servers, and leaf certificates signed by it for the API
// server, for people, and for nodes.
//
// A certificate's subject is who its holder is to the API server: the common
// name is the user, the organizations are the groups (Kubernetes x509 client
// certificates). Keys are ECDSA P-256 and never leave the machine they were
// made on; nodes send certificate requests.
package pki

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"time"

	"meshd.dev/pkg/durable"
)

const (
	caLife   = 10 * 365 * 24 * time.Hour
	leafLife = 365 * 24 * time.Hour
	// clockSkew is how far a machine's clock may be behind the server's.
	clockSkew = time.Hour
)

// CA signs certificates.
type CA struct {
	Cert *x509.Certificate
	key  crypto.Signer
}

// Identity says who a certificate is for and where it may be used.
type Identity struct {
	// User becomes the common name, Groups the organizations.
	User   string
	Groups []string
	// DNSNames and Addresses make it a serving certificate as well.
	DNSNames  []string
	Addresses []netip.Addr
}

// LoadOrCreateCA reads ca.crt and ca.key in dir, or makes them when neither
// exists. A certificate without its key is an error: guessing would make a
// second CA. A key alone is what a first start that was cut short leaves.
func LoadOrCreateCA(dir, name string) (*CA, error) {
	certPath, keyPath := filepath.Join(dir, "ca.crt"), filepath.Join(dir, "ca.key")
	cert, err := LoadCert(certPath)
	if _, lost := os.Stat(keyPath); err == nil && errors.Is(lost, os.ErrNotExist) {
		return nil, fmt.Errorf("cluster CA: %s is missing; restore it from the backup that %s is of", keyPath, certPath)
	}
	key, keyErr := LoadOrCreateKey(keyPath)
	if keyErr != nil {
		return nil, keyErr
	}
	if errors.Is(err, os.ErrNotExist) {
		cert, err = selfSign(name, key)
		if err == nil {
			err = durable.WriteFile(certPath, EncodeCert(cert), 0o644)
		}
	}
	if err != nil {
		return nil, fmt.Errorf("cluster CA: %w", err)
	}
	if !key.PublicKey.Equal(cert.PublicKey) {
		return nil, fmt.Errorf("cluster CA: %s is not the key of %s; restore both from the same backup", keyPath, certPath)
	}
	return &CA{Cert: cert, key: key}, nil
}

func selfSign(name string, key *ecdsa.PrivateKey) (*x509.Certificate, error) {
	tmpl, err := template(Identity{User: name}, caLife)
	if err != nil {
		return nil, err
	}
	tmpl.IsCA = true
	tmpl.BasicConstraintsValid = true
	tmpl.KeyUsage = x509.KeyUsageCertSign | x509.KeyUsageDigitalSignature
	tmpl.ExtKeyUsage = nil
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, key.Public(), key)
	if err != nil {
		return nil, err
	}
	return x509.ParseCertificate(der)
}

func template(id Identity, life time.Duration) (*x509.Certificate, error) {
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 127))
	if err != nil {
		return nil, err
	}
	now := time.Now()
	tmpl := &x509.Certificate{
		SerialNumber: serial,
		Subject:      pkix.Name{CommonName: id.User, Organization: id.Groups},
		NotBefore:    now.Add(-clockSkew),
		NotAfter:     now.Add(life),
		KeyUsage:     x509.KeyUsageDigitalSignature,
		ExtKeyUsage:  []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
		DNSNames:     id.DNSNames,
	}
	for _, a := range id.Addresses {
		tmpl.IPAddresses = append(tmpl.IPAddresses, a.AsSlice())
	}
	if len(id.DNSNames)+len(id.Addresses) > 0 {
		tmpl.ExtKeyUsage = append(tmpl.ExtKeyUsage, x509.ExtKeyUsageServerAuth)
	}
	return tmpl, nil
}

// Sign issues a certificate for id to the holder of pub, valid for a year.
func (ca *CA) Sign(id Identity, pub crypto.PublicKey) (*x509.Certificate, error) {
	tmpl, err := template(id, leafLife)
	if err != nil {
		return nil, fmt.Errorf("sign certificate of %s: %w", id.User, err)
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, ca.Cert, pub, ca.key)
	if err != nil {
		return nil, fmt.Errorf("sign certificate of %s: %w", id.User, err)
	}
	return x509.ParseCertificate(der)
}

// Keep makes sure dir/name.crt and dir/name.key are a certificate of this CA
// for id that is not past half of its life, and makes a new one otherwise. The
// CA's own certificate follows in the same file, so that a joining node can
// compare it with the hash in its token. It returns the two paths.
func (ca *CA) Keep(dir, name string, id Identity) (certPath, keyPath string, err error) {
	certPath, keyPath = filepath.Join(dir, name+".crt"), filepath.Join(dir, name+".key")
	key, err := LoadOrCreateKey(keyPath)
	if err != nil {
		return "", "", err
	}
	if cert, err := LoadCert(certPath); err == nil && ca.fits(cert, key, id) {
		return certPath, keyPath, nil
	}
	cert, err := ca.Sign(id, key.Public())
	if err != nil {
		return "", "", err
	}
	return certPath, keyPath, durable.WriteFile(certPath, append(EncodeCert(cert), EncodeCert(ca.Cert)...), 0o644)
}

func (ca *CA) fits(cert *x509.Certificate, key *ecdsa.PrivateKey, id Identity) bool {
	want, err := template(id, leafLife)
	if err != nil {
		return false
	}
	addrs := func(c *x509.Certificate) (s []string) {
		for _, ip := range c.IPAddresses {
			s = append(s, ip.String())
		}
		return s
	}
	return key.PublicKey.Equal(cert.PublicKey) &&
		cert.CheckSignatureFrom(ca.Cert) == nil &&
		!HalfSpent(cert) &&
		cert.Subject.String() == want.Subject.String() &&
		slices.Equal(cert.DNSNames, want.DNSNames) &&
		slices.Equal(addrs(cert), addrs(want))
}

// HalfSpent reports whether a certificate is past half of its life, the time
// to renew it.
func HalfSpent(cert *x509.Certificate) bool {
	return time.Now().After(cert.NotBefore.Add(cert.NotAfter.Sub(cert.NotBefore) / 2))
}

// Hash names a CA: the SHA-256 of its public key (SubjectPublicKeyInfo), in
// hex, as kubeadm's --discovery-token-ca-cert-hash has it.
func Hash(ca *x509.Certificate) string {
	sum := sha256.Sum256(ca.RawSubjectPublicKeyInfo)
	return hex.EncodeToString(sum[:])
}

// LoadOrCreateKey reads an ECDSA P-256 private key (PEM, SEC 1), or makes it.
func LoadOrCreateKey(path string) (*ecdsa.PrivateKey, error) {
	b, err := os.ReadFile(path)
	if errors.Is(err, os.ErrNotExist) {
		return createKey(path)
	}
	if err != nil {
		return nil, fmt.Errorf("private key: %w", err)
	}
	block, _ := pem.Decode(b)
	if block == nil {
		return nil, fmt.Errorf("private key %s: not PEM; restore it from a backup, or remove it to have a new identity", path)
	}
	key, err := x509.ParseECPrivateKey(block.Bytes)
	if err != nil {
		return nil, fmt.Errorf("private key %s: %w", path, err)
	}
	return key, nil
}

func createKey(path string) (*ecdsa.PrivateKey, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("private key: %w", err)
	}
	der, err := x509.MarshalECPrivateKey(key)
	if err != nil {
		return nil, fmt.Errorf("private key: %w", err)
	}
	return key, durable.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: der}), 0o600)
}

// LoadOrCreateSecret reads a file of n random bytes, or makes it.
func LoadOrCreateSecret(path string, n int) ([]byte, error) {
	b, err := os.ReadFile(path)
	if errors.Is(err, os.ErrNotExist) {
		b = make([]byte, n)
		_, _ = rand.Read(b)
		return b, durable.WriteFile(path, b, 0o600)
	}
	if err != nil {
		return nil, fmt.Errorf("secret: %w", err)
	}
	if len(b) != n {
		return nil, fmt.Errorf("secret %s: want %d bytes, have %d; restore it from a backup", path, n, len(b))
	}
	return b, nil
}

// LoadCert reads the first certificate of a PEM file.
func LoadCert(path string) (*x509.Certificate, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	cert, err := ParseCert(b)
	if err != nil {
		return nil, fmt.Errorf("certificate %s: %w", path, err)
	}
	return cert, nil
}

// ParseCert reads the first certificate in PEM.
func ParseCert(b []byte) (*x509.Certificate, error) {
	block, _ := pem.Decode(b)
	if block == nil || block.Type != "CERTIFICATE" {
		return nil, errors.New("want PEM of type CERTIFICATE")
	}
	return x509.ParseCertificate(block.Bytes)
}

// EncodeCert is the PEM form.
func EncodeCert(cert *x509.Certificate) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert.Raw})
}
