package datapath

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"meshd.dev/pkg/datapath/internal/testns"
	"meshd.dev/pkg/mesh"
)

// roleFlood sends a marker to addresses for ever, a thousand times a second.
func roleFlood(args []string) error {
	socket, err := net.ListenUDP("udp", nil)
	if err != nil {
		return err
	}
	tick := time.NewTicker(time.Millisecond)
	for i := 0; ; i++ {
		<-tick.C
		to, err := net.ResolveUDPAddr("udp", args[i%len(args)])
		if err != nil {
			return err
		}
		_, _ = socket.WriteTo([]byte(marker), to) // refused, blackholed: all the same
	}
}

// roleForge sends UDP packets under a source address that need not be its own,
// past its own network stack: forge TEXT SOURCE DESTINATION, whole and in two
// fragments.
func roleForge(args []string) error {
	from, to := netip.MustParseAddr(args[1]), netip.MustParseAddrPort(args[2])
	link, err := net.InterfaceByName("eth0")
	if err != nil {
		return err
	}
	protocol := uint16(unix.ETH_P_IP)
	if from.Is6() {
		protocol = unix.ETH_P_IPV6
	}
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM, 0)
	if err != nil {
		return err
	}
	gateway, err := hostEnd()
	if err != nil {
		return err
	}
	sa := &unix.SockaddrLinklayer{Protocol: protocol<<8 | protocol>>8, Ifindex: link.Index, Halen: 6}
	copy(sa.Addr[:], gateway)
	for _, packet := range forged(args[0], from, to) {
		if err := unix.Sendto(fd, packet, 0, sa); err != nil {
			return err
		}
	}
	return nil
}

// hostEnd is the MAC of the other end of a pod's link.
func hostEnd() (net.HardwareAddr, error) {
	out, err := exec.Command("ip", "neigh", "show", "169.254.1.1").Output()
	fields := strings.Fields(string(out))
	if err != nil || len(fields) < 5 {
		return nil, fmt.Errorf("neighbour %q: %v", out, err)
	}
	return net.ParseMAC(fields[4])
}

// forged are a UDP packet, and the same in two fragments.
func forged(text string, from netip.Addr, to netip.AddrPort) (packets [][]byte) {
	udp := make([]byte, 8+64)
	binary.BigEndian.PutUint16(udp, 7777)
	binary.BigEndian.PutUint16(udp[2:], to.Port())
	binary.BigEndian.PutUint16(udp[4:], uint16(len(udp)))
	copy(udp[8:], strings.Repeat(text+" ", 64/(len(text)+1)))
	pseudo := append(append([]byte{}, from.AsSlice()...), to.Addr().AsSlice()...)
	pseudo = append(pseudo, 0, unix.IPPROTO_UDP, byte(len(udp)>>8), byte(len(udp)))
	binary.BigEndian.PutUint16(udp[6:], sum(append(pseudo, udp...)))
	const half = 40
	if from.Is4() {
		head := func(offset, length int, more bool) []byte {
			h := make([]byte, 20)
			h[0], h[8], h[9] = 0x45, 64, unix.IPPROTO_UDP
			binary.BigEndian.PutUint16(h[2:], uint16(20+length))
			binary.BigEndian.PutUint16(h[4:], uint16(os.Getpid()))
			flags := uint16(offset / 8)
			if more {
				flags |= 0x2000
			}
			binary.BigEndian.PutUint16(h[6:], flags)
			copy(h[12:], from.AsSlice())
			copy(h[16:], to.Addr().AsSlice())
			binary.BigEndian.PutUint16(h[10:], sum(h))
			return h
		}
		return [][]byte{append(head(0, len(udp), false), udp...),
			append(head(0, half, true), udp[:half]...), append(head(half, len(udp)-half, false), udp[half:]...)}
	}
	head := func(next byte, length int) []byte {
		h := make([]byte, 40)
		h[0], h[6], h[7] = 0x60, next, 64
		binary.BigEndian.PutUint16(h[4:], uint16(length))
		copy(h[8:], from.AsSlice())
		copy(h[24:], to.Addr().AsSlice())
		return h
	}
	fragment := func(offset int, more byte, body []byte) []byte {
		f := make([]byte, 8)
		f[0] = unix.IPPROTO_UDP
		binary.BigEndian.PutUint16(f[2:], uint16(offset)|uint16(more))
		binary.BigEndian.PutUint32(f[4:], uint32(os.Getpid()))
		return append(append(head(unix.IPPROTO_FRAGMENT, 8+len(body)), f...), body...)
	}
	return [][]byte{append(head(unix.IPPROTO_UDP, len(udp)), udp...), fragment(0, 1, udp[:half]), fragment(half, 0, udp[half:])}
}

