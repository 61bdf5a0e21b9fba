package kubernetes

import (
	"context"
	"errors"
	"fmt"
	"strings"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"

	"meshd.dev/test/cluster"
)

// ownNodeOnly tries, with the token of m1's meshd, what a machine that was taken
// over would try.
func ownNodeOnly(ctx context.Context, w *World) (string, error) {
	for _, name := range []string{"meshd-own-node", "meshd-own-events"} {
		policy, err := w.API.AdmissionregistrationV1().ValidatingAdmissionPolicies().Get(ctx, name, metav1.GetOptions{})
		if err != nil {
			return "", err
		}
		if c := policy.Status.TypeChecking; c != nil && len(c.ExpressionWarnings) > 0 {
			return "", fmt.Errorf("the API finds fault with the policy %s: %+v", name, c.ExpressionWarnings)
		}
	}
	pod, err := w.meshdPod(ctx, "m1")
	if err != nil {
		return "", err
	}
	token, err := w.Kubectl(ctx, "create", "token", "meshd", "-n", meshdNamespace, "--bound-object-kind=Pod", "--bound-object-name="+pod.Name)
	if err != nil {
		return "", err
	}
	api, err := w.withToken(strings.TrimSpace(token))
	if err != nil {
		return "", err
	}
	patch := func(node, body string, sub ...string) error {
		_, err := api.CoreV1().Nodes().Patch(ctx, node, types.StrategicMergePatchType, []byte(body), metav1.PatchOptions{}, sub...)
		return err
	}
	note := func(node, key, value string) error {
		return patch(node, fmt.Sprintf(`{"metadata":{"annotations":{%q:%s}}}`, key, value))
	}
	tell := func(node, reason string, about corev1.ObjectReference) error {
		namespace := about.Namespace
		if namespace == "" {
			namespace = metav1.NamespaceDefault
		}
		return only(api.CoreV1().Events(namespace).Create(ctx, &corev1.Event{
			ObjectMeta: metav1.ObjectMeta{Namespace: namespace, GenerateName: "lab-"}, InvolvedObject: about, Type: corev1.EventTypeWarning, Reason: reason, Message: "lab",
			Source: corev1.EventSource{Component: "meshd", Host: node}, ReportingController: "meshd", ReportingInstance: node,
		}, metav1.CreateOptions{}))
	}
	about := func(kind, namespace, name string) corev1.ObjectReference {
		return corev1.ObjectReference{Kind: kind, Namespace: namespace, Name: name}
	}
	list := metav1.ListOptions{}
	for _, c := range []struct {
		what, says string
		err        error
	}{
		{"its own annotation", "", note("m1", "meshd.dev/lab", `"x"`)},
		{"its own annotation away", "", note("m1", "meshd.dev/lab", "null")},
		{"another node", "may not write to node m2", note("m2", "meshd.dev/lab", `"x"`)},
		{"somebody else's annotation", "begin with meshd.dev/", note("m1", "lab", `"x"`)},
		{"a label", "writes no labels", patch("m1", `{"metadata":{"labels":{"lab":"x"}}}`)},
		{"a taint", "writes no labels", patch("m1", `{"spec":{"unschedulable":true}}`)},
		{"another condition", "no condition but NetworkUnavailable",
			patch("m1", `{"status":{"conditions":[{"type":"MemoryPressure","status":"True"}]}}`, "status")},
		{"its addresses", "nothing of a node's status", patch("m1", `{"status":{"addresses":[{"type":"InternalIP","address":"192.0.2.1"}]}}`, "status")},
		{"an owner", "writes no labels", patch("m1", `{"metadata":{"ownerReferences":[{"apiVersion":"v1","kind":"ConfigMap","name":"x","uid":"x"}]}}`)},
		{"its runtime's handlers", "nothing of a node's status", patch("m1", `{"status":{"runtimeHandlers":[{"name":"x"}]}}`, "status")},
		{"an event of a pod", "", tell("m1", "Lab", about("Pod", cluster.Namespace, "p"))},
		{"an event of its Node", "", tell("m1", "Lab", about("Node", "", "m1"))},
		{"an event of a policy that is not enforced", "", tell("m1", "NotEnforced", about("NetworkPolicy", cluster.Namespace, "p"))},
		{"another event of a policy", "tells no such events about NetworkPolicy p", tell("m1", "Enforced", about("NetworkPolicy", cluster.Namespace, "p"))},
		{"an event of another Node", "tells no such events about Node m2", tell("m1", "Lab", about("Node", "", "m2"))},
		{"an event of a Secret", "tells no such events about Secret p", tell("m1", "Lab", about("Secret", cluster.Namespace, "p"))},
		{"an event in another's name", "tells events in no other name", tell("m2", "Lab", about("Pod", cluster.Namespace, "p"))},
		{"a change of an event", "forbidden", only(api.CoreV1().Events(cluster.Namespace).Patch(ctx, "lab", types.MergePatchType, []byte(`{}`), metav1.PatchOptions{}))},
		{"its own pods", "", only(api.CoreV1().Pods("").List(ctx, metav1.ListOptions{FieldSelector: "spec.nodeName=m1"}))},
		{"policies", "", only(api.NetworkingV1().NetworkPolicies("").List(ctx, list))},
		{"a pod less", "forbidden", api.CoreV1().Pods(cluster.Namespace).Delete(ctx, "p", metav1.DeleteOptions{})},
		{"its capacity", "nothing of a node's status", patch("m1", `{"status":{"capacity":{"pods":"1"}}}`, "status")},
		{"deleting", "forbidden", api.CoreV1().Nodes().Delete(ctx, "m2", metav1.DeleteOptions{})},
		{"secrets", "forbidden", only(api.CoreV1().Secrets("").List(ctx, list))},
		{"config maps", "forbidden", only(api.CoreV1().ConfigMaps("").List(ctx, list))},
	} {
		switch {
		case c.says == "" && c.err != nil:
			return "", fmt.Errorf("%s: %w", c.what, c.err)
		case c.says != "" && c.err == nil:
			return "", fmt.Errorf("%s: allowed", c.what)
		case c.says != "" && !strings.Contains(c.err.Error(), c.says):
			return "", fmt.Errorf("%s: want it denied with %q, got: %w", c.what, c.says, c.err)
		}
	}
	return "its own annotations and condition, events in its own name, and nothing else", nil
}

