package nodeauth

// Node n2 carries the key of 32 sevens and changes to that of 32 eights; node n1, which asks, the one of 32
// ones.

import (
	"bytes"
	"slices"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apiserver/pkg/admission"

	"meshd.dev/pkg/kube"
	"meshd.dev/pkg/mesh"
)

func TestPublished(t *testing.T) {
	const (
		ok      = ""
		ones    = "AQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQE="
		twos    = "AgICAgICAgICAgICAgICAgICAgICAgICAgICAgICAgI="
		sevens  = "BwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwc="
		eights  = "CAgICAgICAgICAgICAgICAgICAgICAgICAgICAgICAg="
		zeros   = "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA="
		noKey   = "want 32 bytes in base64"
		noPlace = "want address:port of a unicast address"
		key     = keyAnnotation
		next    = nextKeyAnnotation
		talks   = exchangeAnnotation
		places  = endpointsAnnotation
	)
	for _, c := range []struct {
		name, annotation, now, before, want string
	}{
		{"a key of its own", key, twos, ones, ok},
		{"the key it has", key, ones, ones, ok},
		{"another's key", key, sevens, ones, `node "n2" has it; give this machine a key of its own`},
		{"another's key, spelled otherwise", key, "BwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwd=", ones, `node "n2" has it`},
		{"another's key, on two lines", key, "BwcHBwcHBwcHBwcH\nBwcHBwcHBwcHBwcHBwcHBwcHBwc=", ones, `node "n2" has it`},
		{"what it shared before", key, sevens, sevens, ok},
		{"a key no more", key, "-", ones, ok},
		{"an empty key", key, "", ones, noKey},
		{"a short key", key, "AQEB", ones, noKey},
		{"a long key", key, ones[:42] + ones, ones, noKey},
		{"no base64", key, "(none)", ones, noKey},
		{"zeros", key, zeros, ones, noKey},
		{"a novel", key, strings.Repeat("x", 5000), ones, strings.Repeat("x", 80) + `"`},

		{"a next key of its own", next, twos + " 51821", "-", ok},
		{"its own key as the next", next, ones + " 51821", "-", ok},
		{"another's key as the next", next, sevens + " 51821", "-", `node "n2" has it`},
		{"the next key of another", next, eights + " 51821", "-", `node "n2" has it`},
		{"the next key of another as its own", key, eights, ones, `node "n2" has it`},
		{"a next key no more", next, "-", twos + " 51821", ok},
		{"a next key without a port", next, twos, "-", "want a public key, a space and a port"},
		{"a next key at port zero", next, twos + " 0", "-", "want a public key, a space and a port"},
		{"no next key", next, "x 51821", "-", noKey},

		{"where to talk about keys", talks, "51820 " + strings.Repeat("0a", 32), "-", ok},
		{"no port to talk", talks, strings.Repeat("0a", 32), "-", "want a port, a space and 64 hex digits"},
		{"no pin", talks, "51820 0a", "-", "want a port, a space and 64 hex digits"},
		{"a novel about keys", talks, "51820 " + strings.Repeat("0a", 5000), "-", "want a port, a space and 64 hex digits"},

		{"one endpoint", places, "192.0.2.1:51820", "-", ok},
		{"both families", places, "[2001:db8::1]:51820,192.0.2.1:51820", "-", ok},
		{"a private address", places, "10.0.0.1:51820,[fd00::1]:51820", "-", ok},
		{"sixteen", places, strings.Repeat("192.0.2.1:1,", 15) + "192.0.2.1:1", "-", ok},
		{"seventeen", places, strings.Repeat("192.0.2.1:1,", 16) + "192.0.2.1:1", "-", "more than 16 endpoints"},
		{"endpoints no more", places, "-", "192.0.2.1:51820", ok},
		{"empty endpoints", places, "", "192.0.2.1:51820", noPlace},
		{"an empty one among them", places, "192.0.2.1:1,", "-", noPlace},
		{"a bad one it had before", places, "x", "x", ok},
		{"a name", places, "example.org:51820", "-", noPlace},
		{"no port", places, "192.0.2.1", "-", noPlace},
		{"port zero", places, "192.0.2.1:0", "-", noPlace},
		{"loopback", places, "127.0.0.1:51820", "-", noPlace},
		{"loopback in disguise", places, "[::ffff:127.0.0.1]:51820", "-", noPlace},
		{"nowhere", places, "0.0.0.0:51820", "-", noPlace},
		{"nowhere in disguise", places, "[::ffff:0.0.0.0]:51820", "-", noPlace},
		{"everybody", places, "255.255.255.255:51820", "-", noPlace},
		{"a group", places, "[ff02::1]:51820", "-", noPlace},
		{"link-local", places, "169.254.0.1:51820", "-", noPlace},
		{"with a link of its own", places, "[fe80::1%eth0]:51820", "-", noPlace},
		{"global with a link", places, "[2001:db8::1%eth0]:51820", "-", noPlace},
	} {
		for _, sub := range []string{"", "status"} {
			said := func(text string) *corev1.Node {
				n := node("n1")
				if text != "-" {
					n.Annotations[c.annotation] = text
				}
				return n
			}
			err := publish(t, publishedIndex(), sub, said(c.now), said(c.before))
			switch {
			case c.want == ok && err != nil:
				t.Errorf("%s: %v", c.name, err)
			case c.want != ok && (err == nil || !strings.Contains(err.Error(), c.want) || len(err.Error()) > 400):
				t.Errorf("%s:\n got %v\nwant a part %q", c.name, err, c.want)
			}
		}
	}
}

