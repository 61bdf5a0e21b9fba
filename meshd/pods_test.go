package main

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"testing"
	"time"

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

// Pods that come and pods that go are seen, each by itself.
func TestWatchOfTheRecords(t *testing.T) {
	dir := t.TempDir()
	records := filepath.Join(dir, "meshd")
	if err := os.MkdirAll(filepath.Join(records, "freed"), 0o755); err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(t.Context())
	kicks, ended := make(chan bool, 1), make(chan error, 1)
	go func() {
		ended <- watchFolder(ctx, records, func() {
			select {
			case kicks <- true:
			default:
			}
		})
	}()
	record, freed := filepath.Join(records, "10.244.1.2,eth0,web"), filepath.Join(records, "freed", "1,10.244.1.2,eth0,web")
	seen := func(change func() error) {
		t.Helper()
		for { // until the watch is there
			if err := change(); err != nil && !errors.Is(err, os.ErrNotExist) { // done before
				t.Fatal(err)
			}
			select {
			case <-kicks:
				return
			case <-time.After(time.Second):
			}
		}
	}
	seen(func() error { return errors.Join(os.WriteFile(freed, nil, 0o600), os.Rename(freed, record)) })
	for range 3 {
		seen(func() error { return os.Rename(record, freed) })
		seen(func() error { return os.Rename(freed, record) })
	}
	stop()
	if err := <-ended; err != nil {
		t.Error(err)
	}
}
