package nodeauth

// The cluster of these tests: nodes n1, n2 and n3, each with a key of its own; n1 runs pod default/mine, n2
// runs default/theirs and other/theirs. Everything a pod refers to has its name:
// secret mine, config map mine, service account mine, claim mine, volume
// pv-mine. default/ended ran on n1 and is over.

import (
	"context"
	"flag"
	"fmt"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apiserver/pkg/authentication/user"
	"k8s.io/apiserver/pkg/authorization/authorizer"
	"k8s.io/client-go/tools/cache"
)

var update = flag.Bool("update", false, "write testdata/allowed.golden anew; read the difference before you commit it")

func pod(ns, name, node string) *corev1.Pod {
	return &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Namespace: ns, Name: name, UID: types.UID("uid-" + ns + "-" + name)},
		Spec: corev1.PodSpec{
			NodeName: node, ServiceAccountName: name,
			Volumes: []corev1.Volume{
				{Name: "s", VolumeSource: corev1.VolumeSource{Secret: &corev1.SecretVolumeSource{SecretName: name}}},
				{Name: "p", VolumeSource: corev1.VolumeSource{PersistentVolumeClaim: &corev1.PersistentVolumeClaimVolumeSource{ClaimName: name}}},
			},
			Containers: []corev1.Container{{EnvFrom: []corev1.EnvFromSource{
				{ConfigMapRef: &corev1.ConfigMapEnvSource{LocalObjectReference: corev1.LocalObjectReference{Name: name}}},
			}}},
		},
	}
}

func claim(ns, name string) *corev1.PersistentVolumeClaim {
	return &corev1.PersistentVolumeClaim{
		ObjectMeta: metav1.ObjectMeta{Namespace: ns, Name: name},
		Spec:       corev1.PersistentVolumeClaimSpec{VolumeName: "pv-" + name},
	}
}

func testIndex() *Index {
	x := NewIndex()
	for _, n := range []string{"n1", "n2", "n3"} {
		x.Nodes().OnAdd(node(n), true)
	}
	ended := pod("default", "ended", "n1")
	ended.Status.Phase = corev1.PodSucceeded
	for _, p := range []*corev1.Pod{pod("default", "mine", "n1"), ended, pod("default", "theirs", "n2"), pod("other", "theirs", "n2"), pod("default", "waiting", "")} {
		x.Pods().OnAdd(p, true)
	}
	for _, n := range []string{"mine", "theirs"} {
		x.Claims().OnAdd(claim("default", n), true)
	}
	x.SyncedBy(func() bool { return true })
	return x
}

func nodeUser(name string) user.Info {
	return holder(name, "key of "+name)
}

// holder is a node that proved to hold a key, or none.
func holder(name, key string) user.Info {
	u := &user.DefaultInfo{Name: "system:node:" + name, Groups: []string{"system:nodes", "system:authenticated"}}
	if key != "" {
		u.Extra = map[string][]string{identityAnnotation: {key}}
	}
	return u
}

// joinedWith is another machine by the same name.
func joinedWith(name, key string) *corev1.Node {
	return node(name, func(n *corev1.Node) {
		n.Annotations = map[string]string{identityAnnotation: key}
		if key == "" {
			n.Annotations = nil
		}
	})
}

