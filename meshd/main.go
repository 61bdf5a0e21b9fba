// Meshd is the daemon of a node: `meshd server` on the first machine of a
// cluster, `meshd join` on each other one, `meshd agent` on every node of an
// existing Kubernetes, `meshd wireguard` for the process that carries a node's
// tunnels where the kernel has no WireGuard.
//
// Main is wiring: flags and the configuration file are read once into a
// Config, the parts are built in the order they depend on each other, and run
// in one group until a signal or the first error.
package main

import (
	"context"
	"fmt"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/spf13/cobra"
)

func main() {
	hideNotifySocket()
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	context.AfterFunc(ctx, stop) // a second signal ends the process at once
	ended := make(chan error, 1)
	go func() { ended <- newCommand().ExecuteContext(ctx) }()
	if err := outcome(ctx, ended); err != nil {
		fmt.Fprintln(os.Stderr, "meshd:", err)
		os.Exit(1)
	}
}

// endPatience is how long the end may take once it was asked for. Watches of
// an API that is away sleep up to half a minute; nothing depends on a clean
// end, so nobody waits for them.
const endPatience = 8 * time.Second

func outcome(ctx context.Context, ended <-chan error) error {
	select {
	case err := <-ended:
		return err
	case <-ctx.Done():
	}
	select {
	case err := <-ended:
		return err
	case <-time.After(endPatience):
		return nil
	}
}

func newCommand() *cobra.Command {
	root := &cobra.Command{
		Use:   "meshd",
		Short: "An encrypted network, service discovery and a small orchestrator for containers on several machines",
		Long: `meshd connects the containers of several machines through WireGuard, resolves
service names on every machine, and runs pods where there is no Kubernetes.

  meshd server                      on the first machine
  meshctl token create              there, for each machine that is to join
  meshd join HOST --token TOKEN     on each other machine
  meshd agent                       on each node of an existing Kubernetes: manifests/
  meshctl status                    anywhere: what is up, what is not, why, what to do

Every flag may stand in /etc/meshd/config.yaml under its own name instead
(node-name: m1); the command line wins.`,
		SilenceUsage:  true,
		SilenceErrors: true,
		Version:       version(),
	}
	root.AddCommand(serverCommand(), joinCommand(), agentCommand(), wireguardCommand(), readyCommand(), cleanupCommand(), allocateCommand(), floorCommand())
	return root
}