// TestKeyIsFreeAgain: a key goes with the node that carried it.
func TestKeyIsFreeAgain(t *testing.T) {
	now, before := published(7, "")(node("n1")), published(1, "")(node("n1"))
	for _, c := range []struct {
		name   string
		change func(x *Index)
		want   string
	}{
		{"taken", func(*Index) {}, `node "n2" has it`},
		{"its node was removed", func(x *Index) { x.Nodes().OnDelete(node("n2")) }, ""},
		{"its node took another", func(x *Index) { x.Nodes().OnUpdate(published(7, "")(node("n2")), published(9, "")(node("n2"))) }, ""},
		{"its node took it back", func(x *Index) { x.Nodes().OnUpdate(published(7, "")(node("n2")), node("n2")) }, ""},
		{"nobody knows", func(x *Index) { x.SyncedBy(func() bool { return false }) }, "not known yet, try again"},
	} {
		x := publishedIndex()
		c.change(x)
		err := publish(t, x, "", now, before)
		if c.want == "" && err != nil || c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want)) {
			t.Errorf("%s: %v, want %q", c.name, err, c.want)
		}
	}
}

func publishedIndex() *Index {
	x := testIndex()
	x.Nodes().OnAdd(published(1, "")(node("n1")), true)
	n2 := published(7, "")(node("n2"))
	n2.Annotations[nextKeyAnnotation] = mesh.Key(bytes.Repeat([]byte{8}, 32)).String() + " 51821"
	x.Nodes().OnAdd(n2, true)
	return x
}

func publish(t *testing.T, x *Index, sub string, now, before *corev1.Node) error {
	gvk, gvr := corev1.SchemeGroupVersion.WithKind("Node"), schema.GroupVersionResource{Version: "v1", Resource: "nodes"}
	a := admission.NewAttributesRecord(now, before, gvk, "", now.Name, gvr, sub, admission.Update, nil, false, nodeUser(now.Name))
	return NewAdmission(x).Validate(t.Context(), a, nil)
}

// What is admitted, peers can read as they read everything.
func FuzzPublished(f *testing.F) {
	for _, s := range []string{"BwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwc=", "192.0.2.1:51820,[2001:db8::1]:51820", "[::ffff:192.0.2.1]:1", ",", "",
		"BwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwc= 51821", "51820 " + strings.Repeat("0a", 32), "+1 " + strings.Repeat("0A", 32)} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, text string) {
		k, err := parseKey(text)
		theirs, theirErr := mesh.ParseKey(text)
		if good := theirErr == nil && !theirs.IsZero(); good != (err == nil) || good && mesh.Key(k) != theirs {
			t.Errorf("key %q: %v, %v; peers read %v, %v", text, k, err, theirs, theirErr)
		}
		if next, err := parseNextKey(text); err == nil {
			n := node("n1")
			n.Annotations[nextKeyAnnotation] = text
			if peer, err := kube.NodeOf(n); err != nil || peer.NextKey != mesh.Key(next) || peer.NextPort == 0 {
				t.Errorf("next key %q: peers read %v at %d, %v", text, peer.NextKey, peer.NextPort, err)
			}
		}
		if checkExchange(text) == nil {
			n := node("n1")
			n.Annotations[exchangeAnnotation] = text
			if peer, err := kube.NodeOf(n); err != nil || peer.Exchange.Port == 0 {
				t.Errorf("exchange %q: peers read %+v, %v", text, peer.Exchange, err)
			}
		}
		if checkEndpoints(text) == nil {
			n := node("n1")
			n.Annotations = map[string]string{mesh.AnnotationEndpoints: text, mesh.AnnotationPublicKey: ""}
			if peer, err := kube.NodeOf(n); err != nil || len(peer.Endpoints) == 0 {
				t.Errorf("endpoints %q: peers read %v, %v", text, peer.Endpoints, err)
			}
		}
	})
}

// The names are the ones peers read.
func TestAnnotationNames(t *testing.T) {
	want := []string{mesh.AnnotationPublicKey, mesh.AnnotationEndpoints, mesh.AnnotationNextKey, mesh.AnnotationKeyExchange}
	if !slices.Equal(publishedAnnotations, want) {
		t.Errorf("%q, want %q", publishedAnnotations, want)
	}
}
