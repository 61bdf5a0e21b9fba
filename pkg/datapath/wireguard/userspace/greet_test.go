package userspace_test

import (
	"context"
	"net"
	"os"
	"testing"
	"time"

	"golang.zx2c4.com/wireguard/wgctrl"
	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	"meshd.dev/pkg/datapath/internal/testns"
	"meshd.dev/pkg/datapath/wireguard/userspace"
)

// A process that begins anew has a session with its peer though nobody sends
// anything.
func TestGreetsPeers(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	ours, theirs := newKey(t), newKey(t)
	_, far := official(t, theirs, ours.PublicKey(), 51902)
	defer far.Close()
	wg, err := wgctrl.New()
	if err != nil {
		t.Fatal(err)
	}
	defer wg.Close()
	for _, upFirst := range []bool{true, false} {
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- userspace.Run(ctx, userspace.Config{Device: "wgu", NoOffloads: upFirst}) }()
		answers(t, wg, done)
		if upFirst {
			testns.Sh(t, "ip link set wgu up")
		}
		port := 51901
		if err := wg.ConfigureDevice("wgu", wgtypes.Config{PrivateKey: &ours, ListenPort: &port, Peers: []wgtypes.PeerConfig{{
			PublicKey: theirs.PublicKey(), Endpoint: &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1), Port: 51902},
			AllowedIPs: []net.IPNet{{IP: net.IPv4(10, 244, 2, 0).To4(), Mask: net.CIDRMask(24, 32)}}}}}); err != nil {
			t.Fatal(err)
		}
		if !upFirst {
			testns.Sh(t, "ip link set wgu up")
		}
		for deadline := time.Now().Add(20 * time.Second); ; { // nothing else would ever begin one
			dev, err := wg.Device("wgu")
			if err != nil {
				t.Fatal(err)
			}
			if !dev.Peers[0].LastHandshakeTime.IsZero() {
				break
			}
			if time.Now().After(deadline) {
				t.Fatalf("up first %t: no handshake", upFirst)
			}
			time.Sleep(5 * time.Millisecond)
		}
		if upFirst {
			anotherSession(t, wg)
		}
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run: %v", err)
		}
	}
}

// anotherSession begins when an endpoint is told again, though it is the one
// there is; the counters go on, so it is the same peer. The engine begins none
// for five seconds after another.
func anotherSession(t *testing.T, wg *wgctrl.Client) {
	t.Helper()
	before, err := wg.Device("wgu")
	if err != nil {
		t.Fatal(err)
	}
	for deadline := time.Now().Add(20 * time.Second); ; {
		if err := wg.ConfigureDevice("wgu", wgtypes.Config{Peers: []wgtypes.PeerConfig{{
			PublicKey: before.Peers[0].PublicKey, UpdateOnly: true, Endpoint: before.Peers[0].Endpoint}}}); err != nil {
			t.Fatal(err)
		}
		now, err := wg.Device("wgu")
		if err != nil {
			t.Fatal(err)
		}
		if p := now.Peers[0]; p.LastHandshakeTime.After(before.Peers[0].LastHandshakeTime) {
			if p.TransmitBytes < before.Peers[0].TransmitBytes {
				t.Errorf("%d bytes sent, %d before", p.TransmitBytes, before.Peers[0].TransmitBytes)
			}
			return
		}
		if time.Now().After(deadline) {
			t.Fatal("no other session")
		}
		time.Sleep(100 * time.Millisecond)
	}
}
