package kubernetes

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"meshd.dev/test/cluster"
)

// What is wrong has to be said where people look: meshctl status, the events of
// meshd's pod and of a pod that waits for a network, the log, the Node. And a
// machine that cannot have all of the network has nothing of it.

// aPod is a pod on a node that nobody had to schedule: the node may not be Ready.
const aPod = `apiVersion: v1
kind: Pod
metadata: {name: %s, namespace: demo, labels: {app: %[1]s}}
spec:
  nodeName: %s
` + echoSpec

const demoNamespace = "apiVersion: v1\nkind: Namespace\nmetadata: {name: demo}\n---\n"

// startPod tries until the new namespace has its service account.
func (w *World) startPod(ctx context.Context, name, node string) error {
	return w.Until(ctx, func(ctx context.Context) error {
		return w.Apply(ctx, name, demoNamespace+fmt.Sprintf(aPod, name, node))
	})
}

// eventSays waits for an event about an object that has all these words; it
// returns how many there are.
func (w *World) eventSays(ctx context.Context, namespace, kind, name string, words ...string) (n int, err error) {
	return n, w.Until(ctx, func(ctx context.Context) error {
		list, err := w.API.CoreV1().Events(namespace).List(ctx, metav1.ListOptions{FieldSelector: "involvedObject.kind=" + kind + ",involvedObject.name=" + name})
		if err != nil {
			return err
		}
		n = 0
		var all []string
		for _, e := range list.Items {
			text := e.Reason + ": " + e.Message
			if all = append(all, text); hasAll(text, words) {
				n++
			}
		}
		if n == 0 {
			return fmt.Errorf("no event of %s %s/%s says %q:\n%s", kind, namespace, name, words, strings.Join(all, "\n"))
		}
		return nil
	})
}

func hasAll(text string, words []string) bool {
	for _, word := range words {
		if !strings.Contains(text, word) {
			return false
		}
	}
	return true
}

// logSays waits for words in the log of a node's meshd.
func (w *World) logSays(ctx context.Context, node, words string) error {
	return w.Until(ctx, func(ctx context.Context) error {
		p, err := w.meshdPod(ctx, node)
		if err != nil {
			return err
		}
		log, err := w.Kubectl(ctx, "logs", "-n", meshdNamespace, p.Name)
		if err == nil && !strings.Contains(log, words) {
			err = fmt.Errorf("the log of meshd on %s does not say %q:\n%s", node, words, log)
		}
		return err
	})
}

// saidOf wants words in meshctl status on a node, in an event of its meshd pod,
// and in its log.
func (w *World) saidOf(ctx context.Context, node, words string) (string, error) {
	said, err := w.statusSays(ctx, node, words)
	if err != nil {
		return "", err
	}
	p, err := w.meshdPod(ctx, node)
	if err != nil {
		return "", err
	}
	if _, err := w.eventSays(ctx, meshdNamespace, "Pod", p.Name, "Unhealthy", words); err != nil {
		return "", err
	}
	return said, w.logSays(ctx, node, words)
}

// saidToAll wants them as well in the Node's condition and in an event of a pod
// that waits for its network, and that nothing was begun on the machine.
func (w *World) saidToAll(ctx context.Context, node, waits, words string) (string, error) {
	if err := w.startPod(ctx, waits, node); err != nil {
		return "", err
	}
	said, err := w.saidOf(ctx, node, words)
	if err != nil {
		return "", err
	}
	if err := w.nodeAndEventsSay(ctx, node, words); err != nil {
		return "", err
	}
	if _, err := w.eventSays(ctx, cluster.Namespace, "Pod", waits, "MeshdIsNotUp", words); err != nil {
		return "", err
	}
	return said, w.nothingBegun(ctx, node)
}

