package userspace_test

import (
	"bytes"
	"context"
	"log/slog"
	"net"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.zx2c4.com/wireguard/wgctrl"
	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	"meshd.dev/pkg/datapath/internal/testns"
	"meshd.dev/pkg/datapath/wireguard/userspace"
)

// lines is a log.
type lines struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lines) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(b)
}

func (l *lines) count(text string) int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return strings.Count(l.b.String(), text)
}

// A peer that cannot be sent to is complained of, and not with every packet:
// the log is in memory.
func TestLogIsNotFilledByPackets(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	ours, theirs := newKey(t), newKey(t)
	log := &lines{}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() {
		done <- userspace.Run(ctx, userspace.Config{Device: "wgu", NoOffloads: true, Log: slog.New(slog.NewTextHandler(log, nil))})
	}()
	defer func() { cancel(); <-done }()
	wg, err := wgctrl.New()
	if err != nil {
		t.Fatal(err)
	}
	defer wg.Close()
	answers(t, wg, done)
	far, dev := official(t, theirs, ours.PublicKey(), 51902)
	defer dev.Close()
	port := 51901
	if err := wg.ConfigureDevice("wgu", wgtypes.Config{PrivateKey: &ours, ListenPort: &port, Peers: []wgtypes.PeerConfig{{
		PublicKey: theirs.PublicKey(), Endpoint: &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1), Port: 51902},
		AllowedIPs: []net.IPNet{{IP: net.IPv4(10, 244, 2, 0).To4(), Mask: net.CIDRMask(24, 32)}}}}}); err != nil {
		t.Fatal(err)
	}
	testns.Sh(t, "ip address add 10.244.1.1/24 dev wgu; ip link set wgu up; ip route add 10.244.2.0/24 dev wgu")
	there, err := far.ListenUDP(&net.UDPAddr{Port: 7})
	if err != nil {
		t.Fatal(err)
	}
	defer there.Close()
	c, err := net.Dial("udp", "10.244.2.2:7")
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	arrives := func(text string) {
		t.Helper()
		buf := make([]byte, 100)
		for deadline := time.Now().Add(20 * time.Second); ; {
			_, _ = c.Write([]byte(text))
			_ = there.SetReadDeadline(time.Now().Add(100 * time.Millisecond))
			if n, _, _ := there.ReadFrom(buf); string(buf[:n]) == text {
				return
			}
			if time.Now().After(deadline) {
				t.Fatalf("%q did not arrive", text)
			}
		}
	}
	arrives("first")
	testns.Sh(t, `nft add table ip shut; nft add chain ip shut out '{ type filter hook output priority 0; }'
		nft add rule ip shut out udp dport 51902 drop`)
	defer testns.Sh(t, "nft delete table ip shut || true")
	const text = "Failed to send data packets"
	for deadline := time.Now().Add(20 * time.Second); log.count(text) == 0; {
		if time.Now().After(deadline) {
			t.Fatal("no complaint")
		}
		_, _ = c.Write([]byte("lost"))
	}
	for range 5000 {
		_, _ = c.Write([]byte("lost"))
	}
	testns.Sh(t, "nft delete table ip shut")
	arrives("last") // behind all the others
	if n := log.count(text); n > 2 {
		t.Errorf("%q %d times for 5,000 packets", text, n)
	}
}
