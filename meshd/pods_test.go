package main

import (
	"context"
	"log/slog"
	"os"
	"path/filepath"
	"testing"

	"k8s.io/client-go/kubernetes/fake"

	"meshd.dev/pkg/kube"
	"meshd.dev/pkg/status"
)

// A machine may have no watch left to give (fs.inotify.max_user_instances is
// 128 by default). meshd goes on without.
func TestWithoutAWatchOfTheRecords(t *testing.T) {
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "cni"), nil, 0o600); err != nil { // no folder: nothing to watch
		t.Fatal(err)
	}
	n := &node{log: slog.New(slog.DiscardHandler), board: &status.Board{}, window: kube.New(kube.Config{Client: fake.NewClientset()})}
	n.cfg.DataDir = dir
	ctx, stop := context.WithCancel(context.Background())
	stop()
	if err := n.watchPods(ctx); err != nil {
		t.Errorf("%v; want meshd to go on", err)
	}
}
