package kubernetes

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"meshd.dev/test/cluster"
	"meshd.dev/test/netlab"
)

// nodesAndPods: nodes reach every pod, pods reach every node at its own
// addresses, and pods on a node's own network are as reachable as the node.
func nodesAndPods(ctx context.Context, w *World) (string, error) {
	ways := 0
	for _, a := range w.nodes {
		m := w.Machine(a)
		from, err := w.PodOn(ctx, "everywhere", a)
		if err != nil {
			return "", err
		}
		for _, b := range w.nodes {
			to, err := w.PodOn(ctx, "everywhere", b)
			if err != nil {
				return "", err
			}
			host, err := w.PodOn(ctx, "host", b)
			if err != nil {
				return "", err
			}
			if len(host.Status.PodIPs) != 2 {
				return "", fmt.Errorf("pod %s on the network of %s has addresses %v", host.Name, b, host.Status.PodIPs)
			}
			for i, family := range []string{"IPv4", "IPv6"} {
				what := fmt.Sprintf("%s from node %s to pod on %s", family, a, b)
				if err := w.answeredBy(ctx, what, to.Name, asker(m, url(to.Status.PodIPs[i].IP, "8080"))); err != nil {
					return "", err
				}
				what = fmt.Sprintf("%s from pod on %s to node %s", family, a, b)
				if err := w.answeredBy(ctx, what, host.Name, w.fetcher(from, url(host.Status.PodIPs[i].IP, "8080"))); err != nil {
					return "", err
				}
				ways += 2
			}
		}
	}
	return fmt.Sprintf("%d ways, both families", ways), nil
}

// An ask gets an answer from an echo program somewhere.
type ask func(context.Context) (cluster.Identity, error)

// asker asks from a machine's own network.
func asker(m *netlab.Machine, target string) ask {
	return func(ctx context.Context) (id cluster.Identity, err error) {
		ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
		defer cancel()
		body, err := cluster.Get(ctx, m, target)
		if err != nil {
			return id, err
		}
		return id, json.Unmarshal([]byte(body), &id)
	}
}

// fetcher asks from a pod.
func (w *World) fetcher(p *corev1.Pod, target string) ask {
	return func(ctx context.Context) (cluster.Identity, error) {
		id, _, err := w.Fetch(ctx, p, target, 2*time.Second)
		return id, err
	}
}

// answeredBy wants the answer of one pod.
func (w *World) answeredBy(ctx context.Context, what, pod string, ask ask) error {
	return w.Until(ctx, func(ctx context.Context) error {
		id, err := ask(ctx)
		switch {
		case err != nil:
			return fmt.Errorf("%s: %w", what, err)
		case id.Pod != pod:
			return fmt.Errorf("%s: %s answers, want %s", what, id.Pod, pod)
		}
		return nil
	})
}

// hostPorts is a pod whose ports are to be the node's, one of them only at one
// of the node's addresses; %s is that address.
const hostPorts = `apiVersion: v1
kind: Pod
metadata: {name: hostports, namespace: demo, labels: {app: hostports}}
spec:
  nodeName: m2
  terminationGracePeriodSeconds: 1
  containers:
  - name: echo
    image: meshd.local/echo:1
    imagePullPolicy: IfNotPresent
    env:
    - {name: POD_NAME, valueFrom: {fieldRef: {fieldPath: metadata.name}}}
    - {name: NODE_NAME, valueFrom: {fieldRef: {fieldPath: spec.nodeName}}}
    ports:
    - {containerPort: 8080, hostPort: 8088}
    - {containerPort: 8080, hostPort: 8089, hostIP: %s}
    - {containerPort: 7778, hostPort: 7788, protocol: UDP}
    readinessProbe: {httpGet: {path: /readyz, port: 8080}, periodSeconds: 1}
`

