package main

import (
	"cmp"
	"context"
	"crypto/ecdh"
	"crypto/rand"
	"encoding/base64"
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"meshd.dev/pkg/mesh"
	"meshd.dev/test/cluster"
	"meshd.dev/test/netlab"
	"meshd.dev/test/story"
)

// thousand is how many nodes there are: m1 with the server, m2, which is
// measured, and nobodies.
const thousand = 1000

// manyNodes is a server with room for a thousand nodes, and one that joined.
func manyNodes(ctx context.Context, w *story.World) error {
	if err := w.Boot(ctx, "m1", "m2"); err != nil {
		return err
	}
	if err := w.StartServer(ctx, "--pod-cidr", "10.128.0.0/9,fd00:10:244::/48"); err != nil {
		return err
	}
	token, err := w.Token(ctx)
	if err != nil {
		return err
	}
	if err := w.Join(ctx, "m2", token, "--log-level", "debug"); err != nil {
		return err
	}
	_, err = w.NodesReady(ctx, []string{"m1", "m2"})
	return err
}

// nodes puts 998 nodes that are nobody beside m1 and m2 into the API and
// measures what that costs m2's meshd: memory, the time until all are peers,
// time and operations of one change, and the requests and CPU of an idle minute.
func nodes(ctx context.Context, w *story.World, o options) (rows []row, err error) {
	if err := wait(ctx, 15*time.Second); err != nil { // the start is not the question
		return nil, err
	}
	before, err := footprints(w)
	if err != nil {
		return nil, err
	}
	made, converged, err := makeNobodies(ctx, w)
	if err != nil {
		return nil, err
	}
	again, err := bootAmongMany(ctx, w)
	if err != nil {
		return nil, err
	}
	if err := wait(ctx, 30*time.Second); err != nil {
		return nil, err
	}
	changes, err := oneByOne(ctx, w, o)
	if err != nil {
		return nil, err
	}
	if err := wait(ctx, 20*time.Second); err != nil {
		return nil, err
	}
	idle, err := idleNode(ctx, w)
	if err != nil {
		return nil, err
	}
	after, err := footprints(w)
	if err != nil {
		return nil, err
	}
	for _, name := range []string{"join", "wireguard", "server"} {
		a, b := after[name], before[name]
		rows = append(rows, row{"1,000 nodes: memory of meshd " + name, mib(a.RSS), mib(b.RSS) + " with two nodes", fmt.Sprintf("%s and %s of it anonymous", mib(a.Anon), mib(b.Anon))})
	}
	rows = append(rows,
		row{"998 nodes made until all are peers of m2", sec(converged), sec(made) + " for the making", "eight at a time; the server gives each its pod CIDRs"},
		row{"start of meshd until 999 nodes are peers and routes", sec(again), "", "no device and no state on disk; with the start of the device process"})
	return append(append(rows, changes...), idle...), nil
}

func wait(ctx context.Context, d time.Duration) error {
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(d):
		return nil
	}
}

// nobody is a node without a machine.
func nobody(i int) *corev1.Node {
	key, _ := ecdh.X25519().GenerateKey(rand.Reader) // never fails
	return &corev1.Node{
		ObjectMeta: metav1.ObjectMeta{Name: fmt.Sprintf("nobody%d", i), Annotations: map[string]string{
			mesh.AnnotationPublicKey: base64.StdEncoding.EncodeToString(key.PublicKey().Bytes()),
			mesh.AnnotationEndpoints: fmt.Sprintf("198.18.%d.%d:51820", 1+i/250, 1+i%250),
		}},
		Spec: corev1.NodeSpec{Unschedulable: true},
	}
}

func makeNobodies(ctx context.Context, w *story.World) (made, converged time.Duration, err error) {
	begin := time.Now()
	group, in := errgroup.WithContext(ctx)
	group.SetLimit(8)
	for i := range thousand - 2 {
		group.Go(func() error {
			_, err := w.API.CoreV1().Nodes().Create(in, nobody(i), metav1.CreateOptions{})
			return err
		})
	}
	if err := group.Wait(); err != nil {
		return 0, 0, err
	}
	made = time.Since(begin)
	return made, time.Since(begin), allThere(ctx, w, begin, &converged)
}

// allThere waits until every other node is a peer of m2 with its routes, and
// says when.
func allThere(ctx context.Context, w *story.World, begin time.Time, took *time.Duration) error {
	return cluster.Until(ctx, func(ctx context.Context) error {
		out, err := w.Machine("m2").Run(ctx, "sh", "-c", "wg show mesh0 peers | wc -l; ip route show proto 77 dev mesh0 | wc -l")
		*took = time.Since(begin)
		var peers, routes int
		if _, scan := fmt.Sscan(out, &peers, &routes); err == nil && scan != nil {
			return scan
		}
		if err == nil && (peers < thousand-1 || routes < thousand-1) {
			err = fmt.Errorf("%d peers, %d routes", peers, routes)
		}
		return err
	})
}

