package udp

import (
	"bytes"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"meshd.dev/pkg/datapath/internal/testns"
)

func TestMain(m *testing.M) { testns.Main(m) }

// pair is two sockets of a family that reach each other over lo.
func pair(t *testing.T, network string, offload bool) (a, b *Socket, to netip.AddrPort) {
	t.Helper()
	var both [2]*Socket
	for i := range both {
		s, err := Open(network, 0)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { s.Close() })
		if err := s.SetOffload(offload); err != nil {
			t.Fatal(err)
		}
		both[i] = s
	}
	lo := netip.AddrFrom4([4]byte{127, 0, 0, 1})
	if network == "udp6" {
		lo = netip.IPv6Loopback()
	}
	return both[0], both[1], netip.AddrPortFrom(lo, both[1].Port())
}

// Datagrams of any sizes arrive as they were sent, in order, whoever cuts them.
func TestDatagrams(t *testing.T) {
	sizes := map[string][]int{
		"one":                         {100},
		"all the same":                repeat(1200, 40),
		"more than a message takes":   repeat(50, 128),
		"more bytes than that":        repeat(1400, 100),
		"the last is shorter":         {900, 900, 100},
		"a short one in between":      {900, 100, 900, 900},
		"growing":                     {1, 2, 3, 4, 5},
		"falling":                     {5, 4, 3, 2, 1},
		"large":                       {30000, 30000, 30000, 8000},
		"more than one call can take": repeat(10, 300),
	}
	for _, network := range []string{"udp4", "udp6"} {
		for _, offload := range []bool{false, true} {
			for name, sizes := range sizes {
				t.Run(fmt.Sprintf("%s/offload %t/%s", network, offload, name), func(t *testing.T) {
					a, b, to := pair(t, network, offload)
					const offset = 8
					var bufs [][]byte
					for i, n := range sizes {
						bufs = append(bufs, bytes.Repeat([]byte{byte(i), byte(i >> 8)}, (n+offset+1)/2)[:n+offset])
					}
					if refused, err := a.Send(bufs, offset, to, to.Addr()); refused || err != nil {
						t.Fatal(refused, err)
					}
					got := collect(t, b, len(bufs), netip.AddrPortFrom(to.Addr(), a.Port()), to.Addr())
					for i := range bufs {
						if !bytes.Equal(got[i], bufs[i][offset:]) {
							t.Errorf("datagram %d: %d bytes, want %d", i, len(got[i]), len(bufs[i])-offset)
						}
					}
				})
			}
		}
	}
}

func repeat(n, times int) (all []int) {
	for range times {
		all = append(all, n)
	}
	return all
}

// collect receives n datagrams.
func collect(t *testing.T, s *Socket, n int, from netip.AddrPort, at Local) (got [][]byte) {
	t.Helper()
	if err := s.SetReadDeadline(time.Now().Add(10 * time.Second)); err != nil {
		t.Fatal(err)
	}
	slab, messages := make([]byte, 2*maxDatagram), make([]Message, batch)
	for len(got) < n {
		k, err := s.Receive(slab, messages, batch)
		if err != nil {
			t.Fatalf("after %d of %d: %v", len(got), n, err)
		}
		for _, m := range messages[:k] {
			if m.From != from || m.To != at {
				t.Errorf("from %s at %s, want %s at %s", m.From, m.To, from, at)
			}
			for i := 0; i < m.Size; i += m.Segment {
				got = append(got, bytes.Clone(slab[m.Offset+i:m.Offset+min(i+m.Segment, m.Size)]))
			}
		}
	}
	return got
}

// Single datagrams that wait are taken together.
func TestReceivesInBatches(t *testing.T) {
	a, b, to := pair(t, "udp4", false)
	for range 20 {
		if _, err := a.Send([][]byte{{1}}, 0, to, netip.Addr{}); err != nil {
			t.Fatal(err)
		}
	}
	n, err := b.Receive(make([]byte, 2*maxDatagram), make([]Message, batch), batch)
	if n != 20 || err != nil {
		t.Errorf("%d at once, %v", n, err)
	}
}

