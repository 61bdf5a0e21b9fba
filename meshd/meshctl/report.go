package main

import (
	"cmp"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"

	"meshd.dev/pkg/status"
)

// report is a judged status; it feeds table, JSON and tests.
type report struct {
	node     string           // this machine
	guest    bool             // of somebody else's Kubernetes
	Healthy  bool             `json:"healthy"`
	Daemon   *status.Document `json:"daemon,omitempty"`
	Nodes    []nodeLine       `json:"nodes"`
	Tunnels  []status.Tunnel  `json:"tunnels"`
	Pods     podCount         `json:"pods"`
	Services serviceCount     `json:"services"`
	DNS      string           `json:"dns"`
	Problems []problem        `json:"problems"`
}

type nodeLine struct {
	Name    string   `json:"name"`
	Ready   string   `json:"ready"`
	Address string   `json:"address"`
	PodCIDR []string `json:"podCIDRs"`
	Agent   string   `json:"agent"`
	Pods    int      `json:"pods"`
}

type podCount struct {
	Total, Ready, Done, Starting, Failing int
	OwnNodeOnly                           bool
}

type serviceCount struct{ Total, WithEndpoints, Empty int }

// problem is one thing that is not as it should be.
type problem struct {
	What   string `json:"what"`
	Reason string `json:"reason"`
	Next   string `json:"next"`
}

// startingTime is how long a pod may be pending before that counts as a
// problem.
const startingTime = 30 * time.Second

func judge(f facts, now time.Time) report {
	r := report{node: f.node, guest: f.guest, Tunnels: []status.Tunnel{}, Nodes: []nodeLine{}, Problems: []problem{}, DNS: "not known"}
	r.daemon(f)
	if f.guest {
		r.foreign(f)
		return r
	}
	if f.apiErr != nil {
		r.add("api", f.apiErr.Error(), "is `meshd server` running on the server, and can this machine reach it? `journalctl -u meshd-server` there")
	}
	r.nodes(f)
	r.pods(f, now)
	r.services(f)
	r.Healthy = len(r.Problems) == 0
	return r
}

// foreign is the report on a node of somebody else's Kubernetes: what the API
// says is shown as far as it may be asked, and judged by others.
func (r *report) foreign(f facts) {
	mine := r.Problems
	r.nodes(f)
	r.services(f)
	r.Problems = mine
	r.Healthy = len(r.Problems) == 0
}

func (r *report) add(what, reason, next string) {
	r.Problems = append(r.Problems, problem{what, cmp.Or(reason, "no reason known"), next})
}

func (r *report) daemon(f facts) {
	if f.daemon == nil {
		r.add("meshd on this machine", f.daemonErr.Error(), "start it: `systemctl start meshd-server` or `meshd-join`, or `meshd server` / `meshd join` by hand; its log: `journalctl -u 'meshd*'`; on a node of an existing Kubernetes: `kubectl -n meshd get pods -o wide`; pods and tunnels go on without it")
		return
	}
	d := *f.daemon
	d.Tunnels = nil // they stand beside it
	r.Daemon = &d
	r.Tunnels = append(r.Tunnels, f.daemon.Tunnels...)
	dns, seen := "up", false
	for _, c := range f.daemon.Checks {
		seen = seen || strings.HasPrefix(c.Name, "dns/")
		if c.Healthy {
			continue
		}
		r.add(c.Name, c.Reason, c.Next)
		if strings.HasPrefix(c.Name, "dns/") {
			dns = c.Reason
		}
	}
	if seen {
		r.DNS = dns
	}
}

func (r *report) nodes(f facts) {
	onNode := map[string]int{}
	for _, p := range f.pods {
		onNode[p.Spec.NodeName]++
	}
	for _, n := range f.nodes {
		line := nodeLine{Name: n.Name, Ready: "Unknown", PodCIDR: n.Spec.PodCIDRs, Agent: n.Status.NodeInfo.KubeletVersion, Pods: onNode[n.Name]}
		reason := "it never reported"
		for _, c := range n.Status.Conditions {
			if c.Type == corev1.NodeReady {
				line.Ready, reason = string(c.Status), c.Message
			}
		}
		for _, a := range n.Status.Addresses {
			if a.Type == corev1.NodeInternalIP && line.Address == "" {
				line.Address = a.Address
			}
		}
		if line.Ready != "True" {
			r.add("node "+n.Name, reason, "look at that machine: is it on, does it reach the server, does `meshctl status` there say more?")
		}
		r.Nodes = append(r.Nodes, line)
	}
	slices.SortFunc(r.Nodes, func(a, b nodeLine) int { return cmp.Compare(a.Name, b.Name) })
}

