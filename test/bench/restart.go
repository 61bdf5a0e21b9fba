package main

import (
	"context"
	"fmt"
	"strconv"
	"strings"
	"time"

	"meshd.dev/test/story"
)

// restart kills the process that carries the tunnels of m1, while m1 asks m3
// through them a thousand times a second, and reports the longest time without
// an answer.
func restart(ctx context.Context, w *story.World, o options) ([]row, error) {
	to, err := w.MeshAddr(ctx, "m3")
	if err != nil {
		return nil, err
	}
	var gaps []time.Duration
	for range o.rounds {
		// ping prints the time of each answer; -O would add lines of its own.
		out, err := w.Machine("m1").Run(ctx, "sh", "-ec", fmt.Sprintf(`ping -n -D -i 0.001 -w 6 %s >/tmp/ping &
			ping=$!; sleep 2
			pid=$(cat /var/run/wireguard/mesh0.lock); kill -9 $pid
			wait $ping || true; cat /tmp/ping; rm /tmp/ping`, to))
		if err != nil {
			return nil, err
		}
		gap, answers := longestGap(out)
		if answers < 1000 {
			return nil, fmt.Errorf("restart: %d answers: %s", answers, lastLines(out))
		}
		gaps = append(gaps, gap)
	}
	return []row{{"tunnel process killed: longest time without an answer", ms(quantile(gaps, .5)) + " median", "",
		fmt.Sprintf("%s to %s of %d; asked about 1,000 times a second; aim 50 ms", ms(quantile(gaps, 0)), ms(quantile(gaps, 1)), len(gaps))}}, nil
}

// longestGap between lines of ping -D, which begin with [seconds since 1970].
func longestGap(out string) (longest time.Duration, answers int) {
	var last float64
	for line := range strings.Lines(out) {
		stamp, rest, ok := strings.Cut(strings.TrimPrefix(line, "["), "]")
		if !ok || !strings.Contains(rest, "time=") {
			continue
		}
		now, err := strconv.ParseFloat(stamp, 64)
		if err != nil {
			continue
		}
		if answers++; last > 0 {
			longest = max(longest, time.Duration((now-last)*float64(time.Second)))
		}
		last = now
	}
	return longest, answers
}

func lastLines(s string) string { return s[max(0, len(s)-300):] }
