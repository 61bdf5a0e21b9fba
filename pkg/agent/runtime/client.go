// Package runtime is the container runtime as the agent needs it: the calls of
// CRI v1 with a time limit each, and what the runtime has of a pod as one
// value.
package runtime

import (
	"context"
	"fmt"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"meshd.dev/pkg/agent/plan"
)

const (
	quick   = 10 * time.Second // looking
	usual   = 2 * time.Minute  // making and removing
	pulling = 30 * time.Minute

	maxMessage = 16 << 20
)

// Client calls the runtime on one socket.
type Client struct {
	conn *grpc.ClientConn
	rt   cri.RuntimeServiceClient
	img  cri.ImageServiceClient

	mu    sync.Mutex
	ended map[string]plan.Container // exited containers never change
	exits map[string]Exit           // deaths CRI does not show yet
}

// Exit is the death of a container's first process.
type Exit struct {
	ID       string
	ExitCode int32
	At       time.Time
}

// Dial makes a Client of the runtime on the unix socket at path. It does not
// wait for the runtime; calls fail until it is there.
func Dial(path string) (*Client, error) {
	conn, err := grpc.NewClient("unix://"+path,
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxMessage)),
		grpc.WithConnectParams(grpc.ConnectParams{Backoff: reconnect, MinConnectTimeout: 2 * time.Second}))
	if err != nil {
		return nil, fmt.Errorf("dial runtime %s: %w", path, err)
	}
	return &Client{
		conn: conn, rt: cri.NewRuntimeServiceClient(conn), img: cri.NewImageServiceClient(conn),
		ended: map[string]plan.Container{}, exits: map[string]Exit{},
	}, nil
}

// Conn is the connection, for the services CRI does not cover.
func (c *Client) Conn() *grpc.ClientConn { return c.conn }

// Close ends the connection.
func (c *Client) Close() error { return c.conn.Close() }

// call runs f within limit and says what was tried when it fails.
func call[T any](ctx context.Context, limit time.Duration, what string, f func(context.Context) (T, error)) (T, error) {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	v, err := f(ctx)
	if err != nil {
		return v, fmt.Errorf("%s: %w", what, err)
	}
	return v, nil
}

// NotFound reports whether err says that the thing is not there.
func NotFound(err error) bool { return status.Code(err) == codes.NotFound }

// Unimplemented reports whether the runtime does not know the call.
func Unimplemented(err error) bool { return status.Code(err) == codes.Unimplemented }

// Version is the runtime's name and version, as in containerd://1.6.20.
func (c *Client) Version(ctx context.Context) (string, error) {
	r, err := call(ctx, quick, "ask the runtime's version", func(ctx context.Context) (*cri.VersionResponse, error) {
		return c.rt.Version(ctx, &cri.VersionRequest{})
	})
	if err != nil {
		return "", err
	}
	return r.RuntimeName + "://" + r.RuntimeVersion, nil
}

// Conditions are the runtime's own: RuntimeReady and NetworkReady.
func (c *Client) Conditions(ctx context.Context) ([]*cri.RuntimeCondition, error) {
	r, err := call(ctx, quick, "ask the runtime's status", func(ctx context.Context) (*cri.StatusResponse, error) {
		return c.rt.Status(ctx, &cri.StatusRequest{})
	})
	if err != nil {
		return nil, err
	}
	return r.Status.GetConditions(), nil
}

// RunSandbox makes and starts a sandbox and returns its ID.
func (c *Client) RunSandbox(ctx context.Context, cfg *cri.PodSandboxConfig) (string, error) {
	r, err := call(ctx, 4*time.Minute, "run sandbox", func(ctx context.Context) (*cri.RunPodSandboxResponse, error) {
		return c.rt.RunPodSandbox(ctx, &cri.RunPodSandboxRequest{Config: cfg})
	})
	if err != nil {
		return "", err
	}
	return r.PodSandboxId, nil
}

// StopSandbox ends a sandbox and gives back its network. One that is not there
// is stopped.
func (c *Client) StopSandbox(ctx context.Context, id string) error {
	_, err := call(ctx, usual, "stop sandbox "+id, func(ctx context.Context) (*cri.StopPodSandboxResponse, error) {
		return c.rt.StopPodSandbox(ctx, &cri.StopPodSandboxRequest{PodSandboxId: id})
	})
	return ignoreNotFound(err)
}

// RemoveSandbox removes a sandbox and its containers.
func (c *Client) RemoveSandbox(ctx context.Context, id string) error {
	_, err := call(ctx, usual, "remove sandbox "+id, func(ctx context.Context) (*cri.RemovePodSandboxResponse, error) {
		return c.rt.RemovePodSandbox(ctx, &cri.RemovePodSandboxRequest{PodSandboxId: id})
	})
	return ignoreNotFound(err)
}

