package kube

import (
	"net/netip"
	"strings"
	"testing"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes/fake"

	"meshd.dev/pkg/mesh"
)

// TestPublishAChangeOfTheKey: what is published comes, changes and goes, and
// peers read what was said.
func TestPublishAChangeOfTheKey(t *testing.T) {
	client := fake.NewClientset(testNode("m1", nil))
	old, next := mesh.Key{1}, mesh.Key{2}
	exchange := mesh.Exchange{Port: 51820, Pin: mesh.Pin{7, 31: 9}}
	endpoints := []netip.AddrPort{netip.MustParseAddrPort("192.0.2.1:51820")}
	for _, r := range []Record{
		{PublicKey: old, Endpoints: endpoints},
		{PublicKey: old, NextKey: next, NextPort: 51821, Exchange: exchange, Endpoints: endpoints},
		{PublicKey: next, NextKey: next, NextPort: 51821, Exchange: exchange, Endpoints: endpoints},
		{PublicKey: next, Exchange: exchange, Endpoints: endpoints},
	} {
		if err := Publish(t.Context(), client, "m1", r); err != nil {
			t.Fatal(err)
		}
		obj, err := client.CoreV1().Nodes().Get(t.Context(), "m1", metav1.GetOptions{})
		if err != nil {
			t.Fatal(err)
		}
		n, err := NodeOf(obj)
		if err != nil || !r.Stands(n) {
			t.Errorf("published %+v, peers read %+v, %v", r, n, err)
		}
		if _, there := obj.Annotations[mesh.AnnotationNextKey]; there != !r.NextKey.IsZero() {
			t.Errorf("the next key is there: %v, published %+v", there, r)
		}
	}
}

func TestBadKeysAreNamed(t *testing.T) {
	good := mesh.Key{1}.String()
	pin := strings.Repeat("0a", 32)
	for _, c := range []struct{ annotation, text, want string }{
		{mesh.AnnotationNextKey, good, "want a public key, a space and a port"},
		{mesh.AnnotationNextKey, good + " 0", "want a public key, a space and a port"},
		{mesh.AnnotationNextKey, good + " 70000", "want a public key, a space and a port"},
		{mesh.AnnotationNextKey, "x 51821", "want 32 bytes in base64"},
		{mesh.AnnotationNextKey, strings.Repeat("A", 43) + "= 51821", "the key is zero"},
		{mesh.AnnotationKeyExchange, pin, "want a port, a space and a pin"},
		{mesh.AnnotationKeyExchange, "51820 0a", "want 64 hex digits"},
		{mesh.AnnotationKeyExchange, "51820 " + strings.Repeat("x", 64), "want hex digits"},
		{mesh.AnnotationRotateKey, "now", "want 32 bytes in base64"},
	} {
		n, err := NodeOf(testNode("m1", map[string]string{c.annotation: c.text, mesh.AnnotationPublicKey: good}))
		if err == nil || !strings.Contains(err.Error(), "node m1: annotation "+c.annotation) || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s %q: %v, want %q", c.annotation, c.text, err, c.want)
		}
		if n.PublicKey != (mesh.Key{1}) || !n.NextKey.IsZero() || n.Exchange != (mesh.Exchange{}) {
			t.Errorf("%s %q: read as %+v", c.annotation, c.text, n)
		}
	}
}
