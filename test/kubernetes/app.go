package kubernetes

import (
	"context"
	"crypto/rand"
	_ "embed"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"meshd.dev/test/cluster"
	"meshd.dev/test/netlab"
)

//go:embed testdata/app.yaml
var app string

// The node ports of testdata/app.yaml.
const (
	webNodePort = "30080"
	udpNodePort = "30778"
)

// inner are the addresses that must not be seen on the underlay.
var inner = []netip.Prefix{
	netip.MustParsePrefix("10.244.0.0/16"), netip.MustParsePrefix("10.96.0.0/16"),
	netip.MustParsePrefix("fd00:10:244::/48"), netip.MustParsePrefix("fd00:10:96::/112"),
}

// beside are the kinds of packets machines exchange besides the tunnels':
// neighbours, the API and the kubelets.
var beside = []string{"arp", "icmp6", "tcp/6443", "tcp/10250"}

func applicationReady(ctx context.Context, w *World) (string, error) {
	if err := w.Apply(ctx, "app", app); err != nil {
		return "", err
	}
	for _, name := range []string{"everywhere", "host"} {
		on, err := w.ReadyOn(ctx, name, len(w.nodes))
		if err != nil {
			return "", err
		}
		if !slices.Equal(on, w.nodes) {
			return "", fmt.Errorf("the pods of %s are on %v, want one a node", name, on)
		}
	}
	return "", nil
}

// eachPair calls do for the pods of everywhere on each two nodes.
func (w *World) eachPair(ctx context.Context, do func(from, to *corev1.Pod) error) error {
	for _, a := range w.nodes {
		for _, b := range w.nodes {
			from, err := w.PodOn(ctx, "everywhere", a)
			if err != nil {
				return err
			}
			to, err := w.PodOn(ctx, "everywhere", b)
			if err != nil {
				return err
			}
			if err := do(from, to); err != nil {
				return err
			}
		}
	}
	return nil
}

// podsReachEachOther fetches from each pod to each by both of its addresses.
func podsReachEachOther(ctx context.Context, w *World) (string, error) {
	n := 0
	err := w.eachPair(ctx, func(from, to *corev1.Pod) error {
		if len(to.Status.PodIPs) != 2 {
			return fmt.Errorf("pod %s has addresses %v, want one a family", to.Name, to.Status.PodIPs)
		}
		for _, ip := range to.Status.PodIPs {
			id, err := w.fetchUntil(ctx, from, url(ip.IP, "8080"))
			if err != nil {
				return err
			}
			if id.Pod != to.Name {
				return fmt.Errorf("%s is %s, want %s", ip.IP, id.Pod, to.Name)
			}
			if host, _, _ := net.SplitHostPort(id.Remote); !slices.ContainsFunc(from.Status.PodIPs, func(p corev1.PodIP) bool { return p.IP == host }) {
				return fmt.Errorf("%s sees %s, want an address of %s: %v", to.Name, host, from.Name, from.Status.PodIPs)
			}
			n++
		}
		return nil
	})
	return fmt.Sprintf("%d ways, both families, each sees the other's own address", n), err
}

// fetchUntil fetches until it goes well: endpoints and rules take their moment.
func (w *World) fetchUntil(ctx context.Context, from *corev1.Pod, target string) (cluster.Identity, error) {
	var id cluster.Identity
	err := w.Until(ctx, func(ctx context.Context) (err error) {
		id, _, err = w.Fetch(ctx, from, target, 2*time.Second)
		return err
	})
	return id, err
}

func url(host, port string) string { return "http://" + net.JoinHostPort(host, port) + "/" }

// throughTunnel sends a marker from m1 to m3 by the service's name and by a
// stream, and looks for it on the underlay.
func throughTunnel(ctx context.Context, w *World) (string, error) {
	from, err := w.PodOn(ctx, "everywhere", "m1")
	if err != nil {
		return "", err
	}
	to, err := w.PodOn(ctx, "everywhere", "m3")
	if err != nil {
		return "", err
	}
	marker := "marker-" + rand.Text()
	capture, err := w.Lab.Capture([]byte(marker), inner...)
	if err != nil {
		return "", err
	}
	f, n, err := w.FetchUntilFrom(ctx, from, "http://web.demo.svc.cluster.local/?"+marker, "m3")
	var p cluster.Progress
	if err == nil {
		p, err = w.ShortTransfer(ctx, from, to, marker)
	}
	seen := capture.Stop()
	if err != nil {
		return "", fmt.Errorf("%w; the underlay saw %s", err, seen)
	}
	if err := cluster.OnlyTunnels(seen, beside...); err != nil {
		return "", err
	}
	return fmt.Sprintf("answer of %s after %d tries; %d wireguard packets, %d KB of marker text sent, 0 seen",
		f.Remote, n, seen.Packets["wireguard"], p.Bytes>>10), nil
}

