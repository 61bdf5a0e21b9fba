package link

import (
	"bytes"
	"encoding/binary"
	"errors"
	"testing"
	"time"

	"github.com/tailscale/wireguard-go/tun"
	"golang.org/x/sys/unix"

	"meshd.dev/pkg/datapath/internal/testns"
)

// A connection of ours to 10.0.0.2, played by the test, which takes segments of
// 100 bytes, a whole window of them: nothing is lost of what the kernel makes
// one packet of.
func TestSmallSegments(t *testing.T) {
	d := open(t)
	testns.Sh(t, `
		ip addr add 10.0.0.1/32 dev lnk; ip link set lnk up
		ip route add 10.0.0.2 dev lnk src 10.0.0.1 initcwnd 1000`)
	if have, err := d.SetOffloads(TCP); have != TCP || err != nil {
		t.Fatalf("offloads %s, %v", have, err)
	}
	if err := d.File().SetReadDeadline(time.Now().Add(10 * time.Second)); err != nil {
		t.Fatal(err)
	}
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_SNDBUFFORCE, 4<<20)
	if err := unix.Connect(fd, &unix.SockaddrInet4{Port: 7, Addr: [4]byte{10, 0, 0, 2}}); !errors.Is(err, unix.EINPROGRESS) {
		t.Fatal(err)
	}
	sent := make([]byte, 60000)
	for i := range sent {
		sent[i] = byte(i*7 + i>>8)
	}
	var got []byte
	var base uint32
	slab, packets := make([]byte, 2<<16), make([]tun.ReadPacket, d.BatchSize())
	for len(got) < len(sent) {
		n, err := d.Read(slab, packets)
		if err != nil {
			t.Fatalf("after %d bytes of %d: %v", len(got), len(sent), err)
		}
		for _, p := range packets[:n] {
			b := slab[p.Offset : p.Offset+p.Size]
			if len(b) < 40 || b[0] != 0x45 || b[9] != unix.IPPROTO_TCP {
				continue // the kernel's own
			}
			seq, payload := binary.BigEndian.Uint32(b[24:]), b[20+b[32]>>4*4:]
			switch {
			case b[33]&0x02 != 0: // SYN
				base = seq + 1
				if _, err := d.Write([][]byte{welcome(b)}, 0); err != nil {
					t.Fatal(err)
				}
				if n, err := unix.Write(fd, sent); n != len(sent) {
					t.Fatalf("wrote %d bytes, %v", n, err)
				}
			case len(payload) > 0:
				if int(seq-base) != len(got) {
					t.Fatalf("byte %d comes after byte %d", seq-base, len(got))
				}
				got = append(got, payload...)
			}
		}
	}
	if !bytes.Equal(got, sent) {
		t.Error("it arrived otherwise than it was sent")
	}
}

// welcome answers a SYN: segments of 100 bytes, a window of 64 KB.
func welcome(syn []byte) []byte {
	b := []byte{0x45, 0, 0, 44, 0, 1, 0, 0, 64, unix.IPPROTO_TCP, 0, 0, 10, 0, 0, 2, 10, 0, 0, 1}
	binary.BigEndian.PutUint16(b[10:], ^tun.Checksum(b, 0))
	b = append(b, syn[22], syn[23], syn[20], syn[21]) // ports
	b = append(b, 0, 0, 0, 1)
	b = binary.BigEndian.AppendUint32(b, binary.BigEndian.Uint32(syn[24:])+1)
	b = append(b, 6<<4, 0x12, 0xff, 0xff, 0, 0, 0, 0, 2, 4, 0, 100)
	binary.BigEndian.PutUint16(b[36:], ^tun.Checksum(b[20:], tun.PseudoHeaderChecksum(unix.IPPROTO_TCP, b[12:16], b[16:20], 24)))
	return b
}
