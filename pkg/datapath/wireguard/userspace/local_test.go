package userspace_test

import (
	"context"
	"encoding/hex"
	"net"
	"os"
	"strings"
	"testing"
	"time"

	"golang.zx2c4.com/wireguard/wgctrl"
	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	"meshd.dev/pkg/datapath/internal/testns"
	"meshd.dev/pkg/datapath/wireguard/userspace"
)

// A peer of which nobody said where it is calls 127.0.0.2; it is answered, and later written to, from there:
// a translator of addresses between us would let nothing else through. The
// official implementation follows us, so it shows from where we write.
func TestWritesFromWhereItWasCalled(t *testing.T) {
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
	if err := wg.ConfigureDevice("wgu", wgtypes.Config{PrivateKey: &ours, ListenPort: &port, Peers: []wgtypes.PeerConfig{{
		PublicKey: theirs.PublicKey(), AllowedIPs: []net.IPNet{{IP: net.IPv4(10, 244, 2, 0).To4(), Mask: net.CIDRMask(24, 32)}}}}}); err != nil {
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
	far, dev := official(t, theirs, ours.PublicKey(), 51902)
	defer dev.Close()
	const called = "endpoint=127.0.0.2:51901\n"
	key := ours.PublicKey()
	if err := dev.IpcSet("public_key=" + hex.EncodeToString(key[:]) + "\nupdate_only=true\n" + called); err != nil {
		t.Fatal(err)
	}
	c, err := far.DialUDP(nil, &net.UDPAddr{IP: net.IPv4(10, 244, 1, 1), Port: 7})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	buf := make([]byte, 100)
	for deadline, answers := time.Now().Add(20*time.Second), 0; answers < 3; {
		if time.Now().After(deadline) {
			t.Fatal("no answer")
		}
		_, _ = c.Write([]byte("from where?"))
		_ = c.SetReadDeadline(time.Now().Add(200 * time.Millisecond))
		if n, _ := c.Read(buf); n > 0 {
			answers++
		}
	}
	if told, err := dev.IpcGet(); err != nil || !strings.Contains(told, called) {
		t.Errorf("the peer sees us elsewhere: %s, %v", told, err)
	}
}
