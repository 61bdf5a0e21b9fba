package nodeauth

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"fmt"
	"math/big"
	"net/http"
	"net/http/httptest"
	"slices"
	"testing"

	"k8s.io/apiserver/pkg/authentication/user"
	"k8s.io/apiserver/pkg/endpoints/request"
)

// TestEndWithNode: what a node has open ends with its Node, and nothing else.
func TestEndWithNode(t *testing.T) {
	removed := func(x *Index) { x.Nodes().OnDelete(node("n1")) }
	for _, c := range []struct {
		name   string
		user   user.Info
		change func(x *Index)
		ends   bool
	}{
		{"removed", nodeUser("n1"), removed, true},
		{"given to another key", nodeUser("n1"), func(x *Index) { x.Nodes().OnUpdate(node("n1"), joinedWith("n1", "k")) }, true},
		{"nobody's any more", nodeUser("n1"), func(x *Index) { x.Nodes().OnUpdate(node("n1"), joinedWith("n1", "")) }, true},
		{"removed and back at once", nodeUser("n1"), func(x *Index) { removed(x); x.Nodes().OnAdd(node("n1"), false) }, true},
		{"another node's request", nodeUser("n2"), removed, false},
		{"a person's request", &user.DefaultInfo{Name: "alice"}, removed, false},
		{"a heartbeat", nodeUser("n1"), func(x *Index) { x.Nodes().OnUpdate(node("n1"), node("n1")) }, false},
		{"it publishes its key", nodeUser("n1"), func(x *Index) { x.Nodes().OnUpdate(node("n1"), published(1, "")(node("n1"))) }, false},
	} {
		x := testIndex()
		serve(x, c.user, func(ctx context.Context) {
			if ctx.Err() != nil {
				t.Errorf("%s: ended before it began: %v", c.name, context.Cause(ctx))
			}
			c.change(x)
			if ended := ctx.Err() != nil; ended != c.ends {
				t.Errorf("%s: ended is %v, want %v", c.name, ended, c.ends)
			}
			if want := "node n1 was removed from the cluster"; c.ends && fmt.Sprint(context.Cause(ctx)) != want {
				t.Errorf("%s: %v, want %q", c.name, context.Cause(ctx), want)
			}
		})
		if len(x.open) > 0 {
			t.Errorf("%s: %v is kept after the request", c.name, x.open)
		}
	}
}

// TestRemovedBehindAuthorization: the Node went between the authorizer's word
// and the request.
func TestRemovedBehindAuthorization(t *testing.T) {
	x := testIndex()
	x.Nodes().OnDelete(node("n1"))
	serve(x, nodeUser("n1"), func(ctx context.Context) {
		if ctx.Err() == nil {
			t.Error("the request of a removed node goes on")
		}
	})
}

func serve(x *Index, u user.Info, during func(context.Context)) {
	r := httptest.NewRequest("GET", "/api/v1/nodes?watch=1", nil)
	ctx := request.WithUser(r.Context(), u)
	ctx = request.WithRequestInfo(ctx, &request.RequestInfo{IsResourceRequest: true, Verb: "watch", Resource: "nodes"})
	EndWithNode(x, http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) { during(r.Context()) })).
		ServeHTTP(httptest.NewRecorder(), r.WithContext(ctx))
}

func TestUserOf(t *testing.T) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "system:node:n1", Organization: []string{"system:nodes"}}}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	resp, ok, err := UserOf.User([]*x509.Certificate{cert})
	if err != nil || !ok {
		t.Fatal(ok, err)
	}
	spki, _ := x509.MarshalPKIXPublicKey(key.Public())
	if got, want := identityOf(resp.User), fmt.Sprintf("%x", sha256.Sum256(spki)); got != want {
		t.Errorf("identity %q, want %q", got, want)
	}
	if resp.User.GetName() != "system:node:n1" || !slices.Equal(resp.User.GetGroups(), []string{"system:nodes"}) || len(resp.User.GetExtra()) < 2 {
		t.Errorf("user %+v: name, groups and the library's own extra are to stay", resp.User)
	}
}
