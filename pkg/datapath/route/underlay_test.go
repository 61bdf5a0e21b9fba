package route

import (
	"net/netip"
	"os"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"meshd.dev/pkg/datapath/internal/testns"
)

// A question that the kernel did not answer is no answer: it is asked again, on
// a socket that works.
func TestUnderlayAsksAgain(t *testing.T) {
	testns.New(t)
	testns.Sh(t, `
		ip link add eth0 type veth peer name wire; ip link set wire up; ip link set eth0 up
		ip address add 192.0.2.1/24 dev eth0; ip route add 198.51.100.0/24 via 192.0.2.254`)
	u, before := NewUnderlay("mesh0"), sockets(t)
	defer u.Close()
	ask := func(addr string, want int) {
		t.Helper()
		if got := u.PathMTU(netip.MustParseAddr(addr)); got != want {
			t.Errorf("PathMTU(%s) = %d, want %d", addr, got, want)
		}
	}
	ask("198.51.100.1", 1500)
	null, err := os.Open("/dev/null")
	if err != nil {
		t.Fatal(err)
	}
	defer null.Close()
	broken := 0
	for fd := range sockets(t) {
		if !before[fd] {
			if err := unix.Dup3(int(null.Fd()), fd, unix.O_CLOEXEC); err != nil {
				t.Fatal(err)
			}
			broken++
		}
	}
	if broken == 0 {
		t.Fatal("no socket is kept open: this test tests nothing")
	}
	ask("198.51.100.2", 1500)

	// No descriptor left: no socket. It is not taken for no route.
	var limit unix.Rlimit
	if err := unix.Prlimit(0, unix.RLIMIT_NOFILE, nil, &limit); err != nil {
		t.Fatal(err)
	}
	u.Close()
	few := limit
	few.Cur = 3
	if err := unix.Prlimit(0, unix.RLIMIT_NOFILE, &few, nil); err != nil {
		t.Fatal(err)
	}
	ask("198.51.100.3", 0)
	if err := unix.Prlimit(0, unix.RLIMIT_NOFILE, &limit, nil); err != nil {
		t.Fatal(err)
	}
	ask("198.51.100.3", 1500)

	// No route is an answer, and remembered until Forget.
	ask("203.0.113.1", 0)
	testns.Sh(t, "ip route add default via 192.0.2.254")
	ask("203.0.113.1", 0)
	u.Forget()
	ask("203.0.113.1", 1500)
}

// sockets are the descriptors of this process that are one.
func sockets(t *testing.T) map[int]bool {
	t.Helper()
	list, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	all := map[int]bool{}
	for _, e := range list {
		to, err := os.Readlink("/proc/self/fd/" + e.Name())
		if err == nil && strings.HasPrefix(to, "socket:") {
			fd := 0
			for _, c := range e.Name() {
				fd = 10*fd + int(c-'0')
			}
			all[fd] = true
		}
	}
	return all
}
