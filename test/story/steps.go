package story

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"meshd.dev/test/cluster"
	"meshd.dev/test/netlab"
)

// Running is the step at which the application is up.
const Running = "its pods are ready, web on three machines"

// Steps are the whole story in order.
func Steps() []Step {
	return []Step{
		{"build images from static Go programs", buildImages},
		{"three machines on an underlay of their own", bootMachines},
		{"meshd server on m1", startServer},
		{"meshd join on m2 and m3, a token each", joinMachines},
		{"three nodes Ready", nodesReady},
		{"meshctl status: healthy, tunnels up on each", statusHealthy},
		{"apply an application in plain YAML", applyApplication},
		{Running, applicationReady},
		{"config map and secret, as files and as environment", configReaches},
		{"m1 reaches m3 by service name, underlay shows no payload", nameThroughTunnel},
		{"kill -9 a container: back, data and secret there", killContainer},
		{"kill -9 a containerd shim: the pod is back", killShim},
		{"kill -9 meshd on m3, then m1: a transfer goes on", killMeshd},
		{"m3 loses power: out of DNS and Service, pods elsewhere", losePower},
		{"m3 comes back and rejoins by itself", comeBack},
	}
}

func buildImages(ctx context.Context, w *World) (string, error) {
	if err := w.BuildImages(ctx); err != nil {
		return "", err
	}
	var sizes []string
	for _, tar := range w.tars {
		fi, err := os.Stat(tar)
		if err != nil {
			return "", err
		}
		sizes = append(sizes, fmt.Sprintf("%s %.1f MB", strings.TrimSuffix(filepath.Base(tar), ".tar"), float64(fi.Size())/1e6))
	}
	return strings.Join(sizes, ", "), nil
}

func bootMachines(ctx context.Context, w *World) (string, error) {
	if err := w.Boot(ctx, Names...); err != nil {
		return "", err
	}
	version, err := w.Machine("m1").Run(ctx, "containerd", "--version")
	if err != nil {
		return "", err
	}
	f := strings.Fields(version)
	return "each with containerd " + f[min(2, len(f)-1)] + " and the images", nil
}

func startServer(ctx context.Context, w *World) (string, error) {
	if err := w.StartServer(ctx); err != nil {
		return "", err
	}
	return "API ready at " + w.Machine("m1").IPv4().String() + ":6443", nil
}

func joinMachines(ctx context.Context, w *World) (string, error) {
	for _, name := range Names[1:] {
		token, err := w.Token(ctx)
		if err != nil {
			return "", err
		}
		if err := w.Join(ctx, name, token); err != nil {
			return "", err
		}
	}
	return "single use, valid for 10 minutes", nil
}

func nodesReady(ctx context.Context, w *World) (string, error) {
	return w.NodesReady(ctx, Names)
}

// NodesReady waits until exactly these nodes exist and are Ready.
func (w *World) NodesReady(ctx context.Context, names []string) (string, error) {
	var cidrs []string
	err := cluster.Until(ctx, func(ctx context.Context) error {
		for _, name := range names {
			if pid := w.meshd[name]; pid != 0 && !netlab.Alive(pid) {
				return cluster.Final{Err: fmt.Errorf("meshd on %s has ended:\n%s", name, w.MeshdLog(name, 20))}
			}
		}
		list, err := w.API.CoreV1().Nodes().List(ctx, metav1.ListOptions{})
		if err != nil {
			return err
		}
		var ready, not []string
		cidrs = nil
		for _, n := range list.Items {
			if why := notReady(n); why != "" {
				not = append(not, n.Name+": "+why)
				continue
			}
			ready = append(ready, n.Name)
			cidrs = append(cidrs, n.Name+" "+n.Spec.PodCIDR)
		}
		if !slices.Equal(ready, names) {
			return fmt.Errorf("nodes ready: %v, want %v; %s", ready, names, strings.Join(not, "; "))
		}
		return nil
	})
	return strings.Join(cidrs, ", "), err
}

// notReady says why a node is not Ready; empty if it is.
func notReady(n corev1.Node) string {
	for _, c := range n.Status.Conditions {
		if c.Type == corev1.NodeReady {
			if c.Status == corev1.ConditionTrue {
				return ""
			}
			return fmt.Sprintf("%s %s %s", c.Status, c.Reason, c.Message)
		}
	}
	return "no Ready condition yet"
}

