package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes"

	"meshd.dev/pkg/join"
	"meshd.dev/pkg/status"
)

// patience bounds how long a status may take, whatever is down.
const patience = 10 * time.Second

func statusCommand(w *where) *cobra.Command {
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "status",
		Short: "Print what is up, what is not, why, and what to do; the exit status says healthy or not",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			ctx, cancel := context.WithTimeout(cmd.Context(), patience)
			defer cancel()
			r := judge(gather(ctx, w), time.Now())
			if err := show(cmd.OutOrStdout(), r, asJSON); err != nil {
				return err
			}
			if !r.Healthy {
				return errUnhealthy
			}
			return nil
		},
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	return cmd
}

func show(out io.Writer, r report, asJSON bool) error {
	if !asJSON {
		return printReport(out, r)
	}
	enc := json.NewEncoder(out)
	enc.SetIndent("", "  ")
	return enc.Encode(r)
}

// facts is everything a status is judged by. An error stands for what could
// not be asked.
type facts struct {
	daemon    *status.Document
	daemonErr error
	socket    string

	apiErr   error
	nodes    []corev1.Node
	pods     []corev1.Pod
	services []corev1.Service
	slices   []discoveryv1.EndpointSlice
	// warnings are the newest Warning event of each pod, where these
	// credentials may read events.
	warnings map[types.UID]warning
	// node is this machine's name in the cluster, if it has joined one.
	node string
	// ownPodsOnly: these credentials may see no other node's pods.
	ownPodsOnly bool
	// guest: the cluster is somebody else's Kubernetes, of which meshd is only
	// the network.
	guest bool
}

// warning is what an event says, and when it last did.
type warning struct {
	text string
	last time.Time
}

func gather(ctx context.Context, w *where) facts {
	f := facts{socket: w.socket()}
	f.node, _ = join.Credentials{Dir: filepath.Join(w.dataDir, "node")}.Node()
	var doc status.Document
	if f.daemonErr = status.Fetch(ctx, w.socket(), "/status", &doc); f.daemonErr == nil {
		f.daemon = &doc
		f.guest = doc.Role == guestRole
	}
	client, err := w.client()
	switch {
	case err != nil:
	case f.guest:
		err = f.askForeign(ctx, client)
	default:
		err = f.askAPI(ctx, client)
	}
	f.apiErr = err
	return f
}

func (f *facts) askAPI(ctx context.Context, client kubernetes.Interface) error {
	if err := f.askForeign(ctx, client); err != nil {
		return err
	}
	pods, err := client.CoreV1().Pods("").List(ctx, metav1.ListOptions{})
	if apierrors.IsForbidden(err) && f.node != "" {
		f.ownPodsOnly = true
		pods, err = client.CoreV1().Pods("").List(ctx, metav1.ListOptions{FieldSelector: "spec.nodeName=" + f.node})
	}
	if err != nil {
		return fmt.Errorf("list pods: %w", err)
	}
	f.pods = pods.Items
	f.warnings = podWarnings(ctx, client)
	return nil
}

// guestRole is the role of a daemon of `meshd agent`.
const guestRole = "agent"

// askForeign asks what a network knows of its cluster; its credentials see no
// pods.
func (f *facts) askForeign(ctx context.Context, client kubernetes.Interface) error {
	nodes, err := client.CoreV1().Nodes().List(ctx, metav1.ListOptions{})
	if err != nil {
		return fmt.Errorf("list nodes: %w", err)
	}
	services, err := client.CoreV1().Services("").List(ctx, metav1.ListOptions{})
	if err != nil {
		return fmt.Errorf("list services: %w", err)
	}
	slices, err := client.DiscoveryV1().EndpointSlices("").List(ctx, metav1.ListOptions{})
	if err != nil {
		return fmt.Errorf("list endpointslices: %w", err)
	}
	f.nodes, f.services, f.slices = nodes.Items, services.Items, slices.Items
	return nil
}

// maxWarnings bounds how many events a status reads.
const maxWarnings = 500

// podWarnings: without them a status says less and is no less true, so an
// error is none.
func podWarnings(ctx context.Context, client kubernetes.Interface) map[types.UID]warning {
	events, err := client.CoreV1().Events("").List(ctx, metav1.ListOptions{
		FieldSelector: "type=Warning,involvedObject.kind=Pod", Limit: maxWarnings})
	if err != nil {
		return nil
	}
	newest := map[types.UID]warning{}
	for _, e := range events.Items {
		last := e.LastTimestamp.Time
		if last.IsZero() {
			last = e.EventTime.Time
		}
		if last.After(newest[e.InvolvedObject.UID].last) {
			newest[e.InvolvedObject.UID] = warning{text: e.Reason + ": " + strings.TrimSpace(e.Message), last: last}
		}
	}
	return newest
}
