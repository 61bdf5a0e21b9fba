package main

import (
	"fmt"
	"path/filepath"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"meshd.dev/pkg/cni"
)

// podsCommand prints the attachments of this machine as they lie on disk.
func podsCommand(w *where) *cobra.Command {
	return &cobra.Command{
		Use: "pods", Short: "Print the pods attached on this machine: address, interface, container, since when", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			records, err := cni.Pods(filepath.Join(w.dataDir, "cni"))
			tw := tabwriter.NewWriter(cmd.OutOrStdout(), 0, 0, 3, ' ', 0)
			fmt.Fprintln(tw, "ADDRESSES\tPOD\tLINK\tCONTAINER\tSINCE")
			for _, r := range records {
				addrs := make([]string, len(r.Addresses))
				for i, a := range r.Addresses {
					addrs[i] = a.String()
				}
				fmt.Fprintf(tw, "%s\t%s/%s\t%s\t%.12s\t%s\n", strings.Join(addrs, ","), r.Pod.Namespace, r.Pod.Name, r.HostLink, r.ContainerID, r.Since.Format(time.RFC3339))
			}
			if ferr := tw.Flush(); ferr != nil {
				return ferr
			}
			return err
		},
	}
}