func (r *report) pods(f facts, now time.Time) {
	r.Pods = podCount{Total: len(f.pods), OwnNodeOnly: f.ownPodsOnly}
	for _, p := range f.pods {
		reason, state := podState(p, f.warnings[p.UID], now)
		switch state {
		case podReady:
			r.Pods.Ready++
		case podDone:
			r.Pods.Done++
		case podStarting:
			r.Pods.Starting++
		default:
			r.Pods.Failing++
			name := p.Namespace + "/" + p.Name
			r.add("pod "+name, reason, fmt.Sprintf("meshctl kubectl -n %s describe pod %s; meshctl kubectl -n %s logs %s --previous", p.Namespace, p.Name, p.Namespace, p.Name))
		}
	}
}

// States of a pod, as far as a person cares.
type podVerdict int

const (
	podReady podVerdict = iota
	podDone
	podStarting
	podFailing
)

// freshWarning is how old an event may be and still explain a pod.
const freshWarning = 10 * time.Minute

// podState prefers what the newest event says to a condition that only says
// which containers are not ready.
func podState(p corev1.Pod, warned warning, now time.Time) (string, podVerdict) {
	switch p.Status.Phase {
	case corev1.PodSucceeded:
		return "", podDone
	case corev1.PodFailed:
		return cmp.Or(p.Status.Message, p.Status.Reason, "failed"), podFailing
	}
	if p.DeletionTimestamp != nil {
		if p.DeletionTimestamp.Add(startingTime).After(now) {
			return "", podStarting
		}
		return "it should be gone and its node " + p.Spec.NodeName + " does not say so", podFailing
	}
	ready, reason := false, ""
	for _, c := range p.Status.Conditions {
		switch {
		case c.Type == corev1.PodReady && c.Status == corev1.ConditionTrue:
			ready = true
		case c.Status != corev1.ConditionTrue && c.Message != "" && reason == "":
			reason = c.Message
		}
	}
	for _, cs := range slices.Concat(p.Status.InitContainerStatuses, p.Status.ContainerStatuses) {
		if w := cs.State.Waiting; w != nil && w.Reason != "ContainerCreating" && w.Reason != "PodInitializing" {
			return fmt.Sprintf("container %s: %s %s", cs.Name, w.Reason, w.Message), podFailing
		}
	}
	if ready {
		return "", podReady
	}
	if now.Sub(p.CreationTimestamp.Time) < startingTime {
		return "", podStarting
	}
	if now.Sub(warned.last) > freshWarning {
		warned.text = ""
	}
	return cmp.Or(warned.text, reason, "not ready"), podFailing
}

func (r *report) services(f facts) {
	ready := map[string]bool{}
	for _, s := range f.slices {
		for _, e := range s.Endpoints {
			if e.Conditions.Ready == nil || *e.Conditions.Ready {
				ready[s.Namespace+"/"+s.Labels[discoveryv1.LabelServiceName]] = true
			}
		}
	}
	r.Services.Total = len(f.services)
	for _, s := range f.services {
		name := s.Namespace + "/" + s.Name
		switch {
		case ready[name] || s.Spec.Type == corev1.ServiceTypeExternalName:
			r.Services.WithEndpoints++
		case len(s.Spec.Selector) > 0:
			r.Services.Empty++
			r.add("service "+name, "no ready endpoint: no pod that matches its selector is ready", fmt.Sprintf("meshctl kubectl -n %s get pods -l %s", s.Namespace, selector(s.Spec.Selector)))
		}
	}
}

func selector(m map[string]string) string {
	var terms []string
	for k, v := range m {
		terms = append(terms, k+"="+v)
	}
	slices.Sort(terms)
	return strings.Join(terms, ",")
}

func printReport(out io.Writer, r report) error {
	tw := tabwriter.NewWriter(out, 0, 0, 3, ' ', 0)
	if d := r.Daemon; d != nil {
		fmt.Fprintf(tw, "meshd %s on %s (%s), up %s\n", d.Version, d.Node, d.Role, d.Time.Sub(d.Started).Round(time.Second))
	}
	r.printNodes(tw)
	fmt.Fprintln(tw, "\nTUNNEL TO\tUP\tENDPOINT\tHANDSHAKE\tRX\tTX\tMTU\tBACK END")
	for _, t := range r.Tunnels {
		fmt.Fprintf(tw, "%s\t%s\t%s\t%s\t%s\t%s\t%d\t%s\n", t.Peer, yesNo(t.Up), t.Endpoint, ago(t.Handshake, r.Daemon.Time), bytes(t.RxBytes), bytes(t.TxBytes), t.MTU, t.Backend)
	}
	for _, t := range r.Tunnels {
		if t.Note != "" {
			fmt.Fprintf(tw, "  %s: %s\n", t.Peer, t.Note)
		}
	}
	r.printCounts(tw)
	fmt.Fprintf(tw, "dns\t%s\n", r.DNS)
	r.printNotes(tw)
	if err := tw.Flush(); err != nil {
		return err
	}
	if r.Daemon != nil {
		printRepairs(out, r.Daemon.Repairs, r.Daemon.Time)
	}
	return printProblems(out, r.Problems)
}