// bootAmongMany has meshd on m2 start as after a boot for the first time.
func bootAmongMany(ctx context.Context, w *story.World) (took time.Duration, err error) {
	m := w.Machine("m2")
	if err := stopMeshd(ctx, m); err != nil {
		return 0, err
	}
	if _, err := m.Run(ctx, "sh", "-c", "ip link delete mesh0; rm -f /var/lib/meshd/node/state.json; ip route flush proto 77; ip -6 route flush proto 77"); err != nil {
		return 0, err
	}
	begin := time.Now()
	if err := w.Join(ctx, "m2", "", "--log-level", "debug"); err != nil {
		return 0, err
	}
	return took, allThere(ctx, w, begin, &took)
}

func stopMeshd(ctx context.Context, m *netlab.Machine) error {
	p, err := meshdOf(m, "join")
	if err != nil {
		return err
	}
	return netlab.Kill(ctx, p.Pid)
}

func meshdOf(m *netlab.Machine, role string) (netlab.Process, error) {
	for _, p := range m.Processes() {
		if p.Name() == "meshd-"+role || p.Name() == "meshd" && len(p.Argv) > 1 && p.Argv[1] == role {
			return p, nil
		}
	}
	return netlab.Process{}, fmt.Errorf("no meshd %s on %s", role, m.Name)
}

// footprints of the processes, by role.
func footprints(w *story.World) (map[string]netlab.Process, error) {
	all := map[string]netlab.Process{}
	for role, name := range map[string]string{"server": "m1", "join": "m2", "wireguard": "m2"} {
		p, err := meshdOf(w.Machine(name), role)
		if err != nil {
			return nil, err
		}
		all[role] = p
	}
	return all, nil
}

// changed is one change of one node, as m2's meshd tells of it.
type changed struct {
	event  time.Duration // from the call of the API to the event in pkg/kube
	kernel time.Duration // from there to the kernel's last answer
	ops    int
}

// oneByOne changes single nodes, in rounds of an endpoint, one that leaves and
// one that joins.
func oneByOne(ctx context.Context, w *story.World, _ options) ([]row, error) {
	log, err := follow(w.Machine("m2").Disk("/var/log/meshd.log"))
	if err != nil {
		return nil, err
	}
	defer log.file.Close()
	all, nodes := map[string][]changed{}, w.API.CoreV1().Nodes()
	kinds := []string{"an endpoint changes", "a node leaves", "a node joins"}
	for i := range 30 {
		name := fmt.Sprintf("nobody%d", 10+i)
		old, err := nodes.Get(ctx, name, metav1.GetOptions{})
		if err != nil {
			return nil, err
		}
		for k, do := range []func() error{
			func() error {
				patch := fmt.Sprintf(`{"metadata":{"annotations":{%q:"198.18.250.%d:51820"}}}`, mesh.AnnotationEndpoints, i+1)
				_, err := nodes.Patch(ctx, name, types.MergePatchType, []byte(patch), metav1.PatchOptions{})
				return err
			},
			func() error { return nodes.Delete(ctx, name, metav1.DeleteOptions{}) },
			func() error { // as a node comes that has its pod CIDRs already
				again := nobody(10 + i)
				again.Spec.PodCIDR, again.Spec.PodCIDRs = old.Spec.PodCIDR, old.Spec.PodCIDRs
				_, err := nodes.Create(ctx, again, metav1.CreateOptions{})
				return err
			},
		} {
			if err := wait(ctx, 100*time.Millisecond); err != nil { // nothing of the last one is under way
				return nil, err
			}
			begin := time.Now()
			if err := do(); err != nil {
				return nil, err
			}
			c, ok, err := log.next(ctx, begin)
			if err != nil {
				return nil, fmt.Errorf("%s (%s): %w", kinds[k], name, err)
			}
			if ok {
				all[kinds[k]] = append(all[kinds[k]], c)
			}
		}
	}
	byHand, err := byHand(ctx, w)
	if err != nil {
		return nil, err
	}
	var rows []row
	for _, kind := range kinds {
		if len(all[kind]) == 0 {
			return nil, fmt.Errorf("%s: never alone", kind)
		}
		part := func(f func(changed) time.Duration) (list []time.Duration) {
			for _, c := range all[kind] {
				list = append(list, f(c))
			}
			return list
		}
		kernel, event := part(func(c changed) time.Duration { return c.kernel }), part(func(c changed) time.Duration { return c.event })
		hand := byHand[min(1, slices.Index(kinds, kind))]
		rows = append(rows, row{"1,000 nodes, " + kind + ": event to kernel", fmt.Sprintf("%.2f ms median", quantile(kernel, .5).Seconds()*1e3),
			fmt.Sprintf("%.1f ms by wg(8) and ip(8)", hand.Seconds()*1e3),
			fmt.Sprintf("goal < 1; p90 %.2f, longest %.2f of %d; %d operations; ratio %.2f; from the API call to the event another %.1f",
				quantile(kernel, .9).Seconds()*1e3, quantile(kernel, 1).Seconds()*1e3, len(kernel), all[kind][0].ops, float64(quantile(kernel, .5))/float64(hand), quantile(event, .5).Seconds()*1e3)})
	}
	whole := log.whole
	return append(rows, row{"1,000 nodes, a whole round", fmt.Sprintf("%.1f ms median", quantile(whole, .5).Seconds()*1e3), "", fmt.Sprintf("everything read and compared: every 10 s and when somebody else changes something; %d seen", len(whole))}), nil
}

