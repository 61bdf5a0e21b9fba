package main

import (
	"cmp"
	"fmt"
	"net/netip"
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
			fmt.Fprintln(tw, "ADDRESSES\tPOD\tINTERFACE\tLINK\tHOST PORTS\tCONTAINER\tSINCE")
			for _, r := range records {
				fmt.Fprintln(tw, strings.Join(podColumns(r), "\t"))
			}
			if ferr := tw.Flush(); ferr != nil {
				return ferr
			}
			return err
		},
	}
}

func podColumns(r cni.Record) []string {
	var addrs, ports []string
	for _, a := range r.Addresses {
		addrs = append(addrs, a.String())
	}
	for _, p := range r.HostPorts {
		on := ""
		if p.HostIP.IsValid() {
			on = netip.AddrPortFrom(p.HostIP, p.HostPort).String()
		} else {
			on = fmt.Sprint(p.HostPort)
		}
		ports = append(ports, fmt.Sprintf("%s/%s→%d", on, strings.ToLower(string(p.Protocol)), p.Port))
	}
	pod := "-"
	if r.Pod.Name != "" {
		pod = r.Pod.Namespace + "/" + r.Pod.Name
	}
	link := r.HostLink
	if r.HostLocal != "" {
		link = "of another plugin"
	}
	return []string{strings.Join(addrs, ","), pod, r.IfName, cmp.Or(link, "-"), cmp.Or(strings.Join(ports, ","), "-"),
		fmt.Sprintf("%.12s", r.ContainerID), r.Since.Format(time.RFC3339)}
}
