// Package arch keeps the arrows of the tree: which room may import which, and
// which modules of others may come in where. Its test is the rule; pkg/README.md
// has the picture. To add an arrow, change the tables here and the picture in
// one commit, and say why.
package arch

import (
	"cmp"
	"encoding/json"
	"fmt"
	"io"
	"slices"
	"strings"
)

const module = "meshd.dev"

// A pkg is what `go list -json` says of a package.
type pkg struct {
	ImportPath string
	Imports    []string // of the package, not of its tests
}

// arrows are the rooms of the tree and the rooms each may import. A room is a
// folder with all below it that is not a room itself; inside a room everybody
// may import everybody. What the datapath, the agent, the controllers and the
// DNS know of each other goes through cluster state, never through an import.
var arrows = map[string][]string{
	"pkg/mesh":      {},
	"pkg/reconcile": {},
	"pkg/status":    {},
	"pkg/durable":   {},
	"pkg/pki":       {"pkg/durable"},
	"pkg/join":      {"pkg/durable", "pkg/pki"},
	"pkg/exchange":  {"pkg/durable", "pkg/mesh", "pkg/pki", "pkg/reconcile", "pkg/status"},
	"pkg/kube":      {"pkg/durable", "pkg/mesh", "pkg/reconcile", "pkg/status"},

	"pkg/datapath":   {"pkg/durable", "pkg/mesh", "pkg/reconcile", "pkg/status"},
	"pkg/cni":        {"pkg/durable", "pkg/mesh"},
	"pkg/apiserver":  {"pkg/durable"},
	"pkg/controller": {"pkg/reconcile", "pkg/status"},
	"pkg/agent":      {"pkg/durable", "pkg/reconcile", "pkg/status"},

	"dns":         {"dns/index"},
	"dns/index":   {"pkg/mesh"},
	"dns/coredns": {"dns", "dns/index", "pkg/mesh", "pkg/reconcile", "pkg/status"},

	"cni-plugin":            {"pkg/cni"},
	"meshd/meshd-wireguard": {"pkg/datapath", "pkg/mesh"},
	"meshd/meshctl":         {"pkg/cni", "pkg/join", "pkg/kube", "pkg/mesh", "pkg/pki", "pkg/status"},
	"meshd": {"dns/coredns", "dns/index", "pkg/agent", "pkg/apiserver", "pkg/cni", "pkg/controller", "pkg/datapath",
		"pkg/durable", "pkg/exchange", "pkg/join", "pkg/kube", "pkg/mesh", "pkg/pki", "pkg/reconcile", "pkg/status"},

	"manifests": {},

	// Tests drive binaries; of the product they know only the documents those print.
	"test": {"pkg/mesh", "pkg/status"},
}

// A fence says where alone packages of a module of others may be imported.
type fence struct {
	prefix string
	only   []string // packages of ours, with all below them
	why    string
}

var fences = []fence{
	{"k8s.io/kubernetes", []string{"pkg/apiserver/upstream", "pkg/apiserver/serviceaccount", "pkg/controller/upstream"},
		"Kubernetes' own tree is not a library: every package of it is one more to keep up with"},
	{"k8s.io/apiserver", []string{"pkg/apiserver"}, "everybody else is a client of the API, over HTTP"},
	{"k8s.io/apiextensions-apiserver", []string{"pkg/apiserver"}, "everybody else is a client of the API, over HTTP"},
	{"go.etcd.io/", []string{"pkg/apiserver"}, "the Kubernetes API is the only state interface above it"},
	{"k8s.io/kubectl", []string{"meshd/meshctl"}, "kubectl is a command, carried by meshctl"},
	{"k8s.io/cri-api", []string{"pkg/agent", "test"}, "only the agent talks to the container runtime"},
	{"github.com/coredns/", []string{"dns"}, "records are ours (dns/index); CoreDNS is how they are served"},
	{"github.com/tailscale/", []string{"pkg/datapath/wireguard"}, "the userspace engine stays behind one door"},
	{"golang.zx2c4.com/", []string{"pkg/datapath/wireguard", "meshd/meshctl"}, "one code path for kernel and userspace devices, behind one door"},
	{"github.com/cilium/", []string{"pkg/datapath/shortcut", "test"}, "one door to programs in the kernel, which may go around the firewall"},
	{"github.com/google/nftables", []string{"pkg/datapath/firewall"}, "one owner of the nft table"},
	{"github.com/containernetworking/", []string{"pkg/cni", "test"}, "only the plugin speaks CNI"},
	{"github.com/spf13/", []string{"meshd"}, "flags end in main"},
}

