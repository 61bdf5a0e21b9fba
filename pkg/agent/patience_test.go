package agent

import (
	"context"
	"net"
	"path/filepath"
	"testing"

	"google.golang.org/grpc"
	"k8s.io/client-go/tools/record"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"meshd.dev/pkg/agent/plan"
	"meshd.dev/pkg/agent/runtime"
)

// blackHole is a runtime whose registry never answers.
type blackHole struct {
	cri.UnimplementedImageServiceServer
	pulling chan struct{}
}

func (b *blackHole) ImageStatus(context.Context, *cri.ImageStatusRequest) (*cri.ImageStatusResponse, error) {
	return &cri.ImageStatusResponse{}, nil
}

func (b *blackHole) PullImage(ctx context.Context, _ *cri.PullImageRequest) (*cri.PullImageResponse, error) {
	close(b.pulling)
	<-ctx.Done()
	return nil, ctx.Err()
}

// A pod that is to stop does not wait for its image.
func TestPullIsGivenUp(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "cri")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	hole, srv := &blackHole{pulling: make(chan struct{})}, grpc.NewServer()
	cri.RegisterImageServiceServer(srv, hole)
	served := make(chan error)
	go func() { served <- srv.Serve(l) }()
	defer func() { srv.Stop(); <-served }()
	rt, err := runtime.Dial(socket)
	if err != nil {
		t.Fatal(err)
	}
	defer rt.Close()
	a := &Agent{rt: rt, recorder: record.NewFakeRecorder(10)}
	a.cfg.defaults()
	w := newWorker(a, ownedBy(""), false, 1)
	defer w.prober.Close()
	w.mu.Lock()
	w.seen = observed("s")
	w.launch(t.Context(), plan.Op{Verb: plan.StartContainer, Name: "main"})
	w.mu.Unlock()
	<-hole.pulling
	w.giveUp()
	w.ops.Wait()
	if len(w.failures) != 0 || len(w.busy) != 0 {
		t.Errorf("failures %v, under way %v", w.failures, w.busy)
	}
}
