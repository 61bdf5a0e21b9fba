package cni

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containernetworking/cni/libcni"
	"github.com/containernetworking/cni/pkg/types"
	types100 "github.com/containernetworking/cni/pkg/types/100"
	"golang.org/x/sys/unix"

	"meshd.dev/pkg/datapath/firewall"
	"meshd.dev/pkg/mesh"
)

// The plan of every test here: the node's pod CIDRs are 10.244.1.0/24 and
// fd00:10:244:1::/64, so that the first pod has 10.244.1.2 and
// fd00:10:244:1::2 (.0 is the network, .1 the node).

// binary builds the plugin once for all tests that want it.
var binary = sync.OnceValues(func() (dir string, err error) {
	if dir, err = os.MkdirTemp("", "cni-plugin-test-"); err != nil {
		return "", err
	}
	builtIn = dir
	out, err := exec.Command("go", "build", "-ldflags=-s -w", "-o", filepath.Join(dir, PluginType), "meshd.dev/cni-plugin").CombinedOutput()
	if err != nil {
		return dir, fmt.Errorf("build the plugin: %w\n%s", err, out)
	}
	return dir, nil
})

var builtIn string

func TestMain(m *testing.M) {
	code := m.Run()
	if builtIn != "" {
		os.RemoveAll(builtIn)
	}
	os.Exit(code)
}

// lab is a host in a network namespace of its own, with the compiled plugin
// driven as container runtimes drive it.
type lab struct {
	t       *testing.T
	binDir  string
	dataDir string
	cni     *libcni.CNIConfig
	list    *libcni.NetworkConfigList
	host    *os.File // its namespace
	network Network
	// firewall is meshd's part.
	firewall *firewall.Table
}

// applyFirewall is one round of the daemon.
func (l *lab) applyFirewall() {
	l.t.Helper()
	l.mustBeHost()
	own := mesh.Node{PodCIDRs: l.network.PodCIDRs}
	_, err := l.firewall.Apply(l.t.Context(), firewall.Config{
		Device: mesh.Device, PodLinks: mesh.PodLinkPrefix, PodCIDRs: own.PodCIDRs, MeshAddrs: own.MeshAddrs(), Cluster: own.PodCIDRs})
	if err != nil {
		l.t.Fatal(err)
	}
}

// elements are all there are of pods in the firewall.
func (l *lab) elements() []mesh.SetElement {
	l.t.Helper()
	l.mustBeHost()
	all, err := podElements(mesh.FirewallTable)
	if err != nil {
		l.t.Fatal(err)
	}
	return all
}

// newLab makes the test's own goroutine live in the host's namespace.
func newLab(t *testing.T, edit ...func(*Network)) *lab {
	t.Helper()
	needRoot(t, "ip", "nsenter")
	binDir, err := binary()
	if err != nil {
		t.Fatal(err)
	}
	enterNewHost(t)
	l := &lab{t: t, binDir: binDir, dataDir: filepath.Join(t.TempDir(), "cni")}
	if l.host, err = os.Open("/proc/thread-self/ns/net"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.host.Close() })
	run(t, "ip", "link", "set", "lo", "up")
	for _, key := range []string{"net/ipv4/ip_forward", "net/ipv6/conf/all/forwarding"} {
		if err := os.WriteFile("/proc/sys/"+key, []byte("1"), 0); err != nil {
			t.Fatal(err)
		}
	}
	l.network = Network{
		PodCIDRs: []netip.Prefix{netip.MustParsePrefix("10.244.1.0/24"), netip.MustParsePrefix("fd00:10:244:1::/64")},
		MTU:      1420, DataDir: l.dataDir,
	}
	l.network.Table = mesh.FirewallTable
	for _, f := range edit {
		f(&l.network)
	}
	l.firewall = firewall.New(nil, func() ([]mesh.LocalPod, error) { return Attached(l.dataDir) })
	l.applyFirewall()
	path := filepath.Join(t.TempDir(), "10-meshd.conflist")
	if _, err := WriteConflist(path, l.network); err != nil {
		t.Fatal(err)
	}
	if l.list, err = libcni.NetworkConfFromFile(path); err != nil {
		t.Fatal(err)
	}
	l.cni = libcni.NewCNIConfigWithCacheDir([]string{binDir}, t.TempDir(), nil)
	return l
}