// roleTooBig claims that what one address sent to another was too big: toobig
// SENDER DESTINATION TO.
func roleTooBig(args []string) error {
	from, dst, to := netip.MustParseAddr(args[0]), netip.MustParseAddr(args[1]), netip.MustParseAddr(args[2])
	// What is said to have been sent: an echo, which belongs to no socket.
	about := make([]byte, 20+8)
	about[0], about[2], about[3], about[8], about[9] = 0x45, 1500>>8, 1500&0xff, 64, unix.IPPROTO_ICMP
	copy(about[12:], from.AsSlice())
	copy(about[16:], dst.AsSlice())
	binary.BigEndian.PutUint16(about[10:], sum(about[:20]))
	message, family, protocol := []byte{3, 4, 0, 0, 0, 0, 552 >> 8, 552 & 0xff}, unix.AF_INET, unix.IPPROTO_ICMP
	var sa unix.Sockaddr = &unix.SockaddrInet4{Addr: [4]byte(to.AsSlice())}
	if to.Is6() {
		about = make([]byte, 40+8)
		about[0], about[4], about[5], about[6], about[7], about[40] = 0x60, 1460>>8, 1460&0xff, unix.IPPROTO_ICMPV6, 64, 128
		copy(about[8:], from.AsSlice())
		copy(about[24:], dst.AsSlice())
		message, family, protocol = []byte{2, 0, 0, 0, 0, 0, 1290 >> 8, 1290 & 0xff}, unix.AF_INET6, unix.IPPROTO_ICMPV6
		sa = &unix.SockaddrInet6{Addr: to.As16()}
	}
	message = append(message, about...)
	if to.Is4() { // of the other the kernel makes it
		binary.BigEndian.PutUint16(message[2:], sum(message))
	}
	fd, err := unix.Socket(family, unix.SOCK_RAW, protocol)
	if err != nil {
		return err
	}
	return unix.Sendto(fd, message, 0, sa)
}

// sum is the checksum of RFC 1071.
func sum(b []byte) uint16 {
	var s uint32
	for i, c := range b {
		s += uint32(c) << (8 * (1 - i%2))
	}
	for s > 0xffff {
		s = s>>16 + s&0xffff
	}
	return ^uint16(s)
}

// capture of what comes to a link of a pod, or of the test's own namespace.
func capture(t *testing.T, enter []string, link, what string) (read func() []byte) {
	t.Helper()
	file := filepath.Join(t.TempDir(), "seen.pcap")
	args := append(append([]string{}, enter...), "tcpdump", "-i", link, "-U", "-Z", "root", "-w", file, what)
	cmd := exec.Command(args[0], args[1:]...)
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = cmd.Process.Kill(); _ = cmd.Wait() })
	eventually(t, "tcpdump listens", func() error {
		if i, err := os.Stat(file); err != nil || i.Size() < 24 {
			return fmt.Errorf("not yet: %v", err)
		}
		return nil
	})
	return func() []byte {
		b, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
}

