package userspace

import (
	"net"
	"net/netip"
	"testing"
	"time"
)

// Packets to peers of both families, in any order, arrive where they shall.
func TestPeersOfBothFamilies(t *testing.T) {
	b := newBind()
	_, port, err := b.Open(0)
	if err != nil {
		t.Fatal(err)
	}
	defer b.Close()
	var peers []*net.UDPConn
	for _, addr := range []string{"127.0.0.1", "::1"} {
		c, err := net.ListenUDP("udp", &net.UDPAddr{IP: net.ParseIP(addr)})
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		peers = append(peers, c)
	}
	for i, to := range []int{1, 0, 1, 0, 0, 1, 1, 0, 1} {
		ep, err := b.ParseEndpoint(peers[to].LocalAddr().String())
		if err != nil {
			t.Fatal(err)
		}
		if err := b.Send([][]byte{{byte(i)}}, ep, 0); err != nil {
			t.Fatal(err)
		}
		buf := make([]byte, 10)
		_ = peers[to].SetReadDeadline(time.Now().Add(5 * time.Second))
		n, from, err := peers[to].ReadFromUDPAddrPort(buf)
		if err != nil || n != 1 || buf[0] != byte(i) || from.Port() != port {
			t.Errorf("packet %d to %s: %d bytes, from %s, %v; want from port %d", i, ep.DstToString(), n, from, err, port)
		}
	}
}

func TestBothFamiliesReceiveOnOnePort(t *testing.T) {
	b := newBind()
	fns, port, err := b.Open(0)
	if err != nil {
		t.Fatal(err)
	}
	if len(fns) != 2 {
		t.Errorf("%d functions to receive, want one a family", len(fns))
	}
	if _, _, err := newBind().Open(port); err == nil {
		t.Error("the same port was opened twice")
	}
	for _, a := range []string{"127.0.0.1", "::1"} {
		if c, err := net.DialUDP("udp", nil, net.UDPAddrFromAddrPort(netip.AddrPortFrom(netip.MustParseAddr(a), port))); err != nil {
			t.Error(err)
		} else {
			c.Close()
		}
	}
	if err := b.Close(); err != nil {
		t.Error(err)
	}
	if _, again, err := b.Open(port); err != nil || again != port {
		t.Errorf("opened again on %d, %v", again, err)
	}
	b.Close()
}
