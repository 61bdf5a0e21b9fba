package main

import (
	"fmt"
	"io"
	"path/filepath"

	"github.com/spf13/cobra"

	"meshd.dev/pkg/cni"
	"meshd.dev/pkg/mesh"
)

// gcCommand gives back what pods left behind, as meshd does each minute; it
// needs no meshd for it.
func gcCommand(w *where) *cobra.Command {
	var dry bool
	cmd := &cobra.Command{
		Use: "gc", Short: "Give back what pods of this machine left behind: addresses, links, host ports", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			report, err := cni.Sweep(cmd.Context(), cni.SweepConfig{
				DataDir: filepath.Join(w.dataDir, "cni"), Table: mesh.FirewallTable, DryRun: dry}, nil)
			printSweep(cmd.OutOrStdout(), report, dry)
			return err
		},
	}
	cmd.Flags().BoolVar(&dry, "dry-run", false, "only say what would be given back, and why")
	return cmd
}

func printSweep(out io.Writer, r cni.Report, dry bool) {
	verb := "gave back"
	if dry {
		verb = "would give back"
	}
	for _, line := range r.Lines() {
		fmt.Fprintln(out, verb, line)
	}
	for _, c := range r.Corrupt {
		fmt.Fprintf(out, "set aside %s: cannot be read; its addresses stay taken until its pod is gone\n", c)
	}
	for _, u := range r.Unknown {
		fmt.Fprintf(out, "left alone link %s: it has no record, and yet a pod behind it\n", u)
	}
	if len(r.Lines())+len(r.Corrupt)+len(r.Unknown) == 0 {
		fmt.Fprint(out, "nothing to give back; ")
	}
	fmt.Fprintf(out, "%d attached\n", r.Kept)
}
