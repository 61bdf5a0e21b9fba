package main

import (
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"meshd.dev/pkg/join"
	"meshd.dev/pkg/pki"
)

func testServer(t *testing.T) serverConfig {
	cfg := serverConfig{nodeConfig: nodeConfig{NodeName: "m1", NodeIPs: []string{"192.0.2.1"}, DataDir: t.TempDir(), RunDir: t.TempDir(), ListenPort: 51820, AgentPort: 10250, Shortcut: "off"},
		Listen: ":6443", PodCIDRs: []string{"10.244.0.0/16"}, ServiceCIDRs: []string{"10.96.0.0/16"}, ClusterDomain: "cluster.local"}
	if err := cfg.complete(); err != nil {
		t.Fatal(err)
	}
	return cfg
}

func TestKeysThatDataDependsOnAreNotMadeAnew(t *testing.T) {
	cfg := testServer(t)
	if _, err := prepareKeys(cfg); err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll(cfg.state("etcd", "member"), 0o700); err != nil {
		t.Fatal(err)
	}
	if _, err := prepareKeys(cfg); err != nil {
		t.Errorf("second start: %v", err)
	}
	for _, name := range []string{"encryption.key", "service-account.key", "ca.key", "ca.crt"} {
		path := cfg.state("pki", name)
		if err := os.Rename(path, path+".away"); err != nil {
			t.Fatal(err)
		}
		if _, err := prepareKeys(cfg); err == nil || !strings.Contains(err.Error(), name+" is missing") {
			t.Errorf("without %s: %v", name, err)
		}
		if _, err := os.Stat(path); err == nil {
			t.Errorf("%s was made anew", name)
		}
		if err := os.Rename(path+".away", path); err != nil {
			t.Fatal(err)
		}
	}
}

func TestATokenOnAMachineThatHasJoined(t *testing.T) {
	cfg := testServer(t)
	if _, err := prepareKeys(cfg); err != nil {
		t.Fatal(err)
	}
	creds := join.Credentials{Dir: cfg.state("node")}
	ca, err := pki.LoadCert(filepath.Join(cfg.DataDir, "pki", "ca.crt"))
	if err != nil {
		t.Fatal(err)
	}
	nobody := "127.0.0.1:1" // refuses at once
	for _, c := range []struct{ name, server, token, want string }{
		{"none", "", "", ""},
		{"a stale one does not keep it from starting", nobody, join.NewToken(pki.Hash(ca)).String(), ""},
		{"mistyped", nobody, "x", "token: want id.secret"},
		{"another cluster's", nobody, join.NewToken(strings.Repeat("0", 64)).String(), "belongs to another cluster"},
	} {
		t.Run(c.name, func(t *testing.T) {
			err := joinAgain(t.Context(), creds, "m1", c.server, c.token, slog.New(slog.DiscardHandler))
			if c.want == "" && err != nil || c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want)) {
				t.Errorf("error %v, want %q", err, c.want)
			}
		})
	}
}
