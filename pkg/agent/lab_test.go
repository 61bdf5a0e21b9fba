package agent

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	goruntime "runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	imgv1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"golang.org/x/sys/unix"
	v1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/kubernetes/scheme"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/remotecommand"

	"meshd.dev/pkg/agent/runtime"
	"meshd.dev/pkg/apiserver"
	"meshd.dev/pkg/pki"
	"meshd.dev/pkg/status"
)

// The machine of these tests is the test process itself, in a network and a
// mount namespace of its own: 10.99.0.1/24 is the node's end of every pod's
// link, pods get 10.99.0.2 and up.
const (
	insideEnv = "MESHD_AGENT_TEST_INSIDE"
	apiEnv    = "MESHD_AGENT_TEST_API"
	busyImage = "lab.local/busy:1"
	nodeName  = "n1"
)

func TestMain(m *testing.M) {
	if os.Getenv(insideEnv) == "" && os.Geteuid() == 0 {
		os.Exit(enter())
	}
	if dir := os.Getenv(apiEnv); dir != "" {
		os.Exit(apiMain(dir))
	}
	os.Exit(m.Run())
}

// enter runs this binary again in namespaces of its own.
func enter() int {
	cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
	cmd.Env = append(os.Environ(), insideEnv+"=1")
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Unshareflags: syscall.CLONE_NEWNET | syscall.CLONE_NEWNS, Pdeathsig: syscall.SIGKILL}
	if err := cmd.Run(); err != nil {
		if cmd.ProcessState != nil {
			return cmd.ProcessState.ExitCode()
		}
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return 0
}

// lab is one machine with containerd and an API server, as one test sees it.
type lab struct {
	t *testing.T
	*machine
}

type machine struct {
	dir    string
	cri    string
	admin  kubernetes.Interface
	node   *rest.Config
	master *rest.Config
	ca     *pki.CA
	rt     *runtime.Client
	board  *status.Board

	ctrd    *exec.Cmd
	stopAPI func()
}

func newLab(t *testing.T) *lab {
	t.Helper()
	if os.Getenv(insideEnv) == "" {
		t.Skip("needs root, for namespaces of its own")
	}
	for _, tool := range []string{"containerd", "runc", "ctr", "ip"} {
		if _, err := exec.LookPath(tool); err != nil {
			t.Skipf("needs %s", tool)
		}
	}
	dir, err := os.MkdirTemp("", "meshd-agent-")
	if err != nil {
		t.Fatal(err)
	}
	l := &lab{t, &machine{dir: dir, board: &status.Board{}, cri: filepath.Join(dir, "c.sock")}}
	t.Cleanup(func() { l.clean() })
	run(t, "ip", "link", "set", "lo", "up")
	l.network()
	l.startAPI()
	l.startContainerd()
	l.images()
	if l.rt, err = runtime.Dial(l.cri); err != nil {
		t.Fatal(err)
	}
	return l
}

func run(t *testing.T, args ...string) string {
	t.Helper()
	out, err := exec.Command(args[0], args[1:]...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s: %v\n%s", strings.Join(args, " "), err, out)
	}
	return string(out)
}

// plugin is a CNI plugin just large enough: a veth pair, a route each way.
const plugin = `#!/bin/sh
set -e
cat >/dev/null
ns=$CNI_NETNS; id=$(echo $CNI_CONTAINERID | cut -c1-11); dir=DIR/ips; mkdir -p $dir
case $CNI_COMMAND in
ADD)
  n=2; while ! mkdir $dir/$n 2>/dev/null; do n=$((n+1)); done
  echo $CNI_CONTAINERID > $dir/$n/id; ip=10.99.0.$n
  ip link add h$id type veth peer name p$id
  ln -sf $ns DIR/ns-$id
  nsenter --net=$ns true
  ip link set p$id netns $(basename $ns) 2>/dev/null || ip link set p$id netns $ns
  nsenter --net=$ns sh -c "ip link set p$id name eth0; ip addr add $ip/32 dev eth0; ip link set eth0 up; ip route add 10.99.0.1 dev eth0; ip route add default via 10.99.0.1"
  ip link set h$id up; ip addr add 10.99.0.1/32 dev h$id 2>/dev/null || true; ip route add $ip/32 dev h$id
  echo '{"cniVersion":"1.0.0","interfaces":[{"name":"eth0","sandbox":"'$ns'"}],"ips":[{"address":"'$ip'/32","interface":0}]}'
  ;;
DEL)
  ip link del h$id 2>/dev/null || true; rm -f DIR/ns-$id
  for d in $dir/*; do if [ "$(cat $d/id 2>/dev/null)" = "$CNI_CONTAINERID" ]; then rm -r $d; fi; done
  ;;
VERSION) echo '{"cniVersion":"1.0.0","supportedVersions":["0.3.1","0.4.0","1.0.0"]}';;
esac
`