// hostPort opens ports of m2 for a pod and closes them with it.
func hostPort(ctx context.Context, w *World) (string, error) {
	m1, m2, out := w.Machine("m1"), w.Machine("m2"), w.Machine(outside)
	if err := w.Apply(ctx, "hostports", fmt.Sprintf(hostPorts, m2.IPv4())); err != nil {
		return "", err
	}
	if _, err := w.ReadyOn(ctx, "hostports", 1); err != nil {
		return "", err
	}
	away, err := w.PodOn(ctx, "everywhere", "m1")
	if err != nil {
		return "", err
	}
	beside, err := w.PodOn(ctx, "everywhere", "m2")
	if err != nil {
		return "", err
	}
	v4, v6 := m2.IPv4().String(), m2.IPv6().String()
	for what, ask := range map[string]ask{
		"from outside": asker(out, url(v4, "8088")), "from outside, IPv6": asker(out, url(v6, "8088")),
		"from another node": asker(m1, url(v4, "8088")), "from the node itself": asker(m2, url(v4, "8088")),
		"from the node's loopback": asker(m2, url("127.0.0.1", "8088")),
		"from a pod elsewhere":     w.fetcher(away, url(v4, "8088")), "from a pod beside it": w.fetcher(beside, url(v4, "8088")),
		"at one address": asker(out, url(v4, "8089")),
	} {
		if err := w.answeredBy(ctx, "host port "+what, "hostports", ask); err != nil {
			return "", err
		}
	}
	id, err := asker(out, url(v4, "8088"))(ctx)
	if err != nil {
		return "", err
	}
	if host, _, _ := net.SplitHostPort(id.Remote); host != out.IPv4().String() {
		return "", fmt.Errorf("the pod behind the host port sees %s, want the client's own address %s", host, out.IPv4())
	}
	if err := w.Until(ctx, func(ctx context.Context) error {
		_, err := w.datagram(ctx, out, net.JoinHostPort(v4, "7788"))
		return err
	}); err != nil {
		return "", fmt.Errorf("UDP host port: %w", err)
	}
	if _, err := asker(out, url(v6, "8089"))(ctx); err == nil {
		return "", errors.New("a host port of one address answers at another")
	}
	if err := w.API.CoreV1().Pods(cluster.Namespace).Delete(ctx, "hostports", metav1.DeleteOptions{}); err != nil {
		return "", err
	}
	return "TCP and UDP, from outside with the client's address, nodes, pods, loopback; closed with the pod", w.Until(ctx, func(ctx context.Context) error {
		if _, err := asker(out, url(v4, "8088"))(ctx); err == nil {
			return errors.New("the host port of a deleted pod answers")
		}
		return nil
	})
}

// The ranges of Config.Settings that are to see pods' own addresses, and an
// address in each that the machine outside has besides its own.
const noMasquerade = "no-masquerade: [198.51.100.0/24, \"2001:db8:77::/64\"]"

var elsewhere = []netip.Addr{netip.MustParseAddr("198.51.100.1"), netip.MustParseAddr("2001:db8:77::1")}

// masquerade: what leaves for the outside has the node's address, but for the
// ranges that are to see the pod's own.
func masquerade(ctx context.Context, w *World) (string, error) {
	out := w.Machine(outside)
	undo, err := w.routeElsewhere(ctx)
	defer undo()
	if err != nil {
		return "", err
	}
	for _, name := range w.nodes {
		p, err := w.PodOn(ctx, "everywhere", name)
		if err != nil {
			return "", err
		}
		m := w.Machine(name)
		for i, own := range []netip.Addr{m.IPv4(), m.IPv6()} {
			if err := w.seenAs(ctx, p, []netip.Addr{out.IPv4(), out.IPv6()}[i], own); err != nil {
				return "", err
			}
			pod, err := netip.ParseAddr(p.Status.PodIPs[i].IP)
			if err != nil {
				return "", err
			}
			if err := w.seenAs(ctx, p, elsewhere[i], pod); err != nil {
				return "", err
			}
		}
	}
	return "the outside sees the node's address, what is excluded the pod's, both families", nil
}

// routeElsewhere gives the machine outside its further addresses, a route to
// them to the nodes, and to it routes to the pods.
func (w *World) routeElsewhere(ctx context.Context) (undo func(), err error) {
	type command struct {
		m    *netlab.Machine
		args []string // of ip; args[1] is add
	}
	var done []command
	undo = func() {
		for _, c := range slices.Backward(done) {
			c.args[1] = "delete"
			_, _ = c.m.Run(context.WithoutCancel(ctx), append([]string{"ip"}, c.args...)...)
		}
	}
	add := func(m *netlab.Machine, args ...string) {
		if err == nil {
			if _, err = m.Run(ctx, append([]string{"ip"}, args...)...); err == nil {
				done = append(done, command{m, args})
			}
		}
	}
	out := w.Machine(outside)
	for _, a := range elsewhere {
		add(out, "address", "add", a.String(), "dev", "lo")
	}
	for _, name := range w.nodes {
		m := w.Machine(name)
		n, apiErr := w.API.CoreV1().Nodes().Get(ctx, name, metav1.GetOptions{})
		if apiErr != nil {
			return undo, apiErr
		}
		for i, via := range []netip.Addr{m.IPv4(), m.IPv6()} {
			add(out, "route", "add", n.Spec.PodCIDRs[i], "via", via.String())
			add(m, "route", "add", elsewhere[i].String(), "via", []netip.Addr{out.IPv4(), out.IPv6()}[i].String())
		}
	}
	return undo, err
}

