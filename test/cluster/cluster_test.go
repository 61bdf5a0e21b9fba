package cluster

import (
	"context"
	"errors"
	"strings"
	"testing"
	"time"

	"meshd.dev/test/netlab"
)

func TestOnlyTunnels(t *testing.T) {
	traffic := func(change func(*netlab.Traffic)) netlab.Traffic {
		s := netlab.Traffic{Packets: map[string]int{"wireguard": 10, "arp": 2, "icmp6": 1, "tcp/6443": 5}}
		change(&s)
		return s
	}
	for _, c := range []struct {
		name, says string
		change     func(*netlab.Traffic)
	}{
		{"tunnels, API and neighbours", "", func(*netlab.Traffic) {}},
		{"no tunnel at all", "no WireGuard packet", func(s *netlab.Traffic) { delete(s.Packets, "wireguard") }},
		{"payload in clear", "1 packets hold the payload in clear: tcp/80 a > b", func(s *netlab.Traffic) {
			s.Marked, s.MarkedKinds = 1, []string{"tcp/80 a > b"}
		}},
		{"a pod's address", "show pod or service addresses", func(s *netlab.Traffic) { s.Inner = 3 }},
		{"another protocol", "4 packets of kind udp/53", func(s *netlab.Traffic) { s.Packets["udp/53"] = 4 }},
		{"packets not looked at", "missed 7 packets", func(s *netlab.Traffic) { s.Dropped = 7 }},
	} {
		t.Run(c.name, func(t *testing.T) {
			got := ""
			if err := OnlyTunnels(traffic(c.change), "arp", "icmp6", "tcp/6443"); err != nil {
				got = err.Error()
			}
			if c.says == "" && got != "" || !strings.Contains(got, c.says) {
				t.Errorf("says %q, want %q", got, c.says)
			}
		})
	}
}

func TestUntil(t *testing.T) {
	ctx, cancel := context.WithTimeoutCause(t.Context(), 50*time.Millisecond, errors.New("not within a moment"))
	defer cancel()
	err := Until(ctx, func(context.Context) error { return errors.New("no pod is ready") })
	if err == nil || err.Error() != "no pod is ready (not within a moment)" {
		t.Errorf("says %v", err)
	}
	tries := 0
	if err := Until(t.Context(), func(context.Context) error { tries++; return Final{errors.New("dead")} }); err == nil || tries != 1 {
		t.Errorf("%d tries, %v", tries, err)
	}
	if err := Until(t.Context(), func(context.Context) error { return nil }); err != nil {
		t.Error(err)
	}
}

func TestShort(t *testing.T) {
	for d, want := range map[time.Duration]string{
		1234 * time.Millisecond: "1.23s", 56700 * time.Microsecond: "57ms", 1234567 * time.Nanosecond: "1.23ms", 0: "0s",
	} {
		if got := Short(d); got != want {
			t.Errorf("%d: %s, want %s", d, got, want)
		}
	}
}