const loopback = `#!/bin/sh
cat >/dev/null
case $CNI_COMMAND in
ADD) nsenter --net=$CNI_NETNS ip link set lo up; echo '{"cniVersion":"0.3.1","interfaces":[{"name":"lo","sandbox":"'$CNI_NETNS'"}],"ips":[{"version":"4","address":"127.0.0.1/8","interface":0}]}';;
VERSION) echo '{"cniVersion":"0.3.1","supportedVersions":["0.3.1","0.4.0","1.0.0"]}';;
esac
`

func (l *lab) network() {
	bin, conf := filepath.Join(l.dir, "cni"), filepath.Join(l.dir, "net.d")
	for _, d := range []string{bin, conf} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			l.t.Fatal(err)
		}
	}
	l.write("cni/tiny", strings.ReplaceAll(plugin, "DIR", l.dir), 0o755)
	l.write("cni/loopback", loopback, 0o755)
	l.write("net.d/10-tiny.conflist", `{"cniVersion":"1.0.0","name":"tiny","plugins":[{"type":"tiny"}]}`, 0o644)
}

func (l *lab) write(path, text string, mode os.FileMode) string {
	l.t.Helper()
	full := filepath.Join(l.dir, path)
	if err := os.WriteFile(full, []byte(text), mode); err != nil {
		l.t.Fatal(err)
	}
	return full
}

const containerdConfig = `version = 2
root = "DIR/root"
state = "DIR/state"
disabled_plugins = ["io.containerd.snapshotter.v1.aufs","io.containerd.snapshotter.v1.btrfs","io.containerd.snapshotter.v1.devmapper","io.containerd.snapshotter.v1.zfs","io.containerd.internal.v1.opt","io.containerd.tracing.processor.v1.otlp"]
[grpc]
  address = "DIR/c.sock"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "lab.local/busy:1"
  disable_apparmor = true
  restrict_oom_score_adj = true
  stream_server_address = "127.0.0.1"
  stream_server_port = "0"
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "DIR/cni"
    conf_dir = "DIR/net.d"
  [plugins."io.containerd.grpc.v1.cri".containerd]
    snapshotter = "overlayfs"
    default_runtime_name = "runc"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
      runtime_type = "io.containerd.runc.v2"
      [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
        SystemdCgroup = false
`

