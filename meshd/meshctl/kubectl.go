package main

import (
	"fmt"
	"net/url"
	"os"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	"k8s.io/cli-runtime/pkg/genericclioptions"
	"k8s.io/cli-runtime/pkg/genericiooptions"
	"k8s.io/client-go/tools/clientcmd"
	"k8s.io/kubectl/pkg/cmd"
	"k8s.io/kubectl/pkg/cmd/util"

	"meshd.dev/pkg/status"
)

// kubectlCommand is kubectl as a library, pointed at this cluster.
func kubectlCommand(w *where) *cobra.Command {
	return &cobra.Command{
		Use:                "kubectl [command]",
		Short:              "kubectl for this cluster, built in",
		DisableFlagParsing: true,
		RunE: func(_ *cobra.Command, args []string) error {
			path, err := w.kubeconfigPath()
			if err != nil && !withoutCluster(args) {
				return err
			}
			if err == nil {
				if err := os.Setenv(clientcmd.RecommendedConfigPathEnvVar, path); err != nil {
					return err
				}
			}
			flags := genericclioptions.NewConfigFlags(true).WithDeprecatedPasswordFlag().WithDiscoveryBurst(300).WithDiscoveryQPS(50)
			k := cmd.NewKubectlCommand(cmd.KubectlOptions{
				Arguments:   append([]string{"kubectl"}, args...),
				ConfigFlags: flags,
				IOStreams:   genericiooptions.IOStreams{In: os.Stdin, Out: os.Stdout, ErrOut: os.Stderr},
			})
			k.SetArgs(args)
			if err := k.Execute(); err != nil {
				util.CheckErr(err) // prints and exits as kubectl does
			}
			return nil
		},
	}
}

// withoutCluster reports whether these arguments need no kubeconfig, or bring
// their own.
func withoutCluster(args []string) bool {
	return len(args) == 0 || slices.ContainsFunc(args, func(a string) bool {
		return a == "help" || a == "-h" || a == "--help" || a == "--client" || a == "completion" || a == "kustomize" ||
			strings.HasPrefix(a, "--kubeconfig") || strings.HasPrefix(a, "--server") || a == "-s"
	})
}

// serverAddress is host:port of the API in the kubeconfig.
func serverAddress(w *where) (string, error) {
	path, err := w.kubeconfigPath()
	if err != nil {
		return "", err
	}
	config, err := clientcmd.BuildConfigFromFlags("", path)
	if err != nil {
		return "", err
	}
	u, err := url.Parse(config.Host)
	if err != nil {
		return "", err
	}
	return u.Host, nil
}

// planCommand prints what the daemon would change in the kernel now.
func planCommand(w *where) *cobra.Command {
	return &cobra.Command{
		Use: "plan", Short: "Print what meshd would change on this machine now, as ip, wg and nft commands", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			var plan struct {
				Ops   []string `json:"ops"`
				Error string   `json:"error"`
			}
			if err := status.Fetch(cmd.Context(), w.socket(), "/plan", &plan); err != nil {
				return err
			}
			for _, op := range plan.Ops {
				fmt.Fprintln(cmd.OutOrStdout(), op)
			}
			if plan.Error != "" {
				return fmt.Errorf("plan: %s", plan.Error)
			}
			if len(plan.Ops) == 0 {
				fmt.Fprintln(cmd.OutOrStdout(), "nothing: the kernel is as the cluster wants it")
			}
			return nil
		},
	}
}
