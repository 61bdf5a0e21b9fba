package main

import (
	"context"
	"fmt"
	"strconv"
	"strings"
	"time"

	"meshd.dev/test/story"
)

// restart ends the process that carries the tunnels of m1, while m1 asks m3
// through them about a thousand times a second, and reports the longest time
// without an answer: once killed, for meshd to start another, and once taken
// over by a new one, as in an upgrade.
func restart(ctx context.Context, w *story.World, o options) ([]row, error) {
	to, err := w.MeshAddr(ctx, "m3")
	if err != nil {
		return nil, err
	}
	var rows []row
	for _, way := range []struct{ name, script string }{
		{"killed", "kill -9 $(cat /var/run/wireguard/mesh0.lock)"},
		{"taken over", "setsid meshd wireguard --take-over mesh0 </dev/null >/dev/null 2>&1 &"},
	} {
		var gaps []time.Duration
		for range o.rounds {
			out, err := w.Machine("m1").Run(ctx, "sh", "-ec", fmt.Sprintf(`ping -n -D -i 0.001 -w %d %s >/tmp/ping &
				ping=$!; sleep 2
				%s
				wait $ping || true; cat /tmp/ping; rm /tmp/ping`, int(asking.Seconds()), to, way.script))
			if err != nil {
				return nil, err
			}
			gap, answers := longestGap(out, asking)
			if answers < 1000 {
				return nil, fmt.Errorf("tunnel process %s: %d answers: %s", way.name, answers, out[max(0, len(out)-300):])
			}
			gaps = append(gaps, gap)
		}
		rows = append(rows, row{"tunnel process " + way.name + ": longest time without an answer", ms(quantile(gaps, .5)) + " median", "",
			fmt.Sprintf("%s to %s of %d; asked about 1,000 times a second; aim 50 ms", ms(quantile(gaps, 0)), ms(quantile(gaps, 1)), len(gaps))})
	}
	return rows, nil
}

// asking is how long is asked.
const asking = 5 * time.Second

// longestGap between lines of ping -D, which begin with [seconds since 1970],
// and between the last one and the end of the time that was asked for.
func longestGap(out string, asked time.Duration) (longest time.Duration, answers int) {
	var first, last float64
	gap := func(until float64) { longest = max(longest, time.Duration((until-last)*float64(time.Second))) }
	for line := range strings.Lines(out) {
		stamp, rest, ok := strings.Cut(strings.TrimPrefix(line, "["), "]")
		if !ok || !strings.Contains(rest, "time=") {
			continue
		}
		now, err := strconv.ParseFloat(stamp, 64)
		if err != nil {
			continue
		}
		if answers++; answers == 1 {
			first, last = now, now
		}
		gap(now)
		last = now
	}
	if answers > 0 {
		gap(first + asked.Seconds())
	}
	return longest, answers
}