// resources an agent could try, with and without a namespace.
var (
	namespaced = strings.Fields(`
		/pods /pods/status /pods/log /pods/exec /pods/attach /pods/portforward /pods/proxy /pods/binding
		/pods/eviction /pods/ephemeralcontainers /pods/resize /bindings
		/secrets /configmaps /persistentvolumeclaims /persistentvolumeclaims/status
		/serviceaccounts /serviceaccounts/token /services /services/status /services/proxy /endpoints
		/events /resourcequotas /limitranges /replicationcontrollers /podtemplates
		apps/deployments apps/deployments/scale apps/replicasets apps/statefulsets apps/daemonsets apps/controllerrevisions
		batch/jobs batch/cronjobs coordination.k8s.io/leases discovery.k8s.io/endpointslices events.k8s.io/events
		networking.k8s.io/networkpolicies networking.k8s.io/ingresses policy/poddisruptionbudgets
		rbac.authorization.k8s.io/roles rbac.authorization.k8s.io/rolebindings
		authorization.k8s.io/localsubjectaccessreviews autoscaling/horizontalpodautoscalers`)
	clusterScoped = strings.Fields(`
		/nodes /nodes/status /nodes/proxy /nodes/log /nodes/stats /nodes/metrics /namespaces /namespaces/finalize /namespaces/status
		/persistentvolumes /persistentvolumes/status
		rbac.authorization.k8s.io/clusterroles rbac.authorization.k8s.io/clusterrolebindings
		authentication.k8s.io/tokenreviews authorization.k8s.io/subjectaccessreviews
		certificates.k8s.io/certificatesigningrequests certificates.k8s.io/certificatesigningrequests/approval
		storage.k8s.io/storageclasses storage.k8s.io/csinodes storage.k8s.io/volumeattachments
		scheduling.k8s.io/priorityclasses node.k8s.io/runtimeclasses apiextensions.k8s.io/customresourcedefinitions
		admissionregistration.k8s.io/validatingwebhookconfigurations /users /groups`)
	verbs      = strings.Fields("get list watch create update patch delete deletecollection proxy bind escalate impersonate use *")
	namespaces = []string{"", "default", "other", "kube-system", "kube-node-lease"}
	names      = []string{"", "n1", "n2", "mine", "ended", "theirs", "waiting", "pv-mine", "pv-theirs"}
	selectors  = []string{"", "spec.nodeName=n1", "spec.nodeName=n2", "spec.nodeName!=n1", "spec.nodeName=n1,status.phase=Running", "metadata.name=mine"}
)

func attributes(res, verb, ns, name, sel string) authorizer.AttributesRecord {
	group, res, _ := strings.Cut(res, "/")
	res, sub, _ := strings.Cut(res, "/")
	a := authorizer.AttributesRecord{User: nodeUser("n1"), Verb: verb, Namespace: ns, APIGroup: group, APIVersion: "v1",
		Resource: res, Subresource: sub, Name: name, ResourceRequest: true}
	if sel != "" {
		a.FieldSelectorRequirements = fields.ParseSelectorOrDie(sel).Requirements()
	}
	return a
}

// TestAllowed tries every verb on every resource in every place and compares
// what node n1 may do with testdata/allowed.golden.
func TestAllowed(t *testing.T) {
	authz := newAuthorizer(testIndex(), 0)
	tried := 0
	var out strings.Builder
	for _, res := range append(namespaced, clusterScoped...) {
		spaces := namespaces
		if strings.Contains(fmt.Sprint(clusterScoped), res) {
			spaces = []string{""}
		}
		for _, verb := range verbs {
			var where []string
			all := 0
			for _, ns := range spaces {
				for _, name := range names {
					for _, sel := range selectors {
						all++
						d, _, err := authz.Authorize(context.Background(), attributes(res, verb, ns, name, sel))
						if err != nil {
							t.Fatal(err)
						}
						if d == authorizer.DecisionAllow {
							where = append(where, place(ns, name, sel))
						}
					}
				}
			}
			tried += all
			if len(where) > 0 {
				fmt.Fprintf(&out, "%s %s: %s\n", verb, strings.TrimPrefix(res, "/"), compact(where, len(spaces)*len(names)))
			}
		}
	}
	t.Logf("%d combinations", tried)
	if tried < 100000 {
		t.Errorf("only %d combinations tried", tried)
	}
	const file = "testdata/allowed.golden"
	if *update {
		os.WriteFile(file, []byte(out.String()), 0o644)
	}
	want, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(string(want), out.String()); d != "" {
		t.Errorf("what a node may do changed (-golden +now):\n%s", d)
	}
}

func place(ns, name, sel string) string {
	s := name
	if s == "" {
		s = "(no name)"
	}
	if ns != "" {
		s = ns + "/" + s
	}
	return s + "?" + sel
}

// compact says "everywhere" where the place does not matter and leaves out the
// selector where that does not matter.
func compact(where []string, places int) string {
	perPlace, perSel := map[string]int{}, map[string]int{}
	for _, w := range where {
		p, sel, _ := strings.Cut(w, "?")
		perPlace[p]++
		perSel[sel]++
	}
	var out []string
	for _, w := range where {
		p, sel, _ := strings.Cut(w, "?")
		switch {
		case len(where) == places*len(selectors):
			w = "everywhere"
		case perSel[sel] == places:
			w = "everywhere with " + sel
		case perPlace[p] == len(selectors):
			w = p
		}
		if !slices.Contains(out, w) {
			out = append(out, w)
		}
	}
	return strings.Join(out, "; ")
}

