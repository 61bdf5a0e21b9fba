package userspace

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
)

// TestSecond asks for a device again and again: it runs once, again after it
// ended or while it ends, and for no other name. What a process that was killed
// left is in nobody's way.
func TestSecond(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	var runs atomic.Int64
	var up atomic.Bool
	end, ending := make(chan error), make(chan bool, 1)
	s := &second{name: "m0-next", there: up.Load, run: func(ctx context.Context) error {
		if runs.Add(1) == 4 {
			return errors.New("no TUN")
		}
		up.Store(true)
		defer up.Store(false)
		select {
		case <-ctx.Done():
			return nil
		case err := <-end:
			up.Store(false)
			<-ending
			return err
		}
	}}
	path := filepath.Join(t.TempDir(), "m0.d", "second")
	killed := &second{}
	if err := killed.open(ctx, path); err != nil {
		t.Fatal(err)
	}
	killed.socket.listener.Close() // and its file stays
	if err := s.open(ctx, path); err != nil {
		t.Fatal(err)
	}
	for path, want := range map[string]os.FileMode{path: os.ModeSocket | 0o600, filepath.Dir(path): os.ModeDir | 0o700} {
		if info, err := os.Stat(path); err != nil || info.Mode() != want {
			t.Errorf("%s: %v, %v, want %v", path, info.Mode(), err, want)
		}
	}
	ask := func(name string) string {
		conn, err := net.Dial("unix", path)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		fmt.Fprintln(conn, name)
		answer, _ := bufio.NewReader(conn).ReadString('\n')
		return strings.TrimSpace(answer)
	}
	ends := func() { end <- errors.New("link is gone") } // and whoever asks has to wait
	ended := func() { ends(); ending <- true }
	for i, c := range []struct {
		before func()
		name   string
		after  func()
		want   string
		runs   int64
	}{
		{nil, "m0", nil, `"m0" is not served here, only m0-next`, 0},
		{nil, strings.Repeat("x", 100), nil, "", 0},
		{nil, "m0-next", nil, "ok", 1},
		{nil, "m0-next", nil, "ok", 1},
		{ended, "m0-next", nil, "ok", 2},
		{ends, "m0-next", func() { ending <- true }, "ok", 3},
		{ended, "m0-next", nil, "it ended at once: no TUN", 4},
		{nil, "m0-next", nil, "ok", 5},
	} {
		if c.before != nil {
			c.before()
			for up.Load() { // its link is gone first
			}
		}
		if c.after != nil {
			go c.after()
		}
		if got := ask(c.name); got != c.want || runs.Load() != c.runs {
			t.Fatalf("%d: answer %q after %d runs, want %q after %d", i, got, runs.Load(), c.want, c.runs)
		}
	}
	s.close()
	if _, err := os.Stat(path); !errors.Is(err, os.ErrNotExist) || up.Load() {
		t.Errorf("closed, and yet: socket %v, device %v", err, up.Load())
	}
}