func statusHealthy(ctx context.Context, w *World) (string, error) {
	return w.StatusHealthy(ctx, Names)
}

// StatusHealthy waits until meshctl status is content on each machine.
func (w *World) StatusHealthy(ctx context.Context, names []string) (string, error) {
	var tunnels []string
	err := cluster.Until(ctx, func(ctx context.Context) error {
		tunnels = nil
		for _, name := range names {
			out, err := w.Machine(name).Run(ctx, "meshctl", "status", "--json")
			if err != nil {
				table, _ := w.Machine(name).Run(ctx, "meshctl", "status")
				return fmt.Errorf("%w\n%s", err, table)
			}
			up, backend, err := tunnelsUp([]byte(out))
			if err != nil {
				return fmt.Errorf("%s: %w", name, err)
			}
			if up != len(names)-1 {
				return fmt.Errorf("%s: %d tunnels up, want %d:\n%s", name, up, len(names)-1, out)
			}
			tunnels = append(tunnels, fmt.Sprintf("%s %d", name, up))
			if name == names[len(names)-1] && backend != "" {
				tunnels = append(tunnels, backend)
			}
		}
		return nil
	})
	return strings.Join(tunnels, ", "), err
}

// tunnelsUp counts the tunnels that are up in a status document, wherever in
// it they stand, and names what carries them.
func tunnelsUp(doc []byte) (up int, backend string, err error) {
	var v any
	if err := json.Unmarshal(doc, &v); err != nil {
		return 0, "", fmt.Errorf("read meshctl status --json: %w", err)
	}
	var walk func(v any)
	walk = func(v any) {
		switch v := v.(type) {
		case []any:
			for _, e := range v {
				walk(e)
			}
		case map[string]any:
			if _, isTunnel := v["backend"]; isTunnel && v["up"] == true {
				up++
				backend, _ = v["backend"].(string)
			}
			for _, e := range v {
				walk(e)
			}
		}
	}
	walk(v)
	return up, backend, nil
}

// Kubectl runs meshctl kubectl on m1.
func (w *World) Kubectl(ctx context.Context, args ...string) (string, error) {
	tool := w.cfg.Kubectl
	if len(tool) == 0 {
		tool = []string{"meshctl", "kubectl"}
	}
	return w.Machine("m1").Run(ctx, slices.Concat(tool, args)...)
}

func applyApplication(ctx context.Context, w *World) (string, error) {
	manifest, err := os.ReadFile(w.cfg.Manifest)
	if err != nil {
		return "", err
	}
	if err := w.Machine("m1").WriteFile("/root/demo.yaml", manifest, 0o644); err != nil {
		return "", err
	}
	out, err := w.Kubectl(ctx, "apply", "-f", "/root/demo.yaml")
	if err != nil {
		return "", err
	}
	return fmt.Sprintf("meshctl kubectl apply: %d objects", strings.Count(out, "\n")), nil
}

func applicationReady(ctx context.Context, w *World) (string, error) {
	for app, n := range map[string]int{"everywhere": 3, "ledger": 1} {
		if _, err := w.ReadyOn(ctx, app, n); err != nil {
			return "", err
		}
	}
	on, err := w.ReadyOn(ctx, "web", 3)
	if err != nil {
		return "", err
	}
	if !slices.Equal(on, Names) {
		return "", fmt.Errorf("the three pods of web are on %v, want one a machine", on)
	}
	for _, machine := range Names {
		p, err := w.PodOn(ctx, "everywhere", machine)
		if err != nil {
			return "", err
		}
		id, err := w.Identity(ctx, p)
		if err != nil {
			return "", err
		}
		if id.Pod != p.Name || id.Node != machine {
			return "", fmt.Errorf("pod %s on %s says it is %s on %s", p.Name, machine, id.Pod, id.Node)
		}
	}
	return "Deployment 3, DaemonSet 3, one with a volume", nil
}

// password is what manifests/examples/demo.yaml has in its secret.
const password = "correct-horse-battery-staple"

