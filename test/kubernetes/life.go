package kubernetes

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"meshd.dev/test/cluster"
)

// late is a node that comes when the cluster is running.
const late = "m4"

// newNode: nobody does anything for the network of a node that comes later.
func newNode(ctx context.Context, w *World) (string, error) {
	if err := w.Boot(ctx, late); err != nil {
		return "", err
	}
	if err := w.lookBefore(ctx, late); err != nil {
		return "", err
	}
	start := time.Now()
	if err := w.StartNode(ctx, w.Machine(late)); err != nil {
		return "", err
	}
	w.nodes = append(slices.Clone(w.nodes), late)
	if _, err := w.NodesAre(ctx, w.nodes, notReady); err != nil {
		return "", err
	}
	ready := time.Since(start)
	for _, app := range []string{"everywhere", "host"} {
		if _, err := w.ReadyOn(ctx, app, len(w.nodes)); err != nil {
			return "", err
		}
	}
	if _, err := podsReachEachOther(ctx, w); err != nil {
		return "", err
	}
	_, err := w.StatusHealthy(ctx, w.nodes)
	return fmt.Sprintf("Ready %s after its kubelet's start, its pods reach all others", cluster.Short(ready)), err
}

// upgrade gives the DaemonSet another image while two pods talk.
func upgrade(ctx context.Context, w *World) (string, error) {
	from, err := w.PodOn(ctx, "everywhere", "m1")
	if err != nil {
		return "", err
	}
	to, err := w.PodOn(ctx, "everywhere", "m3")
	if err != nil {
		return "", err
	}
	before, err := w.ourPods(ctx)
	if err != nil {
		return "", err
	}
	t, err := w.StartTransfer(ctx, from, cluster.Stream(to), "", 4<<20)
	if err != nil {
		return "", err
	}
	start := time.Now()
	_, err = w.Kubectl(ctx, "set", "image", "-n", meshdNamespace, "daemonset/meshd", "meshd="+nextImage)
	if err == nil {
		err = w.rolledOut(ctx, "meshd", len(w.nodes))
	}
	took := time.Since(start)
	p, broken := t.Stop(ctx)
	if err := errors.Join(err, broken); err != nil {
		return "", err
	}
	if err := w.replacedOnly(ctx, "meshd", before); err != nil {
		return "", err
	}
	for _, was := range []*corev1.Pod{from, to} {
		if err := w.Untouched(ctx, was); err != nil {
			return "", err
		}
	}
	_, err = w.StatusHealthy(ctx, w.nodes)
	return fmt.Sprintf("%d nodes in %s; %.1f MB whole and in order, longest silence %s", len(w.nodes), cluster.Short(took),
		float64(p.Bytes)/1e6, cluster.Short(p.Silence)), err
}

// ourPods are the pods of our DaemonSets, by name.
func (w *World) ourPods(ctx context.Context) (map[string]corev1.Pod, error) {
	list, err := w.API.CoreV1().Pods(meshdNamespace).List(ctx, metav1.ListOptions{})
	if err != nil {
		return nil, err
	}
	pods := map[string]corev1.Pod{}
	for _, p := range list.Items {
		pods[p.Name] = p
	}
	return pods, nil
}

// replacedOnly checks that one DaemonSet's pods are all new, and the other
// pods of ours, which carry the tunnels, the old ones.
func (w *World) replacedOnly(ctx context.Context, daemonSet string, before map[string]corev1.Pod) error {
	now, err := w.ourPods(ctx)
	if err != nil {
		return err
	}
	for name, p := range now {
		_, old := before[name]
		replaced := p.OwnerReferences[0].Name == daemonSet
		switch {
		case replaced && old:
			return fmt.Errorf("pod %s is the one from before", name)
		case !replaced && !old:
			return fmt.Errorf("pod %s was replaced as well", name)
		case !replaced && p.Status.ContainerStatuses[0].RestartCount != before[name].Status.ContainerStatuses[0].RestartCount:
			return fmt.Errorf("pod %s was restarted", name)
		}
	}
	return nil
}

