package userspace

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
)

// TestSecond asks for a device again and again: it runs once, again after it
// ended, and for no other name.
func TestSecond(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	var runs atomic.Int64
	var up atomic.Bool
	end := make(chan error)
	s := &second{name: "m0-next", log: slog.New(slog.DiscardHandler), there: up.Load, run: func(ctx context.Context) error {
		if runs.Add(1) == 3 {
			return errors.New("no TUN")
		}
		up.Store(true)
		defer up.Store(false)
		select {
		case <-ctx.Done():
			return nil
		case err := <-end:
			return err
		}
	}}
	path := filepath.Join(t.TempDir(), "ask")
	served := make(chan error, 1)
	go func() { served <- s.serve(ctx, path) }()
	ask := func(name string) string {
		var conn net.Conn
		for err := error(errors.New("")); err != nil; {
			conn, err = net.Dial("unix", path)
		}
		defer conn.Close()
		fmt.Fprintln(conn, name)
		answer, _ := bufio.NewReader(conn).ReadString('\n')
		return strings.TrimSpace(answer)
	}
	ended := func() {
		end <- errors.New("link is gone")
		for len(s.ended) == 0 || up.Load() { // of the server alone otherwise, which waits for us
		}
	}
	for i, c := range []struct {
		name, want string
		runs       int64
		then       func()
	}{
		{"m0", `"m0" is not served here, only m0-next`, 0, nil},
		{strings.Repeat("x", 100), "", 0, nil},
		{"m0-next", "ok", 1, nil},
		{"m0-next", "ok", 1, ended},
		{"m0-next", "ok", 2, ended},
		{"m0-next", "serve m0-next: it ended at once; the log says why", 3, nil},
		{"m0-next", "ok", 4, nil},
	} {
		if got := ask(c.name); got != c.want || runs.Load() != c.runs {
			t.Fatalf("%d: answer %q after %d runs, want %q after %d", i, got, runs.Load(), c.want, c.runs)
		}
		if c.then != nil {
			c.then()
		}
	}
	cancel()
	if err := <-served; err != nil {
		t.Error(err)
	}
}
