package story

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"strings"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"meshd.dev/test/cluster"
	"meshd.dev/test/netlab"
)

// Attached is the story of what one pod may ask of its network: an address of
// its own choice, a port of the machine, and limits of its bandwidth.
func Attached() []Step {
	return []Step{
		{"one machine, meshd server", func(ctx context.Context, w *World) (string, error) { return "", Idle(ctx, w) }},
		{"a pod has the address it asked for", fixedAddress},
		{"its host port is open, on loopback too", hostPortOpen},
		{"its bandwidth is limited, both ways", bandwidthLimited},
		{"meshctl pods shows it", podsShowIt},
		{"the firewall is flushed: it is back by itself", firewallFlushed},
		{"addresses run out: the node says so, until there are some", addressesRunOut},
		{"the pod goes: its port is closed, nothing is left", hostPortClosed},
	}
}

// fixed is a pod that asks for everything; %s is its address.
const fixed = `apiVersion: v1
kind: Pod
metadata:
  name: fixed
  namespace: demo
  annotations:
    meshd.dev/ips: %s
    kubernetes.io/ingress-bandwidth: 80M
    kubernetes.io/egress-bandwidth: 40M
spec:
  terminationGracePeriodSeconds: 1
  containers:
  - name: echo
    image: meshd.local/echo:1
    imagePullPolicy: IfNotPresent
    ports: [{containerPort: 8080, hostPort: 9080}]
    env:
    - name: POD_NAME
      valueFrom: {fieldRef: {fieldPath: metadata.name}}
`

func fixedAddress(ctx context.Context, w *World) (string, error) {
	node, err := w.API.CoreV1().Nodes().Get(ctx, "m1", metav1.GetOptions{})
	if err != nil {
		return "", err
	}
	cidr, err := netip.ParsePrefix(node.Spec.PodCIDR)
	if err != nil {
		return "", err
	}
	last := cidr.Addr().As4()
	last[3] += 77
	want := netip.AddrFrom4(last).String()
	if err := w.Machine("m1").WriteFile("/root/fixed.yaml", fmt.Appendf(nil, fixed, want), 0o644); err != nil {
		return "", err
	}
	if _, err := w.Kubectl(ctx, "apply", "-f", "/root/fixed.yaml"); err != nil {
		return "", err
	}
	err = cluster.Until(ctx, func(ctx context.Context) error {
		p, err := w.API.CoreV1().Pods("demo").Get(ctx, "fixed", metav1.GetOptions{})
		if err != nil {
			return err
		}
		for _, c := range p.Status.Conditions {
			if c.Type == corev1.PodReady && c.Status == corev1.ConditionTrue {
				if p.Status.PodIP != want {
					return cluster.Final{Err: fmt.Errorf("the pod has %s, want %s", p.Status.PodIP, want)}
				}
				return nil
			}
		}
		return fmt.Errorf("pod fixed is not ready: %v", p.Status.Conditions)
	})
	return want, err
}

// doors are the ways to the host port: by the address of the machine, and by
// its loopback.
func doors(w *World) map[string]*http.Client {
	m := w.Machine("m1")
	inside := &http.Client{Transport: &http.Transport{DisableKeepAlives: true, DialContext: m.DialContext}}
	return map[string]*http.Client{
		"http://" + netip.AddrPortFrom(m.IPv4(), 9080).String() + "/": inside,
		"http://127.0.0.1:9080/": inside,
	}
}

func knock(ctx context.Context, c *http.Client, url string) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return err
	}
	resp, err := c.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, 64<<10))
	if err != nil {
		return err
	}
	if !strings.Contains(string(body), "fixed") {
		return fmt.Errorf("%s answers %q", url, body)
	}
	return nil
}

func hostPortOpen(ctx context.Context, w *World) (string, error) {
	for url, c := range doors(w) {
		if err := cluster.Until(ctx, func(ctx context.Context) error { return knock(ctx, c, url) }); err != nil {
			return "", err
		}
	}
	return "9080", nil
}