// Two machines, a and b; pods 2 and 3 on each. a's pod 3 forges its source in
// every way; nothing of it arrives anywhere, and what it says under its own
// addresses does.
func TestForgedSources(t *testing.T) {
	join := underlay(t)
	a, b := newMachine(t, "a", 1), newMachine(t, "b", 2)
	state := mesh.State{Nodes: []mesh.Node{a.node(), b.node()}}
	for _, m := range []*machine{a, b} {
		m.pod(2)
		m.pod(3)
	}
	state.Services = []*mesh.Service{service(1, 0, addrs(b.podAddr(2), b.podAddr6(2))...)}
	tell(state, a, b)
	settled(t, a, b)
	a.reaches(t, "pod to pod", b.podAddr(2))
	join(t)
	seen := map[string]func() []byte{"wire": capture(t, nil, "br0", "")}
	for name, m := range map[string]*machine{"a's neighbour": a, "b's pod": b} {
		seen[name] = capture(t, []string{"nsenter", "-t", m.ns, "-n", "-m", "ip", "netns", "exec", "p2"}, "eth0", "udp or ip6 proto 44 or ip[6:2] & 0x3fff != 0")
		m.run(0, "serve", "udp", ":5353", m.name+"/host")
	}
	seen["a itself"] = capture(t, []string{"nsenter", "-t", a.ns, "-n", "-m"}, "mesh0", "")
	forge := func(text, from, to string) {
		if out, err := a.in_(3, exe(), "forge", text, from, to); err != nil {
			t.Fatalf("forge %s to %s: %v %s", from, to, err, out)
		}
	}
	four, six := []string{a.podAddr(2), "10.244.1.77", b.podAddr(2), "10.244.2.1", "10.244.1.1", "10.244.99.9", "192.0.2.1", "192.0.2.2", "192.0.2.254", "10.96.0.1", "127.0.0.1", "0.0.0.0", "203.0.113.5"},
		[]string{a.podAddr6(2), "fd00:10:244:1::77", b.podAddr6(2), "fd00:10:244:2::1", "fd00:10:244:1::1", "fd00:10:244:99::9", "2001:db8::1", "2001:db8::2", "fd00:10:96::1", "::1", "::", "2001:db8:5::5"}
	for _, from := range four {
		for _, to := range []string{a.podAddr(2), b.podAddr(2), "10.96.0.1", "10.244.1.1", "192.0.2.1", "192.0.2.254"} {
			forge("FORGED", from, to+":53")
		}
	}
	for _, from := range six {
		for _, to := range []string{a.podAddr6(2), b.podAddr6(2), "fd00:10:96::1", "fd00:10:244:1::1", "2001:db8::1", "2001:db8::fe"} {
			forge("FORGED", from, "["+to+"]:53")
		}
	}
	for _, to := range []string{a.podAddr(2), b.podAddr(2)} {
		forge("HONEST", a.podAddr(3), to+":53")
	}
	for _, to := range []string{a.podAddr6(2), b.podAddr6(2)} {
		forge("HONEST", a.podAddr6(3), "["+to+"]:53")
	}
	for _, name := range []string{"a's neighbour", "b's pod"} {
		eventually(t, "what is honest arrives at "+name, func() error {
			// Of each packet 9 times: whole, and again in fragments, for each family.
			if n := bytes.Count(seen[name](), []byte("HONEST")); n < 36-4 {
				return fmt.Errorf("%d times", n)
			}
			return nil
		})
	}
	for name, read := range seen {
		if n := bytes.Count(read(), []byte("FORGED")); n > 0 {
			t.Errorf("%s: a forged packet arrived: %d times", name, n)
		}
	}
}

