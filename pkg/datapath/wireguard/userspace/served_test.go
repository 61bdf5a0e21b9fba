package userspace_test

import (
	"net"
	"os"
	"testing"
	"time"

	"meshd.dev/pkg/datapath/internal/testns"
	"meshd.dev/pkg/datapath/wireguard"
	"meshd.dev/pkg/datapath/wireguard/userspace"
)

// TestSecondIsServedWhereTheFirstIs: two processes drive the devices one after
// the other, as before and after a restart of meshd, and neither starts one
// (its command does not exist). The second device is one and the same for both.
func TestSecondIsServedWhereTheFirstIs(t *testing.T) {
	if testns.Backend(t) == "kernel" {
		t.Skip("this kernel has WireGuard")
	}
	serving := make(chan error, 1)
	go func() { serving <- userspace.ServeSecond(t.Context(), userspace.Config{Device: "wgs"}) }()
	for { // until there is somebody to ask
		if _, err := os.Stat(wireguard.AskPath("wgs")); err == nil {
			break
		}
		select {
		case err := <-serving:
			t.Fatal(err)
		case <-time.After(5 * time.Millisecond):
		}
	}
	dir := t.TempDir()
	second := func() *wireguard.Device {
		t.Helper()
		d, err := wireguard.New(wireguard.Options{Name: "wgs", StateDir: dir, Served: true, SpawnUserspace: []string{"/nowhere", "wireguard"}})
		if err != nil {
			t.Fatal(err)
		}
		return d.Second("wgs-next")
	}
	cfg := wireguard.Config{ListenPort: 51903, MTU: 1420}
	index := func() int {
		t.Helper()
		link, err := net.InterfaceByName("wgs-next")
		if err != nil {
			t.Fatal(err)
		}
		return link.Index
	}
	for round := range 2 { // asked for again after it went
		before := second()
		if err := before.Apply(t.Context(), cfg); err != nil {
			t.Fatalf("round %d: %v", round, err)
		}
		was := index()
		after := second()
		if err := after.Apply(t.Context(), cfg); err != nil {
			t.Fatalf("round %d: %v", round, err)
		}
		if now := index(); now != was {
			t.Errorf("round %d: link %d became %d", round, was, now)
		}
		if err := after.Remove(t.Context()); err != nil {
			t.Fatalf("round %d: %v", round, err)
		}
		if link, err := net.InterfaceByName("wgs-next"); err == nil {
			t.Errorf("round %d: link %v is there still", round, link)
		}
	}
}