func configReaches(ctx context.Context, w *World) (string, error) {
	web, err := w.PodOn(ctx, "web", "m3")
	if err != nil {
		return "", err
	}
	ledger, err := w.PodOn(ctx, "ledger", "m2")
	if err != nil {
		return "", err
	}
	for _, c := range []struct {
		pod        *corev1.Pod
		path, want string
	}{
		{web, "/file?path=/etc/greeting/greeting.txt", "hello from a config map\n"},
		{web, "/env?name=password", password},
		{ledger, "/file?path=/etc/credentials/password", password},
	} {
		got, err := w.Ask(ctx, c.pod, c.path)
		if err != nil {
			return "", fmt.Errorf("pod %s: %w", c.pod.Name, err)
		}
		if got != c.want {
			return "", fmt.Errorf("pod %s %s: got %q, want %q", c.pod.Name, c.path, got, c.want)
		}
	}
	return "", nil
}

// Inner are the addresses that must not be seen on the underlay.
var Inner = []netip.Prefix{
	netip.MustParsePrefix("10.244.0.0/16"), netip.MustParsePrefix("10.96.0.0/16"),
	netip.MustParsePrefix("fd00:10:244::/48"), netip.MustParsePrefix("fd00:10:96::/112"),
}

// beside are the kinds of packets that machines exchange besides the tunnels':
// neighbours, and the API and the agents behind mutual TLS.
var beside = []string{"arp", "icmp6", "tcp/6443", "tcp/10250"}

func nameThroughTunnel(ctx context.Context, w *World) (string, error) {
	from, err := w.PodOn(ctx, "everywhere", "m1")
	if err != nil {
		return "", err
	}
	to, err := w.PodOn(ctx, "everywhere", "m3")
	if err != nil {
		return "", err
	}
	marker := "marker-" + rand.Text()
	capture, err := w.Lab.Capture([]byte(marker), Inner...)
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
	return fmt.Sprintf("answer of %s after %d tries in %v; %d wireguard packets, %d KB of marker text sent, 0 seen",
		f.Remote, n, f.Took.Round(10*time.Microsecond), seen.Packets["wireguard"], p.Bytes>>10), nil
}

func killContainer(ctx context.Context, w *World) (string, error) {
	before, err := w.PodOn(ctx, "ledger", "m2")
	if err != nil {
		return "", err
	}
	journal, err := w.Ask(ctx, before, "/file?path=/data/journal")
	if err != nil {
		return "", err
	}
	proc, err := w.Process(before)
	if err != nil {
		return "", err
	}
	killed := time.Now()
	if err := netlab.Kill(ctx, proc.Pid); err != nil {
		return "", err
	}
	id, err := w.BackAfter(ctx, before, killed)
	if err != nil {
		return "", err
	}
	serving := time.Since(killed)
	if err := w.keptData(ctx, before, journal); err != nil {
		return "", err
	}
	event, err := w.accounted(ctx, before, killed)
	if err != nil {
		return "", err
	}
	return fmt.Sprintf("main() runs again after %s, serves after %s; restart counted; event %q",
		cluster.Short(id.Started.Sub(killed)), cluster.Short(serving), event), nil
}

// keptData checks that the journal on the volume has grown by one start and
// that the secret is there.
func (w *World) keptData(ctx context.Context, p *corev1.Pod, journal string) error {
	now, err := w.Ask(ctx, p, "/file?path=/data/journal")
	if err != nil {
		return err
	}
	if !strings.HasPrefix(now, journal) || strings.Count(now, "\n") != strings.Count(journal, "\n")+1 {
		return fmt.Errorf("the volume's journal was\n%sand is\n%s", journal, now)
	}
	secret, err := w.Ask(ctx, p, "/file?path=/etc/credentials/password")
	if err == nil && secret != password {
		err = fmt.Errorf("the secret is %q now", secret)
	}
	return err
}

// accounted waits until the API says that the pod's container was restarted
// because of signal 9, and returns what an event says of it.
func (w *World) accounted(ctx context.Context, before *corev1.Pod, killed time.Time) (string, error) {
	was := before.Status.ContainerStatuses[0].RestartCount
	err := cluster.Until(ctx, func(ctx context.Context) error {
		now, err := w.API.CoreV1().Pods(before.Namespace).Get(ctx, before.Name, metav1.GetOptions{})
		if err != nil {
			return err
		}
		if len(now.Status.ContainerStatuses) == 0 {
			return errors.New("no container status")
		}
		s := now.Status.ContainerStatuses[0]
		last := s.LastTerminationState.Terminated
		if s.RestartCount != was+1 || s.State.Running == nil || last == nil || last.ExitCode != 137 {
			return fmt.Errorf("restart count %d (was %d), state %+v, last state %+v; want one more, running, exit code 137",
				s.RestartCount, was, s.State, s.LastTerminationState)
		}
		return nil
	})
	if err != nil {
		return "", err
	}
	return w.eventAfter(ctx, before, killed)
}

