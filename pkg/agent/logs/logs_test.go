package logs

import (
	"bytes"
	"context"
	"errors"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"
)

const sample = "2026-11-24T12:00:00.000000001Z stdout F one\n" +
	"2026-11-24T12:00:01Z stderr F two\n" +
	"2026-11-24T12:00:02Z stdout P thr\n" +
	"2026-11-24T12:00:02Z stdout F ee\n" +
	"garbage\n" +
	"2026-11-24T12:00:03Z stdout F four\n"

func TestRead(t *testing.T) {
	path := filepath.Join(t.TempDir(), "0.log")
	if err := os.WriteFile(path, []byte(sample), 0o600); err != nil {
		t.Fatal(err)
	}
	noon := time.Date(2026, 11, 24, 12, 0, 4, 0, time.UTC)
	for query, want := range map[string]string{
		"":                               "one\ntwo\nthree\nfour\n",
		"tailLines=1":                    "four\n",
		"tailLines=0":                    "",
		"tailLines=100":                  "one\ntwo\nthree\nfour\n",
		"stream=Stderr":                  "two\n",
		"sinceSeconds=2":                 "three\nfour\n",
		"sinceTime=2026-11-24T12:00:03Z": "four\n",
		"limitBytes=5":                   "one\nt",
		"timestamps=true&tailLines=1":    "2026-11-24T12:00:03Z four\n",
		"timestamps=true&sinceSeconds=2": "2026-11-24T12:00:02Z three\n2026-11-24T12:00:03Z four\n",
	} {
		q, err := url.ParseQuery(query)
		if err != nil {
			t.Fatal(err)
		}
		o, err := ParseOptions(q, noon)
		if err != nil {
			t.Errorf("%s: %v", query, err)
			continue
		}
		var out bytes.Buffer
		if err := Read(t.Context(), path, o, &out, nil); err != nil || out.String() != want {
			t.Errorf("%s: got %q, %v, want %q", query, out.String(), err, want)
		}
	}
}

func TestBadOptions(t *testing.T) {
	for _, query := range []string{"tailLines=-1", "tailLines=x", "limitBytes=0", "sinceTime=yesterday", "stream=loud"} {
		q, _ := url.ParseQuery(query)
		if _, err := ParseOptions(q, time.Now()); err == nil {
			t.Errorf("%s is accepted", query)
		}
	}
}

// safe is a buffer that may be read while it is written.
type safe struct {
	c chan string
}

func (s safe) Write(b []byte) (int, error) { s.c <- string(b); return len(b), nil }

func TestFollowGoesThroughARotation(t *testing.T) {
	path := filepath.Join(t.TempDir(), "0.log")
	write := func(line string) {
		f, err := os.OpenFile(path, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		if _, err := f.WriteString("2026-11-24T12:00:00Z stdout F " + line + "\n"); err != nil {
			t.Fatal(err)
		}
	}
	write("a")
	out, alive := safe{make(chan string, 10)}, atomic.Bool{}
	alive.Store(true)
	done := make(chan error)
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	go func() { done <- Read(ctx, path, Options{Follow: true, Tail: -1, Limit: -1}, out, alive.Load) }()
	expect := func(want string) {
		t.Helper()
		select {
		case got := <-out.c:
			if got != want {
				t.Errorf("got %q, want %q", got, want)
			}
		case <-ctx.Done():
			t.Fatalf("%q did not come", want)
		}
	}
	expect("a\n")
	write("b")
	expect("b\n")
	write("c")
	if err := Rotate(path, 1, 3, func() error { write("d"); return nil }); err != nil {
		t.Fatal(err)
	}
	expect("c\n")
	expect("d\n")
	alive.Store(false)
	if err := <-done; err != nil {
		t.Error(err)
	}
}

func TestRotate(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "0.log")
	fill := func(text string) func() error {
		return func() error { return os.WriteFile(path, []byte(text), 0o600) }
	}
	count := func() int {
		m, _ := filepath.Glob(path + "*")
		return len(m)
	}
	_ = fill("small")()
	if err := Rotate(path, 100, 3, func() error { return errors.New("must not be called") }); err != nil {
		t.Error(err)
	}
	for range 6 {
		_ = fill(strings.Repeat("x", 100))()
		if err := Rotate(path, 100, 3, fill("new")); err != nil {
			t.Fatal(err)
		}
		time.Sleep(2 * time.Millisecond) // the names are times
	}
	if n := count(); n != 3 {
		t.Errorf("there are %d files, want 3", n)
	}
	_ = fill(strings.Repeat("y", 100))()
	if err := Rotate(path, 100, 3, func() error { return errors.New("no") }); err == nil {
		t.Error("the runtime's refusal is not told")
	}
	if b, _ := os.ReadFile(path); len(b) != 100 {
		t.Error("the log was not put back")
	}
}

func FuzzParseLine(f *testing.F) {
	for line := range strings.Lines(sample) {
		f.Add([]byte(line))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		if l, err := ParseLine(b); err == nil && l.Stream != "stdout" && l.Stream != "stderr" {
			t.Errorf("%q gives %+v", b, l)
		}
	})
}
