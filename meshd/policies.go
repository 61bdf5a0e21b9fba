package main

import (
	"fmt"
	"slices"

	"meshd.dev/pkg/kube"
	"meshd.dev/pkg/mesh"
)

// policies says on the board that there are policies, and whom they would
// protect here; and of each, once in the cluster, in an event that its author
// finds. meshd enforces none.
func (w *witness) policies(pods []kube.Pod) (events []kube.Event) {
	n := w.node
	if n.cfg.Policies == "ignore" {
		n.board.OK("kube/policies")
		return nil
	}
	policies, known := w.local.Policies()
	if !known {
		return nil // kube/policies says so, or kube/sync
	}
	why := unenforced(policies, pods)
	if why == "" {
		n.board.OK("kube/policies")
		w.warned = false
		return nil
	}
	n.board.Fail("kube/policies", why, "do not rely on them, and delete those that nobody needs; where something else enforces them, --network-policies=ignore (network-policies: ignore in config.yaml)")
	if !w.warned {
		w.warned = true
		n.log.Warn("network policies are not enforced", "why", why)
	}
	if state := n.window.State(); state == nil || spokesman(state) != n.cfg.NodeName {
		return nil
	}
	for _, p := range policies {
		events = append(events, kube.Event{About: p.Reference(), Reason: "NotEnforced",
			Message: "meshd does not enforce policies yet: the pods that this one selects are as open as without it, unless something else enforces it"})
	}
	return events
}

// unenforced says how many policies there are and whom of this node they are
// about; empty without any.
func unenforced(policies []kube.Policy, pods []kube.Pod) string {
	if len(policies) == 0 {
		return ""
	}
	selecting := 0
	selected := make([]bool, len(pods))
	for _, policy := range policies {
		selects := false
		for i, pod := range pods {
			if policy.Selects(pod) {
				selects, selected[i] = true, true
			}
		}
		if selects {
			selecting++
		}
	}
	n := 0
	for _, is := range selected {
		if is {
			n++
		}
	}
	return fmt.Sprintf("%d NetworkPolicies, of which %d select pods of this node (%d pods); meshd does not enforce policies yet: these pods are as open as without them",
		len(policies), selecting, n)
}

// spokesman is the one node that says what is to be said once in the cluster:
// the first that is ready and has meshd.
func spokesman(state *mesh.State) string {
	i := slices.IndexFunc(state.Nodes, func(n mesh.Node) bool { return n.Ready && !n.PublicKey.IsZero() })
	if i < 0 {
		return ""
	}
	return state.Nodes[i].Name
}