func (l *lab) startContainerd() {
	l.t.Helper()
	conf := l.write("containerd.toml", strings.ReplaceAll(containerdConfig, "DIR", l.dir), 0o644)
	log, err := os.OpenFile(filepath.Join(l.dir, "containerd.log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		l.t.Fatal(err)
	}
	defer log.Close()
	l.ctrd = exec.Command("containerd", "-c", conf)
	l.ctrd.Stdout, l.ctrd.Stderr = log, log
	if err := l.ctrd.Start(); err != nil {
		l.t.Fatal(err)
	}
	rt, err := runtime.Dial(l.cri)
	if err != nil {
		l.t.Fatal(err)
	}
	defer rt.Close()
	l.until("containerd answers", func() bool { _, err := rt.Version(context.Background()); return err == nil })
}

func (l *lab) stopContainerd() {
	if l.ctrd != nil {
		_ = l.ctrd.Process.Kill()
		_ = l.ctrd.Wait()
		l.ctrd = nil
	}
}

// clean ends what containerd left running and removes the folder. The mounts
// go with the namespace, but the folder must be free of them now.
func (l *lab) clean() {
	if l.t.Failed() {
		b, _ := os.ReadFile(filepath.Join(l.dir, "containerd.log"))
		l.t.Logf("containerd said:\n%s", b[max(0, len(b)-3000):])
	}
	if l.rt != nil {
		pods, _ := l.rt.List(context.Background())
		var wg sync.WaitGroup
		for _, p := range pods {
			for _, s := range p.Sandboxes {
				wg.Go(func() { _ = l.rt.RemoveSandbox(context.Background(), s.ID) })
			}
		}
		wg.Wait()
		_ = l.rt.Close()
	}
	l.stopContainerd()
	for _, pid := range l.processes(l.dir) {
		_ = syscall.Kill(pid, syscall.SIGKILL)
	}
	for _, pid := range l.inNamespace() {
		_ = syscall.Kill(pid, syscall.SIGKILL)
	}
	l.until("the mounts are gone", func() bool {
		b, _ := os.ReadFile("/proc/self/mountinfo")
		left := 0
		for line := range strings.Lines(string(b)) {
			if f := strings.Fields(line); len(f) > 4 && strings.HasPrefix(f[4], l.dir) {
				_ = unix.Unmount(f[4], unix.MNT_DETACH)
				left++
			}
		}
		return left == 0
	})
	l.until("the folder is removed", func() bool { return os.RemoveAll(l.dir) == nil })
}

// processes whose command line contains word, this one excepted.
func (l *lab) processes(word string) []int {
	var out []int
	entries, _ := os.ReadDir("/proc")
	for _, e := range entries {
		var pid int
		if _, err := fmt.Sscanf(e.Name(), "%d", &pid); err != nil || pid == os.Getpid() {
			continue
		}
		b, _ := os.ReadFile("/proc/" + e.Name() + "/cmdline")
		if bytes.Contains(b, []byte(word)) {
			out = append(out, pid)
		}
	}
	return out
}

// inNamespace are the containers' processes: they were started from the
// overlay below our folder.
func (l *lab) inNamespace() []int {
	var out []int
	entries, _ := os.ReadDir("/proc")
	for _, e := range entries {
		var pid int
		if _, err := fmt.Sscanf(e.Name(), "%d", &pid); err != nil || pid == os.Getpid() {
			continue
		}
		b, _ := os.ReadFile("/proc/" + e.Name() + "/mountinfo")
		if bytes.Contains(b, []byte("upperdir="+l.dir)) && !sameMountNS(pid) {
			out = append(out, pid)
		}
	}
	return out
}

func sameMountNS(pid int) bool {
	a, _ := os.Readlink("/proc/self/ns/mnt")
	b, _ := os.Readlink(fmt.Sprintf("/proc/%d/ns/mnt", pid))
	return a == b
}

func (l *lab) images() {
	l.t.Helper()
	binary := filepath.Join(l.dir, "busy")
	build := exec.Command("go", "build", "-o", binary, "./internal/busy")
	if out, err := build.CombinedOutput(); err != nil {
		l.t.Fatalf("build busy: %v\n%s", err, out)
	}
	tarPath := filepath.Join(l.dir, "busy.tar")
	if err := pack(binary, tarPath); err != nil {
		l.t.Fatal(err)
	}
	run(l.t, "ctr", "-a", l.cri, "-n", "k8s.io", "images", "import", tarPath)
}

func pack(binary, to string) error {
	b, err := os.ReadFile(binary)
	if err != nil {
		return err
	}
	var buf bytes.Buffer
	w := tar.NewWriter(&buf)
	for _, d := range []string{"tmp/", "etc/"} {
		if err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeDir, Name: d, Mode: 0o1777}); err != nil {
			return err
		}
	}
	if err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: "busy", Mode: 0o755, Size: int64(len(b))}); err != nil {
		return err
	}
	if _, err := w.Write(b); err != nil {
		return err
	}
	if err := w.Close(); err != nil {
		return err
	}
	layer, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(buf.Bytes())), nil })
	if err != nil {
		return err
	}
	img, err := mutate.AppendLayers(empty.Image, layer)
	if err != nil {
		return err
	}
	file, err := img.ConfigFile()
	if err != nil {
		return err
	}
	file = file.DeepCopy()
	file.OS, file.Architecture = "linux", goruntime.GOARCH
	// As a sandbox's image it waits.
	file.Config = imgv1.Config{Entrypoint: []string{"/busy"}, Cmd: []string{"wait"}, Env: []string{"PATH=/"}}
	if img, err = mutate.ConfigFile(img, file); err != nil {
		return err
	}
	tag, err := name.NewTag(busyImage)
	if err != nil {
		return err
	}
	return tarball.WriteToFile(to, tag, img)
}

