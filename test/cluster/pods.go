package cluster

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"meshd.dev/test/netlab"
)

// Namespace of the applications.
const Namespace = "demo"

// Pods of an app, in order of name, without those that are being deleted.
func (v *View) Pods(ctx context.Context, app string) ([]corev1.Pod, error) {
	list, err := v.API.CoreV1().Pods(Namespace).List(ctx, metav1.ListOptions{LabelSelector: "app=" + app})
	if err != nil {
		return nil, err
	}
	pods := slices.DeleteFunc(list.Items, func(p corev1.Pod) bool { return p.DeletionTimestamp != nil })
	slices.SortFunc(pods, func(a, b corev1.Pod) int { return strings.Compare(a.Name, b.Name) })
	return pods, nil
}

// PodOn is the ready pod of an app on a machine.
func (v *View) PodOn(ctx context.Context, app, machine string) (*corev1.Pod, error) {
	pods, err := v.Pods(ctx, app)
	if err != nil {
		return nil, err
	}
	for _, p := range pods {
		if p.Spec.NodeName == machine && Ready(p) {
			return &p, nil
		}
	}
	return nil, fmt.Errorf("no pod of %s is ready on %s", app, machine)
}

// ReadyOn waits until every pod of an app is ready and returns the machines
// they are on, in order.
func (v *View) ReadyOn(ctx context.Context, app string, n int) ([]string, error) {
	var on []string
	err := Until(ctx, func(ctx context.Context) error {
		pods, err := v.Pods(ctx, app)
		if err != nil {
			return err
		}
		on = nil
		for _, p := range pods {
			if Ready(p) {
				on = append(on, p.Spec.NodeName)
			}
		}
		slices.Sort(on)
		if len(on) != n || len(pods) != n {
			return fmt.Errorf("%s: want %d pods ready, have\n%s", app, n, Describe(pods))
		}
		return nil
	})
	return on, err
}

func Ready(p corev1.Pod) bool {
	return slices.ContainsFunc(p.Status.Conditions, func(c corev1.PodCondition) bool {
		return c.Type == corev1.PodReady && c.Status == corev1.ConditionTrue
	})
}

// Describe is a line a pod, with why it is not ready.
func Describe(pods []corev1.Pod) string {
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

// Get has machine m fetch a URL with a numeric address.
func Get(ctx context.Context, m *netlab.Machine, target string) (string, error) {
	return request(ctx, m, http.MethodGet, target)
}

func request(ctx context.Context, m *netlab.Machine, method, target string) (string, error) {
	req, err := http.NewRequestWithContext(ctx, method, target, nil)
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
		err = fmt.Errorf("%s: %s: %s", target, resp.Status, strings.TrimSpace(string(b)))
	}
	return string(b), err
}

// AskFrom asks the echo program in a pod something, from the pod's own machine
// unless another is given; path may have a query.
func (v *View) AskFrom(ctx context.Context, m *netlab.Machine, ip, method, path string) (string, error) {
	return request(ctx, m, method, "http://"+net.JoinHostPort(ip, "8080")+path)
}

// Ask asks it from its own machine.
func (v *View) Ask(ctx context.Context, p *corev1.Pod, path string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	return v.AskFrom(ctx, v.Machine(p.Spec.NodeName), p.Status.PodIP, http.MethodGet, path)
}

// AskJSON wants JSON for an answer.
func (v *View) AskJSON(ctx context.Context, p *corev1.Pod, path string, into any) error {
	body, err := v.Ask(ctx, p, path)
	if err != nil {
		return fmt.Errorf("pod %s on %s: %w", p.Name, p.Spec.NodeName, err)
	}
	return json.Unmarshal([]byte(body), into)
}

// Identity is what echo says of itself (test/images/echo).
type Identity struct {
	Pod, Node string
	Started   time.Time
	Remote    string // whom it saw asking
}

