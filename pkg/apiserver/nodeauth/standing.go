package nodeauth

import (
	"context"
	"net/http"

	"k8s.io/apiserver/pkg/authentication/user"
	"k8s.io/apiserver/pkg/endpoints/request"
)

// EndWithNode ends every request of a node about a resource at the moment its
// Node is deleted or given to another key: a watch is authorized once and then
// runs for many minutes. It belongs behind authorization.
func EndWithNode(x *Index, next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		u, _ := request.UserFrom(r.Context())
		info, ok := request.RequestInfoFrom(r.Context())
		node, isNode := NodeName(u)
		if !isNode || !ok || !info.IsResourceRequest {
			next.ServeHTTP(w, r)
			return
		}
		ctx, cancel := context.WithCancelCause(r.Context())
		defer cancel(nil)
		release := x.onRemoval(node, u, cancel)
		defer release()
		next.ServeHTTP(w, r.WithContext(ctx))
	})
}

// standing is what a node has open.
type standing struct {
	identity string
	end      context.CancelCauseFunc
}

// errRemoved is why a request ended.
type errRemoved struct{ node string }

func (e errRemoved) Error() string { return "node " + e.node + " was removed from the cluster" }

// onRemoval calls end when the Node is deleted or given to another key, or
// was since the request was authorized, until release.
func (x *Index) onRemoval(node string, u user.Info, end context.CancelCauseFunc) (release func()) {
	s := &standing{identityOf(u), end}
	x.mu.Lock()
	defer x.mu.Unlock()
	if x.open[node] == nil {
		x.open[node] = map[*standing]bool{}
	}
	x.open[node][s] = true
	x.endOpen(node, x.members[node].identity)
	return func() {
		x.mu.Lock()
		defer x.mu.Unlock()
		delete(x.open[node], s)
		if len(x.open[node]) == 0 {
			delete(x.open, node)
		}
	}
}

// endOpen ends what a node has open that holds another key than the Node's.
// The caller holds mu; identity is empty when the Node is gone.
func (x *Index) endOpen(node, identity string) {
	for s := range x.open[node] {
		if identity == "" || s.identity != identity {
			s.end(errRemoved{node})
		}
	}
}