// startAPI starts our own API server.
func (l *lab) startAPI() {
	l.t.Helper()
	dir := filepath.Join(l.dir, "pki")
	ca, err := pki.LoadOrCreateCA(dir, "test")
	if err != nil {
		l.t.Fatal(err)
	}
	l.ca = ca
	keep := func(name string, id pki.Identity) (string, string) {
		cert, key, err := ca.Keep(dir, name, id)
		if err != nil {
			l.t.Fatal(err)
		}
		return cert, key
	}
	loop := []netip.Addr{netip.MustParseAddr("127.0.0.1")}
	keep("server", pki.Identity{User: "server", DNSNames: []string{"localhost"}, Addresses: loop})
	if _, err := pki.LoadOrCreateKey(filepath.Join(dir, "sa.key")); err != nil {
		l.t.Fatal(err)
	}
	if _, err := pki.LoadOrCreateSecret(filepath.Join(dir, "enc.key"), 32); err != nil {
		l.t.Fatal(err)
	}
	keep("agent", pki.Identity{User: "agent", DNSNames: []string{nodeName}, Addresses: loop})
	keep("client", pki.Identity{User: "meshd-apiserver"})
	config := func(name string, id pki.Identity) *rest.Config {
		c, k := keep(name, id)
		return &rest.Config{Host: "https://127.0.0.1:6443", QPS: -1, TLSClientConfig: rest.TLSClientConfig{
			CAFile: filepath.Join(dir, "ca.crt"), CertFile: c, KeyFile: k}}
	}
	l.node = config("node", pki.Identity{User: "system:node:" + nodeName, Groups: []string{"system:nodes"}})
	l.master = config("admin", pki.Identity{User: "admin", Groups: []string{"system:masters"}})
	if l.admin, err = kubernetes.NewForConfig(l.master); err != nil {
		l.t.Fatal(err)
	}
	l.runAPI()
	cert, err := pki.LoadCert(l.node.CertFile)
	if err != nil {
		l.t.Fatal(err)
	}
	identity := map[string]string{"meshd.dev/identity": fmt.Sprintf("%x", sha256.Sum256(cert.RawSubjectPublicKeyInfo))}
	_, err = l.admin.CoreV1().Nodes().Create(context.Background(), &v1.Node{ObjectMeta: metav1.ObjectMeta{Name: nodeName, Annotations: identity}}, metav1.CreateOptions{})
	if err != nil {
		l.t.Fatal(err) // joining does that elsewhere
	}
	_, err = l.admin.CoreV1().ServiceAccounts("default").Create(context.Background(), &v1.ServiceAccount{ObjectMeta: metav1.ObjectMeta{Name: "default"}}, metav1.CreateOptions{})
	if err != nil && !strings.Contains(err.Error(), "already exists") {
		l.t.Fatal(err)
	}
}

// runAPI runs the API server in a process of its own until stopAPI kills it.
func (l *lab) runAPI() {
	l.t.Helper()
	log, err := os.OpenFile(filepath.Join(l.dir, "api.log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		l.t.Fatal(err)
	}
	defer log.Close()
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), apiEnv+"="+l.dir)
	cmd.Stdout, cmd.Stderr = log, log
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		l.t.Fatal(err)
	}
	l.stopAPI = sync.OnceFunc(func() { _ = cmd.Process.Kill(); _ = cmd.Wait() })
	l.t.Cleanup(l.stopAPI)
	l.until("the API server is ready", func() bool {
		_, err := l.admin.CoreV1().Namespaces().Get(context.Background(), "default", metav1.GetOptions{})
		return err == nil
	})
}

