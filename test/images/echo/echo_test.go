package main

import (
	"context"
	"encoding/binary"
	"io"
	"net"
	"net/http/httptest"
	"strings"
	"testing"
	"time"
)

func TestTransferReachesTheFarEndWhole(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	go receiveTransfers(l)
	ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	tr := &transfer{block: fill("marker ")}
	if err := tr.run(ctx, l.Addr().String(), 1<<20); err != nil {
		t.Fatal(err)
	}
	if p := tr.progress(); p.Acked == 0 || p.Acked != p.Sent {
		t.Errorf("progress %+v", p)
	}
}

func TestReceiveRefusesWhatIsNotTheStream(t *testing.T) {
	block := func(n uint64, text string) string {
		b := fill(text)
		binary.BigEndian.PutUint64(b, n)
		return string(b)
	}
	for _, c := range []struct{ name, stream, want string }{
		{"in order", block(0, "a") + block(1, "a"), ""},
		{"a block missing", block(0, "a") + block(2, "a"), "block 2 came where 1 was due"},
		{"a block twice", block(0, "a") + block(0, "a"), "block 0 came where 1 was due"},
		{"another text", block(0, "a") + block(1, "b"), "block 1 does not hold what was sent"},
		{"cut in a block", block(0, "a")[:100], "unexpected EOF"},
	} {
		t.Run(c.name, func(t *testing.T) {
			got := ""
			if err := receive(struct {
				io.Reader
				io.Writer
			}{strings.NewReader(c.stream), io.Discard}); err != nil {
				got = err.Error()
			}
			if got != c.want {
				t.Errorf("got %q, want %q", got, c.want)
			}
		})
	}
}

func TestProbesSayWhatTheyAreTold(t *testing.T) {
	s := &server{}
	web := httptest.NewServer(s.routes())
	defer web.Close()
	get := func(path string) int { return fetch(t.Context(), web.URL+path, time.Second).Status }
	for _, c := range []struct {
		set           string
		ready, health int
	}{
		{"", 200, 200}, {"ready=false", 503, 200}, {"healthy=false", 503, 503}, {"ready=true&healthy=true", 200, 200},
	} {
		resp, err := web.Client().Post(web.URL+"/set?"+c.set, "", nil)
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		if r, h := get("/readyz"), get("/healthz"); r != c.ready || h != c.health {
			t.Errorf("after %q: ready %d, healthy %d, want %d, %d", c.set, r, h, c.ready, c.health)
		}
	}
}