// names has a pod on each node resolve what a cluster's DNS must know; all ask
// kube-dns, and the pod behind it knows nothing.
func names(ctx context.Context, w *World) (string, error) {
	web, err := w.API.CoreV1().Services(cluster.Namespace).Get(ctx, "web", metav1.GetOptions{})
	if err != nil {
		return "", err
	}
	all, err := w.Pods(ctx, "everywhere")
	if err != nil {
		return "", err
	}
	var each []string
	for _, p := range all {
		each = append(each, p.Status.PodIP)
	}
	for _, p := range all {
		conf, err := w.Ask(ctx, &p, "/file?path=/etc/resolv.conf")
		if err != nil {
			return "", err
		}
		if !strings.Contains(conf, "nameserver "+dnsService+"\n") {
			return "", fmt.Errorf("pod %s has the resolv.conf\n%s", p.Name, conf)
		}
		for name, want := range map[string][]string{
			"kubernetes.default.svc.cluster.local.":  {"10.96.0.1"},
			"web":                                    {web.Spec.ClusterIP},
			"web.demo.svc.cluster.local":             {web.Spec.ClusterIP},
			"everywhere.demo.svc.cluster.local":      each,
			"kube-dns.kube-system.svc.cluster.local": {dnsService},
		} {
			if err := w.resolvesTo(ctx, &p, name, "A", want); err != nil {
				return "", err
			}
		}
		if err := w.resolvesTo(ctx, &p, "web.demo.svc.cluster.local", "AAAA", web.Spec.ClusterIPs[1:]); err != nil {
			return "", err
		}
	}
	return fmt.Sprintf("nameserver %s; %d pods asked", dnsService, len(all)), nil
}

func (w *World) resolvesTo(ctx context.Context, p *corev1.Pod, name, kind string, want []string) error {
	want = slices.Sorted(slices.Values(want))
	return w.Until(ctx, func(ctx context.Context) error {
		got, err := w.Resolve(ctx, p, name, kind)
		if err != nil {
			return err
		}
		if !slices.Equal(got, want) {
			return fmt.Errorf("pod %s on %s: %s %s is %v, want %v", p.Name, p.Spec.NodeName, name, kind, got, want)
		}
		return nil
	})
}

// services are reached from pods, from nodes and from outside.
func services(ctx context.Context, w *World) (string, error) {
	web, err := w.API.CoreV1().Services(cluster.Namespace).Get(ctx, "web", metav1.GetOptions{})
	if err != nil {
		return "", err
	}
	for _, name := range w.nodes {
		p, err := w.PodOn(ctx, "everywhere", name)
		if err != nil {
			return "", err
		}
		m := w.Machine(name)
		for _, ip := range web.Spec.ClusterIPs {
			if err := w.spreads(ctx, "pod on "+name+" to "+ip, answerer(w.fetcher(p, url(ip, "80")))); err != nil {
				return "", err
			}
			if err := w.spreads(ctx, name+" itself to "+ip, answerer(asker(m, url(ip, "80")))); err != nil {
				return "", err
			}
		}
		if err := w.spreads(ctx, "outside to the node port of "+name, answerer(asker(w.Machine(outside), url(m.IPv4().String(), webNodePort)))); err != nil {
			return "", err
		}
		if err := w.spreads(ctx, "UDP from outside to the node port of "+name, func(ctx context.Context) (string, error) {
			return w.datagram(ctx, w.Machine(outside), net.JoinHostPort(m.IPv4().String(), udpNodePort))
		}); err != nil {
			return "", err
		}
	}
	if err := w.refusesForNobody(ctx); err != nil {
		return "", err
	}
	return "from pods, nodes and outside, TCP and UDP, every node answers each", nil
}

// answerer asks on which node the pod is that answers.
func answerer(ask ask) func(context.Context) (string, error) {
	return func(ctx context.Context) (string, error) {
		id, err := ask(ctx)
		return id.Node, err
	}
}

// spreads asks until every node has answered.
func (w *World) spreads(ctx context.Context, what string, ask func(context.Context) (string, error)) error {
	seen := map[string]int{}
	return w.Until(ctx, func(ctx context.Context) error {
		node, err := ask(ctx)
		if err != nil {
			return fmt.Errorf("%s: %w; so far %v", what, err, seen)
		}
		seen[node]++
		if len(seen) < len(w.nodes) {
			return fmt.Errorf("%s: answers from %v only", what, seen)
		}
		return nil
	})
}

// datagram sends one and returns on which node the pod is that answers.
func (w *World) datagram(ctx context.Context, m *netlab.Machine, to string) (string, error) {
	conn, err := m.DialContext(ctx, "udp", to)
	if err != nil {
		return "", err
	}
	defer conn.Close()
	if err := conn.SetDeadline(time.Now().Add(time.Second)); err != nil {
		return "", err
	}
	if _, err := conn.Write([]byte("?")); err != nil {
		return "", err
	}
	b := make([]byte, 256)
	n, err := conn.Read(b)
	if err != nil {
		return "", err
	}
	pod, err := w.API.CoreV1().Pods(cluster.Namespace).Get(ctx, string(b[:n]), metav1.GetOptions{})
	if err != nil {
		return "", err
	}
	return pod.Spec.NodeName, nil
}

// nobody is a service without endpoints.
const nobody = `apiVersion: v1
kind: Service
metadata: {name: nobody, namespace: demo}
spec:
  selector: {app: nobody}
  ports: [{port: 80}]
`

// refusesForNobody wants such a service to refuse at once, from every node.
func (w *World) refusesForNobody(ctx context.Context) error {
	if err := w.Apply(ctx, "nobody", nobody); err != nil {
		return err
	}
	for _, name := range w.nodes {
		p, err := w.PodOn(ctx, "everywhere", name)
		if err != nil {
			return err
		}
		if err := w.Until(ctx, func(ctx context.Context) error {
			_, f, err := w.Fetch(ctx, p, "http://nobody.demo.svc.cluster.local/", 5*time.Second)
			switch {
			case err == nil:
				return errors.New("a service without endpoints answers")
			case !strings.Contains(f.Error, "refused"):
				return fmt.Errorf("a service without endpoints: want a refusal, got %w", err)
			}
			return nil
		}); err != nil {
			return err
		}
	}
	return w.API.CoreV1().Services(cluster.Namespace).Delete(ctx, "nobody", metav1.DeleteOptions{})
}