// logFile is m2's log as it grows: lines of the rounds of its datapath.
type logFile struct {
	file  *os.File
	rest  string
	whole []time.Duration
	lines []string // the last ones about rounds
}

func follow(path string) (*logFile, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	_, err = f.Seek(0, 2)
	return &logFile{file: f}, err
}

// next round that did something after begin; ok is false when it also dealt
// with what was heard before.
func (l *logFile) next(ctx context.Context, begin time.Time) (c changed, ok bool, err error) {
	ctx, cancel := context.WithTimeoutCause(ctx, 20*time.Second, errors.New("no round tells of it"))
	defer cancel()
	buf := make([]byte, 64<<10)
	for {
		n, _ := l.file.Read(buf)
		l.rest += string(buf[:n])
		for {
			line, rest, whole := strings.Cut(l.rest, "\n")
			if !whole {
				break
			}
			l.rest = rest
			words := fields(line)
			if words["msg"] != "round" {
				continue
			}
			l.lines = append(l.lines[max(0, len(l.lines)-7):], line)
			took, err1 := time.ParseDuration(words["took"])
			if words["how"] == "whole" && err1 == nil {
				l.whole = append(l.whole, took)
			}
			written, err0 := time.Parse(time.RFC3339Nano, words["time"])
			heard, err2 := time.Parse(time.RFC3339Nano, words["heard"])
			since, err3 := time.ParseDuration(words["since"])
			ops, err4 := strconv.Atoi(words["did"])
			before := begin.Truncate(time.Millisecond) // as the log has it
			if err := cmp.Or(err0, err1, err4); err != nil || ops == 0 || written.Before(before) || words["heard"] == "" {
				continue // of no State, or of one that changed nothing here
			}
			return changed{event: max(0, heard.Sub(begin)), kernel: since, ops: ops}, cmp.Or(err2, err3) == nil && !heard.Before(before), nil
		}
		if n == 0 {
			select {
			case <-ctx.Done():
				return c, false, fmt.Errorf("%w; the last rounds:\n%s", context.Cause(ctx), strings.Join(l.lines, "\n"))
			case <-time.After(5 * time.Millisecond):
			}
		}
	}
}

// fields of a line of log, of those without spaces.
func fields(line string) map[string]string {
	m := map[string]string{}
	for _, word := range strings.Fields(line) {
		if k, v, ok := strings.Cut(word, "="); ok {
			m[k] = v
		}
	}
	return m
}

// byHand is how long the commands take a person would type for a changed
// endpoint, and for a node that joins or leaves: what is there is set anew.
func byHand(ctx context.Context, w *story.World) ([2]time.Duration, error) {
	var took [2]time.Duration
	out, err := w.Machine("m2").Run(ctx, "sh", "-ec", `
		peer=$(wg show mesh0 endpoints | grep -v none | head -n1 | cut -f1); at=$(wg show mesh0 endpoints | grep "$peer" | cut -f2)
		routes4=$(ip route show proto 77 dev mesh0 | head -n2 | tail -n1); routes6=$(ip -6 route show proto 77 dev mesh0 | head -n2 | tail -n1)
		floor4=$(ip route show proto 77 type blackhole | tail -n1); floor6=$(ip -6 route show proto 77 type blackhole | tail -n1 | sed 's/ dev lo//; s/ pref medium//')
		a=$(date +%s%N)
		for i in 1 2 3 4 5 6 7 8 9 10; do wg set mesh0 peer "$peer" endpoint "$at"; done
		b=$(date +%s%N)
		for i in 1 2 3 4 5 6 7 8 9 10; do
			wg set mesh0 peer "$peer" endpoint "$at"
			ip route replace ${routes4% } dev mesh0 proto 77; ip route replace $floor4 proto 77
			ip -6 route replace ${routes6%pref medium*} dev mesh0 proto 77; ip -6 route replace $floor6 proto 77
		done
		c=$(date +%s%N)
		echo $(( (b - a) / 10 )) $(( (c - b) / 10 ))`)
	if err != nil {
		return took, err
	}
	_, err = fmt.Sscan(out, &took[0], &took[1])
	return took, err
}

