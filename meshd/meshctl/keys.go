package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes"

	"meshd.dev/pkg/kube"
	"meshd.dev/pkg/mesh"
	"meshd.dev/pkg/status"
)

// keysCommand prints what this machine knows of keys.
func keysCommand(w *where) *cobra.Command {
	asJSON := false
	cmd := &cobra.Command{
		Use: "keys", Short: "Print this machine's tunnel key, and the keys and preshared keys of its peers", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			var keys status.Keys
			if err := status.Fetch(cmd.Context(), w.socket(), "/keys", &keys); err != nil {
				return err
			}
			if asJSON {
				return json.NewEncoder(cmd.OutOrStdout()).Encode(keys)
			}
			return printKeys(cmd.OutOrStdout(), keys, time.Now())
		},
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "as JSON")
	cmd.AddCommand(rotateCommand(w))
	return cmd
}

func printKeys(out io.Writer, k status.Keys, now time.Time) error {
	fmt.Fprintf(out, "key of %s: %s, number %d, made %s ago\n", k.Node, k.Key, k.Generation, age(now.Sub(k.Made)))
	switch {
	case k.Stage != "steady":
		fmt.Fprintf(out, "it changes: %s (to %s)\n", k.Stage, k.Next)
	case k.Wanted:
		fmt.Fprintln(out, "it changes as soon as it may")
	case !k.Due.IsZero():
		fmt.Fprintf(out, "it changes in %s\n", age(k.Due.Sub(now)))
	}
	for _, node := range slices.Sorted(maps.Keys(k.Waiting)) {
		fmt.Fprintf(out, "waiting for %s: %s\n", node, k.Waiting[node])
	}
	fmt.Fprintln(out)
	tw := tabwriter.NewWriter(out, 0, 0, 3, ' ', 0)
	fmt.Fprintln(tw, "PEER\tKEY\tPRESHARED KEY\tCHANGING")
	for _, p := range k.Peers {
		psk := "none: " + p.PSKWhy
		if !p.PSKMade.IsZero() {
			psk = "made " + age(now.Sub(p.PSKMade)) + " ago"
		}
		changing := "-"
		if p.Changing != "steady" || p.Second {
			changing = p.Changing
			if p.Second {
				changing += ", over the second device"
			}
		}
		fmt.Fprintln(tw, strings.Join([]string{p.Node, cmp.Or(p.Key, "-"), psk, changing}, "\t"))
	}
	return tw.Flush()
}

// age in two units at most.
func age(d time.Duration) string {
	d = max(d, 0)
	switch {
	case d < time.Minute:
		return d.Truncate(time.Second).String()
	case d < 48*time.Hour:
		return strings.TrimSuffix(d.Truncate(time.Minute).String(), "0s")
	}
	return fmt.Sprintf("%dd", int(d.Hours()/24))
}

// rotateCommand changes keys and waits until they have changed.
func rotateCommand(w *where) *cobra.Command {
	all, wait := false, 5*time.Minute
	cmd := &cobra.Command{
		Use: "rotate [NODE...]", Short: "Change the key of this machine, or of nodes, without losing a packet",
		Long: `Rotate changes the tunnel key of this machine; with names, or --all, the keys of
these nodes, for which it needs the administrator's kubeconfig. It waits until
the keys have changed. What is on the way to be changed goes on when it is
interrupted.`,
		RunE: func(cmd *cobra.Command, nodes []string) error {
			ctx, cancel := context.WithTimeout(cmd.Context(), wait)
			defer cancel()
			if !all && len(nodes) == 0 {
				return rotateHere(ctx, cmd.OutOrStdout(), w)
			}
			if all && len(nodes) > 0 {
				return errors.New("rotate: either names of nodes or --all")
			}
			client, err := w.client()
			if err != nil {
				return err
			}
			return rotateNodes(ctx, cmd.OutOrStdout(), client, nodes)
		},
	}
	cmd.Flags().BoolVar(&all, "all", false, "all nodes of the cluster")
	cmd.Flags().DurationVar(&wait, "timeout", wait, "how long to wait")
	return cmd
}

