package testns

import (
	"encoding/binary"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// Lie tells the machine behind a veth link that its way to an address takes
// packets of 600 bytes only, from an address that is no router and about an
// echo reply that nobody sent. It returns when the machine believes that.
//
// The link and its other end, peer, are both in the namespace of the caller;
// ours is an IPv4 address on link.
func Lie(t testing.TB, link, peer string, ours, to netip.Addr) {
	t.Helper()
	header := func(protocol byte, size int, src, dst netip.Addr) []byte {
		b := []byte{0x45, 0, 0, byte(size), 0, 1, 0, 0, 64, protocol, 0, 0}
		b = append(append(b, src.AsSlice()...), dst.AsSlice()...)
		binary.BigEndian.PutUint16(b[10:], sum(b))
		return b
	}
	icmp := []byte{3, 4, 0, 0, 0, 0, 600 >> 8, 600 & 0xff}
	icmp = append(icmp, header(unix.IPPROTO_ICMP, 28, ours, to)...)
	icmp = append(icmp, 0, 0, 0xff, 0xff, 0, 0, 0, 0)
	binary.BigEndian.PutUint16(icmp[2:], sum(icmp))
	liar := ours.Next()
	packet := append(header(unix.IPPROTO_ICMP, 20+len(icmp), liar, ours), icmp...)

	near, err := net.InterfaceByName(link)
	if err != nil {
		t.Fatal(err)
	}
	far, err := net.InterfaceByName(peer)
	if err != nil {
		t.Fatal(err)
	}
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	where := &unix.SockaddrLinklayer{Protocol: 0x0008, Ifindex: far.Index, Halen: 6} // ETH_P_IP
	copy(where.Addr[:], near.HardwareAddr)
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(time.Millisecond) {
		if err := unix.Sendto(fd, packet, 0, where); err != nil {
			t.Fatal(err)
		}
		got := Sh(t, "ip route get "+to.String())
		if strings.Contains(got, "mtu 600") {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("the machine does not believe it: %s", got)
		}
	}
}

// sum is the Internet checksum of an even number of bytes.
func sum(b []byte) uint16 {
	n := uint32(0)
	for i := 0; i < len(b); i += 2 {
		n += uint32(b[i])<<8 | uint32(b[i+1])
	}
	n = n>>16 + n&0xffff
	return ^uint16(n + n>>16)
}