// apiMain is that process.
func apiMain(dir string) int {
	keys := filepath.Join(dir, "pki")
	file := func(name string) string { return filepath.Join(keys, name) }
	pair, err := tls.LoadX509KeyPair(file("client.crt"), file("client.key"))
	if err != nil {
		fmt.Println(err)
		return 1
	}
	pool := x509.NewCertPool()
	ca, err := pki.LoadCert(file("ca.crt"))
	if err != nil {
		fmt.Println(err)
		return 1
	}
	pool.AddCert(ca)
	srv, err := apiserver.New(context.Background(), apiserver.Config{
		Listen: "127.0.0.1:6443", AdvertiseAddress: netip.MustParseAddr("10.99.0.1"), DataDir: filepath.Join(dir, "api"),
		CACert: file("ca.crt"), ClientCA: file("ca.crt"), ServingCert: file("server.crt"), ServingKey: file("server.key"),
		ServiceAccountKey: file("sa.key"), EncryptionKey: file("enc.key"),
		AgentTLS: &tls.Config{Certificates: []tls.Certificate{pair}, RootCAs: pool},
	})
	if err == nil {
		err = srv.Run(context.Background())
	}
	fmt.Println(err)
	return 1
}

// startAgent runs an agent until the returned function is called.
func (l *lab) startAgent() (stop func()) {
	l.t.Helper()
	dir := filepath.Join(l.dir, "pki")
	a, err := New(Config{
		NodeName: nodeName, Client: l.node, CRI: l.cri, StateDir: filepath.Join(l.dir, "agent"),
		PodLogDir: filepath.Join(l.dir, "logs"), NodeIPs: []netip.Addr{netip.MustParseAddr("127.0.0.1")},
		Listen: "127.0.0.1:10250", ServingCert: filepath.Join(dir, "agent.crt"), ServingKey: filepath.Join(dir, "agent.key"),
		ClientCA:   filepath.Join(dir, "ca.crt"),
		ClusterDNS: func() []netip.Addr { return []netip.Addr{netip.MustParseAddr("10.99.0.1")} },
		Board:      l.board, Log: slog.New(slog.NewTextHandler(testWriter{l.t}, &slog.HandlerOptions{Level: slog.LevelDebug})),
	})
	if err != nil {
		l.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- a.Run(ctx) }()
	stopped := false
	stop = func() {
		if stopped {
			return
		}
		stopped = true
		cancel()
		if err := <-done; err != nil {
			l.t.Error("agent:", err)
		}
	}
	l.t.Cleanup(stop)
	return stop
}

type testWriter struct{ t *testing.T }

func (w testWriter) Write(b []byte) (int, error) {
	if testing.Verbose() {
		w.t.Log(strings.TrimSpace(string(b)))
	}
	return len(b), nil
}

// ended says whether process pid has: one that process 1 has not buried yet
// still has its number, and nothing else.
func ended(pid int) bool {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	_, state, _ := bytes.Cut(stat, []byte(") "))
	return err != nil || bytes.HasPrefix(state, []byte("Z"))
}

// until waits for what; the limit is only there to end a broken test.
func (l *lab) until(what string, f func() bool) {
	l.t.Helper()
	for end := time.Now().Add(2 * time.Minute); time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
		if f() {
			return
		}
	}
	l.t.Fatalf("waited in vain until %s", what)
}

func pod(name string, cs ...v1.Container) *v1.Pod {
	grace := int64(2)
	return &v1.Pod{
		ObjectMeta: metav1.ObjectMeta{Name: name, Namespace: "default"},
		Spec: v1.PodSpec{NodeName: nodeName, Containers: cs, TerminationGracePeriodSeconds: &grace,
			AutomountServiceAccountToken: new(bool)},
	}
}

func container(name string, args ...string) v1.Container {
	return v1.Container{Name: name, Image: busyImage, Args: args, ImagePullPolicy: v1.PullIfNotPresent}
}

func (l *lab) create(p *v1.Pod) *v1.Pod {
	l.t.Helper()
	p, err := l.admin.CoreV1().Pods(p.Namespace).Create(context.Background(), p, metav1.CreateOptions{})
	if err != nil {
		l.t.Fatal(err)
	}
	return p
}

// get is the pod as the API has it; one without a name when it has none.
func (l *lab) get(name string) *v1.Pod {
	p, err := l.admin.CoreV1().Pods("default").Get(context.Background(), name, metav1.GetOptions{})
	if err != nil {
		return &v1.Pod{}
	}
	return p
}

