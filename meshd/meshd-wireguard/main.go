// Meshd-wireguard is the process that carries a node's tunnels where the
// kernel has no WireGuard: the body of `meshd wireguard`, which becomes this
// program where the two lie side by side.
//
// It is a program of its own because what it is for is small and meshd is not:
// it runs after 1 ms and takes 7 MB, where meshd with all of Kubernetes in it
// takes 45 ms before its first line and 74 MB. Tunnels stand still that long
// when their process died.
package main

import (
	"context"
	"flag"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"syscall"

	"meshd.dev/pkg/datapath/wireguard/userspace"
	"meshd.dev/pkg/mesh"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	if err := run(ctx); err != nil {
		fmt.Fprintln(os.Stderr, "meshd-wireguard:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context) error {
	cfg := userspace.Config{Log: slog.New(slog.NewTextHandler(os.Stderr, nil))}
	flag.Usage = func() {
		fmt.Fprintln(os.Stderr, "usage: meshd-wireguard [FLAGS] [DEVICE]; see meshd wireguard --help")
		flag.PrintDefaults()
	}
	cfg.Flags(flag.CommandLine)
	flag.Parse()
	if flag.NArg() > 1 {
		return fmt.Errorf("want one device at most, have %q", flag.Args())
	}
	if cfg.Device = flag.Arg(0); cfg.Device == "" {
		cfg.Device = mesh.Device
	}
	return userspace.Run(ctx, cfg)
}
