package arch

import (
	"bytes"
	"os/exec"
	"strings"
	"testing"
)

func TestTheTreeKeepsItsArrows(t *testing.T) {
	cmd := exec.Command("go", "list", "-json=ImportPath,Imports", module+"/...")
	var errOut bytes.Buffer
	cmd.Stderr = &errOut
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("go list: %v\n%s", err, errOut.Bytes())
	}
	pkgs, err := parse(bytes.NewReader(out))
	if err != nil {
		t.Fatal(err)
	}
	if len(pkgs) < 20 {
		t.Fatalf("go list knows only %d packages", len(pkgs))
	}
	for _, why := range check(pkgs) {
		t.Error(why)
	}
}

// The rules themselves: each line is an import and a piece of what is said of it.
func TestRules(t *testing.T) {
	for _, c := range []struct{ from, imports, says string }{
		{"pkg/datapath", "meshd.dev/pkg/mesh", ""},
		{"pkg/datapath/route", "meshd.dev/pkg/datapath/wireguard", ""},
		{"pkg/datapath/route", "meshd.dev/pkg/agent", "the arrow pkg/datapath → pkg/agent is new"},
		{"pkg/agent", "meshd.dev/pkg/controller", "the arrow pkg/agent → pkg/controller is new"},
		{"pkg/controller", "meshd.dev/dns/index", "the arrow pkg/controller → dns/index is new"},
		{"dns", "meshd.dev/pkg/datapath", "the arrow dns → pkg/datapath is new"},
		{"pkg/kube", "meshd.dev/meshd", "the arrow pkg/kube → meshd is new"},
		{"pkg/kube", "meshd.dev/test/netlab", "the arrow pkg/kube → test is new"},
		{"pkg/mesh", "github.com/google/go-cmp/cmp", "nothing but the standard library"},
		{"pkg/mesh", "net/netip", ""},
		{"pkg/cni", "k8s.io/api/core/v1", "must stay out of pkg/cni"},
		{"pkg/controller", "k8s.io/kubernetes/pkg/controller/job", "only pkg/apiserver/upstream"},
		{"pkg/controller/upstream", "k8s.io/kubernetes/pkg/controller/job", ""},
		{"pkg/kube", "go.etcd.io/etcd/client/v3", "only state interface"},
		{"newroom", "fmt", "newroom is in no room"},
	} {
		t.Run(c.from+" imports "+c.imports, func(t *testing.T) {
			got := strings.Join(check([]pkg{{ImportPath: module + "/" + c.from, Imports: []string{c.imports}}}), "\n")
			if c.says == "" && got != "" || !strings.Contains(got, c.says) {
				t.Errorf("says %q, want %q", got, c.says)
			}
		})
	}
}

func TestArrowsHaveNoCircle(t *testing.T) {
	state := map[string]int{} // 1 on the way, 2 done
	var visit func(room string, path []string)
	visit = func(room string, path []string) {
		if state[room] == 1 {
			t.Errorf("a circle: %s", strings.Join(append(path, room), " → "))
		}
		if state[room] != 0 {
			return
		}
		state[room] = 1
		for _, to := range arrows[room] {
			if _, ok := arrows[to]; !ok {
				t.Errorf("arrows[%q] names %q, which is no room", room, to)
			}
			visit(to, append(path, room))
		}
		state[room] = 2
	}
	for room := range arrows {
		visit(room, nil)
	}
}
