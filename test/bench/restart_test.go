package main

import (
	"testing"
	"time"
)

func TestLongestGap(t *testing.T) {
	const answer = "] 64 bytes from 10.244.3.1: icmp_seq=1 ttl=64 time=0.3 ms\n"
	for _, c := range []struct {
		name, out string
		want      time.Duration
		answers   int
	}{
		{"no answer", "PING 10.244.3.1 56(84) bytes of data.\n", 0, 0},
		{"a gap", "[100.000" + answer + "[100.500" + answer + "[103.500" + answer + "[104.900" + answer, 3 * time.Second, 4},
		{"the end is silent", "[100.000" + answer + "[102.000" + answer + "--- statistics ---\n", 3 * time.Second, 2},
		{"other lines do not count", "[100.000" + answer + "[102.000] From 10.244.1.1: Destination Net Unreachable\n[104.000" + answer, 4 * time.Second, 2},
	} {
		got, answers := longestGap(c.out, 5*time.Second)
		if got.Round(time.Millisecond) != c.want || answers != c.answers {
			t.Errorf("%s: %s, %d answers, want %s, %d", c.name, got, answers, c.want, c.answers)
		}
	}
}