// nothingBegun wants a machine's links, addresses, routes, rules and tables to
// be those of before, and no network configuration. The pod of meshd-wireguard
// makes an empty device and its sockets where it can.
func (w *World) nothingBegun(ctx context.Context, node string) error {
	after, err := w.Machine(node).Run(ctx, "sh", "-c", look)
	if err != nil {
		return err
	}
	var left []string
	for line := range strings.Lines(differences(w.before[node], after)) {
		if !strings.HasPrefix(line, "+ file /") && !strings.HasPrefix(line, "+ folder /run/wireguard/mesh0.d") && !strings.HasPrefix(line, "+ link mesh0:") && !strings.Contains(line, "socket tcp") && !strings.Contains(line, "socket udp") {
			left = append(left, line)
		}
	}
	if strings.Contains(after, "file /etc/cni/net.d/") {
		left = append(left, "a network configuration\n")
	}
	if len(left) > 0 {
		return fmt.Errorf("%s is half configured:\n%s", node, strings.Join(left, ""))
	}
	return nil
}

// withoutRights installs everything but the rights.
func withoutRights(ctx context.Context, w *World) (string, error) {
	if err := w.lookBefore(ctx, w.nodes...); err != nil {
		return "", err
	}
	folder, err := w.overlay()
	if err != nil {
		return "", err
	}
	all, err := w.Kubectl(ctx, "kustomize", folder)
	if err != nil {
		return "", err
	}
	var rest []string
	for doc := range strings.SplitSeq(all, "\n---\n") {
		if !strings.Contains(doc, "kind: ClusterRoleBinding") {
			rest = append(rest, doc)
		}
	}
	if err := w.Apply(ctx, "without-rights", strings.Join(rest, "\n---\n")); err != nil {
		return "", err
	}
	said := ""
	for _, words := range []string{"kube/sync", "these credentials may not: get nodes, list nodes"} {
		if said, err = w.saidOf(ctx, "m1", words); err != nil {
			return "", err
		}
	}
	return said, w.nothingBegun(ctx, "m1")
}

// noNft is what a kernel without nfnetlink answers: EPROTONOSUPPORT (93) to a
// netlink socket (domain 16) of netfilter (protocol 12).
const noNft = `{"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{"names": ["socket"], "action": "SCMP_ACT_ERRNO", "errnoRet": 93,
  "args": [{"index": 0, "value": 16, "op": "SCMP_CMP_EQ"}, {"index": 2, "value": 12, "op": "SCMP_CMP_EQ"}]}]}`

// nft gives meshd a kernel with or without nf_tables: a filter of system calls
// refuses as such a kernel does.
func (w *World) nft(ctx context.Context, there bool) error {
	profile := `{"type": "RuntimeDefault", "localhostProfile": null}`
	if !there {
		profile = `{"type": "Localhost", "localhostProfile": "no-nft.json"}`
		for _, name := range w.nodes {
			if err := w.Machine(name).WriteFile("/var/lib/kubelet/seccomp/no-nft.json", []byte(noNft), 0o644); err != nil {
				return err
			}
		}
	}
	patch := `{"spec": {"updateStrategy": {"rollingUpdate": {"maxUnavailable": "100%"}},
		"template": {"spec": {"containers": [{"name": "meshd", "securityContext": {"seccompProfile": ` + profile + `}}]}}}}`
	ds, err := w.API.AppsV1().DaemonSets(meshdNamespace).Patch(ctx, "meshd", types.StrategicMergePatchType, []byte(patch), metav1.PatchOptions{})
	if err != nil {
		return err
	}
	return w.Until(ctx, func(ctx context.Context) error {
		now, err := w.API.AppsV1().DaemonSets(meshdNamespace).Get(ctx, "meshd", metav1.GetOptions{})
		if err == nil && (now.Status.ObservedGeneration < ds.Generation || int(now.Status.UpdatedNumberScheduled) != len(w.nodes)) {
			err = errors.New("not all pods of meshd are of the new template")
		}
		return err
	})
}

// noTUN hides what a userspace tunnel stands on, before anything runs there.
func noTUN(ctx context.Context, w *World) (string, error) {
	_, err := w.Machine("m2").Run(ctx, "mount", "-t", "tmpfs", "none", "/dev/net")
	return "m2 has no /dev/net/tun", err
}

func withoutNft(ctx context.Context, w *World) (string, error) {
	if err := w.nft(ctx, false); err != nil {
		return "", err
	}
	if err := w.Install(ctx); err != nil { // the rights, too; what was patched stays
		return "", err
	}
	return w.saidToAll(ctx, "m1", "waits-for-nft", "nftables: socket: protocol not supported")
}

