package main

import (
	"context"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"sync/atomic"

	"github.com/spf13/cobra"
	"golang.org/x/sync/errgroup"
	"k8s.io/client-go/kubernetes"

	"meshd.dev/pkg/apiserver"
	"meshd.dev/pkg/controller"
	"meshd.dev/pkg/join"
	"meshd.dev/pkg/pki"
	"meshd.dev/pkg/status"
)

func serverCommand() *cobra.Command {
	cfg := &serverConfig{}
	cmd := &cobra.Command{
		Use:   "server",
		Short: "Start a cluster on this machine: API, controllers, and this machine's own pods",
		Long: `Server makes the cluster's certificate authority, serves the Kubernetes API on
embedded etcd, runs the controllers, and is a node of the cluster itself. The
first start makes everything; each later one goes on with what is there.

The administrator's kubeconfig is DATA-DIR/admin.kubeconfig; meshctl finds it.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := readConfigFile(cmd); err != nil {
				return err
			}
			if err := cfg.complete(); err != nil {
				return err
			}
			return runServer(cmd.Context(), *cfg)
		},
	}
	cfg.flags(cmd.Flags())
	return cmd
}

func runServer(ctx context.Context, cfg serverConfig) error {
	log, err := cfg.logger()
	if err != nil {
		return err
	}
	quietLibraries(log)
	frugal()
	if err := lockState(cfg.DataDir); err != nil {
		return err
	}
	keys, err := prepareKeys(cfg)
	if err != nil {
		return err
	}
	joining := &lateHandler{}
	api, err := newAPI(ctx, cfg, keys, joining, log)
	if err != nil {
		return err
	}
	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error { return api.Run(ctx) })
	group.Go(func() error { return runBehindAPI(ctx, cfg, keys, api, joining, log) })
	return group.Wait()
}

func newAPI(ctx context.Context, cfg serverConfig, keys serverKeys, joining *lateHandler, log *slog.Logger) (*apiserver.Server, error) {
	return apiserver.New(ctx, apiserver.Config{
		Listen:            cfg.Listen,
		AdvertiseAddress:  netip.MustParseAddr(cfg.Advertise),
		DataDir:           cfg.DataDir,
		EtcdEndpoints:     cfg.EtcdEndpoints,
		CACert:            keys.caCert,
		ServingCert:       keys.servingCert,
		ServingKey:        keys.servingKey,
		ClientCA:          keys.caCert,
		ServiceAccountKey: keys.serviceAccountKey,
		EncryptionKey:     keys.encryptionKey,
		ServiceCIDRs:      cfg.serviceCIDRs,
		ClusterDomain:     cfg.ClusterDomain,
		AgentTLS:          keys.agentTLS(),
		Handlers:          map[string]http.Handler{join.JoinPath: joining, join.RenewPath: joining},
		Log:               log.With("part", "apiserver"),
	})
}

// runBehindAPI starts what needs the API: joining, controllers, and this
// machine as a node.
func runBehindAPI(ctx context.Context, cfg serverConfig, keys serverKeys, api *apiserver.Server, joining *lateHandler, log *slog.Logger) error {
	select {
	case <-ctx.Done():
		return nil
	case <-api.Ready():
	}
	client, err := kubernetes.NewForConfig(api.Loopback())
	if err != nil {
		return err
	}
	server := &join.Server{CA: keys.ca, Client: client, Cluster: cfg.cluster(), Log: log.With("part", "join")}
	if err := server.Reserve(ctx, join.Credentials{Dir: cfg.state("node")}); err != nil {
		return err
	}
	joining.set(server)

	if cfg.apiPort, err = net.LookupPort("tcp", cfg.port()); err != nil {
		return err // it listens there, so there is one
	}
	n, err := newNode(cfg.nodeConfig, roleServer, log)
	if err != nil {
		return err
	}
	controllers, err := newControllers(cfg, keys, api, n.board, log)
	if err != nil {
		return err
	}
	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error { return controllers.Run(ctx) })
	group.Go(func() error {
		return every(renewInterval, func(context.Context) {
			_, err := prepareKeys(cfg)
			n.board.Report("server/certificates", err, "mend what is named; certificates are good for another half of their life")
		})(ctx)
	})
	group.Go(func() error {
		return every(publishResync, func(ctx context.Context) {
			n.board.Report("server/node", server.Reserve(ctx, n.creds), "is the API up?")
		})(ctx)
	})
	n.run(ctx, group)
	log.Info("meshd server is ready", "node", cfg.NodeName, "api", "https://"+net.JoinHostPort(cfg.Advertise, cfg.port()), "kubeconfig", cfg.state("admin.kubeconfig"))
	notifyReady()
	return group.Wait()
}

func newControllers(cfg serverConfig, keys serverKeys, api *apiserver.Server, board *status.Board, log *slog.Logger) (*controller.Controllers, error) {
	return controller.New(controller.Config{
		Client:          api.Loopback(),
		PodCIDRs:        cfg.podCIDRs,
		ServiceCIDRs:    cfg.serviceCIDRs,
		RootCA:          pki.EncodeCert(keys.ca.Cert),
		NodeGracePeriod: cfg.NodeGrace,
		EvictAfter:      cfg.EvictAfter,
		Board:           board,
		Log:             log.With("part", "controller"),
	})
}

func (c serverConfig) port() string {
	_, port, _ := net.SplitHostPort(c.Listen)
	return port
}

// cluster is what joining nodes are told.
func (c serverConfig) cluster() join.Cluster {
	return join.Cluster{
		Servers:       []string{net.JoinHostPort(c.Advertise, c.port())},
		PodCIDRs:      c.PodCIDRs,
		ServiceCIDRs:  c.ServiceCIDRs,
		ClusterDomain: c.ClusterDomain,
	}
}

// lateHandler serves what can only be built once the API it is part of runs.
type lateHandler struct{ server atomic.Pointer[join.Server] }

func (h *lateHandler) set(s *join.Server) { h.server.Store(s) }

func (h *lateHandler) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	s := h.server.Load()
	switch {
	case s == nil:
		http.Error(w, "the server is starting; try again", http.StatusServiceUnavailable)
	case r.URL.Path == join.RenewPath:
		s.Renew(w, r)
	default:
		s.Join(w, r)
	}
}