// eventAfter waits for the first event about a pod after t that speaks of an exit or a start.
func (w *World) eventAfter(ctx context.Context, p *corev1.Pod, t time.Time) (string, error) {
	var found string
	err := cluster.Until(ctx, func(ctx context.Context) error {
		events, err := w.API.CoreV1().Events(p.Namespace).List(ctx, metav1.ListOptions{
			FieldSelector: "involvedObject.name=" + p.Name})
		if err != nil {
			return err
		}
		for _, e := range events.Items {
			at := e.LastTimestamp.Time
			if at.IsZero() {
				at = e.EventTime.Time
			}
			// Timestamps of events are whole seconds.
			if at.Before(t.Truncate(time.Second)) || e.InvolvedObject.UID != p.UID {
				continue
			}
			if found == "" || strings.Contains(e.Message, "137") || strings.Contains(e.Message, "exit") {
				found = e.Reason + ": " + e.Message
			}
		}
		if found == "" {
			return fmt.Errorf("no event about pod %s since %v", p.Name, t)
		}
		return nil
	})
	return found, err
}

func killShim(ctx context.Context, w *World) (string, error) {
	p, err := w.PodOn(ctx, "web", "m2")
	if err != nil {
		return "", err
	}
	proc, err := w.Process(p)
	if err != nil {
		return "", err
	}
	shim, err := netlab.Parent(proc.Pid)
	if err != nil {
		return "", err
	}
	if !strings.HasPrefix(shim.Name(), "containerd-shim") {
		return "", fmt.Errorf("the parent of pod %s's process is %v, want a containerd shim", p.Name, shim.Argv)
	}
	killed := time.Now()
	if err := netlab.Kill(ctx, shim.Pid); err != nil {
		return "", err
	}
	id, err := w.BackAfter(ctx, p, killed)
	if err != nil {
		return "", err
	}
	if _, err := w.ReadyOn(ctx, "web", 3); err != nil {
		return "", err
	}
	return fmt.Sprintf("main() runs again after %s, all of web ready after %s", cluster.Short(id.Started.Sub(killed)), cluster.Short(time.Since(killed))), nil
}

func killMeshd(ctx context.Context, w *World) (string, error) {
	from, err := w.PodOn(ctx, "everywhere", "m1")
	if err != nil {
		return "", err
	}
	to, err := w.PodOn(ctx, "everywhere", "m3")
	if err != nil {
		return "", err
	}
	t, err := w.StartTransfer(ctx, from, cluster.Stream(to), "", 4<<20)
	if err != nil {
		return "", err
	}
	for _, name := range []string{"m3", "m1"} {
		if err := w.restartMeshd(ctx, name); err != nil {
			_, broken := t.Stop(ctx)
			return "", errors.Join(err, broken)
		}
	}
	p, err := t.Stop(ctx)
	if err != nil {
		return "", err
	}
	for _, was := range []*corev1.Pod{from, to} {
		if err := w.Untouched(ctx, was); err != nil {
			return "", err
		}
	}
	return fmt.Sprintf("%.1f MB whole and in order, longest silence %s, no container restarted", float64(p.Bytes)/1e6, cluster.Short(p.Silence)), nil
}

// restartMeshd kills a machine's meshd and starts it as its init would, then
// waits until it is healthy again.
func (w *World) restartMeshd(ctx context.Context, name string) error {
	if err := netlab.Kill(ctx, w.meshd[name]); err != nil {
		return err
	}
	return w.ReviveMeshd(ctx, name)
}

// Meshd is the process of a machine's meshd.
func (w *World) Meshd(name string) int { return w.meshd[name] }

