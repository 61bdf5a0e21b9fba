package main

import (
	"fmt"
	"io"
	"net/netip"
	"path/filepath"

	"github.com/spf13/cobra"

	"meshd.dev/pkg/datapath"
	"meshd.dev/pkg/join"
	"meshd.dev/pkg/kube"
)

func floorCommand() *cobra.Command {
	var dataDir string
	cmd := &cobra.Command{
		Use:   "floor",
		Short: "Lay the routes by which nothing for pods leaves in clear, before there is a network",
		Long: `Floor adds a blackhole route for each range of pods and services this machine
has heard of, behind all other routes, and ends. meshd lays the same ones when
it starts; this is for the time between the network and meshd at boot, in which
a program of the machine could send to pods in clear (meshd-floor.service).

It takes nothing away, asks nobody, and does nothing on a machine that has not
joined yet.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return layFloor(dataDir, cmd.OutOrStdout()) },
	}
	cmd.Flags().StringVar(&dataDir, "data-dir", "/var/lib/meshd", "folder of all state")
	return cmd
}

func layFloor(dataDir string, out io.Writer) error {
	ranges, err := knownRanges(filepath.Join(dataDir, "node"))
	if err != nil {
		return err
	}
	did, err := datapath.LayFloor(ranges)
	for _, op := range did {
		fmt.Fprintln(out, op)
	}
	return err
}

// knownRanges are those of the cluster this machine joined, and of the nodes in
// the last state it has seen.
func knownRanges(nodeDir string) ([]netip.Prefix, error) {
	var ranges []netip.Prefix
	creds := join.Credentials{Dir: nodeDir}
	if creds.Joined() {
		cluster, err := creds.Cluster()
		if err != nil {
			return nil, err
		}
		for _, texts := range [][]string{cluster.PodCIDRs, cluster.ServiceCIDRs} {
			list, err := prefixes("ranges of the cluster", texts)
			if err != nil {
				return nil, err
			}
			ranges = append(ranges, list...)
		}
	}
	if state := kube.New(kube.Config{CacheFile: filepath.Join(nodeDir, "state.json")}).State(); state != nil {
		for _, n := range state.Nodes {
			ranges = append(ranges, n.PodCIDRs...)
		}
	}
	return ranges, nil
}