func (l *lab) phase(name string, want v1.PodPhase) *v1.Pod {
	l.t.Helper()
	var p *v1.Pod
	l.until(name+" is "+string(want), func() bool { p = l.get(name); return p.Status.Phase == want })
	return p
}

func (l *lab) status(name, container string) v1.ContainerStatus {
	p := l.get(name)
	for _, s := range append(p.Status.InitContainerStatuses, p.Status.ContainerStatuses...) {
		if s.Name == container {
			return s
		}
	}
	return v1.ContainerStatus{}
}

// pid of a container's first process.
func (l *lab) pid(name, container string) int {
	l.t.Helper()
	return l.pidOf(l.get(name).UID, container)
}

func (l *lab) pidOf(uid types.UID, container string) int {
	l.t.Helper()
	pods, err := l.rt.List(context.Background())
	if err != nil || pods[uid] == nil || pods[uid].Latest(container) == nil {
		l.t.Fatalf("the runtime has no container %s of pod %s: %v", container, uid, err)
	}
	id := pods[uid].Latest(container).ID
	out := run(l.t, "ctr", "-a", l.cri, "-n", "k8s.io", "tasks", "ls")
	for line := range strings.Lines(out) {
		if f := strings.Fields(line); len(f) > 1 && f[0] == id {
			var pid int
			if _, err := fmt.Sscanf(f[1], "%d", &pid); err == nil && pid > 0 {
				return pid
			}
		}
	}
	l.t.Fatalf("container %s of %s has no process:\n%s", container, uid, out)
	return 0
}

// in is the lab for a test of its own.
func (l *lab) in(t *testing.T) *lab { return &lab{t, l.machine} }

func (l *lab) nodeReady() bool {
	n, err := l.admin.CoreV1().Nodes().Get(context.Background(), nodeName, metav1.GetOptions{})
	if err != nil {
		return false
	}
	for _, c := range n.Status.Conditions {
		if c.Type == v1.NodeReady {
			return c.Status == v1.ConditionTrue
		}
	}
	return false
}

func (l *lab) ready(name string) bool {
	for _, c := range l.get(name).Status.Conditions {
		if c.Type == v1.PodReady {
			return c.Status == v1.ConditionTrue
		}
	}
	return false
}

// events are the reasons of a pod's events.
func (l *lab) events(name string) []string {
	list, err := l.admin.CoreV1().Events("default").List(context.Background(), metav1.ListOptions{})
	if err != nil {
		return nil
	}
	var out []string
	for _, e := range list.Items {
		if e.InvolvedObject.Name == name {
			out = append(out, e.Reason)
		}
	}
	return out
}

// sandboxOf is the ID of a pod's newest sandbox.
func (l *lab) sandboxOf(name string) string {
	pods, err := l.rt.List(context.Background())
	if p := pods[l.get(name).UID]; err == nil && p != nil && len(p.Sandboxes) > 0 {
		return p.Sandboxes[0].ID
	}
	return ""
}

// fetch is the body at url, or the error's text.
func (l *lab) fetch(url string) string {
	resp, err := (&http.Client{Timeout: 5 * time.Second}).Get(url)
	if err != nil {
		return err.Error()
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		return err.Error()
	}
	return string(b)
}

// exec runs a command in a container through the API server and our door, and
// returns what it wrote.
func (l *lab) exec(p *v1.Pod, container string, cmd ...string) string {
	l.t.Helper()
	client, err := kubernetes.NewForConfig(l.master)
	if err != nil {
		l.t.Fatal(err)
	}
	req := client.CoreV1().RESTClient().Post().Resource("pods").Namespace(p.Namespace).Name(p.Name).SubResource("exec").
		VersionedParams(&v1.PodExecOptions{Container: container, Command: cmd, Stdout: true, Stderr: true}, scheme.ParameterCodec)
	e, err := remotecommand.NewWebSocketExecutor(l.master, "GET", req.URL().String())
	if err != nil {
		l.t.Fatal(err)
	}
	var out, errs bytes.Buffer
	if err := e.StreamWithContext(context.Background(), remotecommand.StreamOptions{Stdout: &out, Stderr: &errs}); err != nil {
		l.t.Fatalf("exec %v in %s: %v: %s", cmd, p.Name, err, errs.String())
	}
	return out.String()
}
