package datapath

import (
	"fmt"
	"testing"

	"meshd.dev/pkg/mesh"
)

func tell(s mesh.State, ms ...*machine) {
	for _, m := range ms {
		m.ask(&s)
	}
}

// Three machines on one wire, 192.0.2.N and 2001:db8::N; their pods are
// 10.244.N.P and fd00:10:244:N::P.
func TestStory(t *testing.T) {
	underlay(t)
	a, b, c := newMachine(t, "a", 1), newMachine(t, "b", 2), newMachine(t, "c", 3)
	all := []*machine{a, b, c}
	state := mesh.State{Nodes: []mesh.Node{a.node(), b.node(), c.node()}}
	tell(state, all...)
	settled(t, all...)
	for _, m := range all {
		m.pod(2)
		m.pod(3)
		m.serve(2, "tcp", ":80")
		m.serve(2, "udp", ":53")
	}
	for _, to := range []string{b.podAddr(2), b.podAddr6(2), c.podAddr(2), a.podAddr(3), a.podAddr6(3)} {
		if out, err := a.in_(2, "ping", "-c1", "-W3", to); err != nil {
			t.Errorf("ping %s: %v\n%s", to, err, out)
		}
	}
	for _, to := range []string{b.podAddr(2), "[" + b.podAddr6(2) + "]"} {
		out, err := a.askFrom(2, "tcp", to+":80", "hello")
		fmt.Println(out, err)
	}
}
