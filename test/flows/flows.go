// Package flows keeps many TCP connections and a thousand UDP questions a second
// going between two places, and says what became of them: for tests and
// measurements in which nothing may be cut.
package flows

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// Serve echoes what comes to addr, TCP and UDP, until ctx ends.
func Serve(ctx context.Context, addr string) error {
	l, err := net.Listen("tcp", addr)
	if err != nil {
		return err
	}
	u, err := net.ListenPacket("udp", addr)
	if err != nil {
		l.Close()
		return err
	}
	stop := context.AfterFunc(ctx, func() { l.Close(); u.Close() })
	defer stop()
	var all sync.WaitGroup
	defer all.Wait()
	all.Go(func() {
		patient(u)
		buf := make([]byte, 2000)
		for {
			n, from, err := u.ReadFrom(buf)
			if errors.Is(err, net.ErrClosed) {
				return
			}
			if err == nil {
				_, _ = u.WriteTo(buf[:n], from)
			}
		}
	})
	for {
		c, err := l.Accept()
		if err != nil {
			if ctx.Err() != nil {
				return nil
			}
			return err
		}
		all.Go(func() {
			closing := context.AfterFunc(ctx, func() { c.Close() })
			defer closing()
			defer c.Close()
			_, _ = io.Copy(c, c)
		})
	}
}

// Result is what became of the flows.
type Result struct {
	// Connections made, and those that did not live to the end.
	Connections, Broken int
	// Asked and Answered over UDP; Gap is the longest time between two
	// answers, Burst the most questions in a row without one.
	Asked, Answered, Burst int
	Gap                    time.Duration
}

// Unanswered questions.
func (r Result) Unanswered() int { return r.Asked - r.Answered }

// patient: what waits for its reader on a busy machine is not lost in the
// socket.
func patient(c net.PacketConn) {
	if raw, err := c.(*net.UDPConn).SyscallConn(); err == nil {
		_ = raw.Control(func(fd uintptr) { _ = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 16<<20) })
	}
}

func (r Result) String() string {
	return fmt.Sprintf("%d of %d connections broken; %d of %d questions unanswered, %d in a row at most; longest time without an answer %.1f ms",
		r.Broken, r.Connections, r.Unanswered(), r.Asked, r.Burst, r.Gap.Seconds()*1e3)
}

// Probe keeps n connections to addr alive, each saying something ten times a
// second, and asks over UDP every millisecond, until ctx ends. It calls ready
// when all connections stand.
func Probe(ctx context.Context, addr string, n int, ready func()) (Result, error) {
	var conns []net.Conn
	for range n {
		c, err := net.DialTimeout("tcp", addr, 10*time.Second)
		if err != nil {
			return Result{}, err
		}
		conns = append(conns, c)
	}
	u, err := net.Dial("udp", addr)
	if err != nil {
		return Result{}, err
	}
	patient(u.(*net.UDPConn))
	ready()
	var all sync.WaitGroup
	var broken atomic.Int64
	for _, c := range conns {
		all.Go(func() {
			if talk(ctx, c) != nil {
				broken.Add(1)
			}
		})
	}
	r := Result{Connections: n}
	all.Go(func() { r.Asked = ask(ctx, u) })
	var answered []bool
	all.Go(func() { answered, r.Gap = listen(u) })
	<-ctx.Done()
	time.AfterFunc(time.Second, func() { u.Close() }) // the last answers
	all.Wait()
	r.Broken = int(broken.Load())
	row := 0
	for i := range r.Asked {
		if i < len(answered) && answered[i] {
			r.Answered++
			row = 0
			continue
		}
		row++
		r.Burst = max(r.Burst, row)
	}
	return r, nil
}

// talk until ctx ends; an error before is a broken connection.
func talk(ctx context.Context, c net.Conn) error {
	defer c.Close()
	tick := time.NewTicker(100 * time.Millisecond)
	defer tick.Stop()
	buf := make([]byte, 16)
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
		_ = c.SetDeadline(time.Now().Add(time.Minute))
		if _, err := c.Write(buf); err != nil {
			return err
		}
		if _, err := io.ReadFull(c, buf); err != nil {
			return err
		}
	}
}

func ask(ctx context.Context, u net.Conn) (asked int) {
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return asked
		case <-tick.C:
		}
		if _, err := u.Write(binary.BigEndian.AppendUint64(nil, uint64(asked))); err == nil {
			asked++
		}
	}
}

// listen notes which questions are answered until u is closed.
func listen(u net.Conn) (answered []bool, longest time.Duration) {
	buf := make([]byte, 100)
	var last time.Time
	for {
		n, err := u.Read(buf)
		if errors.Is(err, net.ErrClosed) {
			return answered, longest
		}
		if err != nil || n < 8 {
			continue // refused
		}
		const most = 1 << 24 // hours of questions
		if i := binary.BigEndian.Uint64(buf); i < most {
			for uint64(len(answered)) <= i {
				answered = append(answered, false)
			}
			answered[i] = true
		}
		now := time.Now()
		if !last.IsZero() {
			longest = max(longest, now.Sub(last))
		}
		last = now
	}
}
