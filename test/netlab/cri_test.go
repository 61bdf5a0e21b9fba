package netlab

// Pods of this test: 10.99.0.0/24.

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"testing"
	"time"

	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"meshd.dev/test/images"
)

const bridgeConflist = `{"cniVersion": "1.0.0", "name": "test", "plugins": [{"type": "bridge", "bridge": "cni0", "isGateway": true,
 "ipam": {"type": "host-local", "ranges": [[{"subnet": "10.99.0.0/24"}]]}}]}`

// A pod made through the container runtime interface, with stock CNI plugins,
// answers to its machine: containerd, runc, cgroups and network work in there.
func TestPodsRunThroughCRI(t *testing.T) {
	need(t, "containerd", "runc", "ctr", "go")
	if _, err := os.Stat("/usr/lib/cni/bridge"); err != nil {
		t.Skip("needs the stock CNI plugins (containernetworking-plugins)")
	}
	_, ms := newLab(t, 1)
	m, ctx := ms[0], t.Context()
	tars, err := images.Build(ctx, t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	if err := m.WriteFile("/etc/cni/net.d/10-test.conflist", []byte(bridgeConflist), 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := m.Run(ctx, "cp", "/usr/lib/cni/bridge", "/usr/lib/cni/host-local", "/usr/lib/cni/loopback", "/opt/cni/bin/"); err != nil {
		t.Fatal(err)
	}
	if _, err := m.StartContainerd(ctx); err != nil {
		t.Fatal(err)
	}
	for _, tar := range tars {
		if err := m.Import(ctx, tar); err != nil {
			t.Fatal(err)
		}
	}
	ip, err := runEcho(ctx, m)
	if err != nil {
		t.Fatal(err)
	}
	web := http.Client{Transport: &http.Transport{DialContext: m.DialContext, DisableKeepAlives: true}}
	var body string
	deadline, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	err = until(deadline, func() bool {
		var resp *http.Response
		if resp, err = web.Get("http://" + net.JoinHostPort(ip, "8080") + "/env?name=GREETING"); err != nil {
			return false
		}
		defer resp.Body.Close()
		b, _ := io.ReadAll(resp.Body)
		body = string(b)
		return true
	})
	if err != nil || body != "hello" {
		t.Errorf("the pod says %q, %v", body, err)
	}
}

// runEcho starts a pod with one echo container and returns its address.
func runEcho(ctx context.Context, m *Machine) (string, error) {
	conn, err := m.CRI()
	if err != nil {
		return "", err
	}
	defer conn.Close()
	runtime := cri.NewRuntimeServiceClient(conn)
	pod := &cri.PodSandboxConfig{
		Metadata: &cri.PodSandboxMetadata{Name: "echo", Namespace: "default", Uid: "1"},
		Hostname: "echo", LogDirectory: "/var/log/pods/echo",
		Linux: &cri.LinuxPodSandboxConfig{CgroupParent: "/kubepods/echo"},
	}
	sandbox, err := runtime.RunPodSandbox(ctx, &cri.RunPodSandboxRequest{Config: pod})
	if err != nil {
		return "", fmt.Errorf("run sandbox: %w", err)
	}
	c, err := runtime.CreateContainer(ctx, &cri.CreateContainerRequest{PodSandboxId: sandbox.PodSandboxId, SandboxConfig: pod,
		Config: &cri.ContainerConfig{
			Metadata: &cri.ContainerMetadata{Name: "echo"}, Image: &cri.ImageSpec{Image: images.Echo}, LogPath: "echo.log",
			Envs:  []*cri.KeyValue{{Key: "GREETING", Value: []byte("hello")}},
			Linux: &cri.LinuxContainerConfig{Resources: &cri.LinuxContainerResources{CpuShares: 100, MemoryLimitInBytes: 64 << 20}},
		}})
	if err != nil {
		return "", fmt.Errorf("create container: %w", err)
	}
	if _, err := runtime.StartContainer(ctx, &cri.StartContainerRequest{ContainerId: c.ContainerId}); err != nil {
		return "", fmt.Errorf("start container: %w", err)
	}
	status, err := runtime.PodSandboxStatus(ctx, &cri.PodSandboxStatusRequest{PodSandboxId: sandbox.PodSandboxId})
	if err != nil {
		return "", err
	}
	return status.Status.Network.Ip, nil
}
