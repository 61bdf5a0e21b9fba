package cni

import (
	endian "encoding/binary"
	"errors"
	"hash/crc32"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"meshd.dev/pkg/mesh"
)

// The addresses: 192.0.2.1 and 2001:db8::1 are the node's, 8132 its port, 132 the
// pod's, 40000 the client's. Kernels without SCTP translate it all the same, so
// its packets are made by hand: an INIT and the INIT ACK that answers it.
func TestSCTPHostPortsWork(t *testing.T) {
	l := newLab(t)
	run(t, "ip", "addr", "add", "192.0.2.1/32", "dev", "lo")
	run(t, "ip", "addr", "add", "2001:db8::1/128", "dev", "lo", "nodad")
	pod, neighbour := l.newPod(), l.newPod()
	r := rt("web", pod)
	r.CapabilityArgs = map[string]any{"portMappings": []any{map[string]any{"hostPort": 8132, "containerPort": 132, "protocol": "sctp"}}}
	l.mustAdd(r)
	l.mustAdd(rt("neighbour", neighbour))
	for _, node := range []netip.Addr{netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("2001:db8::1")} {
		for name, from := range map[string]string{"another pod": neighbour, "the pod itself": pod, "the node": l.host.Name()} {
			client, server := sctpSocket(t, from, node), sctpSocket(t, pod, node)
			const tag, ackTag = 0x01020304, 0x0a0b0c0d
			init := carry(t, name+": INIT at the pod", client, node, sctpPacket(40000, 8132, 0, sctpInit, tag),
				server, func(p sctpSeen) bool { return p.to == 132 && p.kind == sctpInit })
			if init.tag != 0 || init.from == 0 {
				t.Errorf("%s: the pod sees %+v", name, init)
			}
			ack := carry(t, name+": INIT ACK at the client", server, init.source, sctpPacket(132, init.from, tag, sctpInitAck, ackTag),
				client, func(p sctpSeen) bool { return p.to == 40000 && p.kind == sctpInitAck })
			if want := (sctpSeen{source: node, from: 8132, to: 40000, tag: tag, kind: sctpInitAck}); ack != want {
				t.Errorf("%s: answer is %+v, want %+v", name, ack, want)
			}
			client.close()
			server.close()
		}
	}
	l.mustDel(r)
	for _, e := range l.elements() {
		if !strings.HasPrefix(e.Set, mesh.PodSet) {
			t.Errorf("after DEL there is %s in %s", e, e.Set)
		}
	}
}

// A hostIP of a family that the pod has not is passed over, as by portmap.
func TestAHostPortOfAnotherFamily(t *testing.T) {
	l := newLab(t, func(n *Network) { n.PodCIDRs = n.PodCIDRs[:1] })
	r := rt("web", l.newPod())
	r.CapabilityArgs = map[string]any{"portMappings": []any{
		map[string]any{"hostPort": 80, "containerPort": 80, "hostIP": "2001:db8::1"},
		map[string]any{"hostPort": 81, "containerPort": 80, "hostIP": "::"},
		map[string]any{"hostPort": 82, "containerPort": 80, "hostIP": "192.0.2.1"},
	}}
	l.mustAdd(r)
	var ports []string
	for _, e := range l.elements() {
		if strings.HasPrefix(e.Set, mesh.HostPortMap) {
			ports = append(ports, e.String())
		}
	}
	if want := []string{"192.0.2.1 . tcp . 82 : 10.244.1.2 . 80"}; !slices.Equal(ports, want) {
		t.Errorf("host ports %q, want %q", ports, want)
	}
	if err := l.check(r); err != nil {
		t.Errorf("CHECK: %v", err)
	}
	l.applyFirewall()
	if err := l.check(r); err != nil {
		t.Errorf("CHECK after the daemon's round: %v", err)
	}
}

// Chunks of SCTP (RFC 9260, section 3.3).
const (
	sctpInit    = 1
	sctpInitAck = 2
)