func bandwidthLimited(ctx context.Context, w *World) (string, error) {
	m := w.Machine("m1")
	link, err := linkOf(ctx, m, "demo/fixed")
	if err != nil {
		return "", err
	}
	out, err := m.Run(ctx, "tc", "qdisc", "show", "dev", link)
	if err != nil {
		return "", err
	}
	if !strings.Contains(out, "tbf") || !strings.Contains(out, "rate 80Mbit") {
		return "", fmt.Errorf("to the pod: %s", out)
	}
	netns, err := m.Run(ctx, "sh", "-c", `for n in $(ls /run/netns); do nsenter --net=/run/netns/$n tc qdisc show dev eth0; done`)
	if err != nil {
		return "", err
	}
	if !strings.Contains(netns, "rate 40Mbit") {
		return "", fmt.Errorf("from the pod: %s", netns)
	}
	return "80M to it, 40M from it", nil
}

// linkOf a pod, as meshctl pods says.
func linkOf(ctx context.Context, m *netlab.Machine, pod string) (string, error) {
	out, err := m.Run(ctx, "meshctl", "pods")
	if err != nil {
		return "", err
	}
	for line := range strings.Lines(out) {
		if f := strings.Fields(line); len(f) > 3 && f[1] == pod {
			return f[3], nil
		}
	}
	return "", fmt.Errorf("meshctl pods does not have %s:\n%s", pod, out)
}

func podsShowIt(ctx context.Context, w *World) (string, error) {
	out, err := w.Machine("m1").Run(ctx, "meshctl", "pods")
	if err != nil {
		return "", err
	}
	for line := range strings.Lines(out) {
		if strings.Contains(line, "demo/fixed") && strings.Contains(line, "9080/tcp→8080") {
			return strings.Join(strings.Fields(line), " "), nil
		}
	}
	return "", fmt.Errorf("meshctl pods does not have the pod with its port:\n%s", out)
}

func firewallFlushed(ctx context.Context, w *World) (string, error) {
	if _, err := w.Machine("m1").Run(ctx, "nft", "flush", "ruleset"); err != nil {
		return "", err
	}
	return hostPortOpen(ctx, w)
}

// addressesRunOut: host-local, so it seems, has all the rest in use.
func addressesRunOut(ctx context.Context, w *World) (string, error) {
	m := w.Machine("m1")
	const folder = "/var/lib/cni/networks/cbr0"
	if _, err := m.Run(ctx, "sh", "-c", "mkdir -p "+folder+" && cd "+folder+" && for i in $(seq 2 254); do echo old$i > 10.244.0.$i; done"); err != nil {
		return "", err
	}
	says := func(want bool) error {
		return cluster.Until(ctx, func(ctx context.Context) error {
			out, _ := m.Run(ctx, "sh", "-c", "meshctl status || true") // it fails when something is wrong
			if said := strings.Contains(out, "all 253 addresses of [10.244.0.0/24] are taken"); said != want {
				return fmt.Errorf("addresses run out, said %v, want %v:\n%s", said, want, out)
			}
			return nil
		})
	}
	if err := says(true); err != nil {
		return "", err
	}
	if _, err := m.Run(ctx, "rm", "-r", folder); err != nil {
		return "", err
	}
	return "", says(false)
}

func hostPortClosed(ctx context.Context, w *World) (string, error) {
	if _, err := w.Kubectl(ctx, "-n", "demo", "delete", "pod", "fixed"); err != nil {
		return "", err
	}
	for url, c := range doors(w) {
		err := cluster.Until(ctx, func(ctx context.Context) error {
			if knock(ctx, c, url) == nil {
				return errors.New(url + " is still open")
			}
			return nil
		})
		if err != nil {
			return "", err
		}
	}
	m := w.Machine("m1")
	err := cluster.Until(ctx, func(ctx context.Context) error {
		out, err := m.Run(ctx, "sh", "-c", "nft list map inet meshd hostport4; nft list set inet meshd hairpin4")
		if err != nil {
			return err
		}
		if strings.Contains(out, "elements") {
			return fmt.Errorf("left in the firewall: %s", out)
		}
		out, err = m.Run(ctx, "meshctl", "gc", "--dry-run")
		if err == nil && !strings.HasPrefix(out, "nothing to give back") {
			err = fmt.Errorf("meshctl gc: %s", out)
		}
		return err
	})
	return "", err
}
