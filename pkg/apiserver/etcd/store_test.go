package etcd_test

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"meshd.dev/pkg/apiserver/etcd"
)

func open(t *testing.T, dir string) *etcd.Store {
	t.Helper()
	s, err := etcd.Open(t.Context(), dir, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Close)
	return s
}

// TestStartOften: each of many starts answers a linearizable read at once,
// over the same data, without a socket. One prototype start in sixteen hung
// for a minute on the stock health probe.
func TestStartOften(t *testing.T) {
	dir := t.TempDir()
	starts := 50
	if testing.Short() {
		starts = 5
	}
	open(t, dir).Close()
	before := runtime.NumGoroutine()
	for i := range starts {
		s := open(t, dir)
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
		if err := s.Probe(ctx); err != nil {
			t.Errorf("start %d: %v", i, err)
		}
		cancel()
		s.Close()
	}
	for range 100 {
		if runtime.NumGoroutine() <= before {
			return
		}
		runtime.Gosched()
		time.Sleep(10 * time.Millisecond)
	}
	b := make([]byte, 1<<20)
	t.Errorf("%d goroutines, %d before:\n%s", runtime.NumGoroutine(), before, b[:runtime.Stack(b, true)])
}

func TestOpenErrors(t *testing.T) {
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	for _, tc := range []struct {
		name, dir string
		ctx       context.Context
		want      string
	}{
		{"a file where the folder should be", file, t.Context(), "open etcd"},
		{"told to end", t.TempDir(), ended, "context canceled"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			s, err := etcd.Open(tc.ctx, tc.dir, slog.New(slog.DiscardHandler))
			if err == nil {
				// A member that is up before it looks at the context is fine.
				s.Close()
				if tc.ctx.Err() == nil {
					t.Fatal("opened")
				}
				return
			}
			if !strings.Contains(err.Error(), tc.want) {
				t.Errorf("got %v, want %s", err, tc.want)
			}
		})
	}
}

// TestSnapshot: the file is whole or not there.
func TestSnapshot(t *testing.T) {
	s := open(t, t.TempDir())
	path := filepath.Join(t.TempDir(), "db")
	if err := s.Snapshot(path); err != nil {
		t.Fatal(err)
	}
	if i, err := os.Stat(path); err != nil || i.Size() == 0 {
		t.Errorf("snapshot %v, %v", i, err)
	}
	if err := s.Snapshot(filepath.Join(path, "below", "file")); err == nil {
		t.Error("a snapshot below a file")
	}
	if left, _ := filepath.Glob(path + "*"); fmt.Sprint(left) != fmt.Sprintf("[%s]", path) {
		t.Errorf("left behind: %v", left)
	}
}
