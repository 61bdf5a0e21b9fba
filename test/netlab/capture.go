package netlab

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// A Capture reads every packet as it enters the underlay, once.
type Capture struct {
	fd      int
	marker  []byte
	inner   []netip.Prefix
	done    chan struct{}
	stop    chan struct{}
	traffic Traffic
}

// Traffic is what a Capture has seen.
type Traffic struct {
	// Packets and Bytes by kind: "wireguard", "arp", "icmp", "icmp6", "other",
	// or protocol and the lower port, as "tcp/6443".
	Packets map[string]int
	Bytes   map[string]int
	// Marked counts packets that hold the marker in clear; the first ones are in MarkedKinds.
	Marked      int
	MarkedKinds []string
	// Inner counts packets that show an inner address on the underlay.
	Inner      int
	InnerKinds []string
	// Dropped packets were not looked at.
	Dropped int
}

// String is one line: kinds in order of name.
func (t Traffic) String() string {
	var b strings.Builder
	for _, k := range t.Kinds() {
		fmt.Fprintf(&b, "%s %d, ", k, t.Packets[k])
	}
	fmt.Fprintf(&b, "with the marker in clear %d, with inner addresses %d, not seen %d", t.Marked, t.Inner, t.Dropped)
	return b.String()
}

// Kinds in order of name.
func (t Traffic) Kinds() []string {
	var kinds []string
	for k := range t.Packets {
		kinds = append(kinds, k)
	}
	slices.Sort(kinds)
	return kinds
}

// Capture starts reading the underlay. Packets that hold marker, or that go
// from or to an address in inner, are counted: neither may be seen in clear.
func (l *Lab) Capture(marker []byte, inner ...netip.Prefix) (*Capture, error) {
	c := &Capture{marker: marker, inner: inner, done: make(chan struct{}), stop: make(chan struct{}),
		traffic: Traffic{Packets: map[string]int{}, Bytes: map[string]int{}}}
	err := inNamespace(l.netns(), func() (err error) {
		all := int(htons(unix.ETH_P_ALL))
		if c.fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, all); err != nil {
			return fmt.Errorf("open packet socket: %w", err)
		}
		return errors.Join(
			unix.SetsockoptInt(c.fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 64<<20),
			unix.SetsockoptTimeval(c.fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Usec: 50_000}))
	})
	if err != nil {
		return nil, err
	}
	go c.read()
	return c, nil
}

// Stop ends the capture, when what is under way has been read, and says what it saw.
func (c *Capture) Stop() Traffic {
	close(c.stop)
	<-c.done
	if s, err := unix.GetsockoptTpacketStats(c.fd, unix.SOL_PACKET, unix.PACKET_STATISTICS); err == nil {
		c.traffic.Dropped = int(s.Drops)
	}
	unix.Close(c.fd)
	return c.traffic
}

func (c *Capture) read() {
	defer close(c.done)
	buf := make([]byte, 1<<17)
	ends := time.Time{}
	for {
		select {
		case <-c.stop:
			if ends.IsZero() {
				ends = time.Now().Add(2 * time.Second)
			}
		default:
		}
		n, from, err := unix.Recvfrom(c.fd, buf, 0)
		stopping := !ends.IsZero()
		switch {
		case errors.Is(err, unix.EAGAIN) && stopping, stopping && time.Now().After(ends):
			return
		case errors.Is(err, unix.EAGAIN), errors.Is(err, unix.EINTR):
			continue
		case err != nil:
			return
		}
		// Each packet passes once as it comes in and once as it goes out.
		if ll, ok := from.(*unix.SockaddrLinklayer); ok && ll.Pkttype != unix.PACKET_OUTGOING && ll.Hatype == unix.ARPHRD_ETHER {
			c.count(buf[:n])
		}
	}
}

func (c *Capture) count(frame []byte) {
	t := &c.traffic
	kind, src, dst := classify(frame)
	t.Packets[kind]++
	t.Bytes[kind] += len(frame)
	if len(c.marker) > 0 && bytes.Contains(frame, c.marker) {
		t.Marked++
		t.MarkedKinds = note(t.MarkedKinds, fmt.Sprintf("%s %s > %s", kind, src, dst))
	}
	if slices.ContainsFunc(c.inner, func(p netip.Prefix) bool { return p.Contains(src) || p.Contains(dst) }) {
		t.Inner++
		t.InnerKinds = note(t.InnerKinds, fmt.Sprintf("%s %s > %s", kind, src, dst))
	}
}

// note keeps the first few different lines.
func note(lines []string, line string) []string {
	if len(lines) >= 10 || slices.Contains(lines, line) {
		return lines
	}
	return append(lines, line)
}

// wireguardPort is the port the tunnels use.
const wireguardPort = 51820

// clusterPorts of TCP are the API's and the agents'.
var clusterPorts = []uint16{6443, 10250}

// classify names what an Ethernet frame is and whom it is between.
func classify(f []byte) (kind string, src, dst netip.Addr) {
	if len(f) < 14 {
		return "other", src, dst
	}
	p := f[14:]
	switch binary.BigEndian.Uint16(f[12:]) {
	case unix.ETH_P_ARP:
		return "arp", src, dst
	case unix.ETH_P_IP:
		if len(p) < 20 || len(p) < int(p[0]&15)*4 {
			return "other", src, dst
		}
		src, dst = netip.AddrFrom4([4]byte(p[12:16])), netip.AddrFrom4([4]byte(p[16:20]))
		return transport(p[9], p[int(p[0]&15)*4:]), src, dst
	case unix.ETH_P_IPV6:
		if len(p) < 40 {
			return "other", src, dst
		}
		src, dst = netip.AddrFrom16([16]byte(p[8:24])), netip.AddrFrom16([16]byte(p[24:40]))
		next, rest := p[6], p[40:]
		if next == 0 && len(rest) >= 8 { // hop-by-hop options, as MLD has
			next, rest = rest[0], rest[8:]
		}
		return transport(next, rest), src, dst
	}
	return "other", src, dst
}

func transport(proto byte, p []byte) string {
	switch proto {
	case unix.IPPROTO_ICMP:
		return "icmp"
	case unix.IPPROTO_ICMPV6:
		return "icmp6"
	case unix.IPPROTO_TCP, unix.IPPROTO_UDP:
		if len(p) < 4 {
			return "other"
		}
		a, b := binary.BigEndian.Uint16(p), binary.BigEndian.Uint16(p[2:])
		if proto == unix.IPPROTO_UDP && (a == wireguardPort || b == wireguardPort) {
			return "wireguard"
		}
		name := "tcp/"
		if proto == unix.IPPROTO_UDP {
			name = "udp/"
		}
		for _, known := range clusterPorts { // a translated client's own port may be a low one
			if proto == unix.IPPROTO_TCP && (a == known || b == known) {
				return fmt.Sprintf("%s%d", name, known)
			}
		}
		return fmt.Sprintf("%s%d", name, min(a, b))
	}
	return "other"
}

func htons(v uint16) uint16 { return v<<8 | v>>8 }
