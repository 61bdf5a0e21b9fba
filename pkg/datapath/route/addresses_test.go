package route

import (
	"testing"

	"github.com/google/go-cmp/cmp"

	"meshd.dev/pkg/datapath/internal/testns"
)

// Of everything that machines carry only what leads out, is the machine's own
// and stays is an underlay address. (eth0 has 192.0.2.1/24.)
func TestUnderlayAddresses(t *testing.T) {
	fresh(t)
	testns.Sh(t, `
		up() { ip link set $1 up; }
		ip address add 2001:db8::1/64 dev eth0 nodad
		ip address add 192.0.2.100/32 dev eth0                      # wanders, as keepalived's
		ip address add 192.0.2.101/24 dev eth0                      # second of its subnet
		ip address add 2001:db8::dead/64 dev eth0 nodad preferred_lft 0
		ip address add 169.254.7.7/16 dev eth0 scope link
		ip address add fe80::77/64 dev eth0 nodad
		ip address add 198.51.100.7/32 dev lo
		ip link add eth1 type veth peer name eth1x; up eth1x; up eth1
		ip address add 203.0.113.5/32 dev eth1                      # all some clouds give
		ip link add eth2 type veth peer name eth2x
		ip address add 198.51.100.9/24 dev eth2                     # down
		ip link add docker0 type bridge; up docker0
		ip address add 172.17.0.1/16 dev docker0
		ip link add containers type bridge; up containers
		ip link add v0 type veth peer name v1; ip link set v0 master containers; up v0
		ip address add 172.18.0.1/16 dev containers
		ip tuntap add dev vpn0 mode tun; up vpn0
		ip address add 100.64.0.9/10 dev vpn0
		ip link add cali123 type veth peer name cali124; up cali123
		ip address add 10.9.9.9/32 dev cali123
		if ip link add over0 type vxlan id 7 dstport 4789 dev eth0; then
			up over0
			ip address add 10.77.0.1/24 dev over0
		fi`)
	got, err := UnderlayAddresses()
	if err != nil {
		t.Fatal(err)
	}
	var texts []string
	for _, a := range got {
		texts = append(texts, a.String())
	}
	if diff := cmp.Diff([]string{"192.0.2.1", "203.0.113.5", "2001:db8::1"}, texts); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
}
