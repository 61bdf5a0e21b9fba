package story

import "testing"

func TestTunnelsUp(t *testing.T) {
	for _, c := range []struct {
		name, doc, backend string
		up                 int
		fails              bool
	}{
		{"two up", `{"tunnels":[{"peer":"m2","backend":"userspace","up":true},{"peer":"m3","backend":"userspace","up":true}]}`, "userspace", 2, false},
		{"one down", `{"daemon":{"tunnels":[{"backend":"kernel","up":true},{"backend":"kernel","up":false}]}}`, "kernel", 1, false},
		{"none", `{"checks":[{"up":true}]}`, "", 0, false},
		{"no JSON", `healthy`, "", 0, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			up, backend, err := tunnelsUp([]byte(c.doc))
			if up != c.up || backend != c.backend || (err != nil) != c.fails {
				t.Errorf("got %d %q %v", up, backend, err)
			}
		})
	}
}
