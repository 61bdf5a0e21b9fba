package story

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"meshd.dev/test/netlab"
)

// namespace of the application.
const namespace = "demo"

// pods of an app, in order of name, without those that are being deleted.
func (w *World) pods(ctx context.Context, app string) ([]corev1.Pod, error) {
	list, err := w.API.CoreV1().Pods(namespace).List(ctx, metav1.ListOptions{LabelSelector: "app=" + app})
	if err != nil {
		return nil, err
	}
	pods := slices.DeleteFunc(list.Items, func(p corev1.Pod) bool { return p.DeletionTimestamp != nil })
	slices.SortFunc(pods, func(a, b corev1.Pod) int { return strings.Compare(a.Name, b.Name) })
	return pods, nil
}

// podOn is the ready pod of an app on a machine.
func (w *World) podOn(ctx context.Context, app, machine string) (*corev1.Pod, error) {
	pods, err := w.pods(ctx, app)
	if err != nil {
		return nil, err
	}
	for _, p := range pods {
		if p.Spec.NodeName == machine && ready(p) {
			return &p, nil
		}
	}
	return nil, fmt.Errorf("no pod of %s is ready on %s", app, machine)
}

// readyOn waits until every pod of an app is ready and returns the machines
// they are on, in order.
func (w *World) readyOn(ctx context.Context, app string, n int) ([]string, error) {
	var on []string
	err := until(ctx, func(ctx context.Context) error {
		pods, err := w.pods(ctx, app)
		if err != nil {
			return err
		}
		on = nil
		for _, p := range pods {
			if ready(p) {
				on = append(on, p.Spec.NodeName)
			}
		}
		slices.Sort(on)
		if len(on) != n || len(pods) != n {
			return fmt.Errorf("%s: want %d pods ready, have\n%s", app, n, describe(pods))
		}
		return nil
	})
	return on, err
}

func ready(p corev1.Pod) bool {
	return slices.ContainsFunc(p.Status.Conditions, func(c corev1.PodCondition) bool {
		return c.Type == corev1.PodReady && c.Status == corev1.ConditionTrue
	})
}

// describe is a line a pod, with why it is not ready.
func describe(pods []corev1.Pod) string {
	var b strings.Builder
	for _, p := range pods {
		fmt.Fprintf(&b, "  %s on %q: %s", p.Name, p.Spec.NodeName, p.Status.Phase)
		for _, c := range p.Status.Conditions {
			if c.Status != corev1.ConditionTrue && c.Message != "" {
				fmt.Fprintf(&b, "; %s: %s", c.Type, c.Message)
			}
		}
		for _, c := range p.Status.ContainerStatuses {
			if c.State.Waiting != nil {
				fmt.Fprintf(&b, "; %s: %s %s", c.Name, c.State.Waiting.Reason, c.State.Waiting.Message)
			}
		}
		b.WriteString("\n")
	}
	if len(pods) == 0 {
		return "  none"
	}
	return b.String()
}

// client speaks HTTP from a machine, over a connection of its own each time.
func client(m *netlab.Machine) *http.Client {
	return &http.Client{Transport: &http.Transport{DialContext: m.DialContext, DisableKeepAlives: true}}
}

// askFrom asks the echo program in a pod something, from the pod's own machine
// unless another is given; path may have a query.
func (w *World) askFrom(ctx context.Context, m *netlab.Machine, ip, method, path string) (string, error) {
	req, err := http.NewRequestWithContext(ctx, method, "http://"+net.JoinHostPort(ip, "8080")+path, nil)
	if err != nil {
		return "", err
	}
	resp, err := client(m).Do(req)
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err == nil && resp.StatusCode != http.StatusOK {
		err = fmt.Errorf("%s: %s: %s", path, resp.Status, strings.TrimSpace(string(b)))
	}
	return string(b), err
}

func (w *World) ask(ctx context.Context, p *corev1.Pod, path string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	return w.askFrom(ctx, w.Machine(p.Spec.NodeName), p.Status.PodIP, http.MethodGet, path)
}

func (w *World) askJSON(ctx context.Context, p *corev1.Pod, path string, v any) error {
	body, err := w.ask(ctx, p, path)
	if err != nil {
		return fmt.Errorf("pod %s on %s: %w", p.Name, p.Spec.NodeName, err)
	}
	return json.Unmarshal([]byte(body), v)
}

// identity is what echo says of itself (test/images/echo).
type identity struct {
	Pod, Node string
	Started   time.Time
}

func (w *World) identity(ctx context.Context, p *corev1.Pod) (identity, error) {
	var id identity
	return id, w.askJSON(ctx, p, "/", &id)
}

// fetched and resolved are what echo reports of its own requests.
type fetched struct {
	Status              int
	Body, Remote, Error string
	Took                time.Duration
}

type resolved struct {
	Answers  []string
	NotFound bool
	Error    string
	Took     time.Duration
}

