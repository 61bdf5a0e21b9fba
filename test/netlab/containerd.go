package netlab

import (
	"context"
	"fmt"
	"io"
	"os"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// ContainerdSocket is where containerd answers in a machine.
const ContainerdSocket = "/run/containerd/containerd.sock"

// PauseImage is the sandbox image the machines' containerd is told to use.
const PauseImage = "meshd.local/pause:1"

// containerdConfig is for containerd 1.6 and up (version 2 files). A host
// without CAP_SYS_RESOURCE needs restrict_oom_score_adj; AppArmor profiles
// would be the host's.
const containerdConfig = `version = 2
disabled_plugins = ["io.containerd.snapshotter.v1.aufs", "io.containerd.snapshotter.v1.btrfs", "io.containerd.snapshotter.v1.devmapper", "io.containerd.snapshotter.v1.zfs", "io.containerd.internal.v1.opt", "io.containerd.tracing.processor.v1.otlp"]
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "` + PauseImage + `"
  disable_apparmor = true
  restrict_oom_score_adj = true
  stream_server_address = "127.0.0.1"
  stream_server_port = "0"
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "/opt/cni/bin"
    conf_dir = "/etc/cni/net.d"
  [plugins."io.containerd.grpc.v1.cri".containerd]
    snapshotter = "overlayfs"
    default_runtime_name = "runc"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
      runtime_type = "io.containerd.runc.v2"
      [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
        SystemdCgroup = false
`

// StartContainerd starts the machine's containerd, waits until its CRI answers,
// and returns its process number on the host.
func (m *Machine) StartContainerd(ctx context.Context) (int, error) {
	pid, err := m.Start(ctx, "containerd", "containerd")
	if err != nil {
		return 0, err
	}
	conn, err := m.CRI()
	if err != nil {
		return 0, err
	}
	defer conn.Close()
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	last := error(nil)
	err = until(ctx, func() bool {
		if !Alive(pid) {
			cancel()
			return false
		}
		_, last = cri.NewRuntimeServiceClient(conn).Version(ctx, &cri.VersionRequest{})
		return last == nil
	})
	if err != nil {
		log, _ := os.ReadFile(m.Disk("/var/log/containerd.log"))
		return 0, fmt.Errorf("%s: containerd does not answer: %w (%w)\n%s", m.Name, last, err, tail(log, 2000))
	}
	return pid, nil
}

// CRI connects to the machine's containerd.
func (m *Machine) CRI() (*grpc.ClientConn, error) {
	return grpc.NewClient("unix://"+m.Path(ContainerdSocket), grpc.WithTransportCredentials(insecure.NewCredentials()))
}

// Import loads an image tar into the machine's containerd.
func (m *Machine) Import(ctx context.Context, tar string) error {
	f, err := os.Open(tar)
	if err != nil {
		return err
	}
	defer f.Close()
	return m.importFrom(ctx, f)
}

func (m *Machine) importFrom(ctx context.Context, r io.Reader) error {
	cmd := m.Command(ctx, "ctr", "-n", "k8s.io", "images", "import", "-")
	cmd.Stdin = r
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("%s: import image: %w: %s", m.Name, err, out)
	}
	return nil
}

func tail(b []byte, n int) []byte { return b[max(0, len(b)-n):] }
