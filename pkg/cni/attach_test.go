package cni

import (
	"fmt"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"meshd.dev/pkg/cni/rtnl"
)

// What ADD does to the kernel, as a person would type it.
func TestAttachmentAsCommands(t *testing.T) {
	a := attachment{
		hostLink: "msh0123456789ab", podLink: "eth0", podMAC: rtnl.MAC{0x0e, 1, 2, 3, 4, 5}, mtu: 1420,
		addresses: addrs("10.244.1.5", "fd00:10:244:1::5"), alias: "web eth0",
	}
	for _, addr := range a.addresses {
		_, all := gateway(addr)
		a.defaults = append(a.defaults, all)
	}
	var got strings.Builder
	line := func(v any) { fmt.Fprintln(&got, v) }
	line(a.veth(9))
	for _, s := range a.podSysctls() {
		line("pod: " + s.String())
	}
	for _, s := range a.hostSysctls() {
		line(s)
	}
	for _, op := range a.hostUp(7) {
		line(op)
	}
	for _, op := range a.pod(2) {
		line("pod: " + op.String())
	}
	for _, op := range a.reach(7) {
		line(op)
	}
	want := `ip link add msh0123456789ab address 0a:6d:65:73:68:01 mtu 1420 numtxqueues 1 numrxqueues 1 type veth peer name eth0 address 0e:01:02:03:04:05 mtu 1420 numtxqueues 1 numrxqueues 1 netns <pod>
pod: sysctl net.ipv6.conf.eth0.accept_ra=0
pod: sysctl net.ipv6.conf.eth0.disable_ipv6=0
sysctl net.ipv6.conf.msh0123456789ab.accept_ra=0
sysctl net.ipv6.conf.msh0123456789ab.accept_redirects=0
sysctl net.ipv6.conf.msh0123456789ab.disable_ipv6=0
ip link set dev msh0123456789ab addrgenmode none alias "web eth0"; sysctl net.ipv4.conf.msh0123456789ab.rp_filter=1 net.ipv4.conf.msh0123456789ab.accept_redirects=0 net.ipv4.conf.msh0123456789ab.send_redirects=0
ip link set dev msh0123456789ab up
pod: ip link set dev lo up
pod: ip link set dev eth0 addrgenmode none
pod: ip link set dev eth0 up
pod: ip addr add fe80::c01:2ff:fe03:405/64 dev eth0 nodad
pod: ip addr add 10.244.1.5/32 dev eth0
pod: ip neigh replace 169.254.1.1 lladdr 0a:6d:65:73:68:01 dev eth0 nud permanent
pod: ip route add 0.0.0.0/0 via 169.254.1.1 dev eth0 proto 3 onlink
pod: ip addr add fd00:10:244:1::5/128 dev eth0 nodad
pod: ip neigh replace fe80::1 lladdr 0a:6d:65:73:68:01 dev eth0 nud permanent
pod: ip route add ::/0 via fe80::1 dev eth0 proto 3 onlink
ip neigh replace 10.244.1.5 lladdr 0e:01:02:03:04:05 dev msh0123456789ab nud permanent
ip neigh replace fd00:10:244:1::5 lladdr 0e:01:02:03:04:05 dev msh0123456789ab nud permanent
ip route add 10.244.1.5/32 dev msh0123456789ab proto 78 scope link
ip route add fd00:10:244:1::5/128 dev msh0123456789ab proto 78
`
	if diff := cmp.Diff(want, got.String()); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

func TestNamesOfAttachments(t *testing.T) {
	seen := map[string]string{}
	for i := range 20000 {
		id := fmt.Sprintf("pod%d", i)
		link := HostLink(id, "eth0")
		if len(link) != 15 || !strings.HasPrefix(link, "msh") {
			t.Fatalf("link %q does not fit an interface", link)
		}
		if other, twice := seen[link]; twice {
			t.Fatalf("%s and %s share %s", id, other, link)
		}
		seen[link] = id
		if mac := podMAC(id, "eth0"); mac[0]&3 != 2 {
			t.Fatalf("mac %v is not local and unicast", mac)
		}
	}
	r := Record{ContainerID: "abc", IfName: "eth0", HostLink: HostLink("abc", "eth0"), Pod: PodRef{Namespace: "prod", Name: "web-0"}}
	if got, ok := parseAlias(r.alias()); !ok || got.ContainerID != r.ContainerID || got.IfName != r.IfName || got.Pod != r.Pod {
		t.Errorf("alias %q read as %+v", r.alias(), got)
	}
	r.Pod = PodRef{}
	if got := r.alias(); got != "abc eth0" {
		t.Errorf("alias %q", got)
	}
}