func (v *View) Identity(ctx context.Context, p *corev1.Pod) (Identity, error) {
	var id Identity
	return id, v.AskJSON(ctx, p, "/", &id)
}

// Fetched and resolved are what echo reports of its own requests.
type Fetched struct {
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

// Fetch has pod p fetch a URL and returns who answered.
func (v *View) Fetch(ctx context.Context, p *corev1.Pod, target string, limit time.Duration) (Identity, Fetched, error) {
	var f Fetched
	var id Identity
	q := url.Values{"url": {target}, "timeout": {limit.String()}}
	if err := v.AskJSON(ctx, p, "/fetch?"+q.Encode(), &f); err != nil {
		return id, f, err
	}
	if f.Error != "" || f.Status != http.StatusOK {
		return id, f, fmt.Errorf("pod %s on %s fetches %s: status %d %s", p.Name, p.Spec.NodeName, target, f.Status, f.Error)
	}
	return id, f, json.Unmarshal([]byte(f.Body), &id)
}

// Resolve has pod p resolve a name.
func (v *View) Resolve(ctx context.Context, p *corev1.Pod, name, kind string) ([]string, error) {
	var r resolved
	q := url.Values{"name": {name}, "type": {kind}, "timeout": {"2s"}}
	if err := v.AskJSON(ctx, p, "/resolve?"+q.Encode(), &r); err != nil {
		return nil, err
	}
	if r.Error != "" {
		return nil, fmt.Errorf("pod %s on %s resolves %s: %s", p.Name, p.Spec.NodeName, name, r.Error)
	}
	slices.Sort(r.Answers)
	return r.Answers, nil
}

// Process is the main process of a pod's echo container on its machine.
func (v *View) Process(p *corev1.Pod) (netlab.Process, error) {
	for _, proc := range v.Machine(p.Spec.NodeName).Processes() {
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

// FetchUntilFrom fetches by name until a pod on machine answers.
func (v *View) FetchUntilFrom(ctx context.Context, from *corev1.Pod, target, machine string) (f Fetched, tries int, err error) {
	err = Until(ctx, func(ctx context.Context) error {
		tries++
		var id Identity
		var err error
		if id, f, err = v.Fetch(ctx, from, target, 3*time.Second); err != nil {
			return err
		}
		if id.Node != machine {
			return fmt.Errorf("%d tries, none answered from %s", tries, machine)
		}
		return nil
	})
	return f, tries, err
}

// BackAfter waits until the pod's program answers as one started after t.
func (v *View) BackAfter(ctx context.Context, p *corev1.Pod, t time.Time) (Identity, error) {
	var id Identity
	err := Until(ctx, func(ctx context.Context) error {
		now, err := v.API.CoreV1().Pods(p.Namespace).Get(ctx, p.Name, metav1.GetOptions{})
		if err != nil {
			return err
		}
		ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
		defer cancel()
		if id, err = v.Identity(ctx, now); err != nil {
			return fmt.Errorf("%w; it is\n%s", err, Describe([]corev1.Pod{*now}))
		}
		if id.Started.Before(t) {
			return fmt.Errorf("pod %s answers as the one started at %v", p.Name, id.Started)
		}
		return nil
	})
	return id, err
}

// Untouched checks that a pod's container is the one it was.
func (v *View) Untouched(ctx context.Context, was *corev1.Pod) error {
	now, err := v.API.CoreV1().Pods(was.Namespace).Get(ctx, was.Name, metav1.GetOptions{})
	if err != nil {
		return err
	}
	a, b := was.Status.ContainerStatuses[0], now.Status.ContainerStatuses[0]
	if a.ContainerID != b.ContainerID || a.RestartCount != b.RestartCount {
		return fmt.Errorf("pod %s: container was %s (%d restarts), is %s (%d)", was.Name, a.ContainerID, a.RestartCount, b.ContainerID, b.RestartCount)
	}
	return nil
}