// A ban says what must not come into a room, whoever needs it: it would make
// the room slow to start, heavy, or know what it must not.
type ban struct {
	room   string
	prefix string
	why    string
}

var bans = []ban{
	{"pkg/cni", "k8s.io/", "ADD makes no API call, and the binary starts hundreds of times"},
	{"cni-plugin", "k8s.io/", "ADD makes no API call, and the binary starts hundreds of times"},
	{"meshd/meshd-wireguard", "k8s.io/", "tunnels stand still while it starts"},
	{"pkg/datapath", "k8s.io/", "it works on mesh.State, wherever that comes from"},
	{"dns/index", "k8s.io/", "it works on mesh.State, wherever that comes from"},
	{"dns", "k8s.io/", "it answers from the index, not from the API"},
	{"pkg/reconcile", "k8s.io/", "the loop is for everybody"},
	{"pkg/status", "k8s.io/", "status is for everybody"},
}

// standardOnly are rooms that import nothing but the standard library.
var standardOnly = []string{"pkg/mesh", "pkg/status", "pkg/durable"}

// check returns a sentence for every import that breaks a rule.
func check(pkgs []pkg) []string {
	var broken []string
	for _, p := range pkgs {
		from, ours := strings.CutPrefix(p.ImportPath, module+"/")
		if !ours || from == "pkg" { // folder pkg itself holds no program
			continue
		}
		room := roomOf(from)
		if room == "" {
			broken = append(broken, fmt.Sprintf("%s is in no room: give it a line in arrows (test/arch/arch.go) and a place in pkg/README.md", from))
			continue
		}
		for _, path := range p.Imports {
			if why := checkImport(room, from, path); why != "" {
				broken = append(broken, why)
			}
		}
	}
	slices.Sort(broken)
	return slices.Compact(broken)
}

func checkImport(room, from, path string) string {
	if to, ours := strings.CutPrefix(path, module+"/"); ours {
		target := roomOf(to)
		if target == room || slices.Contains(arrows[room], target) {
			return ""
		}
		return fmt.Sprintf("%s imports %s: the arrow %s → %s is new. Meet in cluster state or in pkg/mesh instead; if it must be, add %q to arrows[%q] in test/arch/arch.go and draw it in pkg/README.md",
			from, to, room, target, target, room)
	}
	if !strings.Contains(strings.SplitN(path, "/", 2)[0], ".") {
		return "" // the standard library
	}
	if slices.Contains(standardOnly, room) {
		return fmt.Sprintf("%s imports %s: %s is for everybody and takes nothing but the standard library", from, path, room)
	}
	for _, b := range bans {
		if b.room == room && strings.HasPrefix(path, b.prefix) {
			return fmt.Sprintf("%s imports %s, which must stay out of %s: %s", from, path, room, b.why)
		}
	}
	for _, f := range fences {
		if strings.HasPrefix(path, f.prefix) && !slices.ContainsFunc(f.only, func(p string) bool { return within(from, p) }) {
			return fmt.Sprintf("%s imports %s, which only %s may: %s", from, path, strings.Join(f.only, ", "), f.why)
		}
	}
	return ""
}

// roomOf is the innermost room that folder lies in.
func roomOf(folder string) string {
	best := ""
	for room := range arrows {
		if within(folder, room) && len(room) > len(best) {
			best = room
		}
	}
	return best
}

func within(folder, room string) bool {
	return folder == room || strings.HasPrefix(folder, room+"/")
}

// parse reads the concatenated objects of `go list -json`.
func parse(r io.Reader) ([]pkg, error) {
	var pkgs []pkg
	for d := json.NewDecoder(r); ; {
		var p pkg
		if err := d.Decode(&p); err == io.EOF {
			break
		} else if err != nil {
			return nil, fmt.Errorf("read go list: %w", err)
		}
		pkgs = append(pkgs, p)
	}
	slices.SortFunc(pkgs, func(a, b pkg) int { return cmp.Compare(a.ImportPath, b.ImportPath) })
	return pkgs, nil
}
