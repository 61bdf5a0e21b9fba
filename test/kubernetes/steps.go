package kubernetes

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"

	"meshd.dev/test/cluster"
	"meshd.dev/test/netlab"
)

func bootMachines(ctx context.Context, w *World) (string, error) {
	if err := w.Boot(ctx, w.nodes...); err != nil {
		return "", err
	}
	if err := w.bootOutside(ctx); err != nil {
		return "", err
	}
	version, err := w.Machine("m1").Run(ctx, "containerd", "--version")
	if err != nil {
		return "", err
	}
	f := strings.Fields(version)
	return "containerd " + f[min(2, len(f)-1)], nil
}

func startControlPlane(ctx context.Context, w *World) (string, error) {
	if err := w.StartControlPlane(ctx); err != nil {
		return "", err
	}
	version, err := w.API.Discovery().ServerVersion()
	if err != nil {
		return "", err
	}
	return version.GitVersion, w.Apply(ctx, "kube-dns", kubeDNS)
}

// kubeDNS is what every cluster has, but the pod behind it knows no DNS: whoever
// gets an answer has it from somebody else.
const kubeDNS = `apiVersion: v1
kind: Service
metadata: {name: kube-dns, namespace: kube-system, labels: {k8s-app: kube-dns}}
spec:
  clusterIP: ` + dnsService + `
  ipFamilyPolicy: PreferDualStack
  selector: {k8s-app: kube-dns}
  ports:
  - {name: dns, port: 53, protocol: UDP}
  - {name: dns-tcp, port: 53, protocol: TCP}
---
apiVersion: apps/v1
kind: Deployment
metadata: {name: coredns, namespace: kube-system}
spec:
  selector: {matchLabels: {k8s-app: kube-dns}}
  template:
    metadata: {labels: {k8s-app: kube-dns}}
    spec:
      terminationGracePeriodSeconds: 1
      containers: [{name: mute, image: meshd.local/echo:1, imagePullPolicy: IfNotPresent}]
`

// startNodes starts the kubelets; without a CNI no node is Ready, and each says so.
func startNodes(ctx context.Context, w *World) (string, error) {
	if err := w.each(ctx, w.nodes, func(ctx context.Context, m *netlab.Machine) error { return w.StartNode(ctx, m) }); err != nil {
		return "", err
	}
	found, err := w.NodesAre(ctx, w.nodes, func(n corev1.Node) string {
		switch why := notReady(n); {
		case why == "":
			return "is Ready without a CNI"
		case !strings.Contains(why, "cni plugin not initialized"):
			return why
		case len(n.Spec.PodCIDRs) != 2 && !w.cfg.NoPodCIDRs:
			return fmt.Sprintf("has pod CIDRs %v, want one a family", n.Spec.PodCIDRs)
		}
		return ""
	})
	if err != nil {
		return "", err
	}
	var cidrs []string
	for _, n := range found {
		cidrs = append(cidrs, n.Name+" "+n.Spec.PodCIDR)
	}
	return strings.Join(cidrs, ", "), nil
}

// bootOutside makes the machine that is not of the cluster; the echo program
// runs on it.
func (w *World) bootOutside(ctx context.Context) error {
	m, err := w.Lab.Add(ctx, outside)
	if err != nil {
		return err
	}
	if err := m.PowerOn(ctx); err != nil {
		return err
	}
	echo, err := os.ReadFile(filepath.Join(w.cfg.Work, "echo"))
	if err != nil {
		return err
	}
	if err := m.WriteFile("/srv/echo", echo, 0o755); err != nil {
		return err
	}
	_, err = m.Start(ctx, "echo", "/srv/echo")
	return err
}

// install applies the manifests and waits until every node is Ready and meshd
// content on each.
func install(ctx context.Context, w *World) (string, error) {
	if err := w.lookBefore(ctx, w.nodes...); err != nil {
		return "", err
	}
	start := time.Now()
	if err := w.Install(ctx); err != nil {
		return "", err
	}
	if _, err := w.NodesAre(ctx, w.nodes, notReady); err != nil {
		return "", err
	}
	took := time.Since(start)
	for _, name := range []string{"meshd", "meshd-wireguard"} {
		if err := w.rolledOut(ctx, name, len(w.nodes)); err != nil {
			return "", err
		}
	}
	backend, err := w.StatusHealthy(ctx, w.nodes)
	return fmt.Sprintf("nodes Ready %s after kubectl apply, tunnels: %s", cluster.Short(took), backend), err
}
