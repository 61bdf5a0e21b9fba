package main

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"
)

func TestRangesKnownAtBoot(t *testing.T) {
	for _, c := range []struct {
		name  string
		files map[string]string
		want  string
	}{
		{"never joined", nil, "[]"},
		{"joined", map[string]string{"cluster.json": `{"servers":["192.0.2.1:6443"],"podCIDRs":["10.244.0.0/16","fd00:10:244::/48"],"serviceCIDRs":["10.96.0.0/16"]}`},
			"[10.244.0.0/16 fd00:10:244::/48 10.96.0.0/16]"},
		{"a node of another Kubernetes", map[string]string{"state.json": `{"Nodes":[{"Name":"a","PodCIDRs":["10.42.0.0/24"]},{"Name":"b","PodCIDRs":["10.42.1.0/24"]}]}`},
			"[10.42.0.0/24 10.42.1.0/24]"},
	} {
		dir := t.TempDir()
		for name, text := range c.files {
			if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		ranges, err := knownRanges(dir)
		if got := fmt.Sprint(ranges); err != nil || got != c.want {
			t.Errorf("%s: %s, %v; want %s", c.name, got, err, c.want)
		}
	}
}
