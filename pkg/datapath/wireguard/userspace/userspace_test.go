package userspace_test

import (
	"context"
	"encoding/hex"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"strings"
	"testing"
	"time"

	"golang.zx2c4.com/wireguard/conn"
	"golang.zx2c4.com/wireguard/device"
	"golang.zx2c4.com/wireguard/tun/netstack"
	"golang.zx2c4.com/wireguard/wgctrl"
	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	"meshd.dev/pkg/datapath/internal/testns"
	"meshd.dev/pkg/datapath/wireguard/userspace"
)

func TestMain(m *testing.M) {
	if len(os.Args) == 3 && os.Args[1] == serve {
		serveDevice(os.Args[2])
		return
	}
	testns.Main(m)
}

// Our device, 10.244.1.1 on port 51901, talks to one of the official module,
// 10.244.2.2 on port 51902, over loopback.
func TestTalksToTheOfficialImplementation(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	ours, theirs := newKey(t), newKey(t)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- userspace.Run(ctx, userspace.Config{Device: "wgu"}) }()
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
	testns.Sh(t, `
		ip link set wgu up
		ip address add 10.244.1.1/32 dev wgu
		ip route add 10.244.2.0/24 dev wgu`)
	listener, err := far.ListenTCP(&net.TCPAddr{Port: 80})
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	go func() {
		c, err := listener.Accept()
		if err != nil {
			return
		}
		defer c.Close()
		_, _ = io.Copy(c, c)
	}()
	c, err := net.DialTimeout("tcp", "10.244.2.2:80", 10*time.Second)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	sent := strings.Repeat("through two implementations ", 10000)
	go func() { _, _ = io.WriteString(c, sent); _ = c.(*net.TCPConn).CloseWrite() }()
	if got, err := io.ReadAll(c); err != nil || string(got) != sent {
		t.Errorf("%d bytes of %d came back, %v", len(got), len(sent), err)
	}

	cancel()
	if err := <-done; err != nil {
		t.Errorf("Run: %v", err)
	}
	if _, err := net.InterfaceByName("wgu"); err == nil {
		t.Error("the link is still there")
	}
	if _, err := os.Stat("/run/wireguard/wgu.sock"); err == nil {
		t.Error("the control socket is still there")
	}
}