func needRoot(t *testing.T, tools ...string) {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("needs root")
	}
	for _, tool := range tools {
		if _, err := exec.LookPath(tool); err != nil {
			t.Skipf("needs %s", tool)
		}
	}
}

func enterNewHost(t *testing.T) {
	t.Helper()
	runtime.LockOSThread()
	home, err := os.Open("/proc/thread-self/ns/net")
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Setns(int(home.Fd()), unix.CLONE_NEWNET); err != nil {
			t.Error(err) // the thread stays locked and ends with the test
			return
		}
		home.Close()
		runtime.UnlockOSThread()
	})
}

// newPod makes a network namespace and gives its path.
func (l *lab) newPod() string {
	l.t.Helper()
	path := filepath.Join(l.t.TempDir(), "ns")
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		l.t.Fatal(err)
	}
	made := make(chan error)
	go func() {
		runtime.LockOSThread() // and never unlock: the thread ends here
		err := unix.Unshare(unix.CLONE_NEWNET)
		if err == nil {
			err = unix.Mount("/proc/thread-self/ns/net", path, "", unix.MS_BIND, "")
		}
		made <- err
	}()
	if err := <-made; err != nil {
		l.t.Fatal(err)
	}
	l.t.Cleanup(func() { removePod(path) })
	return path
}

func removePod(path string) {
	_ = unix.Unmount(path, unix.MNT_DETACH)
	_ = os.Remove(path)
}

func run(t *testing.T, name string, args ...string) string {
	t.Helper()
	out, err := exec.Command(name, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
	return string(out)
}

// lines runs a command and gives its lines without needless spaces, sorted.
func lines(t *testing.T, name string, args ...string) []string {
	t.Helper()
	var out []string
	for line := range strings.Lines(run(t, name, args...)) {
		if line = strings.Join(strings.Fields(line), " "); line != "" {
			out = append(out, line)
		}
	}
	slices.Sort(out)
	return out
}

func inPod(netns string, args ...string) []string {
	return append([]string{"--net=" + netns}, args...)
}

func rt(id, netns string) *libcni.RuntimeConf {
	return &libcni.RuntimeConf{
		ContainerID: id, NetNS: netns, IfName: "eth0",
		Args: [][2]string{{"IgnoreUnknown", "1"}, {"K8S_POD_NAMESPACE", "default"}, {"K8S_POD_NAME", id}, {"K8S_POD_UID", "uid-" + id}},
	}
}

func (l *lab) add(r *libcni.RuntimeConf) (*types100.Result, error) {
	l.mustBeHost()
	ctx, stop := bounded()
	defer stop()
	result, err := l.cni.AddNetworkList(ctx, l.list, r)
	if err != nil {
		return nil, err
	}
	return types100.NewResultFromResult(result)
}

func (l *lab) mustAdd(r *libcni.RuntimeConf) *types100.Result {
	l.t.Helper()
	result, err := l.add(r)
	if err != nil {
		l.t.Fatalf("ADD: %v", err)
	}
	return result
}

func (l *lab) del(r *libcni.RuntimeConf) error {
	l.mustBeHost()
	ctx, stop := bounded()
	defer stop()
	return l.cni.DelNetworkList(ctx, l.list, r)
}

func (l *lab) mustDel(r *libcni.RuntimeConf) {
	l.t.Helper()
	if err := l.del(r); err != nil {
		l.t.Fatalf("DEL: %v", err)
	}
}

func (l *lab) check(r *libcni.RuntimeConf) error {
	l.mustBeHost()
	ctx, stop := bounded()
	defer stop()
	return l.cni.CheckNetworkList(ctx, l.list, r)
}

// bounded ends a plugin that would never end, a minute after any that does.
func bounded() (context.Context, context.CancelFunc) {
	return context.WithTimeout(context.Background(), time.Minute)
}

func addresses(r *types100.Result) string {
	var out []string
	for _, ip := range r.IPs {
		out = append(out, ip.Address.String())
	}
	return strings.Join(out, " ")
}

// links are the host's ends of pods.
func (l *lab) links() []string {
	var out []string
	for _, line := range lines(l.t, "ip", "-br", "link") {
		if name, _, _ := strings.Cut(line, "@"); strings.HasPrefix(name, "msh") {
			out = append(out, name)
		}
	}
	return out
}

// records are the names of the records, without the freed ones.
func (l *lab) records() []string {
	entries, err := os.ReadDir(filepath.Join(l.dataDir, "meshd"))
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		l.t.Fatal(err)
	}
	var out []string
	for _, e := range entries {
		if name := e.Name(); name != lockFile && name != bootFile && name != freedDir {
			out = append(out, name)
		}
	}
	return out
}

