package main

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"time"

	"github.com/spf13/cobra"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/uuid"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/leaderelection"
	"k8s.io/client-go/tools/leaderelection/resourcelock"

	"meshd.dev/pkg/controller"
)

// allocateConfig is what `meshd allocate` needs to know.
type allocateConfig struct {
	apiConfig
	PodCIDRs       []string
	Mask4, Mask6   int
	LeaseNamespace string
	LogLevel       string
}

func allocateCommand() *cobra.Command {
	cfg := &allocateConfig{}
	cmd := &cobra.Command{
		Use:   "allocate",
		Short: "Give the nodes of an existing Kubernetes cluster their pod ranges, where the cluster does not",
		Long: `Allocate writes spec.podCIDRs of each Node that has none, as
kube-controller-manager does with --allocate-node-cidrs. It runs once a cluster:
a lease keeps a second one waiting.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return cfg.run(cmd.Context()) },
	}
	f := cmd.Flags()
	cfg.apiFlags(f)
	f.StringSliceVar(&cfg.PodCIDRs, "pod-cidr", nil, "address ranges of all pods, one a family; the first family is the nodes' first")
	f.IntVar(&cfg.Mask4, "node-mask-ipv4", 24, "length of a node's IPv4 range")
	f.IntVar(&cfg.Mask6, "node-mask-ipv6", 64, "length of a node's IPv6 range")
	f.StringVar(&cfg.LeaseNamespace, "lease-namespace", "meshd", "namespace of the lease meshd-allocate")
	f.StringVar(&cfg.LogLevel, "log-level", "info", "debug, info, warn or error")
	return cmd
}

const allocateLease = "meshd-allocate"

func (c *allocateConfig) run(ctx context.Context) error {
	log, err := (&nodeConfig{LogLevel: c.LogLevel}).logger()
	if err != nil {
		return err
	}
	quietLibraries(log)
	ranges, err := prefixes("--pod-cidr", c.PodCIDRs)
	if err != nil {
		return err
	}
	client, err := c.client()
	if err != nil {
		return err
	}
	work := controller.Config{Client: client, PodCIDRs: ranges, NodeMaskIPv4: c.Mask4, NodeMaskIPv6: c.Mask6, Log: log.With("part", "allocate")}
	work.Defaults()
	if err := work.Validate(); err != nil {
		return err
	}
	return lead(ctx, client, c.LeaseNamespace, log, func(ctx context.Context) error {
		log.Info("giving nodes their pod ranges", "ranges", ranges)
		return controller.AllocatePodCIDRs(ctx, work)
	})
}

// lead does work while this process holds the lease. Losing it is an error:
// whoever started the process starts it again, as one that waits.
func lead(ctx context.Context, client *rest.Config, namespace string, log *slog.Logger, work func(context.Context) error) error {
	api, err := kubernetes.NewForConfig(client)
	if err != nil {
		return err
	}
	host, err := os.Hostname()
	if err != nil {
		return err
	}
	leading, stop := context.WithCancel(ctx)
	defer stop()
	result := make(chan error, 1)
	elector, err := leaderelection.NewLeaderElector(leaderelection.LeaderElectionConfig{
		Lock: &resourcelock.LeaseLock{
			LeaseMeta:  metav1.ObjectMeta{Namespace: namespace, Name: allocateLease},
			Client:     api.CoordinationV1(),
			LockConfig: resourcelock.ResourceLockConfig{Identity: host + "_" + string(uuid.NewUUID())},
		},
		// The lease is left to run out: what work has under way when it is told
		// to end may still land, and the next one must not begin before.
		Name:          allocateLease,
		LeaseDuration: 30 * time.Second, RenewDeadline: 20 * time.Second, RetryPeriod: 4 * time.Second,
		Callbacks: leaderelection.LeaderCallbacks{
			OnStartedLeading: func(ctx context.Context) { result <- work(ctx); stop() },
			OnStoppedLeading: func() {},
			OnNewLeader:      func(who string) { log.Info("the lease is held", "by", who) },
		},
	})
	if err != nil {
		return fmt.Errorf("lease %s/%s: %w", namespace, allocateLease, err)
	}
	elector.Run(leading)
	if ctx.Err() != nil {
		return nil // told to end
	}
	if leading.Err() == nil {
		return fmt.Errorf("lost the lease %s/%s", namespace, allocateLease)
	}
	return <-result
}
