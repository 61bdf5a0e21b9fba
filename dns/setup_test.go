package dns

import (
	"strings"
	"testing"

	"github.com/coredns/caddy"

	"meshd.dev/dns/index"
)

func TestSetup(t *testing.T) {
	x, err := index.New(index.Config{Zone: "cluster.local"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(Share(DefaultIndex, x))
	t.Cleanup(Share("other", x))
	for _, c := range []struct {
		corefile string
		zones    string
		ttl      uint32
		noPods   bool
		through  []string
		err      string
	}{
		{corefile: "mesh cluster.local", zones: "cluster.local.", ttl: 5},
		{corefile: "mesh", zones: "cluster.local.", ttl: 5},
		{corefile: "mesh Cluster.Local 10.0.0.0/8", zones: "cluster.local. 10.in-addr.arpa.", ttl: 5},
		{corefile: "mesh cluster.local in-addr.arpa ip6.arpa {\nttl 0\npods disabled\nfallthrough\nindex other\n}",
			zones: "cluster.local. in-addr.arpa. ip6.arpa.", ttl: 0, noPods: true, through: []string{"."}},
		{corefile: "mesh cluster.local {\nfallthrough in-addr.arpa\npods insecure\n}", zones: "cluster.local.", ttl: 5, through: []string{"in-addr.arpa."}},
		{corefile: "mesh cluster.local {\nttl 3601\n}", err: `ttl "3601": want seconds from 0 to 3600`},
		{corefile: "mesh cluster.local {\nttl -1\n}", err: `ttl "-1"`},
		{corefile: "mesh cluster.local {\nttl\n}", err: "ount"},
		{corefile: "mesh cluster.local {\npods verified\n}", err: `pods "verified": want insecure or disabled`},
		{corefile: "mesh cluster.local {\nendpoint http://api\n}", err: `unknown property "endpoint": want ttl, pods, fallthrough or index`},
		{corefile: "mesh cluster.local {\nindex nobody\n}", err: `no index "nobody"`},
		{corefile: "mesh example.org", err: "zone example.org.: the index holds cluster.local."},
		{corefile: "mesh cluster.local\nmesh cluster.local", err: "once"},
	} {
		controller := caddy.NewTestController("dns", c.corefile)
		controller.ServerBlockKeys = []string{"cluster.local"}
		m, err := parse(controller)
		if c.err != "" {
			if err == nil || !strings.Contains(err.Error(), c.err) {
				t.Errorf("%s\nerror %v, want %q", c.corefile, err, c.err)
			}
			continue
		}
		if err != nil {
			t.Errorf("%s\n%v", c.corefile, err)
			continue
		}
		if zones := strings.Join(m.Zones, " "); zones != c.zones || m.TTL != c.ttl || m.NoPods != c.noPods || m.Index != x ||
			strings.Join(m.Fall.Zones, " ") != strings.Join(c.through, " ") {
			t.Errorf("%s\nzones %s, ttl %d, no pods %t, fallthrough %v", c.corefile, zones, m.TTL, m.NoPods, m.Fall.Zones)
		}
	}
}