// Pods, here and elsewhere, do not tell a machine how large its packets to
// others may be; routers do.
func TestPodsDoNotShrinkPaths(t *testing.T) {
	join := underlay(t)
	a, b := newMachine(t, "a", 1), newMachine(t, "b", 2)
	tell(mesh.State{Nodes: []mesh.Node{a.node(), b.node()}}, a, b)
	a.pod(2)
	b.pod(2)
	settled(t, a, b)
	a.reaches(t, "pod to pod", b.podAddr(2))
	join(t)
	claim := func(m *machine, pod int, host string, to ...string) {
		for _, to := range to {
			sender, dst := "192.0.2.1", "192.0.2."+host
			if netip.MustParseAddr(to).Is6() {
				sender, dst = "2001:db8::1", "2001:db8::"+host
			}
			var out string
			var err error
			if m == nil {
				out, err = testns.Output(exe(), "toobig", sender, dst, to)
			} else {
				out, err = m.in_(pod, exe(), "toobig", sender, dst, to)
			}
			if err != nil {
				t.Fatalf("to %s about %s: %v %s", to, dst, err, out)
			}
		}
	}
	claim(a, 2, "77", "10.244.1.1", "192.0.2.1", "fd00:10:244:1::1", "2001:db8::1")
	claim(b, 2, "78", "10.244.1.1", "fd00:10:244:1::1")
	mtus := func(host string) string {
		return a.sh("ip route get 192.0.2." + host + "; ip route get 2001:db8::" + host)
	}
	eventually(t, "a router is believed", func() error {
		claim(nil, 0, "79", "192.0.2.1", "2001:db8::1")
		if out := mtus("79"); strings.Count(out, "mtu") != 2 {
			return fmt.Errorf("%s", out)
		}
		return nil
	})
	a.reaches(t, "behind the claims", b.podAddr(2))
	for host, who := range map[string]string{"77": "its own pod", "78": "a pod elsewhere"} {
		if out := mtus(host); strings.Contains(out, "mtu") {
			t.Errorf("a believes %s:\n%s", who, out)
		}
	}
}

// b is taken over: what it sends through the tunnel may reach pods of a, and
// nothing behind a.
func TestPeersReachOnlyPods(t *testing.T) {
	join := underlay(t)
	a, b := newMachine(t, "a", 1), newMachine(t, "b", 2)
	state := mesh.State{Nodes: []mesh.Node{a.node(), b.node()}}
	a.pod(2)
	tell(state, a, b)
	settled(t, a, b)
	if err := b.cmd.Process.Kill(); err != nil { // or it would repair what follows
		t.Fatal(err)
	}
	_ = b.cmd.Wait()
	join(t)
	seen := capture(t, nil, "br0", "net 10.244.0.0/16 or net fd00:10:244::/48")
	b.sh(fmt.Sprintf(`
		nft flush ruleset
		wg set mesh0 peer %s allowed-ips 10.244.1.0/24,fd00:10:244:1::/64,192.0.2.254/32,2001:db8::fe/128
		ip route add 192.0.2.254 dev mesh0 src 10.244.2.1
		ip -6 route add 2001:db8::fe dev mesh0 src fd00:10:244:2::1`, a.key))
	for _, to := range []string{"192.0.2.254", "2001:db8::fe"} {
		if out, err := testns.Output("nsenter", "-t", b.ns, "-n", "-m", "ping", "-c3", "-i0.1", "-W0.3", to); err == nil {
			t.Errorf("a hands on what b sends to %s:\n%s", to, out)
		}
	}
	if out, err := testns.Output("nsenter", "-t", b.ns, "-n", "-m", "ping", "-c3", "-i0.2", "-W3", a.podAddr(2)); err != nil {
		t.Errorf("b does not even reach a pod: %v\n%s", err, out)
	}
	if got := seen(); len(got) > 24 {
		t.Errorf("%d bytes of pods' packets on the wire", len(got)-24)
	}
}