// withoutTUN: m1 has all it needs now, m2 lacks the tunnel.
func withoutTUN(ctx context.Context, w *World) (string, error) {
	if err := w.nft(ctx, true); err != nil {
		return "", err
	}
	said, err := w.saidToAll(ctx, "m2", "waits-for-tun", "neither WireGuard nor TUN")
	if err != nil {
		return "", err
	}
	_, err = w.ReadyOn(ctx, "waits-for-nft", 1)
	return said, err
}

// withAll: what was missing comes, and everything comes up by itself.
func withAll(ctx context.Context, w *World) (string, error) {
	if _, err := w.Machine("m2").Run(ctx, "umount", "/dev/net"); err != nil {
		return "", err
	}
	pods, err := w.API.CoreV1().Pods(meshdNamespace).List(ctx, metav1.ListOptions{FieldSelector: "spec.nodeName=m2"})
	if err != nil {
		return "", err
	}
	for _, p := range pods.Items { // a container keeps the /dev it was made with
		if err := w.API.CoreV1().Pods(meshdNamespace).Delete(ctx, p.Name, metav1.DeleteOptions{}); err != nil {
			return "", err
		}
	}
	if _, err := w.NodesAre(ctx, w.nodes, notReady); err != nil {
		return "", err
	}
	if _, err := w.ReadyOn(ctx, "waits-for-tun", 1); err != nil {
		return "", err
	}
	_, err = w.StatusHealthy(ctx, w.nodes)
	return "nodes Ready, the pods that waited run", err
}

// foreignConf is a whole network of somebody else's.
const foreignConf = `{"cniVersion": "1.0.0", "name": "foreign", "plugins": [{"type": "bridge", "bridge": "foreign0", "isGateway": true,
  "ipam": {"type": "host-local", "ranges": [[{"subnet": "10.88.0.0/24"}]]}}]}`

// foreignPod: while another network's configuration comes first, the runtime
// attaches pods to that. Such a pod is named until it is made anew.
func foreignPod(ctx context.Context, w *World) (string, error) {
	const path = "/etc/cni/net.d/05-foreign.conflist"
	m := w.Machine("m2")
	for _, plugin := range []string{"bridge", "host-local"} {
		b, err := os.ReadFile("/usr/lib/cni/" + plugin)
		if err != nil {
			return "", err
		}
		if err := m.WriteFile("/opt/cni/bin/"+plugin, b, 0o755); err != nil {
			return "", err
		}
	}
	if err := m.WriteFile(path, []byte(foreignConf), 0o644); err != nil {
		return "", err
	}
	if _, err := w.saidOf(ctx, "m2", path+" comes before"); err != nil {
		return "", err
	}
	if err := w.startPod(ctx, "foreign", "m2"); err != nil {
		return "", err
	}
	said, err := w.statusSays(ctx, "m2", "demo/foreign (10.88.0.")
	if err != nil {
		return "", err
	}
	if _, err := w.eventSays(ctx, cluster.Namespace, "Pod", "foreign", "NotAttachedByMeshd", "10.88.0.", "remove "+path); err != nil {
		return "", err
	}
	if err := w.Until(ctx, func(ctx context.Context) error {
		n, err := w.API.CoreV1().Nodes().Get(ctx, "m2", metav1.GetOptions{})
		if err == nil && !strings.Contains(fmt.Sprint(n.Status.Conditions), "attaches pods by "+path) {
			err = fmt.Errorf("the conditions of m2 do not name %s: %+v", path, n.Status.Conditions)
		}
		return err
	}); err != nil {
		return "", err
	}
	if _, err := m.Run(ctx, "rm", path); err != nil { // as the line says
		return "", err
	}
	if _, err := w.statusSays(ctx, "m2", "demo/foreign (10.88.0."); err != nil {
		return "", fmt.Errorf("without the configuration: %w", err)
	}
	if _, err := w.Kubectl(ctx, "delete", "pod", "-n", "demo", "foreign"); err != nil {
		return "", err
	}
	if err := w.startPod(ctx, "foreign", "m2"); err != nil {
		return "", err
	}
	if _, err := w.ReadyOn(ctx, "foreign", 1); err != nil {
		return "", err
	}
	if _, err := w.StatusHealthy(ctx, w.nodes); err != nil {
		return "", err
	}
	_, err = m.Run(ctx, "sh", "-c", "ip link delete foreign0; rm /opt/cni/bin/bridge /opt/cni/bin/host-local")
	return said, err
}