// A peer moves from port 51902 to 51903 with its session; then it dies, and
// one that knows nothing but the key begins anew on 51904. Each time the
// question comes from there, and the answer must go there.
func TestFollowsAPeerThatMoves(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	ours, theirs := newKey(t), newKey(t)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- userspace.Run(ctx, userspace.Config{Device: "wgu"}) }()
	defer func() { cancel(); <-done }()
	wg, err := wgctrl.New()
	if err != nil {
		t.Fatal(err)
	}
	defer wg.Close()
	answers(t, wg, done)
	port := 51901
	peer := wgtypes.PeerConfig{PublicKey: theirs.PublicKey(), Endpoint: &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1), Port: 51902},
		AllowedIPs: []net.IPNet{{IP: net.IPv4(10, 244, 2, 0).To4(), Mask: net.CIDRMask(24, 32)}}}
	if err := wg.ConfigureDevice("wgu", wgtypes.Config{PrivateKey: &ours, ListenPort: &port, Peers: []wgtypes.PeerConfig{peer}}); err != nil {
		t.Fatal(err)
	}
	testns.Sh(t, "ip address add 10.244.1.1/24 dev wgu; ip link set wgu up; ip route add 10.244.2.0/24 dev wgu")
	echo, err := net.ListenUDP("udp", &net.UDPAddr{IP: net.IPv4(10, 244, 1, 1), Port: 7})
	if err != nil {
		t.Fatal(err)
	}
	defer echo.Close()
	go func() {
		buf := make([]byte, 2000)
		for {
			n, from, err := echo.ReadFromUDPAddrPort(buf)
			if err != nil {
				return
			}
			_, _ = echo.WriteToUDPAddrPort(buf[:n], from)
		}
	}()
	ask := func(what string, far *netstack.Net, port int) {
		t.Helper()
		c, err := far.DialUDP(nil, &net.UDPAddr{IP: net.IPv4(10, 244, 1, 1), Port: 7})
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		buf := make([]byte, 100)
		deadline := time.Now().Add(20 * time.Second)
		for n := 0; n == 0; { // the first may be lost: the endpoint follows behind it
			if time.Now().After(deadline) {
				t.Fatalf("%s: no answer", what)
			}
			_, _ = c.Write([]byte("where am I"))
			_ = c.SetReadDeadline(time.Now().Add(200 * time.Millisecond))
			n, _ = c.Read(buf)
		}
		dev, err := wg.Device("wgu")
		if err != nil || len(dev.Peers) != 1 || dev.Peers[0].Endpoint.Port != port {
			t.Errorf("%s: peers %v, %v; want one at port %d", what, dev.Peers, err, port)
		}
	}
	far, dev := official(t, theirs, ours.PublicKey(), 51902)
	ask("at first", far, 51902)
	if err := dev.IpcSet("listen_port=51903\n"); err != nil {
		t.Fatal(err)
	}
	ask("with its session", far, 51903)
	dev.Close()
	far, dev = official(t, theirs, ours.PublicKey(), 51904)
	defer dev.Close()
	ask("without a session", far, 51904)
	// The daemon may say where the peer is; the peer knows better.
	peer.UpdateOnly = true
	if err := wg.ConfigureDevice("wgu", wgtypes.Config{Peers: []wgtypes.PeerConfig{peer}}); err != nil {
		t.Fatal(err)
	}
	ask("after another wish", far, 51904)
}

func TestRunEndsWhenTheLinkIsDeleted(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	done := make(chan error, 1)
	go func() { done <- userspace.Run(t.Context(), userspace.Config{Device: "wgv"}) }()
	wg, err := wgctrl.New()
	if err != nil {
		t.Fatal(err)
	}
	defer wg.Close()
	for {
		if _, err := wg.Device("wgv"); err == nil {
			break
		}
		select {
		case err := <-done:
			t.Fatal(err)
		case <-time.After(5 * time.Millisecond):
		}
	}
	testns.Sh(t, "ip link del wgv")
	if err := <-done; err == nil || !strings.Contains(err.Error(), "link wgv is gone") {
		t.Errorf("Run: %v", err)
	}
}

func newKey(t *testing.T) wgtypes.Key {
	k, err := wgtypes.GeneratePrivateKey()
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func answers(t *testing.T, wg *wgctrl.Client, done chan error) {
	t.Helper()
	for {
		if _, err := wg.Device("wgu"); err == nil {
			return
		}
		select {
		case err := <-done:
			t.Fatal(err)
		case <-time.After(5 * time.Millisecond):
		}
	}
}

// official is a device of the official module on a network stack of its own.
func official(t *testing.T, private, peer wgtypes.Key, port int) (*netstack.Net, *device.Device) {
	t.Helper()
	link, stack, err := netstack.CreateNetTUN([]netip.Addr{netip.MustParseAddr("10.244.2.2")}, nil, 1420)
	if err != nil {
		t.Fatal(err)
	}
	dev := device.NewDevice(link, conn.NewDefaultBind(), device.NewLogger(device.LogLevelSilent, ""))
	if err := dev.IpcSet(fmt.Sprintf("private_key=%s\nlisten_port=%d\npublic_key=%s\nallowed_ip=10.244.1.0/24\nendpoint=127.0.0.1:51901\n",
		hex.EncodeToString(private[:]), port, hex.EncodeToString(peer[:]))); err != nil {
		t.Fatal(err)
	}
	if err := dev.Up(); err != nil {
		t.Fatal(err)
	}
	return stack, dev
}