func TestOtherIdentities(t *testing.T) {
	authz := newAuthorizer(testIndex(), 0)
	for _, c := range []struct {
		name   string
		user   user.Info
		want   authorizer.Decision
		secret string
	}{
		{"the node", nodeUser("n1"), authorizer.DecisionAllow, "mine"},
		{"another node", nodeUser("n2"), authorizer.DecisionNoOpinion, "mine"},
		{"a node without pods", nodeUser("n3"), authorizer.DecisionNoOpinion, "mine"},
		{"a node that is not in the cluster", nodeUser("n9"), authorizer.DecisionDeny, "mine"},
		{"a node with an older key of its name", holder("n1", "older"), authorizer.DecisionDeny, "mine"},
		{"a node that proved no key", holder("n1", ""), authorizer.DecisionDeny, "mine"},
		{"a node's name without the group", &user.DefaultInfo{Name: "system:node:n1"}, authorizer.DecisionNoOpinion, "mine"},
		{"the group without a node's name", &user.DefaultInfo{Name: "eve", Groups: []string{"system:nodes"}}, authorizer.DecisionDeny, "mine"},
		{"the group with an empty name", &user.DefaultInfo{Name: "system:node:", Groups: []string{"system:nodes"}}, authorizer.DecisionDeny, "mine"},
		{"a person", &user.DefaultInfo{Name: "alice"}, authorizer.DecisionNoOpinion, "mine"},
	} {
		a := attributes("/secrets", "get", "default", c.secret, "")
		a.User = c.user
		if got, _, _ := authz.Authorize(t.Context(), a); got != c.want {
			t.Errorf("%s: %v, want %v", c.name, got, c.want)
		}
	}
}

// TestFailsClosed: before the index is synced nothing that depends on pods is
// allowed, and what does not depend on them is, to a node that was seen.
func TestFailsClosed(t *testing.T) {
	x := testIndex()
	for _, c := range []struct {
		synced []bool
		want   authorizer.Decision
	}{
		{nil, authorizer.DecisionNoOpinion},
		{[]bool{true, false}, authorizer.DecisionNoOpinion},
		{[]bool{true, true}, authorizer.DecisionAllow},
	} {
		x.synced = nil
		for _, s := range c.synced {
			x.synced = append(x.synced, func() bool { return s })
		}
		authz := newAuthorizer(x, 0)
		for _, res := range []string{"/secrets", "/pods", "/serviceaccounts"} {
			got, why, _ := authz.Authorize(t.Context(), attributes(res, "get", "default", "mine", ""))
			if got != c.want {
				t.Errorf("synced %v: get %s: %v, want %v", c.synced, res, got, c.want)
			}
			if got != authorizer.DecisionAllow && !strings.Contains(why, "not known yet") {
				t.Errorf("synced %v: reason %q", c.synced, why)
			}
		}
		if got, _, _ := authz.Authorize(t.Context(), attributes("/nodes/status", "patch", "", "n1", "")); got != authorizer.DecisionAllow {
			t.Errorf("synced %v: patch of its own status: %v", c.synced, got)
		}
	}
}

// TestNotInTheCluster: a node without a Node object may do nothing, not even
// what every node may.
func TestNotInTheCluster(t *testing.T) {
	const other = `node "n1" joined with another key than the one of this certificate: this machine was removed, and another has its name`
	const gone = `node "n1" is not in the cluster: it was removed, or has not joined`
	for _, c := range []struct {
		name   string
		change func(x *Index)
		want   authorizer.Decision
		why    string
	}{
		{"a node", func(*Index) {}, authorizer.DecisionAllow, ""},
		{"a node that says something of itself", func(x *Index) { x.Nodes().OnUpdate(node("n1"), published(1, "")(node("n1"))) }, authorizer.DecisionAllow, ""},
		{"removed", func(x *Index) { x.Nodes().OnDelete(node("n1")) }, authorizer.DecisionDeny, gone},
		{"removed while nobody looked", func(x *Index) {
			x.Nodes().OnDelete(cache.DeletedFinalStateUnknown{Key: "n1", Obj: node("n1")})
		}, authorizer.DecisionDeny, gone},
		{"another was removed", func(x *Index) { x.Nodes().OnDelete(node("n2")) }, authorizer.DecisionAllow, ""},
		{"removed and joined again", func(x *Index) { x.Nodes().OnDelete(node("n1")); x.Nodes().OnAdd(node("n1"), false) }, authorizer.DecisionAllow, ""},
		{"removed, and another machine joined by its name", func(x *Index) { x.Nodes().OnDelete(node("n1")); x.Nodes().OnAdd(joinedWith("n1", "k"), false) }, authorizer.DecisionDeny, other},
		{"another machine took its name over", func(x *Index) { x.Nodes().OnUpdate(node("n1"), joinedWith("n1", "k")) }, authorizer.DecisionDeny, other},
		{"removed, and a Node made by hand", func(x *Index) { x.Nodes().OnDelete(node("n1")); x.Nodes().OnAdd(joinedWith("n1", ""), false) }, authorizer.DecisionDeny, other},
		{"not seen yet", func(x *Index) {
			x.Nodes().OnDelete(node("n1"))
			x.SyncedBy(func() bool { return false })
		}, authorizer.DecisionNoOpinion, "the nodes are not known yet, try again"},
	} {
		x := testIndex()
		c.change(x)
		authz := newAuthorizer(x, 0)
		for _, a := range []authorizer.AttributesRecord{
			attributes("/nodes", "list", "", "", ""), attributes("/services", "watch", "", "", ""),
			attributes("discovery.k8s.io/endpointslices", "list", "", "", ""), attributes("/events", "create", "default", "", ""),
			attributes("coordination.k8s.io/leases", "update", "kube-node-lease", "n1", ""), attributes("/nodes/status", "patch", "", "n1", ""),
		} {
			if d, why, _ := authz.Authorize(t.Context(), a); d != c.want || why != c.why {
				t.Errorf("%s: %s %s: %v %q, want %v %q", c.name, a.Verb, a.Resource, d, why, c.want, c.why)
			}
		}
	}
}