// ReviveMeshd starts a machine's meshd that ended as its init would, and waits
// until it is healthy again.
func (w *World) ReviveMeshd(ctx context.Context, name string) error {
	if name == "m1" {
		if err := w.StartServer(ctx); err != nil {
			return err
		}
	} else if err := w.Join(ctx, name, ""); err != nil {
		return err
	}
	_, err := w.StatusHealthy(ctx, Names)
	return err
}

func losePower(ctx context.Context, w *World) (string, error) {
	loss, err := w.LosePower(ctx)
	if err != nil {
		return "", fmt.Errorf("%w\nso far: %s", err, loss)
	}
	return loss.String(), nil
}

// A Loss is how long after a machine's power cut each thing was true.
type Loss struct {
	// Slice: no ready endpoint of it in the service's EndpointSlices.
	// DNS: a headless name no longer answers with its pod.
	// Service: the last request through the ClusterIP that failed.
	// Node: its Ready condition is no longer true.
	// Replaced: as many pods as wanted are ready on other machines.
	Slice, DNS, Service, Node, Replaced time.Duration
}

func (l Loss) String() string {
	return fmt.Sprintf("out of DNS %s, of the EndpointSlice %s, last failed request %s, node not ready %s, 3 pods elsewhere %s",
		cluster.Short(l.DNS), cluster.Short(l.Slice), cluster.Short(l.Service), cluster.Short(l.Node), cluster.Short(l.Replaced))
}

// LosePower cuts m3's power and waits until the cluster lives without it.
func (w *World) LosePower(ctx context.Context) (Loss, error) {
	var l Loss
	from, err := w.PodOn(ctx, "everywhere", "m1")
	if err != nil {
		return l, err
	}
	lost, err := w.PodOn(ctx, "everywhere", "m3")
	if err != nil {
		return l, err
	}
	off, served := make(chan error, 1), make(chan error, 1)
	replaced, cancel := context.WithCancel(ctx)
	defer cancel()
	cut := time.Now()
	go func() { off <- w.Machine("m3").PowerOff(ctx) }()
	go func() { served <- w.lastFailure(ctx, replaced, from, cut, &l.Service) }()
	err = w.whenTrue(ctx, cut, map[*time.Duration]func(context.Context) error{
		&l.Slice:    func(ctx context.Context) error { return w.noEndpointOn(ctx, "web", "m3") },
		&l.DNS:      func(ctx context.Context) error { return w.nameWithout(ctx, from, lost.Status.PodIP) },
		&l.Node:     func(ctx context.Context) error { return w.nodeNotReady(ctx, "m3") },
		&l.Replaced: func(ctx context.Context) error { return w.readyElsewhere(ctx, "web", 3, "m3") },
	})
	cancel()
	return l, errors.Join(err, <-served, <-off)
}

// whenTrue waits for each of several things at once and notes when it came.
func (w *World) whenTrue(ctx context.Context, start time.Time, things map[*time.Duration]func(context.Context) error) error {
	errs := make(chan error, len(things))
	for at, ok := range things {
		go func() {
			err := cluster.Until(ctx, ok)
			*at = time.Since(start)
			errs <- err
		}()
	}
	var all error
	for range things {
		all = errors.Join(all, <-errs)
	}
	return all
}

// lastFailure sends requests through the ClusterIP until the pods have been
// replaced and twenty in a row went well; at is when the last one failed.
func (w *World) lastFailure(ctx, replaced context.Context, from *corev1.Pod, start time.Time, at *time.Duration) error {
	well := 0
	return cluster.Until(ctx, func(ctx context.Context) error {
		_, _, err := w.Fetch(ctx, from, "http://web.demo.svc.cluster.local/", time.Second)
		if err != nil {
			well, *at = 0, time.Since(start)
			return err
		}
		if well++; well < 20 || replaced.Err() == nil {
			return errors.New("the service answers, but not for long enough")
		}
		return nil
	})
}

func (w *World) noEndpointOn(ctx context.Context, service, machine string) error {
	slicesOf, err := w.API.DiscoveryV1().EndpointSlices(cluster.Namespace).List(ctx, metav1.ListOptions{
		LabelSelector: discoveryv1.LabelServiceName + "=" + service})
	if err != nil {
		return err
	}
	for _, s := range slicesOf.Items {
		for _, e := range s.Endpoints {
			if e.NodeName != nil && *e.NodeName == machine && (e.Conditions.Ready == nil || *e.Conditions.Ready) {
				return fmt.Errorf("service %s has a ready endpoint on %s still: %v", service, machine, e.Addresses)
			}
		}
	}
	return nil
}

