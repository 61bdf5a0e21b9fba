package cni

import (
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/containernetworking/cni/libcni"
)

// stock builds the plugins of containernetworking/plugins that go behind ours,
// in the version go.mod names, once for all tests that want them.
var stock = sync.OnceValues(func() (dir string, err error) {
	if dir, err = binary(); err != nil {
		return "", err
	}
	args := []string{"build", "-ldflags=-s -w", "-o", dir}
	for _, p := range []string{"portmap", "bandwidth", "tuning"} {
		args = append(args, "github.com/containernetworking/plugins/plugins/meta/"+p)
	}
	if out, err := exec.Command("go", args...).CombinedOutput(); err != nil {
		return "", &os.PathError{Op: "build the stock plugins", Path: string(out), Err: err}
	}
	return dir, nil
})

// First in a chain, with the stock plugins behind, each of which reads our
// result: ADD, CHECK, and DEL, in the versions that have prevResult.
func TestStockPluginsBehind(t *testing.T) {
	l := newLab(t)
	needRoot(t, "nft", "tc")
	if _, err := stock(); err != nil {
		t.Fatal(err)
	}
	for _, version := range []string{"0.3.1", "0.4.0", "1.0.0", "1.1.0"} {
		l.run(version, func(t *testing.T) {
			var ours map[string]any
			if err := json.Unmarshal([]byte(l.stdin(version, map[string]any{"capabilities": map[string]bool{"ips": true, "mac": true}})), &ours); err != nil {
				t.Fatal(err)
			}
			ours["quarantineSeconds"] = 0
			text, err := json.Marshal(map[string]any{"cniVersion": version, "name": "meshd", "plugins": []any{
				ours,
				map[string]any{"type": "portmap", "backend": "nftables", "capabilities": map[string]bool{"portMappings": true}},
				map[string]any{"type": "bandwidth", "capabilities": map[string]bool{"bandwidth": true}},
				map[string]any{"type": "tuning", "sysctl": map[string]string{"net.ipv4.conf.eth0.log_martians": "1"}, "txQLen": 77},
			}})
			if err != nil {
				t.Fatal(err)
			}
			list, err := libcni.NetworkConfFromBytes(text)
			if err != nil {
				t.Fatal(err)
			}
			before := l.list
			l.list = list
			defer func() { l.list = before }()
			r := rt("web-"+version, l.newPod())
			r.CapabilityArgs = map[string]any{
				"portMappings": []any{map[string]any{"hostPort": 8080, "containerPort": 80, "protocol": "tcp"}},
				// The stock plugin shapes the other way with ifb and a
				// classifier that not every kernel has.
				"bandwidth": map[string]any{"ingressRate": 8000000, "ingressBurst": 800000},
			}
			result := l.mustAdd(r)
			if got := addresses(result); !strings.HasPrefix(got, "10.244.1.") || !strings.Contains(got, "fd00:10:244:1::") {
				t.Errorf("addresses %s", got)
			}
			if out := run(t, "nsenter", inPod(r.NetNS, "ip", "link", "show", "dev", "eth0")...); !strings.Contains(out, "qlen 77") {
				t.Errorf("tuning made nothing of it: %s", out)
			}
			if out := run(t, "nft", "list", "ruleset"); !strings.Contains(out, "cni_hostport") {
				t.Errorf("portmap made nothing of it:\n%s", out)
			}
			if out := run(t, "tc", "qdisc", "show", "dev", HostLink(r.ContainerID, "eth0")); !strings.Contains(out, "tbf") {
				t.Errorf("bandwidth made nothing of it: %s", out)
			}
			if version != "0.3.1" { // has no CHECK
				if err := l.check(r); err != nil {
					t.Errorf("CHECK: %v", err)
				}
			}
			l.mustDel(r)
			removePod(r.NetNS)
			l.sweep(nil)
		})
	}
	l.wantClean()
}

// A plugin behind that changes the pod's MAC takes the neighbours away that
// stand for ARP: CHECK says so. The MAC is asked of us.
func TestAMACChangedBehindIsSeen(t *testing.T) {
	l := newLab(t)
	if _, err := stock(); err != nil {
		t.Fatal(err)
	}
	var ours map[string]any
	if err := json.Unmarshal([]byte(l.stdin("1.1.0", nil)), &ours); err != nil {
		t.Fatal(err)
	}
	text, err := json.Marshal(map[string]any{"cniVersion": "1.1.0", "name": "meshd", "plugins": []any{ours,
		map[string]any{"type": "tuning", "mac": "0e:00:00:00:00:33"}}})
	if err != nil {
		t.Fatal(err)
	}
	if l.list, err = libcni.NetworkConfFromBytes(text); err != nil {
		t.Fatal(err)
	}
	r := rt("web", l.newPod())
	l.mustAdd(r)
	wantCode(t, l.check(r), CodeDrift, "neigh 10.244.1.2 dev "+HostLink("web", "eth0")+" lladdr 0e:00:00:00:00:33 permanent (on the host; it is lladdr")
}

// cnitool is what a person has.
func TestCnitool(t *testing.T) {
	l := newLab(t)
	dir, err := binary()
	if err != nil {
		t.Fatal(err)
	}
	tool := filepath.Join(dir, "cnitool")
	if out, err := exec.Command("go", "build", "-o", tool, "github.com/containernetworking/cni/cnitool").CombinedOutput(); err != nil {
		t.Fatalf("build cnitool: %v\n%s", err, out)
	}
	conf := t.TempDir()
	if _, err := WriteConflist(filepath.Join(conf, "10-meshd.conflist"), l.network); err != nil {
		t.Fatal(err)
	}
	pod := l.newPod()
	for _, verb := range []string{"add", "check", "del", "gc", "status"} {
		cmd := exec.Command(tool, verb, "meshd", pod)
		cmd.Env = append(os.Environ(), "CNI_PATH="+dir, "NETCONFPATH="+conf)
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Errorf("cnitool %s: %v\n%s", verb, err, out)
		}
		if verb == "add" && !strings.Contains(string(out), "10.244.1.2/32") {
			t.Errorf("cnitool add: %s", out)
		}
	}
	removePod(pod)
	l.sweep(nil)
	l.wantClean()
}
