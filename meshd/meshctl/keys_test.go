package main

import (
	"context"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes/fake"

	"meshd.dev/pkg/mesh"
	"meshd.dev/pkg/status"
)

func TestPrintKeys(t *testing.T) {
	now := time.Date(2026, 1, 31, 12, 0, 0, 0, time.UTC)
	var b strings.Builder
	err := printKeys(&b, status.Keys{
		Node: "m1", Key: "K1", Generation: 3, Made: now.Add(-25 * time.Hour), Stage: "leaving", Next: "K2",
		Waiting: map[string]string{"m2": "there is no session with it on the other device yet"},
		Peers: []status.KeyPeer{
			{Node: "m2", Key: "K3", Changing: "steady", PSKMade: now.Add(-90 * time.Second)},
			{Node: "m3", Key: "K4", Changing: "returning", Second: true, PSKWhy: "not agreed yet: connection refused"},
		},
	}, now)
	if err != nil {
		t.Fatal(err)
	}
	want := `key of m1: K1, number 3, made 25h0m ago
it changes: leaving (to K2)
waiting for m2: there is no session with it on the other device yet

PEER   KEY   PRESHARED KEY                              CHANGING
m2     K3    made 1m ago                                -
m3     K4    none: not agreed yet: connection refused   returning, over the second device
`
	if d := cmp.Diff(want, b.String()); d != "" {
		t.Errorf("-want +got:\n%s", d)
	}
}

// TestRotateNodes: each node is told which key to leave, and waited for until
// it has another and has finished.
func TestRotateNodes(t *testing.T) {
	key := func(b byte) string { return mesh.Key{b}.String() }
	node := func(name string, b byte) *corev1.Node {
		return &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name, Annotations: map[string]string{mesh.AnnotationPublicKey: key(b)}}}
	}
	client := fake.NewClientset(node("m1", 1), node("m2", 2), node("m3", 3))
	var b strings.Builder
	err := rotateNodes(t.Context(), &b, client, []string{"m1", "m9"})
	if err == nil || !strings.Contains(err.Error(), `no node is called "m9"`) {
		t.Errorf("a node there is not: %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	done := make(chan error, 1)
	go func() { done <- rotateNodes(ctx, &b, client, []string{"m1", "m2"}) }()
	for _, name := range []string{"m1", "m2"} { // be the nodes
		for {
			n, err := client.CoreV1().Nodes().Get(ctx, name, metav1.GetOptions{})
			if err != nil {
				t.Fatal(err)
			}
			if n.Annotations[mesh.AnnotationRotateKey] != n.Annotations[mesh.AnnotationPublicKey] {
				time.Sleep(time.Millisecond) // not told yet
				continue
			}
			n.Annotations[mesh.AnnotationPublicKey] = key(9)
			if name == "m2" { // has not finished
				n.Annotations[mesh.AnnotationNextKey] = key(9) + " 51821"
				time.AfterFunc(3*look, cancel)
			}
			if _, err := client.CoreV1().Nodes().Update(ctx, n, metav1.UpdateOptions{}); err != nil {
				t.Fatal(err)
			}
			break
		}
	}
	if err := <-done; err == nil || !strings.Contains(err.Error(), "not yet changed: m2;") {
		t.Errorf("%v, want m2 named", err)
	}
	if !strings.Contains(b.String(), "m1 has a new key") || strings.Contains(b.String(), "m2 has") {
		t.Errorf("it says %q", b.String())
	}
	if n, err := client.CoreV1().Nodes().Get(t.Context(), "m3", metav1.GetOptions{}); err != nil || n.Annotations[mesh.AnnotationRotateKey] != "" {
		t.Errorf("m3 was told to change its key: %v, %v", n, err)
	}
}
