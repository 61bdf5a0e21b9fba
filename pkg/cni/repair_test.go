package cni

import (
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// TestRepair takes one thing after another from the host's end of a pod, as a
// network manager might.
func TestRepair(t *testing.T) {
	l := newLab(t)
	pod, other := l.newPod(), l.newPod()
	l.mustAdd(rt("pod", pod))
	l.mustAdd(rt("other", other))
	link := HostLink("pod", "eth0")
	for _, c := range []struct {
		name, break_ string
		want         []string
	}{
		{"nothing", "true", nil},
		{"its route", "ip route del 10.244.1.2", []string{"ip route add 10.244.1.2/32 dev " + link + " proto 78 scope link"}},
		{"its IPv6 route", "ip -6 route del fd00:10:244:1::2", []string{"ip route add fd00:10:244:1::2/128 dev " + link + " proto 78"}},
		{"its neighbours", "ip neigh flush nud permanent dev " + link + "; ip -6 neigh flush nud permanent dev " + link,
			[]string{"ip neigh replace 10.244.1.2 lladdr", "ip neigh replace fd00:10:244:1::2 lladdr"}},
		{"all routes of a link", "ip route flush dev " + link + "; ip -6 route flush dev " + link,
			[]string{"ip route add 10.244.1.2/32", "ip route add fd00:10:244:1::2/128"}},
		{"the link is down", "ip link set " + link + " down",
			[]string{"ip link set dev " + link + " addrgenmode none", "ip link set dev " + link + " up", "ip neigh replace 10.244.1.2", "ip neigh replace fd00:10:244:1::2",
				"ip route add 10.244.1.2/32", "ip route add fd00:10:244:1::2/128"}},
	} {
		l.run(c.name, func(t *testing.T) {
			run(t, "sh", "-c", c.break_)
			did, err := Repair(l.dataDir)
			if err != nil {
				t.Fatal(err)
			}
			if len(did) != len(c.want) {
				t.Fatalf("did\n%s\nwant\n%s", strings.Join(did, "\n"), strings.Join(c.want, "\n"))
			}
			for i, w := range c.want {
				if !strings.HasPrefix(did[i], w) {
					t.Errorf("did %s, want %s", did[i], w)
				}
			}
			if did, err := Repair(l.dataDir); err != nil || len(did) > 0 {
				t.Errorf("once more: %v, %v", did, err)
			}
			if err := l.check(rt("pod", pod)); err != nil {
				t.Error(err)
			}
		})
	}
	l.mustDel(rt("pod", pod))
	if did, err := Repair(l.dataDir); err != nil || len(did) > 0 {
		t.Errorf("of a pod that is gone: %v, %v", did, err)
	}
	l.mustDel(rt("other", other))
}

// TestRepairLeavesAnAddAtWorkAlone whose routes come last.
func TestRepairLeavesAnAddAtWorkAlone(t *testing.T) {
	l := newLab(t)
	pod := l.newPod()
	l.mustAdd(rt("pod", pod))
	defer l.mustDel(rt("pod", pod))
	s := openStore(l.dataDir, "meshd")
	n, ok, err := s.find("pod", "eth0")
	if err != nil || !ok {
		t.Fatal(ok, err)
	}
	h, err := s.hold(n, unix.LOCK_EX)
	if err != nil {
		t.Fatal(err)
	}
	run(t, "ip", "route", "del", "10.244.1.2")
	if did, err := Repair(l.dataDir); err != nil || len(did) > 0 {
		t.Errorf("did %v, %v", did, err)
	}
	h.release()
	if did, err := Repair(l.dataDir); err != nil || len(did) != 1 {
		t.Errorf("afterwards: did %v, %v", did, err)
	}
}