// only is the error of a call whose answer does not matter.
func only[T any](_ T, err error) error { return err }

// withToken is a client of the API that has nothing but a token.
func (w *World) withToken(token string) (kubernetes.Interface, error) {
	return kubernetes.NewForConfig(&rest.Config{Host: w.server(), BearerToken: token, Dial: w.Machine("m1").DialContext,
		TLSClientConfig: rest.TLSClientConfig{CAData: w.ca.pem}})
}

// noRights takes the agents' rights: they say so, the network stays as it is,
// and comes to itself when they are back.
func noRights(ctx context.Context, w *World) (string, error) {
	if _, err := w.Kubectl(ctx, "delete", "clusterrolebinding", "meshd"); err != nil {
		return "", err
	}
	p, err := w.meshdPod(ctx, "m1")
	if err != nil {
		return "", err
	}
	// A watch that is open goes on; a new meshd has to open one.
	if err := w.API.CoreV1().Pods(meshdNamespace).Delete(ctx, p.Name, metav1.DeleteOptions{}); err != nil {
		return "", err
	}
	said, err := w.saidOf(ctx, "m1", "these credentials may not")
	if err != nil {
		return "", err
	}
	if _, err := podsReachEachOther(ctx, w); err != nil {
		return "", fmt.Errorf("without rights: %w", err)
	}
	if err := w.Install(ctx); err != nil {
		return "", err
	}
	_, err = w.StatusHealthy(ctx, w.nodes)
	return said, err
}

// statusSays waits until meshctl status names a problem with these words.
func (w *World) statusSays(ctx context.Context, node, words string) (string, error) {
	var line string
	err := w.Until(ctx, func(ctx context.Context) error {
		out, err := w.Status(ctx, node)
		if err == nil {
			return errors.New("meshctl status is content:\n" + out)
		}
		for l := range strings.Lines(out) {
			if strings.Contains(l, words) {
				line = strings.TrimSpace(l)
				return nil
			}
		}
		return fmt.Errorf("meshctl status does not say %q:\n%s%w", words, out, err)
	})
	return line, err
}

// foreignNetwork puts a configuration before ours: meshd names it and lets it be.
func foreignNetwork(ctx context.Context, w *World) (string, error) {
	const path = "/etc/cni/net.d/05-foreign.conflist"
	m := w.Machine("m2")
	const conf = `{"cniVersion": "1.0.0", "name": "foreign", "plugins": [{"type": "loopback"}]}`
	if err := m.WriteFile(path, []byte(conf), 0o644); err != nil {
		return "", err
	}
	said, err := w.statusSays(ctx, "m2", path)
	if err != nil {
		return "", err
	}
	if _, err := m.Run(ctx, "rm", path); err != nil { // fails if somebody took it away
		return "", err
	}
	_, err = w.StatusHealthy(ctx, w.nodes)
	return said, err
}

// noPodCIDR is a cluster whose nodes get no pod CIDRs.
func noPodCIDR(ctx context.Context, w *World) (string, error) {
	if err := w.lookBefore(ctx, w.nodes...); err != nil {
		return "", err
	}
	if err := w.Install(ctx); err != nil {
		return "", err
	}
	return w.saidToAll(ctx, "m1", "waits-on-m1", "has no spec.podCIDRs")
}

// nodeAndEventsSay wants words in the node's condition NetworkUnavailable and in an
// event about a pod of meshd's.
func (w *World) nodeAndEventsSay(ctx context.Context, node, words string) error {
	return w.Until(ctx, func(ctx context.Context) error {
		n, err := w.API.CoreV1().Nodes().Get(ctx, node, metav1.GetOptions{})
		if err != nil {
			return err
		}
		said := false
		for _, c := range n.Status.Conditions {
			if c.Type == "NetworkUnavailable" {
				said = c.Status == "True" && strings.Contains(c.Message, words)
			}
		}
		if !said {
			return fmt.Errorf("node %s has no condition NetworkUnavailable that says %q: %+v", node, words, n.Status.Conditions)
		}
		events, err := w.API.CoreV1().Events(meshdNamespace).List(ctx, metav1.ListOptions{})
		if err != nil {
			return err
		}
		var all []string
		for _, e := range events.Items {
			if strings.Contains(e.Message, words) {
				return nil
			}
			all = append(all, e.Reason+": "+e.Message)
		}
		return fmt.Errorf("no event says %q: %s", words, strings.Join(all, "\n"))
	})
}