// TestWaitsForTheNode: a machine that joined a moment ago is waited for.
func TestWaitsForTheNode(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		x := NewIndex()
		x.SyncedBy(func() bool { return true })
		authz, done := NewAuthorizer(x), make(chan authorizer.Decision)
		ask := func() {
			d, _, _ := authz.Authorize(context.Background(), attributes("/nodes", "list", "", "", ""))
			done <- d
		}
		go ask()
		synctest.Wait()
		x.Nodes().OnAdd(node("n2"), false)
		synctest.Wait()
		x.Nodes().OnAdd(node("n1"), false)
		if d := <-done; d != authorizer.DecisionAllow {
			t.Errorf("%v, want Allow once the node is known", d)
		}
		x.Nodes().OnDelete(node("n1"))
		start := time.Now()
		go ask()
		if d := <-done; d != authorizer.DecisionDeny || time.Since(start) != patience {
			t.Errorf("%v after %v, want Deny after %v", d, time.Since(start), patience)
		}
	})
}

// TestRemovedNodeTakesNoPatience: however much a removed node asks, a pod that
// was bound a moment ago is waited for.
func TestRemovedNodeTakesNoPatience(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		x := testIndex()
		authz, done := NewAuthorizer(x), make(chan authorizer.Decision)
		var asks sync.WaitGroup
		for range 2 * maxWaiting {
			asks.Go(func() {
				a := attributes("/nodes", "list", "", "", "")
				a.User = nodeUser("n9")
				authz.Authorize(context.Background(), a)
			})
		}
		synctest.Wait() // all ask
		go func() {
			d, _, _ := authz.Authorize(context.Background(), attributes("/secrets", "get", "default", "waiting", ""))
			done <- d
		}()
		synctest.Wait()
		x.Pods().OnUpdate(pod("default", "waiting", ""), pod("default", "waiting", "n1"))
		if d := <-done; d != authorizer.DecisionAllow {
			t.Errorf("%v, want Allow", d)
		}
		asks.Wait()
	})
}

// TestWaitsForTheIndex: a pod that was bound a moment ago is waited for.
func TestWaitsForTheIndex(t *testing.T) {
	x := testIndex()
	authz := NewAuthorizer(x)
	done := make(chan authorizer.Decision)
	go func() {
		d, _, _ := authz.Authorize(context.Background(), attributes("/secrets", "get", "default", "waiting", ""))
		done <- d
	}()
	x.Pods().OnUpdate(pod("default", "waiting", ""), pod("default", "waiting", "n1"))
	if d := <-done; d != authorizer.DecisionAllow {
		t.Errorf("%v, want Allow once the pod is bound", d)
	}
	x.Pods().OnDelete(pod("default", "waiting", "n1"))
	if d, _, _ := newAuthorizer(x, 0).Authorize(t.Context(), attributes("/secrets", "get", "default", "waiting", "")); d != authorizer.DecisionNoOpinion {
		t.Errorf("%v after the pod was deleted, want NoOpinion", d)
	}
}
