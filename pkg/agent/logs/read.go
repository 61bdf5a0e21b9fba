// Package logs reads and rotates containers' logs in the format of CRI: a time,
// a stream, a tag that says whether the line is whole, and the text.
package logs

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/url"
	"os"
	"strconv"
	"time"
)

// Options of a reading, as the API has them.
type Options struct {
	Follow, Timestamps bool
	// Tail is the number of last lines; negative for all.
	Tail  int64
	Since time.Time
	// Limit in bytes; negative for none.
	Limit int64
	// Stream is "stdout", "stderr", or empty for both.
	Stream   string
	Previous bool
}

// ParseOptions reads the query of a request.
func ParseOptions(q url.Values, now time.Time) (Options, error) {
	o := Options{Tail: -1, Limit: -1}
	yes := func(name string) bool { v, err := strconv.ParseBool(q.Get(name)); return err == nil && v }
	o.Follow, o.Timestamps, o.Previous = yes("follow"), yes("timestamps"), yes("previous")
	number := func(name string, to *int64, least int64) error {
		v := q.Get(name)
		if v == "" {
			return nil
		}
		n, err := strconv.ParseInt(v, 10, 64)
		if err != nil || n < least {
			return fmt.Errorf("%s=%q is not a number of %d or more", name, v, least)
		}
		*to = n
		return nil
	}
	var seconds int64
	if err := errors.Join(number("tailLines", &o.Tail, 0), number("limitBytes", &o.Limit, 1), number("sinceSeconds", &seconds, 1)); err != nil {
		return o, err
	}
	if seconds > 0 {
		o.Since = now.Add(-time.Duration(seconds) * time.Second)
	}
	if v := q.Get("sinceTime"); v != "" {
		t, err := time.Parse(time.RFC3339Nano, v)
		if err != nil {
			return o, fmt.Errorf("sinceTime=%q is not a time such as 2026-01-02T15:04:05Z", v)
		}
		o.Since = t
	}
	switch v := q.Get("stream"); v {
	case "", "All":
	case "Stdout":
		o.Stream = "stdout"
	case "Stderr":
		o.Stream = "stderr"
	default:
		return o, fmt.Errorf("stream=%q is none of All, Stdout, Stderr", v)
	}
	return o, nil
}

// Line of a log.
type Line struct {
	Time   []byte // RFC 3339
	Stream string
	// Partial: the line goes on in the next one.
	Partial bool
	Text    []byte // with its line feed, unless partial
}

// ParseLine reads one line of CRI's format, with its line feed.
func ParseLine(b []byte) (Line, error) {
	bad := func() (Line, error) {
		return Line{}, fmt.Errorf("log line %.40q is not in the format of CRI", b)
	}
	at, rest, ok := bytes.Cut(b, []byte(" "))
	if !ok {
		return bad()
	}
	stream, rest, ok := bytes.Cut(rest, []byte(" "))
	if !ok || string(stream) != "stdout" && string(stream) != "stderr" {
		return bad()
	}
	tag, text, ok := bytes.Cut(rest, []byte(" "))
	if !ok {
		return bad()
	}
	tag, _, _ = bytes.Cut(tag, []byte(":"))
	l := Line{Time: at, Stream: string(stream), Text: text}
	switch string(tag) {
	case "F":
	case "P":
		l.Partial = true
		l.Text = bytes.TrimSuffix(text, []byte("\n"))
	default:
		return bad()
	}
	return l, nil
}

const maxLine = 1 << 20 // runtimes cut at 16 KiB

// Read writes the log at path to w. While following, alive says whether the
// container may still write; each write is passed on at once.
func Read(ctx context.Context, path string, o Options, w io.Writer, alive func() bool) error {
	f, err := os.Open(path)
	if err != nil {
		return fmt.Errorf("read log: %w", err)
	}
	defer func() { _ = f.Close() }()
	if o.Tail >= 0 {
		at, err := tailStart(f, o.Tail)
		if err == nil {
			_, err = f.Seek(at, io.SeekStart)
		}
		if err != nil {
			return fmt.Errorf("read log: %w", err)
		}
	}
	r := &reader{o: o, w: w, fresh: true}
	in := bufio.NewReaderSize(f, 64<<10)
	var rest []byte
	wait := 20 * time.Millisecond
	for {
		live := o.Follow && alive()
		n, err := r.copy(in, &rest)
		if err != nil || r.full {
			return err
		}
		if !o.Follow {
			return nil
		}
		if next, ok := reopened(f, path); ok {
			// What was written between our last read and the rotation.
			if _, err := r.copy(in, &rest); err != nil {
				return err
			}
			_ = f.Close()
			f, rest = next, nil
			in.Reset(f)
			continue
		}
		if !live && n == 0 {
			return nil
		}
		if n > 0 {
			wait = 20 * time.Millisecond
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(wait):
		}
		wait = min(wait*3/2, 250*time.Millisecond)
	}
}

// reopened opens the file that took the place of f, if one did.
func reopened(f *os.File, path string) (*os.File, bool) {
	now, err := os.Stat(path)
	if err != nil {
		return nil, false
	}
	was, err := f.Stat()
	if err != nil || os.SameFile(now, was) {
		return nil, false
	}
	next, err := os.Open(path)
	return next, err == nil
}

type reader struct {
	o     Options
	w     io.Writer
	sent  int64
	full  bool
	fresh bool // the next text begins a line
}

// copy passes on what is there and keeps an unfinished line in rest.
func (r *reader) copy(in *bufio.Reader, rest *[]byte) (int, error) {
	n := 0
	for !r.full {
		b, err := in.ReadSlice('\n')
		n += len(b)
		*rest = append(*rest, b...)
		if errors.Is(err, bufio.ErrBufferFull) && len(*rest) < maxLine {
			continue
		}
		if errors.Is(err, io.EOF) {
			return n, nil
		}
		if err != nil && !errors.Is(err, bufio.ErrBufferFull) {
			return n, err
		}
		line, err := ParseLine(*rest)
		if err == nil {
			err = r.pass(line)
			if err != nil {
				return n, err
			}
		}
		*rest = (*rest)[:0]
	}
	return n, nil
}

func (r *reader) pass(l Line) error {
	if r.o.Stream != "" && l.Stream != r.o.Stream {
		return nil
	}
	if !r.o.Since.IsZero() {
		at, err := time.Parse(time.RFC3339Nano, string(l.Time))
		if err == nil && at.Before(r.o.Since) {
			return nil
		}
	}
	out := l.Text
	if r.o.Timestamps && r.fresh {
		out = append(append(bytes.Clone(l.Time), ' '), l.Text...)
	}
	r.fresh = !l.Partial
	if r.o.Limit >= 0 && r.sent+int64(len(out)) >= r.o.Limit {
		out = out[:r.o.Limit-r.sent]
		r.full = true
	}
	n, err := r.w.Write(out)
	r.sent += int64(n)
	return err
}

// tailStart is where the last n lines begin.
func tailStart(f *os.File, n int64) (int64, error) {
	end, err := f.Seek(0, io.SeekEnd)
	if err != nil || n == 0 {
		return end, err
	}
	buf := make([]byte, 64<<10)
	found := int64(0)
	for at := end; at > 0; {
		size := min(int64(len(buf)), at)
		at -= size
		if _, err := f.ReadAt(buf[:size], at); err != nil {
			return 0, err
		}
		for i := size - 1; i >= 0; i-- {
			if buf[i] != '\n' || at+i == end-1 {
				continue
			}
			if found++; found == n {
				return at + i + 1, nil
			}
		}
	}
	return 0, nil
}
