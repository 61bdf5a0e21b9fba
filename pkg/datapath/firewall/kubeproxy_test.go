package firewall

import (
	"context"
	"net"
	"net/netip"
	"os/exec"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"meshd.dev/pkg/datapath/internal/testns"
)

func TestKubeProxyIsFound(t *testing.T) {
	if _, err := exec.LookPath("iptables-legacy"); err != nil {
		t.Skip("needs iptables")
	}
	for _, c := range []struct{ name, script, want string }{
		{"an empty machine", "", ""},
		{"a kubelet alone", "iptables-nft -t nat -N KUBE-KUBELET-CANARY; iptables-nft -t mangle -N KUBE-IPTABLES-HINT; iptables-legacy -t nat -N KUBE-MARK-DROP", ""},
		{"somebody else's tables", "nft add table ip nat2; nft add chain ip nat2 KUBE-SERVICES", ""},
		{"nftables mode", "nft add table ip kube-proxy; nft add chain ip kube-proxy services", "nft table ip kube-proxy"},
		{"nftables mode, IPv6 alone", "nft add table ip6 kube-proxy; nft add chain ip6 kube-proxy services", "nft table ip6 kube-proxy"},
		{"iptables mode", "iptables-nft -t nat -N KUBE-SERVICES", "chain KUBE-SERVICES in nft table ip nat"},
		{"iptables mode, the old way", "iptables-legacy -t nat -N KUBE-SERVICES", "chain KUBE-SERVICES of iptables-legacy"},
		{"iptables mode, the old way, IPv6 alone", "iptables-legacy -t nat -N OTHER; ip6tables-legacy -t nat -N KUBE-SERVICES", "chain KUBE-SERVICES of iptables-legacy"},
		{"IPVS mode", "ip link add name kube-ipvs0 type veth peer name x", "link kube-ipvs0"},
	} {
		t.Run(c.name, func(t *testing.T) {
			testns.New(t)
			testns.Sh(t, c.script)
			if got, err := KubeProxy(); got != c.want || err != nil {
				t.Errorf("found %q, %v; want %q", got, err, c.want)
			}
		})
	}
}

// Pods ask 10.96.0.10; the node's resolver listens on 10.244.1.1 and has a
// socket on 10.96.0.10 that nobody reaches; 192.0.2.9 is who serves the
// address otherwise, here by a rule behind ours as kube-proxy makes one.
func TestResolverStandsInWhileItListens(t *testing.T) {
	testns.New(t)
	testns.Sh(t, `
		ip netns add pod
		ip link add mshp0 type veth peer name eth0 netns pod
		ip link add mesh0 type veth peer name other
		ip address add 10.244.1.1/32 dev mesh0
		ip address add 192.0.2.9/32 dev lo
		ip link set mesh0 up; ip link set other up; ip link set mshp0 up
		ip route add 10.244.1.2/32 dev mshp0 proto 78
		ip address add 169.254.1.1/32 dev mshp0
		ip netns exec pod sh -ec 'ip link set lo up; ip link set eth0 up; ip address add 10.244.1.2/32 dev eth0; ip route add 169.254.1.1 dev eth0; ip route add default via 169.254.1.1'
		sysctl -qw net.ipv4.ip_forward=1
		nft add table ip kube-proxy
		nft 'add chain ip kube-proxy nat { type nat hook prerouting priority dstnat; }'
		nft add rule ip kube-proxy nat ip daddr 10.96.0.10 dnat to 192.0.2.9
	`)
	t.Cleanup(func() { _ = testns.Exec("ip", "netns", "delete", "pod") })
	cfg := config()
	cfg.Groups, cfg.ServiceCIDRs = nil, nil
	cfg.Resolver = []netip.Addr{netip.MustParseAddr("10.96.0.10"), netip.MustParseAddr("fd00:10:96::10")}
	apply(t, cfg)

	own, other := listenUDP(t, "10.244.1.1"), listenUDP(t, "192.0.2.9")
	answer(own, "n")
	answer(other, "k")
	for _, c := range []struct {
		name    string
		listens bool
		want    string
	}{{"before it listens", false, "k"}, {"while it listens", true, "n"}, {"after it ended", false, "k"}} {
		var socket net.PacketConn
		if c.listens {
			socket = listenUDP(t, "10.96.0.10")
		}
		if got := ask10(t); got != c.want {
			t.Errorf("%s: %q answered, want %q", c.name, got, c.want)
		}
		if socket != nil {
			socket.Close()
		}
	}
	cfg.Resolver = nil
	apply(t, cfg)
	if got := list(t); strings.Contains(got, "socket wildcard") {
		t.Errorf("the rules stay:\n%s", got)
	}
}

func listenUDP(t *testing.T, addr string) net.PacketConn {
	t.Helper()
	l := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) error {
		var err error
		failed := c.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.SOL_IP, unix.IP_FREEBIND, 1) })
		if failed != nil {
			return failed
		}
		return err
	}}
	conn, err := l.ListenPacket(context.Background(), "udp4", addr+":53")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return conn
}

// answer says who, in one letter, until conn is closed.
func answer(conn net.PacketConn, who string) {
	go func() {
		b := make([]byte, 64)
		for {
			_, from, err := conn.ReadFrom(b)
			if err != nil {
				return
			}
			_, _ = conn.WriteTo([]byte(who), from)
		}
	}()
}

// ask10 asks from the pod, and tries again: the first may be lost while the
// link finds its carrier.
func ask10(t *testing.T) string {
	t.Helper()
	out, err := testns.Output("ip", "netns", "exec", "pod", "bash", "-c",
		`for i in 1 2 3 4 5 6 7 8 9 10; do exec 3<>/dev/udp/10.96.0.10/53; echo -n q >&3; if read -r -t 1 -N 1 c <&3; then echo -n "$c"; exit 0; fi; exec 3>&-; done; exit 1`)
	if err != nil {
		t.Fatal(err)
	}
	return out
}
