package main

import (
	"context"
	"encoding/json"
	"fmt"
	"os/exec"
	"strconv"
	"time"
)

// A load is one way to fill a tunnel with iperf3.
type load struct {
	name string
	args []string
}

var (
	// cubic: the congestion control of the machine may be one that paces.
	oneTCP = load{"one TCP stream", []string{"-C", "cubic"}}
	// steady is 64-byte packets at 10,000 a second; nothing is saturated, so
	// it shows what a packet costs.
	steady = load{"64 B UDP, 10,000 a second", []string{"-u", "-l", "64", "-b", "5120000"}}
	flood  = load{"64 B UDP, as many as go", []string{"-u", "-l", "64", "-b", "0"}}
)

// result of one load.
type result struct {
	Bits    float64 // a second, of payload that arrived
	Bytes   float64 // that arrived
	Packets float64 // that arrived; UDP only
	Seconds float64
}

// serve starts iperf3's other end; it serves until ctx ends.
func serve(ctx context.Context, ns, addr string) (*exec.Cmd, error) {
	cmd := inside(ctx, ns, "iperf3", "-s", "-B", addr, "-p", "5201")
	return cmd, cmd.Start()
}

// run sends a load to addr from inside ns.
func (l load) run(ctx context.Context, ns, addr string, d time.Duration, cpu account) (result, error) {
	ctx, cancel := context.WithTimeout(ctx, d+15*time.Second)
	defer cancel()
	args := append([]string{"iperf3", "-J", "-c", addr, "-p", "5201", "-t", strconv.FormatFloat(d.Seconds(), 'f', -1, 64)}, l.args...)
	cmd := inside(ctx, ns, args...)
	cmd.Cancel = func() error { return cmd.Process.Kill() }
	cmd.WaitDelay = time.Second
	out := &bytesWriter{}
	cmd.Stdout = out
	if err := cmd.Start(); err != nil {
		return result{}, err
	}
	if err := cpu.take(cmd.Process.Pid); err != nil {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		return result{}, err
	}
	err := cmd.Wait()
	r, parseErr := parseIperf(out.b)
	if parseErr != nil {
		return result{}, fmt.Errorf("iperf3 to %s: %w, %w", addr, err, parseErr)
	}
	return r, nil
}

type bytesWriter struct{ b []byte }

func (w *bytesWriter) Write(p []byte) (int, error) { w.b = append(w.b, p...); return len(p), nil }

func parseIperf(out []byte) (result, error) {
	type sum struct {
		Seconds float64 `json:"seconds"`
		Bytes   float64 `json:"bytes"`
		Bits    float64 `json:"bits_per_second"`
		Packets float64 `json:"packets"`
		Lost    float64 `json:"lost_packets"`
	}
	var doc struct {
		Error string `json:"error"`
		End   struct {
			Sum      sum `json:"sum"`
			Received sum `json:"sum_received"`
			Streams  []struct {
				UDP *sum `json:"udp"`
			} `json:"streams"`
		} `json:"end"`
	}
	if err := json.Unmarshal(out, &doc); err != nil {
		return result{}, fmt.Errorf("read its report: %w", err)
	}
	if doc.Error != "" {
		return result{}, fmt.Errorf("it says %q", doc.Error)
	}
	if len(doc.End.Streams) > 0 && doc.End.Streams[0].UDP != nil {
		u := doc.End.Sum
		if u.Packets == 0 || u.Seconds == 0 {
			return result{}, fmt.Errorf("no packet was sent")
		}
		arrived := u.Packets - u.Lost
		bytes := u.Bytes * arrived / u.Packets
		return result{bytes * 8 / u.Seconds, bytes, arrived, u.Seconds}, nil
	}
	s := doc.End.Received
	if s.Bytes == 0 {
		return result{}, fmt.Errorf("nothing arrived")
	}
	return result{Bits: s.Bits, Bytes: s.Bytes, Seconds: s.Seconds}, nil
}