// fetch has pod p fetch a URL and returns who answered.
func (w *World) fetch(ctx context.Context, p *corev1.Pod, target string, limit time.Duration) (identity, fetched, error) {
	var f fetched
	var id identity
	q := url.Values{"url": {target}, "timeout": {limit.String()}}
	if err := w.askJSON(ctx, p, "/fetch?"+q.Encode(), &f); err != nil {
		return id, f, err
	}
	if f.Error != "" || f.Status != http.StatusOK {
		return id, f, fmt.Errorf("pod %s on %s fetches %s: status %d %s", p.Name, p.Spec.NodeName, target, f.Status, f.Error)
	}
	return id, f, json.Unmarshal([]byte(f.Body), &id)
}

// resolve has pod p resolve a name.
func (w *World) resolve(ctx context.Context, p *corev1.Pod, name, kind string) ([]string, error) {
	var r resolved
	q := url.Values{"name": {name}, "type": {kind}, "timeout": {"2s"}}
	if err := w.askJSON(ctx, p, "/resolve?"+q.Encode(), &r); err != nil {
		return nil, err
	}
	if r.Error != "" {
		return nil, fmt.Errorf("pod %s on %s resolves %s: %s", p.Name, p.Spec.NodeName, name, r.Error)
	}
	slices.Sort(r.Answers)
	return r.Answers, nil
}

// process is the main process of a pod's echo container on its machine.
func (w *World) process(p *corev1.Pod) (netlab.Process, error) {
	for _, proc := range w.Machine(p.Spec.NodeName).Processes() {
		if proc.Name() != "echo" {
			continue
		}
		env, _ := os.ReadFile(fmt.Sprintf("/proc/%d/environ", proc.Pid))
		if slices.Contains(strings.Split(string(env), "\x00"), "POD_NAME="+p.Name) {
			return proc, nil
		}
	}
	return netlab.Process{}, fmt.Errorf("no process of pod %s on %s", p.Name, p.Spec.NodeName)
}

// progress is what echo reports of a transfer.
type progress struct {
	Sent, Acked, Bytes uint64
	Silence            time.Duration
	Done               bool
	Error              string
}

// A transfer runs between two pods until it is stopped.
type transfer struct {
	w    *World
	from *corev1.Pod
	id   string
	last chan progress // the end, once
	err  chan error
}

// startTransfer has pod from send text to another pod, rate bytes a second.
func (w *World) startTransfer(ctx context.Context, from *corev1.Pod, to netip.AddrPort, text string, rate int) (*transfer, error) {
	t := &transfer{w: w, from: from, id: fmt.Sprint(time.Now().UnixNano()), last: make(chan progress, 1), err: make(chan error, 1)}
	q := url.Values{"to": {to.String()}, "text": {text}, "rate": {fmt.Sprint(rate)}, "for": {"10m"}, "id": {t.id}}
	target := "http://" + net.JoinHostPort(from.Status.PodIP, "8080") + "/transfer?" + q.Encode()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, target, nil)
	if err != nil {
		return nil, err
	}
	resp, err := client(w.Machine(from.Spec.NodeName)).Do(req)
	if err != nil {
		return nil, err
	}
	if resp.StatusCode != http.StatusOK {
		resp.Body.Close()
		return nil, fmt.Errorf("start transfer: %s", resp.Status)
	}
	running := make(chan struct{})
	go t.follow(resp.Body, running)
	select {
	case <-running:
		return t, nil
	case p := <-t.last:
		return nil, fmt.Errorf("transfer: %s", p.Error)
	case err := <-t.err:
		return nil, err
	}
}

// follow reads progress until the end; running is closed at the first answer.
func (t *transfer) follow(body io.ReadCloser, running chan struct{}) {
	defer body.Close()
	started := false
	for lines := bufio.NewScanner(body); lines.Scan(); {
		var p progress
		if err := json.Unmarshal(lines.Bytes(), &p); err != nil {
			t.err <- err
			return
		}
		if p.Done {
			t.last <- p
			return
		}
		if !started && p.Acked > 0 {
			started = true
			close(running)
		}
	}
	t.err <- fmt.Errorf("the pod that sends is gone")
}

// stop lets the transfer end and returns what became of it.
func (t *transfer) stop(ctx context.Context) (progress, error) {
	m := t.w.Machine(t.from.Spec.NodeName)
	_, stopErr := t.w.askFrom(ctx, m, t.from.Status.PodIP, http.MethodPost, "/transfer/stop?id="+t.id)
	select {
	case p := <-t.last:
		if p.Error != "" {
			return p, fmt.Errorf("the transfer broke after %d of %d blocks: %s", p.Acked, p.Sent, p.Error)
		}
		return p, nil
	case err := <-t.err:
		return progress{}, fmt.Errorf("the transfer broke: %w", err)
	case <-ctx.Done():
		return progress{}, fmt.Errorf("the transfer does not end: %w", context.Cause(ctx))
	case <-after(stopErr):
		return progress{}, stopErr
	}
}

// after fires only if there is an error.
func after(err error) <-chan time.Time {
	if err == nil {
		return nil
	}
	return time.After(time.Second)
}

func lastLines(path string, n int) string {
	b, err := os.ReadFile(path)
	if err != nil {
		return err.Error()
	}
	lines := strings.Split(strings.TrimSpace(string(b)), "\n")
	return strings.Join(lines[max(0, len(lines)-n):], "\n")
}
