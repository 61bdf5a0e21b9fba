package main

import (
	"context"
	"fmt"
	"regexp"
	"strconv"
	"time"

	"meshd.dev/test/story"
)

// rotate changes keys again and again, of one machine, of another, and of all
// at once, while pings of a thousand a second go through the tunnels from m1
// to m3 and from m3 to m2, and counts those that are not answered.
func rotate(ctx context.Context, w *story.World, o options) ([]row, error) {
	pings := []struct{ from, to string }{{"m1", "m3"}, {"m3", "m2"}}
	for _, p := range pings {
		to, err := w.MeshAddr(ctx, p.to)
		if err != nil {
			return nil, err
		}
		// What waits for its turn on a busy machine is not to be lost there.
		script := fmt.Sprintf(`ip link set mesh0 txqueuelen 10000
			setsid ping -q -n -i 0.001 -S 8000000 %s >/tmp/ping-rotate 2>&1 </dev/null & echo $! >/tmp/ping-rotate.pid`, to)
		if _, err := w.Machine(p.from).Run(ctx, "sh", "-ec", script); err != nil {
			return nil, err
		}
	}
	var times []time.Duration
	var failed error
	for i := 0; i < o.rotations && failed == nil; i++ {
		command := [][]string{{"m1", "meshctl", "keys", "rotate"}, {"m3", "meshctl", "keys", "rotate"}, {"m1", "meshctl", "keys", "rotate", "--all"}}[i%3]
		start := time.Now()
		if out, err := w.Machine(command[0]).Run(ctx, command[1:]...); err != nil {
			failed = fmt.Errorf("change of key %d: %w: %s", i, err, out)
		}
		times = append(times, time.Since(start))
	}
	sent, received := 0, 0
	for _, p := range pings {
		out, err := w.Machine(p.from).Run(ctx, "sh", "-ec", `kill -INT $(cat /tmp/ping-rotate.pid)
			while kill -0 $(cat /tmp/ping-rotate.pid) 2>/dev/null; do sleep 0.1; done
			cat /tmp/ping-rotate; rm /tmp/ping-rotate /tmp/ping-rotate.pid`)
		if err != nil {
			return nil, err
		}
		n, m, err := pinged(out)
		if err != nil {
			return nil, err
		}
		sent, received = sent+n, received+m
	}
	if failed != nil {
		return nil, failed
	}
	return []row{{fmt.Sprintf("%d changes of keys under 1,000 packets a second each way: packets lost", len(times)), fmt.Sprint(sent - received), "",
		fmt.Sprintf("of %d; a change took %s median, %s at most", 2*sent, sec(quantile(times, .5)), sec(quantile(times, 1)))}}, nil
}

var pingSummary = regexp.MustCompile(`(\d+) packets transmitted, (\d+) received`)

// pinged reads how many pings were sent and answered.
func pinged(out string) (sent, received int, err error) {
	m := pingSummary.FindStringSubmatch(out)
	if m == nil {
		return 0, 0, fmt.Errorf("ping says %q", out)
	}
	sent, _ = strconv.Atoi(m[1])
	received, _ = strconv.Atoi(m[2])
	return sent, received, nil
}
