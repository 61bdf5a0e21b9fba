package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"meshd.dev/pkg/status"
)

// readyPatience bounds how long a probe waits for an answer.
const readyPatience = 5 * time.Second

// readyCommand is what a kubelet asks, so that `kubectl describe pod` says in
// an event why the network of a node is not up.
func readyCommand() *cobra.Command {
	var runDir string
	cmd := &cobra.Command{
		Use:   "ready",
		Short: "Ask the meshd of this machine whether pods can be attached; the exit status says it, the output why not",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			ctx, cancel := context.WithTimeout(cmd.Context(), readyPatience)
			defer cancel()
			var doc status.Document
			if err := status.Fetch(ctx, filepath.Join(runDir, "meshd.sock"), "/status", &doc); err != nil {
				return err
			}
			if why := hindrances(doc.Checks); len(why) > 0 {
				return errors.New(strings.Join(why, "; "))
			}
			return nil
		},
	}
	cmd.Flags().StringVar(&runDir, "run-dir", "/run/meshd", "folder of meshd's sockets")
	return cmd
}

// elsewhere are checks that say nothing of this machine's pods: they are about
// what others wrote into the cluster, about names outside of it, about pods of
// another network, or about what meshd does not do at all.
var elsewhere = []string{"kube/objects", "dns/upstream", "kube/pods", "kube/policies", "kube/events"}

// causes come first: the others follow from them, mostly, and where a text is
// cut, as in an event, it is at its end.
var causes = []string{"kube/rights", "kube/sync", "kube/node", "datapath/state", "datapath/firewall", "datapath/device"}

// hindrances are the reasons why pods of this machine have no network, causes
// first. A peer that is down is not one: it is somebody else's.
func hindrances(checks []status.Check) []string {
	rank := func(c status.Check) int {
		if i := slices.Index(causes, c.Name); i >= 0 {
			return i
		}
		return len(causes)
	}
	checks = slices.SortedStableFunc(slices.Values(checks), func(a, b status.Check) int { return cmp.Compare(rank(a), rank(b)) })
	var why []string
	for _, c := range checks {
		part, _, _ := strings.Cut(c.Name, "/")
		if !c.Healthy && !slices.Contains(elsewhere, c.Name) && slices.Contains([]string{"kube", "datapath", "cni", "dns"}, part) {
			why = append(why, fmt.Sprintf("%s: %s (%s)", c.Name, c.Reason, c.Next))
		}
	}
	return why
}
