package datapath

import (
	"errors"
	"fmt"
	"net"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"meshd.dev/pkg/datapath/internal/testns"
)

func TestReserved(t *testing.T) {
	for _, c := range []struct {
		list string
		want bool
	}{
		{"", false}, {"51820", false}, {"51821", false}, {"51820-51821", true}, {"1-65535", true},
		{"40000,51000-51820", false}, {"40000,51820-51821,60000", true}, {"51820,51821", true}, {"a-b,,-", false},
	} {
		if got := reserved(c.list, 51820, 51821); got != c.want {
			t.Errorf("%q: %v, want %v", c.list, got, c.want)
		}
	}
}

// A connection that goes out may have the tunnels' ports, until they are reserved.
func TestReservePorts(t *testing.T) {
	testns.New(t)
	testns.Sh(t, `sysctl -qw net.ipv4.ip_local_port_range="51818 51823" net.ipv4.ip_local_reserved_ports=40000,51822`)
	if got := fmt.Sprint(sources(t)); got != "[51818 51819 51820 51821 51823]" {
		t.Errorf("connections go out from %s", got)
	}
	for i, want := range []string{"sysctl -w net.ipv4.ip_local_reserved_ports=40000,51822,51820-51821", ""} {
		if did, err := ReservePorts(51820, 51821); did != want || err != nil {
			t.Errorf("time %d: did %q, %v; want %q", i+1, did, err, want)
		}
	}
	if got := strings.TrimSpace(testns.Sh(t, "sysctl -n net.ipv4.ip_local_reserved_ports")); got != "40000,51820-51822" {
		t.Errorf("reserved are %s", got)
	}
	if got := fmt.Sprint(sources(t)); got != "[51818 51819 51823]" {
		t.Errorf("connections go out from %s", got)
	}
}

// sources are the ports from which connections to one server go out, until the
// kernel has no more.
func sources(t *testing.T) (ports []int) {
	t.Helper()
	l, err := net.Listen("tcp4", "127.0.0.1:6443")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	for {
		c, err := net.Dial("tcp4", l.Addr().String())
		if errors.Is(err, unix.EADDRNOTAVAIL) {
			slices.Sort(ports)
			return ports
		}
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		if err := c.(*net.TCPConn).SetLinger(0); err != nil { // nothing waits when it is closed
			t.Fatal(err)
		}
		ports = append(ports, c.LocalAddr().(*net.TCPAddr).Port)
	}
}