// sctpPacket has one chunk: an INIT or INIT ACK with the tag its sender wants to
// be called by.
func sctpPacket(from, to uint16, verification uint32, kind byte, tag uint32) []byte {
	b := endian.BigEndian.AppendUint16(nil, from)
	b = endian.BigEndian.AppendUint16(b, to)
	b = endian.BigEndian.AppendUint32(b, verification)
	b = append(b, 0, 0, 0, 0) // checksum
	b = append(b, kind, 0, 0, 20)
	b = endian.BigEndian.AppendUint32(b, tag)
	b = append(b, 0, 1, 0, 0, 0, 1, 0, 1, 0, 0, 0, 1) // window, one stream each way, first TSN
	endian.LittleEndian.PutUint32(b[8:], crc32.Checksum(b, crc32.MakeTable(crc32.Castagnoli)))
	return b
}

// sctpSeen is what a packet says, and who sent it.
type sctpSeen struct {
	source   netip.Addr
	from, to uint16
	tag      uint32
	kind     byte
}

// rawSCTP sends and receives SCTP packets in a namespace.
type rawSCTP struct {
	fd int
	v4 bool
}

func sctpSocket(t *testing.T, where string, family netip.Addr) rawSCTP {
	t.Helper()
	s := rawSCTP{v4: family.Is4()}
	domain := unix.AF_INET6
	if s.v4 {
		domain = unix.AF_INET
	}
	open := func() (err error) {
		s.fd, err = unix.Socket(domain, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_SCTP)
		return err
	}
	var err error
	if strings.HasPrefix(where, "/proc/") { // here
		err = open()
	} else {
		var ns *netns
		if ns, err = openNetns(where); err == nil {
			err = ns.visit(open)
			ns.Close()
		}
	}
	if err == nil {
		err = unix.SetsockoptTimeval(s.fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: 1})
	}
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func (s rawSCTP) close() { _ = unix.Close(s.fd) }

func (s rawSCTP) send(t *testing.T, to netip.Addr, packet []byte) {
	t.Helper()
	var addr unix.Sockaddr = &unix.SockaddrInet6{Addr: to.As16()}
	if s.v4 {
		addr = &unix.SockaddrInet4{Addr: to.As4()}
	}
	if err := unix.Sendto(s.fd, packet, 0, addr); err != nil {
		t.Fatalf("send to %s: %v", to, err)
	}
}

// carry sends a packet until what is wanted of it arrives, as SCTP does itself.
func carry(t *testing.T, what string, from rawSCTP, dst netip.Addr, packet []byte, to rawSCTP, wanted func(sctpSeen) bool) sctpSeen {
	t.Helper()
	for range 10 {
		from.send(t, dst, packet)
		if p, ok := to.receive(t, what, wanted); ok {
			return p
		}
	}
	t.Fatalf("%s: nothing came", what)
	return sctpSeen{}
}

// receive waits a second for a packet of which wanted is true. Its checksum must
// be right.
func (s rawSCTP) receive(t *testing.T, what string, wanted func(sctpSeen) bool) (sctpSeen, bool) {
	t.Helper()
	b := make([]byte, 1500)
	for range 100 {
		n, from, err := unix.Recvfrom(s.fd, b, 0)
		if errors.Is(err, unix.EAGAIN) {
			return sctpSeen{}, false
		}
		if err != nil {
			t.Fatalf("%s: %v", what, err)
		}
		packet := b[:n]
		var p sctpSeen
		switch a := from.(type) {
		case *unix.SockaddrInet4:
			p.source = netip.AddrFrom4(a.Addr)
			packet = packet[int(packet[0]&0xf)*4:] // behind the IP header
		case *unix.SockaddrInet6:
			p.source = netip.AddrFrom16(a.Addr)
		}
		if len(packet) < 32 {
			continue
		}
		p.from, p.to = endian.BigEndian.Uint16(packet), endian.BigEndian.Uint16(packet[2:])
		p.tag, p.kind = endian.BigEndian.Uint32(packet[4:]), packet[12]
		if !wanted(p) {
			continue
		}
		sum := endian.LittleEndian.Uint32(packet[8:])
		copy(packet[8:12], []byte{0, 0, 0, 0})
		if want := crc32.Checksum(packet, crc32.MakeTable(crc32.Castagnoli)); sum != want {
			t.Errorf("%s: checksum %08x, want %08x", what, sum, want)
		}
		return p, true
	}
	return sctpSeen{}, false
}
