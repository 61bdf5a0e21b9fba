package flows

import (
	"context"
	"net"
	"testing"
)

func TestNothingIsCutOnLoopback(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	addr := l.Addr().String()
	l.Close()
	serving, stop := context.WithCancel(t.Context())
	done := make(chan error)
	go func() { done <- Serve(serving, addr) }()
	for {
		if c, err := net.Dial("tcp", addr); err == nil {
			c.Close()
			break
		}
	}
	ctx, enough := context.WithCancel(t.Context())
	r, err := Probe(ctx, addr, 10, enough)
	if err != nil || r.Connections != 10 || r.Broken != 0 {
		t.Errorf("%v, %v", r, err)
	}
	stop()
	if err := <-done; err != nil {
		t.Error(err)
	}
}