// idleNode counts what m2's meshd does in a minute in which nothing happens:
// CPU, and requests, which are those the API has less of while it is stopped.
func idleNode(ctx context.Context, w *story.World) ([]row, error) {
	m := w.Machine("m2")
	cpu := func() (node, device time.Duration, err error) {
		a, err1 := meshdOf(m, "join")
		b, err2 := meshdOf(m, "wireguard")
		return cpuTime(a.Pid), cpuTime(b.Pid), cmp.Or(err1, err2)
	}
	node, device, err := cpu()
	if err != nil {
		return nil, err
	}
	with, err := idleRequests(ctx, w)
	if err != nil {
		return nil, err
	}
	node2, device2, err := cpu()
	if err != nil {
		return nil, err
	}
	if err := stopMeshd(ctx, m); err != nil {
		return nil, err
	}
	if err := wait(ctx, 15*time.Second); err != nil { // the server notices, and has had its say
		return nil, err
	}
	without, err := idleRequests(ctx, w)
	if err != nil {
		return nil, err
	}
	if err := w.Join(ctx, "m2", "", "--log-level", "debug"); err != nil {
		return nil, err
	}
	if err := wait(ctx, 30*time.Second); err != nil {
		return nil, err
	}
	total, names := 0, []string{}
	for _, what := range slices.Sorted(maps.Keys(with)) {
		if n := with[what] - without[what]; n != 0 {
			total += n
			names = append(names, fmt.Sprintf("%d %s", n*60, what))
		}
	}
	return []row{
		{"1,000 nodes: API requests of an idle node an hour", strconv.Itoa(total * 60), "3600 of them renew the lease", "of an idle minute: " + strings.Join(names, ", ") + "; and 8 watches, each anew every 5 to 10 minutes"},
		{"1,000 nodes: CPU of an idle node", fmt.Sprintf("%.1f %%", (node2-node).Seconds()/.6), fmt.Sprintf("%.1f %% the device process", (device2-device).Seconds()/.6), "of one CPU, over a minute; debug log on"},
	}, nil
}

// cpuTime is the CPU time a process has used, in ticks of 10 ms.
func cpuTime(pid int) time.Duration {
	b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	f := strings.Fields(string(b[strings.LastIndexByte(string(b), ')')+1:]))
	if len(f) < 13 {
		return 0
	}
	user, _ := strconv.Atoi(f[11])
	system, _ := strconv.Atoi(f[12])
	return time.Duration(user+system) * 10 * time.Millisecond
}

// idleRequests counts those the API answers in a minute in which nothing
// happens, by verb and kind.
func idleRequests(ctx context.Context, w *story.World) (map[string]int, error) {
	first, err := requestsSoFar(ctx, w)
	if err != nil {
		return nil, err
	}
	if err := wait(ctx, time.Minute); err != nil {
		return nil, err
	}
	second, err := requestsSoFar(ctx, w)
	for what, n := range first {
		second[what] -= n
	}
	return second, err
}

func requestsSoFar(ctx context.Context, w *story.World) (map[string]int, error) {
	text, err := w.Kubectl(ctx, "get", "--raw", "/metrics")
	if err != nil {
		return nil, err
	}
	requests := map[string]int{}
	for line := range strings.Lines(text) {
		labels, ok := strings.CutPrefix(line, "apiserver_request_total{")
		if !ok {
			continue
		}
		labels, value, _ := strings.Cut(labels, "} ")
		v, err := strconv.ParseFloat(strings.TrimSpace(value), 64)
		if err != nil {
			return nil, fmt.Errorf("metrics: %q: %w", line, err)
		}
		of := map[string]string{}
		for _, l := range strings.Split(labels, ",") {
			if k, v, ok := strings.Cut(l, "="); ok {
				of[k] = strings.Trim(v, `"`)
			}
		}
		requests[of["verb"]+" "+cmp.Or(of["resource"], "other")] += int(v)
	}
	return requests, nil
}
