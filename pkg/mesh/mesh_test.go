package mesh

import (
	"net/netip"
	"testing"
)

func TestMeshAddrIsTheFirstAfterTheNetwork(t *testing.T) {
	for cidr, want := range map[string]string{
		"10.244.3.0/24":        "10.244.3.1",
		"10.244.3.77/24":       "10.244.3.1",
		"fd00:10:244:3::/64":   "fd00:10:244:3::1",
		"2001:db8:0:ff00::/56": "2001:db8:0:ff00::1",
	} {
		if got := MeshAddr(netip.MustParsePrefix(cidr)).String(); got != want {
			t.Errorf("MeshAddr(%s) = %s, want %s", cidr, got, want)
		}
	}
}

func FuzzParseKey(f *testing.F) {
	f.Add("xTIBA5rboUvnH4htodjb6e697QjLERt1NAB4mZqp8Dg=")
	f.Add("")
	f.Fuzz(func(t *testing.T, s string) {
		k, err := ParseKey(s)
		if err != nil || k.IsZero() {
			return
		}
		again, err := ParseKey(k.String())
		if err != nil || again != k {
			t.Errorf("ParseKey(%q) = %v, then %v, %v", s, k, again, err)
		}
	})
}
