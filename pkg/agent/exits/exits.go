// Package exits tells of containers' deaths as they happen: from containerd's
// own events, which come before the runtime has cleaned up, or from CRI's
// event stream where the runtime is another one.
package exits

import (
	"context"
	"fmt"
	"log/slog"
	"time"

	"github.com/containerd/containerd/api/events"
	eventsapi "github.com/containerd/containerd/api/services/events/v1"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"meshd.dev/pkg/agent/runtime"
)

// criNamespace is containerd's namespace of everything made through CRI.
const criNamespace = "k8s.io"

// Config of a Watcher.
type Config struct {
	Client *runtime.Client
	// Exit is told of each death. It must not block.
	Exit func(runtime.Exit)
	// Connected is called when events flow (again): some may have been missed
	// before.
	Connected func()
	Log       *slog.Logger
}

// Run watches until ctx ends, subscribing again whenever the runtime went
// away. It returns nil then.
func Run(ctx context.Context, cfg Config) error {
	native := true
	wait := 100 * time.Millisecond
	for ctx.Err() == nil {
		begin := time.Now()
		var err error
		if native {
			err = cfg.containerd(ctx)
		} else {
			err = cfg.cri(ctx)
		}
		if runtime.Unimplemented(err) {
			native = !native
		}
		if time.Since(begin) > 10*time.Second {
			wait = 100 * time.Millisecond
		}
		cfg.Log.Debug("runtime events ended", "again in", wait, "err", err)
		select {
		case <-ctx.Done():
		case <-time.After(wait):
		}
		wait = min(2*wait, 5*time.Second)
	}
	return nil
}

func (c *Config) containerd(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream, err := eventsapi.NewEventsClient(c.Client.Conn()).Subscribe(ctx,
		&eventsapi.SubscribeRequest{Filters: []string{`topic=="/tasks/exit",namespace==` + criNamespace}},
		grpc.WaitForReady(true))
	if err != nil {
		return fmt.Errorf("subscribe to containerd's events: %w", err)
	}
	c.Connected()
	for {
		env, err := stream.Recv()
		if err != nil {
			return fmt.Errorf("receive containerd's events: %w", err)
		}
		var e events.TaskExit
		if env.Event == nil || proto.Unmarshal(env.Event.Value, &e) != nil {
			continue
		}
		if e.ID != "" && e.ID != e.ContainerID {
			continue // a process beside the container's first one
		}
		c.Exit(runtime.Exit{ID: e.ContainerID, ExitCode: int32(e.ExitStatus), At: e.ExitedAt.AsTime()})
	}
}

func (c *Config) cri(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream, err := cri.NewRuntimeServiceClient(c.Client.Conn()).GetContainerEvents(ctx, &cri.GetEventsRequest{}, grpc.WaitForReady(true))
	if err != nil {
		return fmt.Errorf("subscribe to the runtime's events: %w", err)
	}
	c.Connected()
	for {
		e, err := stream.Recv()
		if err != nil {
			return fmt.Errorf("receive the runtime's events: %w", err)
		}
		if e.ContainerEventType != cri.ContainerEventType_CONTAINER_STOPPED_EVENT {
			continue
		}
		c.Exit(stopped(e))
	}
}

func stopped(e *cri.ContainerEventResponse) runtime.Exit {
	for _, s := range e.ContainersStatuses {
		if s.Id == e.ContainerId && s.State == cri.ContainerState_CONTAINER_EXITED {
			return runtime.Exit{ID: s.Id, ExitCode: s.ExitCode, At: time.Unix(0, s.FinishedAt)}
		}
	}
	return runtime.Exit{ID: e.ContainerId}
}