// wantClean fails if anything is left of any pod.
func (l *lab) wantClean() {
	l.t.Helper()
	if got := append(l.links(), l.records()...); len(got) != 0 {
		l.t.Errorf("left behind: %v", got)
	}
	if got := lines(l.t, "ip", "route", "show", "proto", "78"); len(got) != 0 {
		l.t.Errorf("routes left behind: %v", got)
	}
	if got := l.elements(); len(got) != 0 {
		l.t.Errorf("left in the firewall: %q", got)
	}
}

func wantCode(t *testing.T, err error, code uint, word string) {
	t.Helper()
	var e *types.Error
	if !errors.As(err, &e) {
		t.Fatalf("got %v, want error code %d", err, code)
	}
	if e.Code != code || !strings.Contains(e.Error(), word) {
		t.Errorf("got code %d %q, want code %d with %q", e.Code, e.Error(), code, word)
	}
}

// raw runs the plugin without libcni and gives what it printed.
func (l *lab) raw(env []string, stdin string) (stdout string, code int) {
	l.t.Helper()
	l.mustBeHost()
	ctx, stop := bounded()
	defer stop()
	cmd := exec.CommandContext(ctx, filepath.Join(l.binDir, PluginType))
	cmd.Env = append([]string{"CNI_PATH=" + l.binDir}, env...)
	cmd.Stdin = strings.NewReader(stdin)
	out, err := cmd.Output()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		l.t.Fatal(err)
	}
	return string(out), cmd.ProcessState.ExitCode()
}

// stdin is the configuration of the plugin for one specification version.
func (l *lab) stdin(version string, more map[string]any) string {
	c := map[string]any{
		"cniVersion": version, "name": "meshd", "type": PluginType, "mtu": l.network.MTU, "dataDir": l.dataDir, "ranges": l.network.PodCIDRs,
		"table": l.network.Table, "hostLocalDir": filepath.Join(l.dataDir, "no-host-local"),
	}
	for k, v := range more {
		c[k] = v
	}
	text, err := json.Marshal(c)
	if err != nil {
		l.t.Fatal(err)
	}
	return string(text)
}

func verbEnv(verb, id, netns string) []string {
	return []string{"CNI_COMMAND=" + verb, "CNI_CONTAINERID=" + id, "CNI_NETNS=" + netns, "CNI_IFNAME=eth0",
		"CNI_ARGS=IgnoreUnknown=1;K8S_POD_NAMESPACE=default;K8S_POD_NAME=" + id}
}

// run is t.Run with the subtest's goroutine in the host's namespace: without
// it, a subtest would work on the machine it runs on.
func (l *lab) run(name string, f func(t *testing.T)) {
	l.t.Run(name, func(t *testing.T) {
		runtime.LockOSThread() // the thread ends with the subtest
		if err := unix.Setns(int(l.host.Fd()), unix.CLONE_NEWNET); err != nil {
			t.Fatal(err)
		}
		f(t)
	})
}

// mustBeHost keeps a test from working on the machine it runs on.
func (l *lab) mustBeHost() {
	l.t.Helper()
	f, err := os.Open("/proc/thread-self/ns/net")
	if err != nil {
		l.t.Fatal(err)
	}
	defer f.Close()
	here, err := f.Stat()
	if err != nil {
		l.t.Fatal(err)
	}
	if want, err := l.host.Stat(); err != nil || !os.SameFile(here, want) {
		panic("not in the lab's host namespace: use l.run or l.inHost")
	}
}

// verb runs one verb without libcni: an error comes back as *types.Error.
func (l *lab) verb(verb, id, netns string, more map[string]any) (stdout string, err error) {
	l.t.Helper()
	return l.verbEnv(verbEnv(verb, id, netns), l.stdin("1.1.0", more))
}

func (l *lab) verbEnv(env []string, stdin string) (string, error) {
	l.t.Helper()
	out, code := l.raw(env, stdin)
	if code == 0 {
		return out, nil
	}
	e := &types.Error{}
	if err := json.Unmarshal([]byte(out), e); err != nil {
		l.t.Fatalf("exit code %d and no error in JSON but %q: %v", code, out, err)
	}
	return out, e
}
