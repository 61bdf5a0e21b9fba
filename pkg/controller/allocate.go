package controller

import (
	"context"
	"fmt"

	"k8s.io/client-go/kubernetes"
)

// AllocatePodCIDRs gives each node its part of cfg.PodCIDRs until ctx ends,
// and does nothing else: for a cluster of somebody else's whose own
// controllers do not. One at a time may run in a cluster.
func AllocatePodCIDRs(ctx context.Context, cfg Config) error {
	cfg.Defaults()
	if err := cfg.Validate(); err != nil {
		return fmt.Errorf("allocate pod CIDRs: %w", err)
	}
	client, err := kubernetes.NewForConfig(cfg.Client)
	if err != nil {
		return fmt.Errorf("allocate pod CIDRs: %w", err)
	}
	p := newPlane(ctx, cfg, client)
	defer p.events.Shutdown()
	c := newNodeCIDR(p)
	p.start(ctx)
	defer p.shutdown()
	return c.Run(ctx)
}
