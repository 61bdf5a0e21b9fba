package main

import (
	"context"
	"crypto/ecdh"
	"crypto/rand"
	"encoding/base64"
	"fmt"
	"strconv"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"meshd.dev/pkg/mesh"
	"meshd.dev/test/cluster"
	"meshd.dev/test/story"
)

// manyNodes is one server, alone, with room for a thousand nodes.
func manyNodes(ctx context.Context, w *story.World) error {
	if err := w.Boot(ctx, "m1"); err != nil {
		return err
	}
	if err := w.StartServer(ctx, "--pod-cidr", "10.128.0.0/9,fd00:10:244::/48"); err != nil {
		return err
	}
	_, err := w.NodesReady(ctx, []string{"m1"})
	return err
}

// nodes puts 999 nodes that are nobody beside m1 into the API and measures what
// that costs its meshd: memory, the time until all are peers, the time of one
// change, and the requests of an idle minute.
func nodes(ctx context.Context, w *story.World, _ options) (rows []row, err error) {
	before, err := meshdMemory(w)
	if err != nil {
		return nil, err
	}
	calmAlone, err := idleRequests(ctx, w)
	if err != nil {
		return nil, err
	}
	begin := time.Now()
	for i := 1; i < 1000; i++ {
		if _, err := w.API.CoreV1().Nodes().Create(ctx, nobody(i), metav1.CreateOptions{}); err != nil {
			return nil, err
		}
	}
	created := time.Since(begin)
	if err := peersAre(ctx, w, func(out string) bool { return strings.Count(out, "\n") == 999 }); err != nil {
		return nil, err
	}
	converged := time.Since(begin)
	var times []time.Duration
	for i := range 20 {
		to := fmt.Sprintf("198.18.250.%d:51820", i+1)
		patch := fmt.Sprintf(`{"metadata":{"annotations":{%q:%q}}}`, mesh.AnnotationEndpoints, to)
		begin := time.Now()
		if _, err := w.API.CoreV1().Nodes().Patch(ctx, fmt.Sprintf("nobody%d", 10+i), types.MergePatchType, []byte(patch), metav1.PatchOptions{}); err != nil {
			return nil, err
		}
		if err := peersAre(ctx, w, func(out string) bool { return strings.Contains(out, to) }); err != nil {
			return nil, err
		}
		times = append(times, time.Since(begin))
	}
	select {
	case <-ctx.Done():
		return nil, ctx.Err()
	case <-time.After(30 * time.Second):
	}
	calm, err := idleRequests(ctx, w)
	if err != nil {
		return nil, err
	}
	after, err := meshdMemory(w)
	if err != nil {
		return nil, err
	}
	return []row{
		{"1,000 nodes: memory of meshd server", mib(after), mib(before) + " with one", "resident; its API, etcd and controllers hold the nodes too"},
		{"999 nodes made one by one until all are peers", ms(converged), ms(created) + " for the making", ""},
		{"one endpoint changes until the device has it", ms(quantile(times, .5)) + " median", ms(quantile(times, 1)) + " the longest of 20", "with the API call, and polling by wg(8)"},
		{"API requests in an idle minute", strconv.Itoa(calm), strconv.Itoa(calmAlone) + " with one node", "one agent and the server's own controllers; a lease renewed each second is 60"},
	}, nil
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

// peersAre waits until what `wg show mesh0 endpoints` prints is as wanted.
func peersAre(ctx context.Context, w *story.World, ok func(string) bool) error {
	return cluster.Until(ctx, func(ctx context.Context) error {
		out, err := w.Machine("m1").Run(ctx, "wg", "show", "mesh0", "endpoints")
		if err == nil && !ok(out) {
			err = fmt.Errorf("%d peers", strings.Count(out, "\n"))
		}
		return err
	})
}

func meshdMemory(w *story.World) (int64, error) {
	for _, p := range w.Machine("m1").Processes() {
		if p.Name() == "meshd" && len(p.Argv) > 1 && p.Argv[1] == "server" {
			return p.RSS, nil
		}
	}
	return 0, fmt.Errorf("no meshd server on m1")
}

// idleRequests counts those the API answers in a minute in which nothing
// happens, without the two that ask for the count.
func idleRequests(ctx context.Context, w *story.World) (int, error) {
	first, err := requestsSoFar(ctx, w)
	if err != nil {
		return 0, err
	}
	select {
	case <-ctx.Done():
		return 0, ctx.Err()
	case <-time.After(time.Minute):
	}
	second, err := requestsSoFar(ctx, w)
	return second - first - 1, err
}

func requestsSoFar(ctx context.Context, w *story.World) (n int, err error) {
	text, err := w.Kubectl(ctx, "get", "--raw", "/metrics")
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(text) {
		if !strings.HasPrefix(line, "apiserver_request_total{") {
			continue
		}
		v, err := strconv.ParseFloat(strings.TrimSpace(line[strings.LastIndexByte(line, ' '):]), 64)
		if err != nil {
			return 0, fmt.Errorf("metrics: %q: %w", line, err)
		}
		n += int(v)
	}
	return n, nil
}
