package kubernetes

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"strings"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"meshd.dev/test/cluster"
	"meshd.dev/test/flows"
	"meshd.dev/test/netlab"
)

// What meshd writes on a Node about its key, and the device that is there while
// it changes.
const (
	publicKey    = "meshd.dev/public-key"
	rotateKey    = "meshd.dev/rotate-key"
	secondDevice = "mesh0-next"
)

// keyChange has m1 change its key while a hundred connections go from its pod
// to one of m3. m2 cannot be asked meanwhile, so the change stays in the middle,
// with the connections on the second device, until the pod of meshd was replaced.
// Where the kernel has no WireGuard that device is the DaemonSet
// meshd-wireguard's, and so it stays.
func keyChange(ctx context.Context, w *World) (string, error) {
	old, err := w.keyOf(ctx, "m1")
	if err != nil {
		return "", err
	}
	stop, err := w.flow(ctx, "m1", "m3")
	if err != nil {
		return "", err
	}
	err = w.changeKey(ctx, "m1", old)
	result, flowErr := stop()
	if err := errors.Join(err, flowErr); err != nil {
		return "", fmt.Errorf("%w (%s)", err, result)
	}
	if result.Broken > 0 {
		return "", fmt.Errorf("%s", result)
	}
	_, err = w.StatusHealthy(ctx, w.nodes)
	return result.String(), err
}

// unasked lets nobody talk with a machine about keys.
const unasked = `add table inet unasked
add chain inet unasked in { type filter hook input priority -10; }
add rule inet unasked in tcp dport 51820 reject with tcp reset
add chain inet unasked out { type filter hook output priority -10; }
add rule inet unasked out tcp dport 51820 reject with tcp reset
`

func (w *World) changeKey(ctx context.Context, node, old string) error {
	if err := w.Machine("m2").WriteFile("/srv/unasked.nft", []byte(unasked), 0o644); err != nil {
		return err
	}
	if _, err := w.Machine("m2").Run(ctx, "nft", "-f", "/srv/unasked.nft"); err != nil {
		return err
	}
	if _, err := w.Kubectl(ctx, "annotate", "node", node, rotateKey+"="+old); err != nil {
		return err
	}
	if err := w.replacedInTheMiddle(ctx, node, old); err != nil {
		return err
	}
	if _, err := w.Machine("m2").Run(ctx, "nft", "delete", "table", "inet", "unasked"); err != nil {
		return err
	}
	return w.Until(ctx, func(ctx context.Context) error {
		if key, err := w.keyOf(ctx, node); err != nil || key == old {
			return errors.Join(err, fmt.Errorf("%s has its old key still", node))
		}
		for _, name := range w.nodes {
			if _, err := w.Machine(name).Run(ctx, "sh", "-c", "! ls -d /sys/class/net/"+secondDevice+" 2>/dev/null"); err != nil {
				return fmt.Errorf("%s has its second device still: %w", name, err)
			}
		}
		return nil
	})
}

// replacedInTheMiddle has the pod of meshd replaced when pods of the node send
// over its second device, and compares that device before and after.
func (w *World) replacedInTheMiddle(ctx context.Context, node, old string) error {
	to, err := w.PodOn(ctx, "everywhere", "m3")
	if err != nil {
		return err
	}
	look := func(ctx context.Context) (link string, err error) {
		out, err := w.Machine(node).Run(ctx, "sh", "-c", "ip route get "+to.Status.PodIP+"; cat /sys/class/net/"+secondDevice+"/ifindex")
		if _, link, ok := strings.Cut(out, " dev "+secondDevice+" "); err == nil && ok {
			return link[strings.LastIndex(strings.TrimSpace(link), "\n")+1:], nil
		}
		return "", errors.Join(err, fmt.Errorf("%s does not send to m3 over %s: %s", node, secondDevice, out))
	}
	var before string
	if err := w.Until(ctx, func(ctx context.Context) (err error) { before, err = look(ctx); return err }); err != nil {
		return err
	}
	p, err := w.meshdPod(ctx, node)
	if err != nil {
		return err
	}
	if _, err := w.Kubectl(ctx, "delete", "pod", "-n", meshdNamespace, p.Name, "--wait"); err != nil {
		return err
	}
	for _, when := range []string{"the pod of meshd is gone", "its successor is ready"} {
		after, err := look(ctx)
		if err != nil {
			return fmt.Errorf("%s: %w", when, err)
		}
		if after != before {
			return fmt.Errorf("%s: link %s of %s became %s", when, strings.TrimSpace(before), secondDevice, strings.TrimSpace(after))
		}
		if err := w.rolledOut(ctx, "meshd", len(w.nodes)); err != nil {
			return err
		}
	}
	if key, err := w.keyOf(ctx, node); err != nil || key != old {
		return errors.Join(err, fmt.Errorf("%s changed its key while m2 could not be asked", node))
	}
	return nil
}

func (w *World) keyOf(ctx context.Context, node string) (string, error) {
	n, err := w.API.CoreV1().Nodes().Get(ctx, node, metav1.GetOptions{})
	if err != nil {
		return "", err
	}
	if n.Annotations[publicKey] == "" {
		return "", fmt.Errorf("node %s has no %s", node, publicKey)
	}
	return n.Annotations[publicKey], nil
}

// flow starts connections and questions from a pod of one node to a pod of
// another; stop says what became of them.
func (w *World) flow(ctx context.Context, from, to string) (stop func() (flows.Result, error), err error) {
	var pids [2]int
	var pods [2]*corev1.Pod
	for i, node := range []string{from, to} {
		if pods[i], err = w.PodOn(ctx, "everywhere", node); err != nil {
			return nil, err
		}
		p, err := w.Process(pods[i])
		if err != nil {
			return nil, err
		}
		pids[i] = p.Pid
	}
	addr, err := netip.ParseAddr(pods[1].Status.PodIP)
	if err != nil {
		return nil, err
	}
	target := netip.AddrPortFrom(addr, 9999).String()
	serving, endServing := context.WithCancel(ctx)
	asking, endAsking := context.WithCancel(ctx)
	var result flows.Result
	ready, served, asked := make(chan struct{}), make(chan error, 1), make(chan error, 1)
	go func() { served <- netlab.InNetNS(pids[1], func() error { return flows.Serve(serving, target) }) }()
	go func() {
		asked <- cluster.Until(asking, func(ctx context.Context) error { // until it listens
			return netlab.InNetNS(pids[0], func() (err error) {
				result, err = flows.Probe(ctx, target, 100, func() { close(ready) })
				return err
			})
		})
	}()
	stop = func() (flows.Result, error) {
		endAsking()
		err := <-asked
		endServing()
		return result, errors.Join(err, <-served)
	}
	select {
	case <-ready:
		return stop, nil
	case <-ctx.Done():
		_, err := stop()
		return nil, errors.Join(context.Cause(ctx), err)
	}
}
