package pki

import (
	"crypto/x509"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestKeepIsStableAndFollowsTheIdentity(t *testing.T) {
	dir := t.TempDir()
	ca, err := LoadOrCreateCA(dir, "meshd-ca")
	if err != nil {
		t.Fatal(err)
	}
	again, err := LoadOrCreateCA(dir, "meshd-ca")
	if err != nil || Hash(again.Cert) != Hash(ca.Cert) {
		t.Fatalf("the CA changed on the second start: %v", err)
	}
	id := Identity{User: "api", DNSNames: []string{"kubernetes"}, Addresses: []netip.Addr{netip.MustParseAddr("10.96.0.1")}}
	keep := func(id Identity) string {
		cert, key, err := ca.Keep(dir, "server", id)
		if err != nil {
			t.Fatal(err)
		}
		if info, _ := os.Stat(key); info.Mode().Perm() != 0o600 {
			t.Errorf("key has mode %v", info.Mode())
		}
		c, err := LoadCert(cert)
		if err != nil {
			t.Fatal(err)
		}
		pool := x509.NewCertPool()
		pool.AddCert(ca.Cert)
		if _, err := c.Verify(x509.VerifyOptions{Roots: pool, DNSName: "kubernetes"}); err != nil {
			t.Error(err)
		}
		return c.SerialNumber.String()
	}
	first := keep(id)
	if keep(id) != first {
		t.Error("the same identity got a new certificate")
	}
	id.Addresses = append(id.Addresses, netip.MustParseAddr("192.0.2.1"))
	if keep(id) == first {
		t.Error("a new address did not lead to a new certificate")
	}
}

func TestDamagedFilesAreNamed(t *testing.T) {
	for file, want := range map[string]string{"ca.key": "not PEM", "ca.crt": "want PEM"} {
		dir := t.TempDir()
		if _, err := LoadOrCreateCA(dir, "meshd-ca"); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, file), []byte("garbage"), 0o600); err != nil {
			t.Fatal(err)
		}
		_, err := LoadOrCreateCA(dir, "meshd-ca")
		if err == nil || !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), file) {
			t.Errorf("%s damaged: %v", file, err)
		}
	}
}

// A new key for a CA that lost its own would be of no use, and would stand in
// the way of the right one.
func TestACAWithoutItsKeyIsLeftAlone(t *testing.T) {
	dir := t.TempDir()
	if _, err := LoadOrCreateCA(dir, "meshd-ca"); err != nil {
		t.Fatal(err)
	}
	key := filepath.Join(dir, "ca.key")
	if err := os.Remove(key); err != nil {
		t.Fatal(err)
	}
	if _, err := LoadOrCreateCA(dir, "meshd-ca"); err == nil || !strings.Contains(err.Error(), "restore") {
		t.Errorf("error %v, want what to restore", err)
	}
	if _, err := os.Stat(key); err == nil {
		t.Error("a new key was made")
	}
}
