package wireguard_test

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"meshd.dev/pkg/datapath/wireguard"
)

// TestRing: after every step a new process finds the same.
func TestRing(t *testing.T) {
	dir := t.TempDir()
	open := func() *wireguard.Ring {
		t.Helper()
		r, err := wireguard.OpenRing(dir)
		if err != nil {
			t.Fatal(err)
		}
		return r
	}
	r := open()
	if k := r.Keys(); !r.Fresh() || k.Generation != 1 || k.Stage() != wireguard.Steady {
		t.Errorf("the first key: fresh %v, %+v", r.Fresh(), k)
	}
	first := r.Keys().Current
	for _, c := range []struct {
		name       string
		do         func(*wireguard.Ring) error
		want       wireguard.Stage
		generation int
	}{
		{"adopt what is not there", (*wireguard.Ring).Adopt, wireguard.Steady, 1},
		{"begin", (*wireguard.Ring).Begin, wireguard.Leaving, 1},
		{"begin again", (*wireguard.Ring).Begin, wireguard.Leaving, 1},
		{"give up", (*wireguard.Ring).Finish, wireguard.Steady, 1},
		{"begin anew", (*wireguard.Ring).Begin, wireguard.Leaving, 1},
		{"adopt", (*wireguard.Ring).Adopt, wireguard.Returning, 2},
		{"adopt again", (*wireguard.Ring).Adopt, wireguard.Returning, 2},
		{"begin while it returns", (*wireguard.Ring).Begin, wireguard.Returning, 2},
		{"finish", (*wireguard.Ring).Finish, wireguard.Steady, 2},
		{"finish again", (*wireguard.Ring).Finish, wireguard.Steady, 2},
	} {
		before := r.Keys()
		if err := c.do(r); err != nil {
			t.Fatalf("%s: %v", c.name, err)
		}
		k := r.Keys()
		if k.Stage() != c.want || k.Generation != c.generation {
			t.Errorf("%s: %s with key number %d, want %s, %d", c.name, k.Stage(), k.Generation, c.want, c.generation)
		}
		if k.Current != before.Current && k.Current != before.Next {
			t.Errorf("%s: key %s came from nowhere", c.name, k.Current)
		}
		again := open().Keys()
		if again.Current != k.Current || again.Next != k.Next || again.Generation != k.Generation || !again.Since.Equal(k.Since) || !again.Made.Equal(k.Made) {
			t.Errorf("%s: a new process finds %+v, want %+v", c.name, again, k)
		}
		for _, file := range []string{"wireguard.key", "wireguard-next.key"} {
			if info, err := os.Stat(filepath.Join(dir, file)); err == nil && info.Mode() != 0o600 {
				t.Errorf("%s: %s has mode %s", c.name, file, info.Mode())
			}
		}
	}
	if r.Keys().Current == first {
		t.Error("the key never changed")
	}
	// Damage: the next key is given up, what people read is not needed.
	if err := r.Begin(); err != nil {
		t.Fatal(err)
	}
	for file, content := range map[string]string{"wireguard-next.key": "no key", "wireguard-keys.json": "{"} {
		if err := os.WriteFile(filepath.Join(dir, file), []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	damaged := open()
	if k := damaged.Keys(); k.Stage() != wireguard.Steady || k.Current != r.Keys().Current || k.Generation != 1 || !strings.Contains(damaged.SetAside(), "wireguard-next.key.corrupt-") {
		t.Errorf("with damaged files: %+v, set aside %q", k, damaged.SetAside())
	}
}