// nameWithout checks that the headless name answers without an address.
func (w *World) nameWithout(ctx context.Context, from *corev1.Pod, ip string) error {
	answers, err := w.Resolve(ctx, from, "everywhere.demo.svc.cluster.local", "A")
	if err != nil {
		return err
	}
	if len(answers) == 0 || slices.Contains(answers, ip) {
		return fmt.Errorf("the headless name answers %v, want others than %s", answers, ip)
	}
	return nil
}

func (w *World) nodeNotReady(ctx context.Context, name string) error {
	n, err := w.API.CoreV1().Nodes().Get(ctx, name, metav1.GetOptions{})
	if err != nil {
		return err
	}
	if notReady(*n) == "" {
		return fmt.Errorf("node %s is Ready still", name)
	}
	return nil
}

func (w *World) readyElsewhere(ctx context.Context, app string, n int, lost string) error {
	pods, err := w.Pods(ctx, app)
	if err != nil {
		return err
	}
	have := 0
	for _, p := range pods {
		if p.Spec.NodeName != lost && cluster.Ready(p) {
			have++
		}
	}
	if have < n {
		return fmt.Errorf("%s: want %d pods ready elsewhere than on %s, have\n%s", app, n, lost, cluster.Describe(pods))
	}
	return nil
}

func comeBack(ctx context.Context, w *World) (string, error) {
	back, err := w.ComeBack(ctx)
	if err != nil {
		return "", fmt.Errorf("%w\nso far: %s", err, back)
	}
	return back.String(), nil
}

// A Return is how long after power-on each thing was true.
type Return struct{ Containerd, Ready, Pod, Whole time.Duration }

func (r Return) String() string {
	return fmt.Sprintf("containerd %s, node Ready %s, its DaemonSet pod ready %s, found by name, 3 of web and healthy everywhere %s",
		cluster.Short(r.Containerd), cluster.Short(r.Ready), cluster.Short(r.Pod), cluster.Short(r.Whole))
}

// ComeBack switches m3 on, starts what its init would start, and waits until
// the cluster is whole.
func (w *World) ComeBack(ctx context.Context) (Return, error) {
	var r Return
	m := w.Machine("m3")
	on := time.Now()
	if err := m.PowerOn(ctx); err != nil {
		return r, err
	}
	if _, err := m.StartContainerd(ctx); err != nil {
		return r, err
	}
	r.Containerd = time.Since(on)
	if err := w.Join(ctx, m.Name, ""); err != nil {
		return r, err
	}
	if _, err := w.NodesReady(ctx, Names); err != nil {
		return r, err
	}
	r.Ready = time.Since(on)
	if err := w.podBack(ctx, on); err != nil {
		return r, err
	}
	r.Pod = time.Since(on)
	if _, err := w.StatusHealthy(ctx, Names); err != nil {
		return r, err
	}
	if _, err := w.ReadyOn(ctx, "web", 3); err != nil {
		return r, err
	}
	r.Whole = time.Since(on)
	return r, nil
}

// podBack waits until a DaemonSet pod started after t is ready on m3 and a pod
// on m1 finds it by its headless name and fetches from it.
func (w *World) podBack(ctx context.Context, t time.Time) error {
	from, err := w.PodOn(ctx, "everywhere", "m1")
	if err != nil {
		return err
	}
	return cluster.Until(ctx, func(ctx context.Context) error {
		p, err := w.PodOn(ctx, "everywhere", "m3")
		if err != nil {
			return err
		}
		id, err := w.Identity(ctx, p)
		if err != nil {
			return err
		}
		if id.Started.Before(t) {
			return fmt.Errorf("pod %s says it started at %v, before the power came back", p.Name, id.Started)
		}
		answers, err := w.Resolve(ctx, from, "everywhere.demo.svc.cluster.local", "A")
		if err != nil {
			return err
		}
		if !slices.Contains(answers, p.Status.PodIP) {
			return fmt.Errorf("the headless name answers %v, without %s", answers, p.Status.PodIP)
		}
		_, _, err = w.Fetch(ctx, from, "http://"+p.Status.PodIP+":8080/", 2*time.Second)
		return err
	})
}
