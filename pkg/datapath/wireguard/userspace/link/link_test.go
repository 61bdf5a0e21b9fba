package link

import (
	"errors"
	"net"
	"net/netip"
	"os"
	"testing"
	"time"

	"github.com/tailscale/wireguard-go/tun"
	"golang.org/x/sys/unix"

	"meshd.dev/pkg/datapath/internal/testns"
)

func TestMain(m *testing.M) { testns.Main(m) }

func open(t *testing.T) *Device {
	t.Helper()
	testns.New(t)
	d, err := Open("lnk", 1420)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { d.Close() })
	return d
}

func TestEvents(t *testing.T) {
	d := open(t)
	expect := func(what string, want tun.Event) {
		t.Helper()
		select {
		case got := <-d.Events():
			if got != want {
				t.Errorf("%s: event %d, want %d", what, got, want)
			}
		case <-time.After(10 * time.Second):
			t.Fatalf("%s: no event", what)
		}
	}
	expect("at first", tun.EventMTUUpdate)
	testns.Sh(t, "ip link set lnk up")
	expect("up", tun.EventUp)
	testns.Sh(t, "ip link set lnk mtu 1300")
	expect("other MTU", tun.EventMTUUpdate)
	if mtu, err := d.MTU(); mtu != 1300 || err != nil {
		t.Errorf("MTU %d, %v", mtu, err)
	}
	testns.Sh(t, "ip link set lnk down")
	expect("down", tun.EventDown)
	if err := d.Close(); err != nil {
		t.Error(err)
	}
	if _, ok := <-d.Events(); ok {
		t.Error("an event after Close")
	}
}

// Small packets that wait are read at once, in order.
func TestReadsInBatches(t *testing.T) {
	d := open(t)
	testns.Sh(t, "ip addr add 10.0.0.1/24 dev lnk; ip link set lnk up")
	const n = 50
	c, err := net.DialUDP("udp4", nil, net.UDPAddrFromAddrPort(netip.MustParseAddrPort("10.0.0.2:7")))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	for i := range n {
		if _, err := c.Write([]byte{byte(i)}); err != nil {
			t.Fatal(err)
		}
	}
	slab, packets := make([]byte, 2<<16), make([]tun.ReadPacket, d.BatchSize())
	var got []byte
	reads := 0
	for ; len(got) < n; reads++ {
		k, err := d.Read(slab, packets)
		if err != nil {
			t.Fatal(err)
		}
		for _, p := range packets[:k] {
			if p.Offset < tun.ReadPacketSpacing {
				t.Fatalf("packet at %d, no room before it", p.Offset)
			}
			if b := slab[p.Offset : p.Offset+p.Size]; p.Size == 29 && b[0] == 0x45 { // others are the kernel's own
				got = append(got, b[28])
			}
		}
	}
	if reads > 2 {
		t.Errorf("%d reads for what one could hold", reads)
	}
	for i, b := range got {
		if int(b) != i {
			t.Fatalf("order %v", got)
		}
	}
}

// A kernel that refuses an offload loses no packet to it.
func TestRefusedOffload(t *testing.T) {
	d := open(t)
	testns.Sh(t, "ip addr add 10.0.0.1/24 dev lnk; ip link set lnk up")
	s, err := net.ListenUDP("udp4", net.UDPAddrFromAddrPort(netip.MustParseAddrPort("10.0.0.1:0")))
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	if have, err := d.SetOffloads(TCP | UDP); have&UDP == 0 || err != nil {
		t.Fatalf("offloads %s, %v", have, err)
	}
	write := d.out.put
	d.out.put = func(fd uintptr) bool {
		if d.out.header[1] != unix.VIRTIO_NET_HDR_GSO_NONE {
			d.out.errno = unix.EINVAL
			return true
		}
		return write(fd)
	}
	var packets [][]byte
	for i := range 3 {
		p := pkt{udp: true, size: 100, seq: uint32(i)}.bytes()
		copy(p[12:20], []byte{10, 0, 0, 2, 10, 0, 0, 1})
		p[22], p[23] = byte(s.LocalAddr().(*net.UDPAddr).Port>>8), byte(s.LocalAddr().(*net.UDPAddr).Port)
		p[26], p[27] = 0, 0
		sum := ^tun.Checksum(p[20:], tun.PseudoHeaderChecksum(17, p[12:16], p[16:20], 108))
		p[26], p[27] = byte(sum>>8), byte(sum)
		packets = append(packets, p)
	}
	if n, err := d.Write(packets, 0); n != 3 || err != nil {
		t.Errorf("wrote %d, %v", n, err)
	}
	_ = s.SetReadDeadline(time.Now().Add(10 * time.Second))
	for i := range 3 {
		buf := make([]byte, 200)
		if n, _, err := s.ReadFromUDPAddrPort(buf); n != 100 || err != nil || buf[0] != byte(i) {
			t.Errorf("datagram %d: %d bytes, %v", i, n, err)
		}
	}
	if d.Offloads() != TCP {
		t.Errorf("offloads %s afterwards", d.Offloads())
	}
}

func TestCloseEndsRead(t *testing.T) {
	d := open(t)
	done := make(chan error, 1)
	go func() {
		_, err := d.Read(make([]byte, 2<<16), make([]tun.ReadPacket, batch))
		done <- err
	}()
	d.Close()
	if err := <-done; !errors.Is(err, os.ErrClosed) {
		t.Errorf("Read: %v", err)
	}
	if _, err := d.Write([][]byte{pkt{size: 1}.bytes()}, 0); !errors.Is(err, os.ErrClosed) {
		t.Errorf("Write: %v", err)
	}
}

func TestUnknownDevice(t *testing.T) {
	testns.New(t)
	if _, err := Open("a/name/that/cannot/be", 1420); err == nil {
		t.Error("a link that cannot be was made")
	}
	if err := testns.Exec("ip", "link", "add", "taken", "type", "veth", "peer", "name", "other"); err != nil {
		t.Fatal(err)
	}
	if _, err := Open("taken", 1420); !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.EBUSY) {
		t.Errorf("a link that is taken: %v", err)
	}
}
