package userspace_test

import (
	"context"
	"net"
	"os"
	"strings"
	"testing"
	"time"

	"golang.zx2c4.com/wireguard/wgctrl"

	"meshd.dev/pkg/datapath/internal/testns"
	"meshd.dev/pkg/datapath/wireguard"
	"meshd.dev/pkg/datapath/wireguard/userspace"
)

// served is how meshd drives devices whose process somebody else starts; its own
// command does not exist, so that starting one itself is an error.
func served(t *testing.T, dir string) *wireguard.Device {
	t.Helper()
	d, err := wireguard.New(wireguard.Options{Name: "wgs", StateDir: dir, Served: true, SpawnUserspace: []string{"/nowhere", "wireguard"}})
	if err != nil {
		t.Fatal(err)
	}
	return d
}

// serving runs the process of wgs until it answers, and ends it with the test.
func serving(t *testing.T, cfg userspace.Config) (end func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- userspace.Run(ctx, cfg) }()
	t.Cleanup(cancel)
	for {
		if c, err := net.Dial("unix", wireguard.SocketPath("wgs")); err == nil {
			c.Close()
			break
		}
		select {
		case err := <-done:
			t.Fatal(err)
		case <-time.After(5 * time.Millisecond):
		}
	}
	return func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
}

// TestSecondIsServedWhereTheFirstIs: two processes drive the devices one after
// the other, as before and after a restart of meshd, and neither starts one. The
// second device is one and the same for both, and whoever looks for devices
// finds these two and nothing else.
func TestSecondIsServedWhereTheFirstIs(t *testing.T) {
	if testns.Backend(t) == "kernel" {
		t.Skip("this kernel has WireGuard")
	}
	end := serving(t, userspace.Config{Device: "wgs", Second: true})
	dir, cfg := t.TempDir(), wireguard.Config{ListenPort: 51902, MTU: 1420}
	if err := served(t, dir).Apply(t.Context(), cfg); err != nil {
		t.Fatal(err)
	}
	cfg.ListenPort++
	for round := range 2 { // asked for again after it went
		var was int
		for _, who := range []string{"before", "after"} {
			second := served(t, dir).Second("wgs-next")
			if err := second.Apply(t.Context(), cfg); err != nil {
				t.Fatalf("round %d, %s: %v", round, who, err)
			}
			link, err := net.InterfaceByName("wgs-next")
			if err != nil {
				t.Fatal(err)
			}
			if who == "after" && link.Index != was {
				t.Errorf("round %d: link %d became %d", round, was, link.Index)
			}
			was = link.Index
		}
		if got := devices(t); got != "wgs-next:51903 wgs:51902" {
			t.Errorf("round %d: devices %s", round, got)
		}
		if err := served(t, dir).Second("wgs-next").Remove(t.Context()); err != nil {
			t.Fatalf("round %d: %v", round, err)
		}
		if link, err := net.InterfaceByName("wgs-next"); err == nil {
			t.Errorf("round %d: link %v is there still", round, link)
		}
	}
	end()
	if _, err := os.Stat(wireguard.AskPath("wgs")); err == nil {
		t.Error("the socket is there still")
	}
}

// devices as wgctrl finds them, which is how meshd configures them, and wg(8).
func devices(t *testing.T) string {
	t.Helper()
	wg, err := wgctrl.New()
	if err != nil {
		t.Fatal(err)
	}
	defer wg.Close()
	list, err := wg.Devices()
	if err != nil {
		t.Fatal(err)
	}
	var found []string
	for _, d := range list {
		found = append(found, net.JoinHostPort(d.Name, strings.TrimSpace(testns.Sh(t, "wg show "+d.Name+" listen-port"))))
	}
	if text := strings.Fields(testns.Sh(t, "wg show interfaces")); len(text) != len(list) {
		t.Errorf("wg finds %q, wgctrl %q", text, found)
	}
	return strings.Join(found, " ")
}

// TestSecondWithoutAnyoneToAsk: a process that does not listen, older than this
// or of another make, serves no second device, so meshd starts it; what one left
// that was killed does not stand for it.
func TestSecondWithoutAnyoneToAsk(t *testing.T) {
	if testns.Backend(t) == "kernel" {
		t.Skip("this kernel has WireGuard")
	}
	ask := func() error {
		return served(t, t.TempDir()).Second("wgs-next").Apply(t.Context(), wireguard.Config{ListenPort: 51903, MTU: 1420})
	}
	if err := ask(); err == nil || !strings.Contains(err.Error(), "nothing serves wgs, and so nobody wgs-next") {
		t.Errorf("nothing there at all: %v", err)
	}
	testns.Sh(t, "mkdir -p "+strings.TrimSuffix(wireguard.AskPath("wgs"), "/second"))
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: wireguard.AskPath("wgs"), Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	l.SetUnlinkOnClose(false)
	l.Close()
	if err := ask(); err == nil || !strings.Contains(err.Error(), "nothing serves wgs, and so nobody wgs-next") {
		t.Errorf("it was killed: %v", err)
	}
	end := serving(t, userspace.Config{Device: "wgs"})
	if err := ask(); err == nil || !strings.Contains(err.Error(), "/nowhere") {
		t.Errorf("killed, and an older one came: %v", err)
	}
	testns.Sh(t, "rm -r "+strings.TrimSuffix(wireguard.AskPath("wgs"), "/second"))
	if err := ask(); err == nil || !strings.Contains(err.Error(), "/nowhere") {
		t.Errorf("an older one: %v", err)
	}
	end()
}
