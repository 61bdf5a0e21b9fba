// Package userspace serves a WireGuard device from this process, for kernels
// that have none.
package userspace

import (
	"context"
	"log/slog"
)

// Config of Run. Device is required.
type Config struct {
	// Device is the name of the link.
	Device string
	// MTU at the start; whoever drives the device changes it. Default 1420.
	MTU int
	Log *slog.Logger
}

// Run serves the device until ctx ends; the device is gone then.
func Run(ctx context.Context, cfg Config) error { <-ctx.Done(); return nil }
