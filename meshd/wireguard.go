package main

import (
	"fmt"
	"log/slog"
	"os"

	"github.com/spf13/cobra"

	"meshd.dev/pkg/datapath/wireguard"
	"meshd.dev/pkg/datapath/wireguard/userspace"
	"meshd.dev/pkg/mesh"
)

func wireguardCommand() *cobra.Command {
	var whereNeeded, noOffloads, takeOver bool
	cmd := &cobra.Command{
		Use:   "wireguard [DEVICE]",
		Short: "Carry a WireGuard device in this process, where the kernel has no WireGuard",
		Long: `Wireguard makes a TUN device, speaks WireGuard on a UDP socket, and answers on
the standard control socket (/var/run/wireguard/DEVICE.sock), so that wg(8) and
meshd configure it like a kernel device.

meshd starts it by itself where it is needed, and it outlives meshd: sessions go
on while meshd restarts or is upgraded. Ending it removes the device; pod
traffic to other nodes then stops, in clear it never goes.`,
		Args: cobra.MaximumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			device := mesh.Device
			if len(args) == 1 {
				device = args[0]
			}
			log := slog.New(slog.NewTextHandler(os.Stderr, nil))
			if whereNeeded && wireguard.InKernel() {
				log.Info("this kernel has WireGuard: nothing to do here", "device", device)
				<-cmd.Context().Done()
				return nil
			}
			if _, err := os.Stat("/dev/net/tun"); err != nil {
				return fmt.Errorf("this kernel has neither WireGuard nor TUN: %w; load the module wireguard or tun, or use a kernel with one of them", err)
			}
			return userspace.Run(cmd.Context(), userspace.Config{Device: device, Hurry: true, NoOffloads: noOffloads, TakeOver: takeOver, Second: whereNeeded, Log: log})
		},
	}
	cmd.Flags().BoolVar(&whereNeeded, "where-needed", false, "wait idly instead where the kernel has WireGuard, and serve DEVICE"+mesh.SecondSuffix+" as well when meshd asks for it; for a service that starts everywhere")
	cmd.Flags().BoolVar(&noOffloads, "no-offloads", false, "use no segmentation offloads (TSO, USO, UDP_SEGMENT, UDP_GRO), though a trial finds that they work")
	cmd.Flags().BoolVar(&takeOver, "take-over", false, "go on where another process carries the device: end it, keep the link and what it was told; for upgrades")
	return cmd
}
