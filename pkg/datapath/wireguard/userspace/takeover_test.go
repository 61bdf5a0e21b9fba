package userspace_test

import (
	"context"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.zx2c4.com/wireguard/wgctrl"
	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	"meshd.dev/pkg/datapath/internal/testns"
	"meshd.dev/pkg/datapath/wireguard/userspace"
)

// serve is this test binary as the process of a device.
const serve = "serve-a-device"

func serveDevice(device string) {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	if err := userspace.Run(ctx, userspace.Config{Device: device, TakeOver: true}); err != nil {
		os.Stderr.WriteString(err.Error() + "\n")
		os.Exit(1)
	}
}

// A second process takes the device over: same link and address, same key and
// peers, a new session without anybody sending; the first ends well.
func TestTakesOver(t *testing.T) {
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
	start := func() (*exec.Cmd, chan error) {
		exe, err := os.Executable()
		if err != nil {
			t.Fatal(err)
		}
		cmd := exec.Command(exe, serve, "wgu")
		cmd.Stderr = os.Stderr
		cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		done := make(chan error, 1)
		go func() { done <- cmd.Wait() }()
		t.Cleanup(func() { _ = cmd.Process.Kill() })
		return cmd, done
	}
	session := func(after time.Time) *wgtypes.Device {
		for deadline := time.Now().Add(20 * time.Second); ; {
			dev, err := wg.Device("wgu")
			if err == nil && len(dev.Peers) == 1 && dev.Peers[0].LastHandshakeTime.After(after) {
				return dev
			}
			if time.Now().After(deadline) {
				t.Fatalf("no session: %+v, %v", dev, err)
			}
			time.Sleep(5 * time.Millisecond)
		}
	}
	_, first := start()
	answers(t, wg, first)
	testns.Sh(t, "ip link set wgu mtu 1300; ip address add 10.244.1.1/32 dev wgu; ip link set wgu up; ip route add 10.244.2.0/24 dev wgu")
	port, psk := 51901, wgtypes.Key{}
	if err := wg.ConfigureDevice("wgu", wgtypes.Config{PrivateKey: &ours, ListenPort: &port, Peers: []wgtypes.PeerConfig{{
		PublicKey: theirs.PublicKey(), PresharedKey: &psk, Endpoint: &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1), Port: 51902},
		AllowedIPs: []net.IPNet{{IP: net.IPv4(10, 244, 2, 0).To4(), Mask: net.CIDRMask(24, 32)}}}}}); err != nil {
		t.Fatal(err)
	}
	before := session(time.Time{})
	link := testns.Sh(t, "ip -o address show wgu; ip route show dev wgu")

	// Within 20 ms of the last greeting the peer would take it for a flood, and
	// answer the next one, after 5 s.
	cmd, second := start()
	after := session(before.Peers[0].LastHandshakeTime)
	if err := <-first; err != nil {
		t.Errorf("the first process: %v", err)
	}
	if now := testns.Sh(t, "ip -o address show wgu; ip route show dev wgu"); now != link {
		t.Errorf("the link is not the same:\n%s\nwas\n%s", now, link)
	}
	if after.PrivateKey != before.PrivateKey || after.ListenPort != before.ListenPort ||
		after.Peers[0].Endpoint.String() != before.Peers[0].Endpoint.String() || len(after.Peers[0].AllowedIPs) != 1 {
		t.Errorf("it was told something else: %+v, %+v", after, after.Peers[0])
	}
	_ = cmd.Process.Signal(syscall.SIGTERM)
	if err := <-second; err != nil {
		t.Errorf("the second process: %v", err)
	}
	if _, err := net.InterfaceByName("wgu"); err == nil {
		t.Error("the link is still there")
	}
}

func TestWithoutTakeOver(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	wg, err := wgctrl.New()
	if err != nil {
		t.Fatal(err)
	}
	defer wg.Close()
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- userspace.Run(ctx, userspace.Config{Device: "wgu"}) }()
	answers(t, wg, done)
	if err := userspace.Run(t.Context(), userspace.Config{Device: "wgu"}); err == nil || !strings.Contains(err.Error(), "another process serves it") {
		t.Errorf("a second process: %v", err)
	}
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
}
