package story

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"strings"
	"sync/atomic"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"meshd.dev/test/cluster"
	"meshd.dev/test/netlab"
)

// Idle starts a single-node cluster with one pod on m1.
func Idle(ctx context.Context, w *World) error {
	if err := w.BuildImages(ctx); err != nil {
		return err
	}
	if err := w.Boot(ctx, "m1"); err != nil {
		return err
	}
	if err := w.StartServer(ctx); err != nil {
		return err
	}
	if _, err := w.NodesReady(ctx, []string{"m1"}); err != nil {
		return err
	}
	return w.Echoes(ctx, "idle", 1)
}

// echoes is a Deployment of plain echo pods; %[1]s is its name, %[2]d how many.
const echoes = `apiVersion: v1
kind: Namespace
metadata: {name: demo}
---
apiVersion: apps/v1
kind: Deployment
metadata: {name: %[1]s, namespace: demo}
spec:
  replicas: %[2]d
  selector: {matchLabels: {app: %[1]s}}
  template:
    metadata: {labels: {app: %[1]s}}
    spec:
      terminationGracePeriodSeconds: 1
      containers:
      - name: echo
        image: meshd.local/echo:1
        imagePullPolicy: IfNotPresent
        env:
        - name: POD_NAME
          valueFrom: {fieldRef: {fieldPath: metadata.name}}
`

// Echoes applies a Deployment of n echo pods and waits until they are ready.
func (w *World) Echoes(ctx context.Context, name string, n int) error {
	err := w.Machine("m1").WriteFile("/root/"+name+".yaml", fmt.Appendf(nil, echoes, name, n), 0o644)
	if err != nil {
		return err
	}
	if _, err := w.Kubectl(ctx, "apply", "-f", "/root/"+name+".yaml"); err != nil {
		return err
	}
	_, err = w.ReadyOn(ctx, name, n)
	return err
}

// Crashes kills the main process of n containers that never crashed before
// (a second crash is held back, as Kubernetes documents it) and returns how long
// after each kill the program's main() ran again.
func (w *World) Crashes(ctx context.Context, n int) ([]time.Duration, error) {
	const batch = 10
	var times []time.Duration
	for len(times) < n {
		if err := w.Echoes(ctx, "crash", batch); err != nil {
			return times, err
		}
		pods, err := w.Pods(ctx, "crash")
		if err != nil {
			return times, err
		}
		for i := range pods {
			took, err := w.crash(ctx, &pods[i])
			if err != nil {
				return times, err
			}
			times = append(times, took)
		}
		if err := w.replaceAll(ctx, "crash", pods); err != nil {
			return times, err
		}
	}
	return times[:n], nil
}

func (w *World) crash(ctx context.Context, p *corev1.Pod) (time.Duration, error) {
	proc, err := w.Process(p)
	if err != nil {
		return 0, err
	}
	killed := time.Now()
	if err := netlab.Kill(ctx, proc.Pid); err != nil {
		return 0, err
	}
	id, err := w.BackAfter(ctx, p, killed)
	return id.Started.Sub(killed), err
}

// replaceAll deletes pods and waits until none of them is there.
func (w *World) replaceAll(ctx context.Context, app string, old []corev1.Pod) error {
	for _, p := range old {
		if err := w.API.CoreV1().Pods(cluster.Namespace).Delete(ctx, p.Name, metav1.DeleteOptions{}); err != nil {
			return err
		}
	}
	return cluster.Until(ctx, func(ctx context.Context) error {
		list, err := w.API.CoreV1().Pods(cluster.Namespace).List(ctx, metav1.ListOptions{LabelSelector: "app=" + app})
		if err != nil {
			return err
		}
		for _, now := range list.Items {
			for _, was := range old {
				if now.UID == was.UID {
					return fmt.Errorf("pod %s is there still", was.Name)
				}
			}
		}
		return nil
	})
}

// MeshAddr is a machine's IPv4 address inside the mesh.
func (w *World) MeshAddr(ctx context.Context, name string) (netip.Addr, error) {
	n, err := w.API.CoreV1().Nodes().Get(ctx, name, metav1.GetOptions{})
	if err != nil {
		return netip.Addr{}, err
	}
	p, err := netip.ParsePrefix(n.Spec.PodCIDR)
	if err != nil {
		return netip.Addr{}, fmt.Errorf("pod CIDR of %s: %w", name, err)
	}
	return p.Masked().Addr().Next(), nil
}

// Throughput sends as much as goes over one TCP connection for d and returns
// bits a second, counted where they arrive.
func Throughput(ctx context.Context, from, to *netlab.Machine, addr netip.Addr, d time.Duration) (float64, error) {
	var l net.Listener
	err := to.InNetNS(func() (err error) {
		l, err = net.Listen("tcp", netip.AddrPortFrom(addr, 0).String())
		return err
	})
	if err != nil {
		return 0, err
	}
	defer l.Close()
	var arrived atomic.Int64
	ended := make(chan error, 1)
	go func() { ended <- drain(l, &arrived) }()
	conn, err := from.DialContext(ctx, "tcp", l.Addr().String())
	if err != nil {
		return 0, err
	}
	start := time.Now()
	err = flood(conn, start.Add(d))
	took := time.Since(start)
	bits := float64(arrived.Load()) * 8 / took.Seconds()
	return bits, errors.Join(err, conn.Close(), <-ended)
}

func drain(l net.Listener, arrived *atomic.Int64) error {
	conn, err := l.Accept()
	if err != nil {
		return err
	}
	defer conn.Close()
	for buf := make([]byte, 1<<18); ; {
		n, err := conn.Read(buf)
		arrived.Add(int64(n))
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
	}
}

func flood(conn net.Conn, end time.Time) error {
	block := []byte(strings.Repeat("meshd", 1<<15))
	if err := conn.SetWriteDeadline(end.Add(10 * time.Second)); err != nil {
		return err
	}
	for time.Now().Before(end) {
		if _, err := conn.Write(block); err != nil {
			return err
		}
	}
	return nil
}

// Spread has new pods of a Deployment made, one on each machine, and waits
// until all pods on m3 have run long enough not to count as crashing.
func (w *World) Spread(ctx context.Context, deployment string) error {
	for _, args := range [][]string{{"restart"}, {"status", "--timeout=120s"}} {
		if _, err := w.Kubectl(ctx, append([]string{"rollout", args[0], "-n", cluster.Namespace, "deploy/" + deployment}, args[1:]...)...); err != nil {
			return err
		}
	}
	return cluster.Until(ctx, func(ctx context.Context) error {
		p, err := w.PodOn(ctx, deployment, "m3")
		if err != nil {
			return err
		}
		if s := p.Status.StartTime; s == nil || time.Since(s.Time) < settledAfter {
			return fmt.Errorf("pod %s has just started", p.Name)
		}
		return nil
	})
}

// settledAfter is more than the first back-off of a container.
const settledAfter = 15 * time.Second
