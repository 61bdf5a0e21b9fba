package wireguard

import (
	"os"
	"strings"
	"testing"
)

func TestPossible(t *testing.T) {
	if InKernel() {
		t.Skip("this kernel has WireGuard")
	}
	was := tunFile
	t.Cleanup(func() { tunFile = was })
	for _, c := range []struct {
		name, tun string
		spawn     []string
		want      string // empty: possible
	}{
		{"with TUN", os.DevNull, []string{"meshd"}, ""},
		{"without TUN", "/nonexistent/tun", []string{"meshd"}, "neither WireGuard nor TUN"},
		{"kernel only", os.DevNull, nil, "this kernel has no WireGuard"},
	} {
		tunFile = c.tun
		d := &Device{opts: Options{Name: "mesh-none", SpawnUserspace: c.spawn}}
		if err := d.Possible(); (err == nil) != (c.want == "") || err != nil && !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v, want %q", c.name, err, c.want)
		}
	}
}
