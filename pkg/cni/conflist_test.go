package cni

import (
	"bytes"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containernetworking/cni/libcni"
	"github.com/google/go-cmp/cmp"
)

func TestConflist(t *testing.T) {
	path := filepath.Join(t.TempDir(), "net.d", "10-meshd.conflist")
	n := Network{PodCIDRs: []netip.Prefix{netip.MustParsePrefix("10.244.1.0/24"), netip.MustParsePrefix("fd00:10:244:1::/64")}, MTU: 1420, ReservedPorts: []string{"51820/udp"}}
	changes := func(want bool) {
		t.Helper()
		if changed, err := WriteConflist(path, n); err != nil || changed != want {
			t.Errorf("changed %v, %v; want %v", changed, err, want)
		}
	}
	changes(true)
	changes(false)
	got, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	want := `{
  "cniVersion": "1.0.0",
  "cniVersions": [
    "0.4.0",
    "1.0.0",
    "1.1.0"
  ],
  "name": "meshd",
  "plugins": [
    {
      "type": "mesh",
      "ranges": [
        "10.244.1.0/24",
        "fd00:10:244:1::/64"
      ],
      "mtu": 1420,
      "dataDir": "/var/lib/meshd/cni",
      "reservedPorts": [
        "51820/udp"
      ],
      "capabilities": {
        "bandwidth": true,
        "io.kubernetes.cri.pod-annotations": true,
        "ips": true,
        "mac": true
      }
    }
  ]
}
`
	if diff := cmp.Diff(want, string(got)); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	if list, err := libcni.NetworkConfFromFile(path); err != nil || list.CNIVersion != "1.1.0" {
		t.Errorf("libcni reads %+v, %v", list, err)
	}
	n.MTU = 1400
	changes(true)
	entries, err := os.ReadDir(filepath.Dir(path))
	if err != nil || len(entries) != 1 {
		t.Errorf("beside the conflist: %v, %v", entries, err)
	}
}

func TestConflistRefusesNonsense(t *testing.T) {
	cidr := []netip.Prefix{netip.MustParsePrefix("fd00::/64")}
	for want, n := range map[string]Network{
		"no pod CIDR":   {},
		"10.0.0.0/8":    {PodCIDRs: []netip.Prefix{netip.MustParsePrefix("10.0.0.1/8")}},
		"want 1280":     {PodCIDRs: cidr, MTU: 1200},
		"absolute path": {PodCIDRs: cidr, DataDir: "x"},
		`port "53"`:     {PodCIDRs: cidr, ReservedPorts: []string{"10250/tcp", "53"}},
		`port "0/udp"`:  {PodCIDRs: cidr, ReservedPorts: []string{"0/udp"}},
		`port "9/UDP"`:  {PodCIDRs: cidr, ReservedPorts: []string{"9/UDP"}},
	} {
		path := filepath.Join(t.TempDir(), "x.conflist")
		if changed, err := WriteConflist(path, n); err == nil || changed || !strings.Contains(err.Error(), want) {
			t.Errorf("got %v, want an error with %q", err, want)
		}
		if _, err := os.Stat(path); err == nil {
			t.Error("wrote it all the same")
		}
	}
}

func TestInstall(t *testing.T) {
	src, dir := filepath.Join(t.TempDir(), "built"), filepath.Join(t.TempDir(), "opt", "cni", "bin")
	write := func(text string) {
		t.Helper()
		if err := os.WriteFile(src, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	install := func(want bool) {
		t.Helper()
		if changed, err := Install(src, dir); err != nil || changed != want {
			t.Errorf("changed %v, %v; want %v", changed, err, want)
		}
	}
	write("one")
	install(true)
	install(false)
	write("two")
	install(true)
	got, err := os.ReadFile(filepath.Join(dir, "mesh"))
	if err != nil || string(got) != "two" {
		t.Errorf("installed %q, %v", got, err)
	}
	if st, err := os.Stat(filepath.Join(dir, "mesh")); err != nil || st.Mode().Perm() != 0o755 {
		t.Errorf("mode %v, %v", st.Mode(), err)
	}
	// A loopback plugin comes beside it, but never in the place of another's.
	if err := os.WriteFile(filepath.Join(dir, "loopback"), []byte("stock"), 0o755); err != nil {
		t.Fatal(err)
	}
	for _, want := range []bool{false, true} {
		if changed, err := InstallLoopback(src, dir); err != nil || changed != want {
			t.Errorf("loopback changed %v, %v; want %v", changed, err, want)
		}
		if err := os.Remove(filepath.Join(dir, "loopback")); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Remove(src); err != nil {
		t.Fatal(err)
	}
	if _, err := Install(src, dir); err == nil {
		t.Error("installed nothing without an error")
	}
}

// What is installed already is recognised by all of its content.
func TestEqualFiles(t *testing.T) {
	long := bytes.Repeat([]byte("0123456789abcdef"), 6<<10) // three times what is compared at once
	changed := bytes.Clone(long)
	changed[len(changed)-1] = 'x'
	for _, c := range []struct {
		name string
		a, b []byte
		want bool
	}{
		{"the same", long, long, true},
		{"the last byte", long, changed, false},
		{"shorter", long, long[:len(long)-1], false},
		{"odd length", long[:70001], long[:70001], true},
		{"empty", nil, nil, true},
	} {
		dir := t.TempDir()
		a, b := filepath.Join(dir, "a"), filepath.Join(dir, "b")
		for path, content := range map[string][]byte{a: c.a, b: c.b} {
			if err := os.WriteFile(path, content, 0o644); err != nil {
				t.Fatal(err)
			}
		}
		if got, err := equalFiles(a, b); err != nil || got != c.want {
			t.Errorf("%s: %t, %v", c.name, got, err)
		}
		if _, err := equalFiles(a, filepath.Join(dir, "none")); err == nil {
			t.Errorf("%s: equal to nothing", c.name)
		}
	}
}
