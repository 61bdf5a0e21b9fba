package datapath

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
	"testing"

	"meshd.dev/pkg/datapath/internal/testns"
	"meshd.dev/pkg/mesh"
	"meshd.dev/test/flows"
)

// roleFlowsServe serves flows, roleFlows keeps them until stdin ends and prints what
// became of them.
func roleFlowsServe(args []string) error { return flows.Serve(context.Background(), args[0]) }

func roleFlows(args []string) error {
	ctx, cancel := context.WithCancel(context.Background())
	go func() { _, _ = io.Copy(io.Discard, os.Stdin); cancel() }()
	n, err := strconv.Atoi(args[1])
	if err != nil {
		return err
	}
	r, err := flows.Probe(ctx, args[0], n, func() { fmt.Println(`"ready"`) })
	if err != nil {
		return err
	}
	return json.NewEncoder(os.Stdout).Encode(r)
}

// under has flows go on from a pod of m while f runs.
func (m *machine) under(t *testing.T, pod int, to string, n int, f func()) flows.Result {
	t.Helper()
	cmd := m.command(pod, "flows", to, strconv.Itoa(n))
	cmd.Stderr = os.Stderr
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = cmd.Process.Kill(); _ = cmd.Wait() })
	said := json.NewDecoder(out)
	var ready string
	if err := said.Decode(&ready); err != nil {
		t.Fatalf("flows: %v", err)
	}
	f()
	in.Close()
	var r flows.Result
	if err := said.Decode(&r); err != nil {
		t.Fatalf("flows: %v", err)
	}
	return r
}

// Two machines; a pod of a has connections to a pod of b and asks it a thousand
// times a second. (test/bench has a hundred of each: bench -only nocut.)
func TestNothingIsCut(t *testing.T) {
	underlay(t)
	a, b := newMachine(t, "a", 1), newMachine(t, "b", 2)
	state := mesh.State{Nodes: []mesh.Node{a.node(), b.node()}, Services: []*mesh.Service{service(1, 0, addrs(b.podAddr(2), b.podAddr6(2))...)}}
	a.pod(2)
	b.pod(2)
	b.run(2, "flows-serve", ":53")
	b.listens(2, "53")
	state.Services[0].Ports[0].Port = 53
	for i := range state.Services[0].Endpoints {
		state.Services[0].Endpoints[i].Ports[0].Port = 53
	}
	tell(state, a, b)
	settled(t, a, b)
	a.reaches(t, "pod to pod", b.podAddr(2))
	for _, to := range []string{b.podAddr(2) + ":53", "10.96.0.1:53"} {
		r := a.under(t, 2, to, 10, func() {
			for i := range 6 {
				m := []*machine{a, b}[i%2]
				if i%3 == 0 {
					_ = m.cmd.Process.Kill()
				}
				m.stop()
				m.start()
				tell(state, m)
				settled(t, m)
			}
		})
		t.Logf("meshd stopped and killed 6 times, flows to %s: %s", to, r)
		if r.Broken > 0 || r.Answered == 0 { // how many answers a busy machine gives says nothing
			t.Errorf("restarts of meshd cut flows to %s: %s", to, r)
		}
	}
	backend := testns.Backend(t)
	r := a.under(t, 2, b.podAddr(2)+":53", 10, func() {
		for i := range 4 {
			m := []*machine{a, b}[i%2]
			before := strings.TrimSpace(m.sh("ip -o link show mesh0 | cut -d: -f1; cat /run/wireguard/mesh0.lock 2>/dev/null ||:"))
			m.killDevice(backend)
			eventually(t, "another device", func() error {
				out, err := testns.Output("nsenter", "-t", m.ns, "-n", "-m", "sh", "-c", "ip -o link show mesh0 | cut -d: -f1; cat /run/wireguard/mesh0.lock 2>/dev/null ||:")
				if err != nil || strings.TrimSpace(out) == before || !strings.Contains(out, "\n") {
					return fmt.Errorf("%q, before %q, %v", out, before, err)
				}
				return nil
			})
			settled(t, m)
			a.reaches(t, "pod to pod again", b.podAddr(2))
		}
	})
	t.Logf("device killed 4 times: %s", r)
	if r.Broken > 0 || r.Answered == 0 {
		t.Errorf("the death of the device cut flows: %s", r)
	}
}