// Create makes a container in a sandbox and returns its ID.
func (c *Client) Create(ctx context.Context, sandbox string, cfg *cri.ContainerConfig, sandboxCfg *cri.PodSandboxConfig) (string, error) {
	r, err := call(ctx, usual, "create container "+cfg.Metadata.Name, func(ctx context.Context) (*cri.CreateContainerResponse, error) {
		return c.rt.CreateContainer(ctx, &cri.CreateContainerRequest{PodSandboxId: sandbox, Config: cfg, SandboxConfig: sandboxCfg})
	})
	if err != nil {
		return "", err
	}
	return r.ContainerId, nil
}

// Start starts a created container.
func (c *Client) Start(ctx context.Context, id string) error {
	_, err := call(ctx, usual, "start container "+id, func(ctx context.Context) (*cri.StartContainerResponse, error) {
		return c.rt.StartContainer(ctx, &cri.StartContainerRequest{ContainerId: id})
	})
	return err
}

// Stop sends the stop signal and, after grace, the one that cannot be caught.
func (c *Client) Stop(ctx context.Context, id string, grace time.Duration) error {
	seconds := int64((grace + time.Second - 1) / time.Second)
	_, err := call(ctx, grace+usual, "stop container "+id, func(ctx context.Context) (*cri.StopContainerResponse, error) {
		return c.rt.StopContainer(ctx, &cri.StopContainerRequest{ContainerId: id, Timeout: seconds})
	})
	return ignoreNotFound(err)
}

// Remove removes a container that does not run.
func (c *Client) Remove(ctx context.Context, id string) error {
	_, err := call(ctx, usual, "remove container "+id, func(ctx context.Context) (*cri.RemoveContainerResponse, error) {
		return c.rt.RemoveContainer(ctx, &cri.RemoveContainerRequest{ContainerId: id})
	})
	return ignoreNotFound(err)
}

// ExecSync runs cmd in a container and returns its output and exit code.
func (c *Client) ExecSync(ctx context.Context, id string, cmd []string, limit time.Duration) ([]byte, int32, error) {
	r, err := call(ctx, limit+time.Second, "exec in container "+id, func(ctx context.Context) (*cri.ExecSyncResponse, error) {
		return c.rt.ExecSync(ctx, &cri.ExecSyncRequest{ContainerId: id, Cmd: cmd, Timeout: int64((limit + time.Second - 1) / time.Second)})
	})
	if err != nil {
		return nil, 0, err
	}
	return append(r.Stdout, r.Stderr...), r.ExitCode, nil
}

// Exec, Attach and PortForward return the URL on which the runtime streams.
func (c *Client) Exec(ctx context.Context, req *cri.ExecRequest) (string, error) {
	r, err := call(ctx, quick, "exec in container "+req.ContainerId, func(ctx context.Context) (*cri.ExecResponse, error) {
		return c.rt.Exec(ctx, req)
	})
	return r.GetUrl(), err
}

// Attach is described at Exec.
func (c *Client) Attach(ctx context.Context, req *cri.AttachRequest) (string, error) {
	r, err := call(ctx, quick, "attach to container "+req.ContainerId, func(ctx context.Context) (*cri.AttachResponse, error) {
		return c.rt.Attach(ctx, req)
	})
	return r.GetUrl(), err
}

// PortForward is described at Exec.
func (c *Client) PortForward(ctx context.Context, req *cri.PortForwardRequest) (string, error) {
	r, err := call(ctx, quick, "forward ports of sandbox "+req.PodSandboxId, func(ctx context.Context) (*cri.PortForwardResponse, error) {
		return c.rt.PortForward(ctx, req)
	})
	return r.GetUrl(), err
}

// WritableBytes is what each container wrote into its own layer, by ID.
func (c *Client) WritableBytes(ctx context.Context) (map[string]int64, error) {
	r, err := call(ctx, quick, "ask what containers use", func(ctx context.Context) (*cri.ListContainerStatsResponse, error) {
		return c.rt.ListContainerStats(ctx, &cri.ListContainerStatsRequest{})
	})
	if err != nil {
		return nil, err
	}
	out := map[string]int64{}
	for _, s := range r.Stats {
		out[s.GetAttributes().GetId()] = int64(s.GetWritableLayer().GetUsedBytes().GetValue())
	}
	return out, nil
}

// ReopenLog makes the runtime open a container's log file anew.
func (c *Client) ReopenLog(ctx context.Context, id string) error {
	_, err := call(ctx, quick, "reopen log of container "+id, func(ctx context.Context) (*cri.ReopenContainerLogResponse, error) {
		return c.rt.ReopenContainerLog(ctx, &cri.ReopenContainerLogRequest{ContainerId: id})
	})
	return err
}

func ignoreNotFound(err error) error {
	if NotFound(err) {
		return nil
	}
	return err
}