// Datagrams larger than the link's MTU go as fragments, offload or not.
func TestLargerThanTheLink(t *testing.T) {
	testns.New(t)
	testns.Sh(t, "ip link set lo mtu 1280")
	a, b, to := pair(t, "udp4", true)
	bufs := [][]byte{bytes.Repeat([]byte{1}, 2000), bytes.Repeat([]byte{2}, 2000), bytes.Repeat([]byte{3}, 500)}
	if _, err := a.Send(bufs, 0, to, netip.Addr{}); err != nil {
		t.Fatal(err)
	}
	for i, got := range collect(t, b, 3, netip.AddrPortFrom(to.Addr(), a.Port()), to.Addr()) {
		if !bytes.Equal(got, bufs[i]) {
			t.Errorf("datagram %d: %d bytes", i, len(got))
		}
	}
	if !a.segment.Load() {
		t.Error("offload was given up for good")
	}
}

// What anybody says about the MTU of a path cuts no datagram, and routers that
// find one too large may.
func TestBelievesNoICMP(t *testing.T) {
	testns.New(t)
	testns.Sh(t, `
		ip link add eth0 type veth peer name wire; ip link set wire up; ip link set eth0 up
		ip address add 192.0.2.1/24 dev eth0
		ip neighbor replace 192.0.2.9 lladdr $(ip -br link show wire | { read -r n s mac rest; echo $mac; }) dev eth0`)
	to := netip.MustParseAddrPort("192.0.2.9:7")
	testns.Lie(t, "eth0", "wire", netip.MustParseAddr("192.0.2.1"), to.Addr())
	wire, err := net.InterfaceByName("wire")
	if err != nil {
		t.Fatal(err)
	}
	const ethIP = 0x0008 // ETH_P_IP as the wire has it
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	if err := unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: ethIP, Ifindex: wire.Index}); err != nil {
		t.Fatal(err)
	}
	if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: 10}); err != nil {
		t.Fatal(err)
	}
	a, err := Open("udp4", 0)
	if err != nil {
		t.Fatal(err)
	}
	defer a.Close()
	if _, err := a.Send([][]byte{make([]byte, 1400)}, 0, to, netip.Addr{}); err != nil {
		t.Fatal(err)
	}
	for packet := make([]byte, 1<<16); ; {
		n, _, err := unix.Recvfrom(fd, packet, 0)
		if err != nil {
			t.Fatal(err)
		}
		if n < 20 || packet[9] != unix.IPPROTO_UDP {
			continue
		}
		if flags := packet[6] >> 5; n != 20+8+1400 || flags != 0 {
			t.Errorf("a packet of %d bytes, flags %03b; want it whole, and that it may be cut", n, flags)
		}
		return
	}
}

// An address of ours that is asked for is used; one that is gone is not, and
// everything arrives.
func TestLocalAddress(t *testing.T) {
	testns.New(t)
	testns.Sh(t, "ip addr add 192.0.2.7/32 dev lo")
	a, b, to := pair(t, "udp4", true)
	for _, tc := range []struct {
		from, want netip.Addr
		refused    bool
	}{
		{netip.MustParseAddr("192.0.2.7"), netip.MustParseAddr("192.0.2.7"), false},
		{netip.MustParseAddr("192.0.2.8"), to.Addr(), true},
		{netip.Addr{}, to.Addr(), false},
	} {
		refused, err := a.Send([][]byte{{1, 2}, {3, 4}}, 0, to, tc.from)
		if refused != tc.refused || err != nil {
			t.Errorf("from %s: refused %t, %v", tc.from, refused, err)
		}
		collect(t, b, 2, netip.AddrPortFrom(tc.want, a.Port()), to.Addr())
	}
}

func TestWrongFamilyAndClose(t *testing.T) {
	a, b, to := pair(t, "udp4", false)
	if _, err := a.Send([][]byte{{1}}, 0, netip.MustParseAddrPort("[::1]:7"), netip.Addr{}); err == nil {
		t.Error("IPv4 socket sent to an IPv6 address")
	}
	done := make(chan error, 1)
	go func() {
		_, err := b.Receive(make([]byte, 2*maxDatagram), make([]Message, 1), 1)
		done <- err
	}()
	b.Close()
	if err := <-done; !errors.Is(err, net.ErrClosed) {
		t.Errorf("Receive: %v", err)
	}
	if err := a.SetReadDeadline(time.Now()); err != nil {
		t.Fatal(err)
	}
	if _, err := a.Receive(make([]byte, maxDatagram), make([]Message, 1), 1); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("Receive past its deadline: %v", err)
	}
	_ = to
}
