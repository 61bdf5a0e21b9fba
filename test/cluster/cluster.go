// Package cluster is what a test sees of a cluster in a lab, whoever serves its
// API and runs its pods: the machines, the API, and the echo pods
// (test/images/echo), which can be asked to resolve, fetch and send.
package cluster

import (
	"context"
	"fmt"
	"time"

	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/clientcmd"

	"meshd.dev/test/netlab"
)

// A View is where a test looks.
type View struct {
	Lab *netlab.Lab
	API kubernetes.Interface
}

// Machine by name; it exists.
func (v *View) Machine(name string) *netlab.Machine { return v.Lab.Machine(name) }

// Connect makes v.API a client that dials from machine m with a kubeconfig, and
// checks that the API is ready.
func (v *View) Connect(ctx context.Context, m *netlab.Machine, kubeconfig []byte) error {
	cfg, err := clientcmd.RESTConfigFromKubeConfig(kubeconfig)
	if err != nil {
		return err
	}
	cfg.Dial, cfg.QPS, cfg.Burst, cfg.Timeout = m.DialContext, 500, 500, 10*time.Second
	api, err := kubernetes.NewForConfig(cfg)
	if err != nil {
		return err
	}
	if _, err := api.Discovery().RESTClient().Get().AbsPath("/readyz").DoRaw(ctx); err != nil {
		return fmt.Errorf("API is not ready: %w", err)
	}
	v.API = api
	return nil
}