// look is how often it is looked whether keys have changed.
const look = 200 * time.Millisecond

func rotateHere(ctx context.Context, out io.Writer, w *where) error {
	var before, now status.Keys
	if err := status.Fetch(ctx, w.socket(), "POST /keys/rotate", &before); err != nil {
		return err
	}
	start := time.Now()
	for {
		if err := status.Fetch(ctx, w.socket(), "/keys", &now); err != nil && ctx.Err() == nil {
			return err
		}
		if now.Generation > before.Generation && now.Stage == "steady" {
			fmt.Fprintf(out, "%s has key %s, number %d, after %s\n", now.Node, now.Key, now.Generation, time.Since(start).Round(100*time.Millisecond))
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("key of %s: %s; it goes on by itself%s", now.Node, cmp.Or(now.Stage, "not known"), waitingFor(now.Waiting))
		case <-time.After(look):
		}
	}
}

func waitingFor(nodes map[string]string) string {
	var list []string
	for _, node := range slices.Sorted(maps.Keys(nodes)) {
		list = append(list, node+": "+nodes[node])
	}
	if len(list) == 0 {
		return ""
	}
	return ", waiting for " + strings.Join(list, "; ")
}

// rotateNodes says on the Node object of each which key to leave; the nodes do
// the rest.
func rotateNodes(ctx context.Context, out io.Writer, client kubernetes.Interface, names []string) error {
	list, err := client.CoreV1().Nodes().List(ctx, metav1.ListOptions{})
	if err != nil {
		return err
	}
	old := map[string]mesh.Key{}
	for i := range list.Items {
		n := &list.Items[i]
		if len(names) > 0 && !slices.Contains(names, n.Name) {
			continue
		}
		node, _ := kube.NodeOf(n)
		if node.PublicKey.IsZero() {
			return fmt.Errorf("node %s has published no key: does meshd run there?", n.Name)
		}
		old[n.Name] = node.PublicKey
	}
	for _, name := range names {
		if _, ok := old[name]; !ok {
			return fmt.Errorf("no node is called %q", name)
		}
	}
	for name, key := range old {
		patch := fmt.Sprintf(`{"metadata":{"annotations":{%q:%q}}}`, mesh.AnnotationRotateKey, key)
		if _, err := client.CoreV1().Nodes().Patch(ctx, name, types.MergePatchType, []byte(patch), metav1.PatchOptions{}); err != nil {
			return fmt.Errorf("have node %s change its key: %w", name, err)
		}
	}
	return awaitKeys(ctx, out, client, old)
}

func awaitKeys(ctx context.Context, out io.Writer, client kubernetes.Interface, old map[string]mesh.Key) error {
	start := time.Now()
	for len(old) > 0 {
		list, err := client.CoreV1().Nodes().List(ctx, metav1.ListOptions{})
		if err != nil && ctx.Err() == nil {
			return err
		}
		for _, name := range changed(list, old) {
			delete(old, name)
			fmt.Fprintf(out, "%s has a new key, after %s\n", name, time.Since(start).Round(100*time.Millisecond))
		}
		if len(old) == 0 {
			break
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("not yet changed: %s; they go on by themselves, `meshctl keys` there says what they wait for", strings.Join(slices.Sorted(maps.Keys(old)), ", "))
		case <-time.After(look):
		}
	}
	return nil
}

// changed are the nodes that have another key than the old one, and nothing
// left to do for it.
func changed(list *corev1.NodeList, old map[string]mesh.Key) (names []string) {
	if list == nil {
		return nil
	}
	for i := range list.Items {
		node, _ := kube.NodeOf(&list.Items[i])
		if key, asked := old[node.Name]; asked && node.PublicKey != key && !node.PublicKey.IsZero() && node.NextKey.IsZero() {
			names = append(names, node.Name)
		}
	}
	slices.Sort(names)
	return names
}
