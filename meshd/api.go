package main

import (
	"errors"
	"fmt"

	"github.com/spf13/pflag"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
)

// apiConfig says how to reach a Kubernetes API that is not ours.
type apiConfig struct {
	Kubeconfig string
	APIServer  string
}

func (c *apiConfig) apiFlags(f *pflag.FlagSet) {
	f.StringVar(&c.Kubeconfig, "kubeconfig", "", "kubeconfig of the cluster (default the service account of the pod this runs in)")
	f.StringVar(&c.APIServer, "api-server", "", "URL of the Kubernetes API, in place of the one the credentials name; needed where meshd itself is the service proxy")
}

// client reaches the API with a kubeconfig, or else as the pod this runs in.
func (c *apiConfig) client() (*rest.Config, error) {
	if c.Kubeconfig != "" {
		config, err := clientcmd.BuildConfigFromFlags(c.APIServer, c.Kubeconfig)
		if err != nil {
			return nil, fmt.Errorf("--kubeconfig %s: %w", c.Kubeconfig, err)
		}
		return config, nil
	}
	config, err := rest.InClusterConfig()
	if errors.Is(err, rest.ErrNotInCluster) {
		return nil, errors.New("this is not a pod of a cluster: give --kubeconfig")
	}
	if err != nil {
		return nil, fmt.Errorf("credentials of this pod: %w", err)
	}
	if c.APIServer != "" {
		config.Host = c.APIServer
	}
	return config, nil
}
