package main

import (
	"flag"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"meshd.dev/pkg/datapath/wireguard/userspace"
	"meshd.dev/pkg/mesh"
)

// tunnelProgram lies beside meshd and is a fraction of it.
const tunnelProgram = "meshd-wireguard"

func wireguardCommand() *cobra.Command {
	var cfg userspace.Config
	cmd := &cobra.Command{
		Use:   "wireguard [DEVICE]",
		Short: "Carry a WireGuard device in this process, where the kernel has no WireGuard",
		Long: `Wireguard makes a TUN device, speaks WireGuard on a UDP socket, and answers on
the standard control socket (/var/run/wireguard/DEVICE.sock), so that wg(8) and
meshd configure it like a kernel device.

meshd starts it by itself where it is needed, and it outlives meshd: sessions go
on while meshd restarts or is upgraded. Ending it removes the device, unless
meshd runs, which starts another one; pod traffic to other nodes stops meanwhile,
in clear it never goes.

The process becomes the program ` + tunnelProgram + ` where that lies beside meshd.`,
		Args: cobra.MaximumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := becomeTunnel(os.Args[2:]); err != nil {
				return err
			}
			cfg.Device, cfg.Log = mesh.Device, slog.New(slog.NewTextHandler(os.Stderr, nil))
			if len(args) == 1 {
				cfg.Device = args[0]
			}
			return userspace.Run(cmd.Context(), cfg)
		},
	}
	flags := flag.NewFlagSet("wireguard", flag.ContinueOnError)
	cfg.Flags(flags)
	cmd.Flags().AddGoFlagSet(flags)
	return cmd
}

// becomeTunnel has this process be the small program, if it is there.
func becomeTunnel(args []string) error {
	self, err := os.Executable()
	if err != nil {
		return err
	}
	program, ok := besideIt(self)
	if !ok {
		return nil
	}
	return fmt.Errorf("%s: %w", program, unix.Exec(program, append([]string{tunnelProgram}, args...), os.Environ()))
}

func besideIt(self string) (program string, ok bool) {
	program = filepath.Join(filepath.Dir(self), tunnelProgram)
	_, err := os.Stat(program)
	return program, err == nil
}

// userspaceCommand is what carries the tunnels where the kernel cannot; the name
// of the device goes behind it.
func userspaceCommand(self string, noOffloads bool) []string {
	command := []string{self, "wireguard"}
	if program, ok := besideIt(self); ok {
		command = []string{program}
	}
	if noOffloads {
		command = append(command, "--no-offloads")
	}
	return command
}