// look is what meshd could leave on a machine. Other programs' addresses and
// routes are in it as well: they have to be as they were. Empty folders are not:
// the kubelet makes them for the volumes of our pods, the last one's included.
const look = `
ip -o link show | awk '{print "link", $2}' | grep -v 'veth\|nodelocal' | sort
ip -o address show scope global | awk '{print "address", $2, $4}' | sort
ip -4 route show table all | grep -v 'table local' | sed 's/^/route /' | sort
ip -6 route show table all | grep -v 'table local\|fe80::' | sed 's/^/route /' | sort
ip rule | sed 's/^/rule /'
nft list tables | grep -v 'kube-proxy\|ip6\? \(mangle\|nat\|filter\)$' # kube-proxy's and the kubelet's
find /etc/cni /opt/cni /var/lib/meshd /run/meshd /run/wireguard /etc/meshd /etc/systemd/network /run/systemd/network ` +
	`/etc/NetworkManager /run/NetworkManager ! -type d 2>/dev/null | sed 's/^/file /' | sort
find /run/wireguard -mindepth 1 -type d 2>/dev/null | sed 's/^/folder /' | sort
ss -Hlntu | awk '{print "socket", $1, $5}' | grep ':53$\|:51820$' | sort
`

func (w *World) lookBefore(ctx context.Context, names ...string) error {
	for _, name := range names {
		text, err := w.Machine(name).Run(ctx, "sh", "-c", look)
		if err != nil {
			return err
		}
		w.before[name] = text
	}
	return nil
}

// uninstall takes the pods away, then meshd as its page says, and compares each
// node with what it was before.
func uninstall(ctx context.Context, w *World) (string, error) {
	if _, err := w.Kubectl(ctx, "delete", "namespace", cluster.Namespace, "--timeout=120s"); err != nil {
		return "", err
	}
	if _, err := w.Kubectl(ctx, "delete", "-n", "kube-system", "deployment/coredns", "--cascade=foreground", "--timeout=120s"); err != nil {
		return "", err
	}
	start := time.Now()
	folder, err := w.overlay()
	if err != nil {
		return "", err
	}
	for _, args := range [][]string{
		{"delete", "-k", folder, "--timeout=120s"},
		{"apply", "-k", "/srv/manifests/kubeadm/cleanup"},
		{"rollout", "status", "-n", "meshd-cleanup", "daemonset/meshd-cleanup", "--timeout=120s"},
		{"delete", "-k", "/srv/manifests/kubeadm/cleanup", "--timeout=120s"},
	} {
		if out, err := w.Kubectl(ctx, args...); err != nil {
			return "", fmt.Errorf("%w\n%s", err, out)
		}
	}
	for _, name := range w.nodes {
		after, err := w.Machine(name).Run(ctx, "sh", "-c", look)
		if err != nil {
			return "", err
		}
		if left := differences(w.before[name], after); left != "" {
			return "", fmt.Errorf("%s is not as it was before:\n%s", name, left)
		}
		for _, p := range w.Machine(name).Processes() {
			if strings.HasPrefix(p.Name(), "mesh") {
				return "", fmt.Errorf("%s: process %v runs still", name, p.Argv)
			}
		}
	}
	return fmt.Sprintf("%d nodes as they were before, after %s", len(w.nodes), cluster.Short(time.Since(start))), w.nodesForget(ctx)
}

// differences between two lists of lines, as a diff shows them.
func differences(before, after string) string {
	var b strings.Builder
	was, is := strings.Split(before, "\n"), strings.Split(after, "\n")
	for _, line := range was {
		if !slices.Contains(is, line) {
			fmt.Fprintf(&b, "- %s\n", line)
		}
	}
	for _, line := range is {
		if !slices.Contains(was, line) {
			fmt.Fprintf(&b, "+ %s\n", line)
		}
	}
	return b.String()
}

// nodesForget wants the nodes to be NotReady again for want of a CNI: the
// container runtime has no configuration of ours any more.
func (w *World) nodesForget(ctx context.Context) error {
	_, err := w.NodesAre(ctx, w.nodes, func(n corev1.Node) string {
		if why := notReady(n); !strings.Contains(why, "cni plugin not initialized") {
			return fmt.Sprintf("is Ready or not for another reason: %q", why)
		}
		return ""
	})
	return err
}
