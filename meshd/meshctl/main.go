// Meshctl is the command line of meshd: what is up and what is not, tokens for
// joining, and a kubectl of its own.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"

	"github.com/spf13/cobra"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
)

// release is set by the linker.
var release = "dev"

// errUnhealthy is the outcome of a status that says why by itself.
var errUnhealthy = errors.New("not healthy")

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	err := newCommand().ExecuteContext(ctx)
	if err != nil && !errors.Is(err, errUnhealthy) {
		fmt.Fprintln(os.Stderr, "meshctl:", err)
	}
	if err != nil {
		os.Exit(1)
	}
}

// where says how to reach the daemon of this machine and the cluster's API.
type where struct {
	dataDir, runDir, kubeconfig string
}

func (w where) socket() string { return filepath.Join(w.runDir, "meshd.sock") }

// kubeconfigPath is the one given, or the administrator's on a server, or the
// node's own on a machine that joined.
func (w where) kubeconfigPath() (string, error) {
	if w.kubeconfig != "" {
		return w.kubeconfig, nil
	}
	if env := os.Getenv(clientcmd.RecommendedConfigPathEnvVar); env != "" {
		return env, nil
	}
	for _, path := range []string{filepath.Join(w.dataDir, "admin.kubeconfig"), filepath.Join(w.dataDir, "node", "node.kubeconfig")} {
		if _, err := os.Stat(path); err == nil {
			return path, nil
		}
	}
	return "", fmt.Errorf("%w: neither --kubeconfig nor KUBECONFIG is set, and %s/admin.kubeconfig is not there; run this as root on a machine of the cluster", errNoKubeconfig, w.dataDir)
}

func (w where) client() (kubernetes.Interface, error) {
	config, err := w.config()
	if err != nil {
		return nil, err
	}
	config.UserAgent = "meshctl/" + release
	return kubernetes.NewForConfig(config)
}

// config is that of a kubeconfig, or else of the pod this runs in.
func (w where) config() (*rest.Config, error) {
	path, err := w.kubeconfigPath()
	if errors.Is(err, errNoKubeconfig) {
		if config, err := rest.InClusterConfig(); err == nil {
			return config, nil
		}
	}
	if err != nil {
		return nil, err
	}
	config, err := clientcmd.BuildConfigFromFlags("", path)
	if err != nil {
		return nil, fmt.Errorf("kubeconfig %s: %w", path, err)
	}
	return config, nil
}

var errNoKubeconfig = errors.New("no kubeconfig")

func newCommand() *cobra.Command {
	w := &where{}
	root := &cobra.Command{
		Use:   "meshctl",
		Short: "Look at and work with a meshd cluster",
		Long: `Meshctl asks the meshd of this machine and the cluster's Kubernetes API.

  meshctl status               what is up, what is not, why, and what to do
  meshctl token create         a token with which one machine may join
  meshctl kubectl get pods -A  kubectl, built in`,
		SilenceUsage: true, SilenceErrors: true,
		Version: release,
	}
	f := root.PersistentFlags()
	f.StringVar(&w.dataDir, "data-dir", "/var/lib/meshd", "state folder of meshd")
	f.StringVar(&w.runDir, "run-dir", "/run/meshd", "folder of meshd's sockets")
	f.StringVar(&w.kubeconfig, "kubeconfig", "", "kubeconfig of the cluster (default KUBECONFIG, then the administrator's or the node's below --data-dir)")
	root.AddCommand(statusCommand(w), tokenCommand(w), kubectlCommand(w), planCommand(w), podsCommand(w), keysCommand(w), gcCommand(w))
	return root
}