// Through everything that happens to a machine, a flood of marked packets, from
// a pod and from the machine itself, to pods of a node that is there, of one
// nobody knows, and to a service: none is seen on the wire, and no address of
// pods or services.
func TestNothingInClear(t *testing.T) {
	join := underlay(t)
	a, b, c := newMachine(t, "a", 1), newMachine(t, "b", 2), newMachine(t, "c", 3)
	state := mesh.State{Nodes: []mesh.Node{a.node(), b.node(), c.node()},
		Services: []*mesh.Service{service(1, 0, addrs(b.podAddr(2), b.podAddr6(2))...)}}
	a.pod(2)
	b.pod(2)
	join(t)
	wire := capture(t, nil, "br0", "")
	tell(state, a, b, c)
	settled(t, a, b, c)
	var to []string
	for _, addr := range []string{b.podAddr(2), b.podAddr6(2), c.podAddr(2), c.podAddr6(2), "10.244.77.7", "fd00:10:244:77::7", "10.96.0.1", "fd00:10:96::1", "10.96.9.9"} {
		to = append(to, net.JoinHostPort(addr, "53"))
	}
	for _, pod := range []int{0, 2} {
		a.run(pod, append([]string{"flood"}, to...)...)
	}
	rx := func() int {
		var links []struct {
			Stats64 struct{ Rx struct{ Packets int } }
		}
		if err := json.Unmarshal([]byte(b.sh("ip netns exec p2 ip -s -j link show eth0")), &links); err != nil || len(links) != 1 {
			t.Fatal(err, links)
		}
		return links[0].Stats64.Rx.Packets
	}
	flows := func(t *testing.T) {
		t.Helper()
		before := rx()
		eventually(t, "the flood arrives", func() error {
			if n := rx(); n < before+100 {
				return fmt.Errorf("%d packets", n-before)
			}
			return nil
		})
	}
	flows(t)
	backend := testns.Backend(t)
	for range 3 {
		a.killDevice(backend)
		settled(t, a)
	}
	flows(t)
	for i := range 3 {
		if i%2 == 0 {
			_ = a.cmd.Process.Kill()
		}
		a.stop()
		if i == 1 { // and the device meanwhile
			a.killDevice(backend)
		}
		a.start()
		tell(state, a)
		settled(t, a)
	}
	flows(t)
	without := state
	without.Nodes = []mesh.Node{a.node(), b.node()}
	for range 3 {
		tell(without, a)
		settled(t, a)
		tell(state, a)
		settled(t, a)
	}
	keyed := state
	other := b.node()
	other.PublicKey = mesh.Key{1, 2, 3}
	keyed.Nodes = []mesh.Node{a.node(), other, c.node()}
	tell(keyed, a) // a key nobody has: nothing may go out until the right one is back
	tell(state, a)
	settled(t, a)
	flows(t)
	for _, breakage := range []string{"ip route flush proto 77", "ip -6 route flush proto 77", "ip link del mesh0", "nft delete table inet meshd", "ip link set mesh0 down"} {
		a.sh(breakage)
		settled(t, a)
	}
	flows(t)
	b1 := wire()
	if len(b1) < 100_000 {
		t.Errorf("the capture has only %d bytes", len(b1))
	}
	if n := bytes.Count(b1, []byte(marker)); n > 0 {
		t.Errorf("the marker was %d times on the wire", n)
	}
	file := filepath.Join(t.TempDir(), "wire.pcap")
	if err := os.WriteFile(file, b1, 0o600); err != nil {
		t.Fatal(err)
	}
	out, _ := testns.Output("tcpdump", "-nr", file, "(net 10.244.0.0/16 or net fd00:10:244::/48 or net 10.96.0.0/16 or net fd00:10:96::/112) and not arp") // the last packet may be cut
	for _, line := range strings.Split(strings.TrimSpace(out), "\n") {
		if line != "" && !strings.HasPrefix(line, "reading from") && !strings.Contains(line, "truncated") {
			t.Errorf("addresses of pods on the wire: %s", line)
		}
	}
}

// killDevice ends what serves the tunnels.
func (m *machine) killDevice(backend string) {
	m.t.Helper()
	if backend == "kernel" {
		m.sh("ip link del mesh0")
		return
	}
	m.sh("kill -9 $(cat /run/wireguard/mesh0.lock)")
}