func (r report) printNodes(tw io.Writer) {
	switch {
	case r.guest && len(r.Nodes) == 0:
		return // not asked: there are no credentials here
	case r.guest:
		fmt.Fprintln(tw, "\nNODE\tREADY\tADDRESS\tPOD CIDRS")
	default:
		fmt.Fprintln(tw, "\nNODE\tREADY\tADDRESS\tPOD CIDRS\tPODS")
	}
	for _, n := range r.Nodes {
		fmt.Fprintf(tw, "%s\t%s\t%s\t%s", n.Name, n.Ready, n.Address, strings.Join(n.PodCIDR, ","))
		if !r.guest {
			fmt.Fprintf(tw, "\t%s", r.podsOn(n))
		}
		fmt.Fprintln(tw)
	}
}

func (r report) printCounts(tw io.Writer) {
	fmt.Fprintln(tw)
	if !r.guest {
		own := ""
		if r.Pods.OwnNodeOnly {
			own = " (of this node; these credentials see no other)"
		}
		fmt.Fprintf(tw, "pods\t%d ready, %d done, %d starting, %d failing%s\n", r.Pods.Ready, r.Pods.Done, r.Pods.Starting, r.Pods.Failing, own)
	}
	if !r.guest || r.Services.Total > 0 {
		fmt.Fprintf(tw, "services\t%d, %d with endpoints, %d without\n", r.Services.Total, r.Services.WithEndpoints, r.Services.Empty)
	}
}

// printNotes says what is worth knowing of what is well.
func (r report) printNotes(tw io.Writer) {
	if r.Daemon == nil {
		return
	}
	for _, c := range r.Daemon.Checks {
		if _, thing, ok := strings.Cut(c.Name, "/"); ok && c.Healthy && c.Note != "" {
			fmt.Fprintf(tw, "%s\t%s\n", thing, c.Note)
		}
	}
}

// printRepairs names what was found broken of late and is well again.
func printRepairs(out io.Writer, repairs []status.Repair, now time.Time) {
	if len(repairs) == 0 {
		return
	}
	fmt.Fprintf(out, "\nREPAIRED in the last %s\n", status.RepairsKept)
	for _, r := range repairs {
		times := ""
		if r.Times > 1 {
			times = fmt.Sprintf(", %d times", r.Times)
		}
		fmt.Fprintf(out, "- %s %s%s: %s\n", r.Part, ago(r.Time, now), times, r.What)
	}
}

func printProblems(out io.Writer, problems []problem) error {
	if len(problems) == 0 {
		_, err := fmt.Fprintln(out, "\nhealthy")
		return err
	}
	plural := "S"
	if len(problems) == 1 {
		plural = ""
	}
	fmt.Fprintf(out, "\n%d PROBLEM%s\n", len(problems), plural)
	for _, p := range problems {
		if _, err := fmt.Fprintf(out, "- %s\n    why:  %s\n    next: %s\n", p.What, p.Reason, p.Next); err != nil {
			return err
		}
	}
	return nil
}

// podsOn is the number of pods of a node, or a dash where these credentials
// cannot tell.
func (r report) podsOn(n nodeLine) string {
	if r.Pods.OwnNodeOnly && n.Name != r.node {
		return "-"
	}
	return strconv.Itoa(n.Pods)
}

func yesNo(b bool) string {
	if b {
		return "yes"
	}
	return "no"
}

func ago(t, now time.Time) string {
	if t.IsZero() {
		return "never"
	}
	return now.Sub(t).Round(time.Second).String() + " ago"
}

// bytes as wg(8) prints them.
func bytes(n int64) string {
	units := []string{"B", "KiB", "MiB", "GiB", "TiB"}
	v, i := float64(n), 0
	for v >= 1024 && i < len(units)-1 {
		v, i = v/1024, i+1
	}
	if i == 0 {
		return fmt.Sprintf("%d B", n)
	}
	return fmt.Sprintf("%.2f %s", v, units[i])
}
