package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strconv"
	"sync"
	"time"
)

// A transfer is a TCP stream of blocks: an 8-byte number that counts from zero,
// a 2-byte length, and that many bytes of a text that repeats. The far end checks
// the number and answers each block with it; anything lost, doubled or out of
// place ends the transfer with an error.
const blockHeader = 10

// Progress is one line of the answer to GET /transfer.
type Progress struct {
	Sent  uint64 `json:"sent"`  // blocks
	Acked uint64 `json:"acked"` // blocks the far end has checked
	Bytes uint64 `json:"bytes"` // of the acked blocks
	// Silence is the longest time between two answers so far.
	Silence time.Duration `json:"silence"`
	Done    bool          `json:"done,omitempty"`
	Error   string        `json:"error,omitempty"`
}

// receiveTransfers is the far end.
func receiveTransfers(l net.Listener) {
	for {
		conn, err := l.Accept()
		if err != nil {
			return
		}
		go func() {
			defer conn.Close()
			if err := receive(conn); err != nil {
				fmt.Println("transfer:", err)
			}
		}()
	}
}

func receive(conn io.ReadWriter) error {
	r := bufio.NewReaderSize(conn, 1<<16)
	header := make([]byte, blockHeader)
	var first []byte // every block repeats the text of the first
	for want := uint64(0); ; want++ {
		if _, err := io.ReadFull(r, header); err != nil {
			if errors.Is(err, io.EOF) {
				return nil
			}
			return err
		}
		text := make([]byte, binary.BigEndian.Uint16(header[8:]))
		if _, err := io.ReadFull(r, text); err != nil {
			return err
		}
		if want == 0 {
			first = text
		}
		if got := binary.BigEndian.Uint64(header); got != want {
			return fmt.Errorf("block %d came where %d was due", got, want)
		}
		if !bytes.Equal(text, first) {
			return fmt.Errorf("block %d does not hold what was sent", want)
		}
		if _, err := conn.Write(header[:8]); err != nil {
			return err
		}
	}
}

// sendTransfer is the near end: to=HOST:PORT, text=WHAT, rate=BYTES a second,
// for=DURATION, id=NAME. It answers with a Progress a line, ten a second, until
// the time is over, the transfer breaks, or POST /transfer/stop names its id.
func sendTransfer(w http.ResponseWriter, r *http.Request) {
	rate, _ := strconv.Atoi(r.FormValue("rate"))
	limit, err := time.ParseDuration(r.FormValue("for"))
	if err != nil || rate <= 0 {
		http.Error(w, "want rate=BYTES and for=DURATION", http.StatusBadRequest)
		return
	}
	ctx, cancel := context.WithTimeout(r.Context(), limit)
	defer cancel()
	underWay.Store(r.FormValue("id"), cancel)
	defer underWay.Delete(r.FormValue("id"))
	t := &transfer{block: fill(r.FormValue("text"))}
	ended := make(chan error, 1)
	go func() { ended <- t.run(ctx, r.FormValue("to"), rate) }()
	out := json.NewEncoder(w)
	tick := time.NewTicker(100 * time.Millisecond)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
			if err := out.Encode(t.progress()); err != nil {
				cancel()
			}
			w.(http.Flusher).Flush()
		case err := <-ended:
			p := t.progress()
			p.Done = true
			if err != nil {
				p.Error = err.Error()
			}
			_ = out.Encode(p)
			return
		}
	}
}

// underWay holds the cancel function of each transfer by its id.
var underWay sync.Map

// stopTransfer lets a transfer come to its end.
func stopTransfer(w http.ResponseWriter, r *http.Request) {
	cancel, ok := underWay.Load(r.FormValue("id"))
	if !ok {
		http.Error(w, "no such transfer", http.StatusNotFound)
		return
	}
	cancel.(context.CancelFunc)()
}

// fill repeats text to about one packet's worth.
func fill(text string) []byte {
	if text == "" {
		text = "meshd transfer "
	}
	body := bytes.Repeat([]byte(text), max(1, 1200/len(text)))
	block := make([]byte, blockHeader, blockHeader+len(body))
	binary.BigEndian.PutUint16(block[8:], uint16(len(body)))
	return append(block, body...)
}

type transfer struct {
	block []byte

	mu   sync.Mutex
	now  Progress
	last time.Time // of the last answer
}

// progress counts a silence that is still going on.
func (t *transfer) progress() Progress {
	t.mu.Lock()
	defer t.mu.Unlock()
	p := t.now
	if !t.last.IsZero() && p.Sent > p.Acked {
		p.Silence = max(p.Silence, time.Since(t.last))
	}
	return p
}

func (t *transfer) run(ctx context.Context, to string, rate int) error {
	conn, err := (&net.Dialer{Timeout: 10 * time.Second}).DialContext(ctx, "tcp", to)
	if err != nil {
		return err
	}
	defer conn.Close()
	answered := make(chan error, 1)
	go func() { answered <- t.readAnswers(conn) }()
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for budget := 0; ; {
		select {
		case <-ctx.Done():
			return t.finish(conn, answered)
		case err := <-answered:
			if err == nil {
				err = errors.New("the far end closed the connection")
			}
			return err
		case <-tick.C:
		}
		for budget += rate / 100; budget >= len(t.block); budget -= len(t.block) {
			if err := t.send(conn); err != nil {
				return err
			}
		}
	}
}

func (t *transfer) send(conn net.Conn) error {
	t.mu.Lock()
	binary.BigEndian.PutUint64(t.block, t.now.Sent)
	t.now.Sent++
	if t.last.IsZero() {
		t.last = time.Now()
	}
	t.mu.Unlock()
	_, err := conn.Write(t.block)
	return err
}

func (t *transfer) readAnswers(conn net.Conn) error {
	r, b := bufio.NewReader(conn), make([]byte, 8)
	for want := uint64(0); ; want++ {
		if _, err := io.ReadFull(r, b); err != nil {
			if errors.Is(err, io.EOF) {
				return nil
			}
			return err
		}
		if got := binary.BigEndian.Uint64(b); got != want {
			return fmt.Errorf("answer %d came where %d was due", got, want)
		}
		t.mu.Lock()
		t.now.Acked++
		t.now.Bytes += uint64(len(t.block) - blockHeader)
		t.now.Silence, t.last = max(t.now.Silence, time.Since(t.last)), time.Now()
		t.mu.Unlock()
	}
}

// finish says that no more comes and waits for the last answers.
func (t *transfer) finish(conn net.Conn, answered <-chan error) error {
	if c, ok := conn.(*net.TCPConn); ok {
		_ = c.CloseWrite()
	}
	select {
	case err := <-answered:
		p := t.progress()
		if err == nil && p.Acked != p.Sent {
			err = fmt.Errorf("%d blocks sent, %d answered", p.Sent, p.Acked)
		}
		return err
	case <-time.After(30 * time.Second):
		return errors.New("the last blocks were not answered within 30 s")
	}
}