const denyAll = `apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: deny-all, namespace: demo}
spec: {podSelector: {}, policyTypes: [Ingress]}
`

// policies are not enforced: who has some is told, on every node and once on
// the policy itself.
func policies(ctx context.Context, w *World) (string, error) {
	if err := w.Apply(ctx, "policy", denyAll); err != nil {
		return "", err
	}
	said, err := w.statusSays(ctx, "m1", "1 NetworkPolicies, of which 1 select pods of this node")
	if err != nil {
		return "", err
	}
	for _, name := range w.nodes {
		if err := w.logSays(ctx, name, "network policies are not enforced"); err != nil {
			return "", err
		}
	}
	n, err := w.eventSays(ctx, cluster.Namespace, "NetworkPolicy", "deny-all", "NotEnforced", "as open as without it")
	if err == nil && n != 1 {
		err = fmt.Errorf("%d events say that the policy is not enforced, want 1", n)
	}
	if err != nil {
		return "", err
	}
	if err := w.rolledOut(ctx, "meshd", len(w.nodes)); err != nil { // no policy makes meshd unready
		return "", err
	}
	if _, err := w.Kubectl(ctx, "delete", "networkpolicy", "-n", "demo", "deny-all"); err != nil {
		return "", err
	}
	_, err = w.StatusHealthy(ctx, w.nodes)
	return said, err
}

// rebootWithoutNft: the network configuration outlasts a reboot, and what it
// calls says what meshd lacks on this boot.
func rebootWithoutNft(ctx context.Context, w *World) (string, error) {
	if err := w.nft(ctx, false); err != nil {
		return "", err
	}
	if _, err := w.statusSays(ctx, "m1", "protocol not supported"); err != nil {
		return "", err
	}
	if _, err := w.Machine("m1").Run(ctx, "nft", "delete", "table", "inet", "meshd"); err != nil {
		return "", err
	}
	if err := w.startPod(ctx, "after-reboot", "m1"); err != nil {
		return "", err
	}
	if _, err := w.eventSays(ctx, cluster.Namespace, "Pod", "after-reboot", "FailedCreatePodSandBox", "the firewall is not ready",
		"meshd on this machine said at", "protocol not supported"); err != nil {
		return "", err
	}
	if err := w.nft(ctx, true); err != nil {
		return "", err
	}
	if _, err := w.ReadyOn(ctx, "after-reboot", 1); err != nil {
		return "", err
	}
	_, err := w.StatusHealthy(ctx, w.nodes)
	return "ADD's error, in the pod's event, quotes meshd; with nf_tables the pod starts", err
}

// badRanges gives three nodes a range each that cannot be, and one that can.
func badRanges(ctx context.Context, w *World) (string, error) {
	give := func(node, cidr string) error {
		_, err := w.Kubectl(ctx, "patch", "node", node, "-p", fmt.Sprintf(`{"spec":{"podCIDR":%q,"podCIDRs":[%[1]q]}}`, cidr))
		return err
	}
	var all []string
	for _, c := range []struct{ node, cidr, words string }{
		{"m2", w.Machine("m2").IPv4().String() + "/31", "contains " + w.Machine("m2").IPv4().String()},
		{"m3", "10.96.3.0/24", "pod CIDR 10.96.3.0/24 and service CIDR 10.96.0.0/16 overlap"},
	} {
		if err := give(c.node, c.cidr); err != nil {
			return "", err
		}
		said, err := w.saidToAll(ctx, c.node, "waits-on-"+c.node, c.words)
		if err != nil {
			return "", err
		}
		all = append(all, said)
	}
	// What is wrong with two of them is not in the way of the third.
	if err := give("m1", "10.244.1.0/24"); err != nil {
		return "", err
	}
	if _, err := w.ReadyOn(ctx, "waits-on-m1", 1); err != nil {
		return "", err
	}
	said, err := w.statusSays(ctx, "m1", "tunnel/m3")
	return strings.Join(append(all, said), "\n"), err
}