// seenAs has a pod fetch from a machine that is not of the cluster, which has to
// see want.
func (w *World) seenAs(ctx context.Context, p *corev1.Pod, to, want netip.Addr) error {
	return w.Until(ctx, func(ctx context.Context) error {
		id, _, err := w.Fetch(ctx, p, url(to.String(), "8080"), 2*time.Second)
		if err != nil {
			return err
		}
		if host, _, _ := net.SplitHostPort(id.Remote); host != want.String() {
			return fmt.Errorf("%s sees pod %s on %s as %s, want %s", to, p.Name, p.Spec.NodeName, host, want)
		}
		return nil
	})
}

// narrow is a pod that may not use much of the network.
const narrow = `apiVersion: v1
kind: Pod
metadata:
  name: narrow
  namespace: demo
  labels: {app: narrow}
  annotations: {kubernetes.io/egress-bandwidth: 4M, kubernetes.io/ingress-bandwidth: 4M}
spec:
  nodeName: m2
` + echoSpec

// echoSpec is the rest of a pod's spec: the program echo.
const echoSpec = `  terminationGracePeriodSeconds: 1
  containers:
  - name: echo
    image: meshd.local/echo:1
    imagePullPolicy: IfNotPresent
    env:
    - {name: POD_NAME, valueFrom: {fieldRef: {fieldPath: metadata.name}}}
    - {name: NODE_NAME, valueFrom: {fieldRef: {fieldPath: spec.nodeName}}}
    readinessProbe: {httpGet: {path: /readyz, port: 8080}, periodSeconds: 1}
`

// narrowed is what narrow is held to, bits a second.
const narrowed = 4e6

// bandwidth compares how fast a limited pod sends and receives with how fast
// two that are not limited do.
func bandwidth(ctx context.Context, w *World) (string, error) {
	if err := w.Apply(ctx, "narrow", narrow); err != nil {
		return "", err
	}
	if _, err := w.ReadyOn(ctx, "narrow", 1); err != nil {
		return "", err
	}
	limited, err := w.PodOn(ctx, "narrow", "m2")
	if err != nil {
		return "", err
	}
	a, err := w.PodOn(ctx, "everywhere", "m1")
	if err != nil {
		return "", err
	}
	b, err := w.PodOn(ctx, "everywhere", "m2")
	if err != nil {
		return "", err
	}
	var rates []float64
	for _, way := range [][2]*corev1.Pod{{a, b}, {limited, a}, {a, limited}} {
		r, err := w.rate(ctx, way[0], way[1])
		if err != nil {
			return "", err
		}
		rates = append(rates, r)
	}
	if free := rates[0]; free < 4*narrowed {
		return "", fmt.Errorf("two pods without a limit reach %.1f Mbit/s only: nothing to compare with", free/1e6)
	}
	for i, way := range []string{"out of", "into"} {
		if r := rates[i+1]; r > 2*narrowed || r < narrowed/4 {
			return "", fmt.Errorf("%.1f Mbit/s %s a pod limited to 4 (%.1f without a limit)", r/1e6, way, rates[0]/1e6)
		}
	}
	return fmt.Sprintf("limit 4 Mbit/s: out %.1f, in %.1f; without %.1f", rates[1]/1e6, rates[2]/1e6, rates[0]/1e6),
		w.API.CoreV1().Pods(cluster.Namespace).Delete(ctx, "narrow", metav1.DeleteOptions{})
}

// rate is how many bits a second come through from one pod to another.
func (w *World) rate(ctx context.Context, from, to *corev1.Pod) (float64, error) {
	start := time.Now()
	t, err := w.StartTransfer(ctx, from, cluster.Stream(to), "", 8<<20)
	if err != nil {
		return 0, err
	}
	time.Sleep(2 * time.Second) // the length of the transfer, not a wait
	p, err := t.Stop(ctx)
	return float64(p.Bytes) * 8 / time.Since(start).Seconds(), err
}

// crash kills a pod's program: the kubelet starts it again in the same network.
func crash(ctx context.Context, w *World) (string, error) {
	p, err := w.PodOn(ctx, "everywhere", "m3")
	if err != nil {
		return "", err
	}
	proc, err := w.Process(p)
	if err != nil {
		return "", err
	}
	killed := time.Now()
	if err := netlab.Kill(ctx, proc.Pid); err != nil {
		return "", err
	}
	id, err := w.BackAfter(ctx, p, killed)
	if err != nil {
		return "", err
	}
	from, err := w.PodOn(ctx, "everywhere", "m1")
	if err != nil {
		return "", err
	}
	if err := w.answeredBy(ctx, "the pod that crashed", p.Name, w.fetcher(from, url(p.Status.PodIP, "8080"))); err != nil {
		return "", err
	}
	_, err = w.ReadyOn(ctx, "everywhere", len(w.nodes))
	return fmt.Sprintf("its program runs again after %s, at the same address", cluster.Short(id.Started.Sub(killed))), err
}
