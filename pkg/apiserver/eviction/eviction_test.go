package eviction

import (
	"context"
	"fmt"
	"strconv"
	"strings"
	"sync"
	"testing"

	corev1 "k8s.io/api/core/v1"
	policyv1 "k8s.io/api/policy/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/apis/meta/internalversion"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apiserver/pkg/endpoints/request"
	"k8s.io/apiserver/pkg/registry/rest"
)

// store holds pods and budgets and refuses what a real one refuses.
type store struct {
	mu      sync.Mutex
	pods    map[string]*corev1.Pod
	pdbs    map[string]*policyv1.PodDisruptionBudget
	deleted []string
	graces  []int64
}

func (s *store) Get(_ context.Context, name string, _ *metav1.GetOptions) (runtime.Object, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if p := s.pods[name]; p != nil {
		return p.DeepCopy(), nil
	}
	return nil, apierrors.NewNotFound(corev1.Resource("pods"), name)
}

func (s *store) Delete(_ context.Context, name string, _ rest.ValidateObjectFunc, o *metav1.DeleteOptions) (runtime.Object, bool, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	p := s.pods[name]
	if p == nil {
		return nil, false, apierrors.NewNotFound(corev1.Resource("pods"), name)
	}
	if pre := o.Preconditions; pre != nil && (pre.UID != nil && *pre.UID != p.UID || pre.ResourceVersion != nil && *pre.ResourceVersion != p.ResourceVersion) {
		return nil, false, apierrors.NewConflict(corev1.Resource("pods"), name, fmt.Errorf("precondition"))
	}
	if len(o.DryRun) == 0 {
		delete(s.pods, name)
		s.deleted = append(s.deleted, name)
		if o.GracePeriodSeconds != nil {
			s.graces = append(s.graces, *o.GracePeriodSeconds)
		}
	}
	return p, true, nil
}

func (s *store) List(context.Context, *internalversion.ListOptions) (runtime.Object, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	list := &policyv1.PodDisruptionBudgetList{}
	for _, p := range s.pdbs {
		list.Items = append(list.Items, *p.DeepCopy())
	}
	return list, nil
}

func (s *store) Update(ctx context.Context, name string, info rest.UpdatedObjectInfo, _ rest.ValidateObjectFunc, _ rest.ValidateObjectUpdateFunc, _ bool, _ *metav1.UpdateOptions) (runtime.Object, bool, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if i, _ := request.RequestInfoFrom(ctx); i == nil || i.APIGroup != "policy" || i.Subresource != "status" {
		return nil, false, fmt.Errorf("the request info is about %+v, validation of a budget needs its group", i)
	}
	old := s.pdbs[name]
	obj, err := info.UpdatedObject(ctx, old)
	if err != nil {
		return nil, false, err
	}
	pdb := obj.(*policyv1.PodDisruptionBudget)
	if pdb.ResourceVersion != old.ResourceVersion {
		return nil, false, apierrors.NewConflict(policyv1.Resource("poddisruptionbudgets"), name, fmt.Errorf("changed"))
	}
	n, _ := strconv.Atoi(old.ResourceVersion)
	pdb.ResourceVersion = strconv.Itoa(n + 1)
	s.pdbs[name] = pdb
	return pdb, false, nil
}

func pod(name string, phase corev1.PodPhase, ready bool) *corev1.Pod {
	p := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: name, UID: types.UID("uid-" + name), ResourceVersion: "1", Labels: map[string]string{"app": "web"}}}
	p.Status.Phase = phase
	if ready {
		p.Status.Conditions = []corev1.PodCondition{{Type: corev1.PodReady, Status: corev1.ConditionTrue}}
	}
	return p
}

func budget(name string, allowed int32, change ...func(*policyv1.PodDisruptionBudget)) *policyv1.PodDisruptionBudget {
	b := &policyv1.PodDisruptionBudget{ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: name, ResourceVersion: "1", Generation: 1}}
	b.Spec.Selector = &metav1.LabelSelector{MatchLabels: map[string]string{"app": "web"}}
	b.Status = policyv1.PodDisruptionBudgetStatus{ObservedGeneration: 1, DisruptionsAllowed: allowed, DesiredHealthy: 2, CurrentHealthy: 2 + allowed}
	for _, c := range change {
		c(b)
	}
	return b
}

func newStore(p *corev1.Pod, budgets ...*policyv1.PodDisruptionBudget) *store {
	s := &store{pods: map[string]*corev1.Pod{p.Name: p}, pdbs: map[string]*policyv1.PodDisruptionBudget{}}
	for _, b := range budgets {
		s.pdbs[b.Name] = b
	}
	return s
}

func TestEvict(t *testing.T) {
	always := policyv1.AlwaysAllow
	short := func(b *policyv1.PodDisruptionBudget) { b.Status.CurrentHealthy = 1 }
	for _, c := range []struct {
		name    string
		pod     *corev1.Pod
		budgets []*policyv1.PodDisruptionBudget
		code    int32  // 0 is success
		part    string // of message and cause
		left    int32  // disruptions of the first budget afterwards
	}{
		{"no budget", pod("a", corev1.PodRunning, true), nil, 0, "", 0},
		{"budget allows", pod("a", corev1.PodRunning, true), []*policyv1.PodDisruptionBudget{budget("b", 2)}, 0, "", 1},
		{"budget is spent", pod("a", corev1.PodRunning, true), []*policyv1.PodDisruptionBudget{budget("b", 0)}, 429,
			"Cannot evict pod as it would violate the pod's disruption budget.|The disruption budget b needs 2 healthy pods and has 2 currently", 0},
		{"budget of other pods", pod("a", corev1.PodRunning, true), []*policyv1.PodDisruptionBudget{budget("b", 0, func(b *policyv1.PodDisruptionBudget) { b.Spec.Selector.MatchLabels["app"] = "db" })}, 0, "", 0},
		{"budget without selector covers nothing", pod("a", corev1.PodRunning, true), []*policyv1.PodDisruptionBudget{budget("b", 0, func(b *policyv1.PodDisruptionBudget) { b.Spec.Selector = nil })}, 0, "", 0},
		{"budget with empty selector covers all", pod("a", corev1.PodRunning, true), []*policyv1.PodDisruptionBudget{budget("b", 0, func(b *policyv1.PodDisruptionBudget) { b.Spec.Selector = &metav1.LabelSelector{} })}, 429, "disruption budget", 0},
		{"two budgets", pod("a", corev1.PodRunning, true), []*policyv1.PodDisruptionBudget{budget("b", 1), budget("c", 1)}, 500, "more than one PodDisruptionBudget", 1},
		{"budget not observed yet", pod("a", corev1.PodRunning, true), []*policyv1.PodDisruptionBudget{budget("b", 1, func(b *policyv1.PodDisruptionBudget) { b.Generation = 2 })}, 429, "still being processed by the server", 1},
		{"negative", pod("a", corev1.PodRunning, true), []*policyv1.PodDisruptionBudget{budget("b", -1)}, 403, "negative", -1},
		{"pending pod is free", pod("a", corev1.PodPending, false), []*policyv1.PodDisruptionBudget{budget("b", 0)}, 0, "", 0},
		{"pod that is over is free", pod("a", corev1.PodFailed, false), []*policyv1.PodDisruptionBudget{budget("b", 0)}, 0, "", 0},
		{"pod not ready, budget healthy", pod("a", corev1.PodRunning, false), []*policyv1.PodDisruptionBudget{budget("b", 0)}, 0, "", 0},
		{"pod not ready, budget short", pod("a", corev1.PodRunning, false), []*policyv1.PodDisruptionBudget{budget("b", 0, short)}, 429, "needs 2 healthy pods and has 1 currently", 0},
		{"pod not ready, budget short, always", pod("a", corev1.PodRunning, false), []*policyv1.PodDisruptionBudget{budget("b", 0, short, func(b *policyv1.PodDisruptionBudget) { b.Spec.UnhealthyPodEvictionPolicy = &always })}, 0, "", 0},
		{"no such pod", pod("other", corev1.PodRunning, true), nil, 404, "not found", 0},
	} {
		for _, dry := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s, dry %v", c.name, dry), func(t *testing.T) {
				budgets := make([]*policyv1.PodDisruptionBudget, len(c.budgets))
				for i, b := range c.budgets {
					budgets[i] = b.DeepCopy()
				}
				s := newStore(c.pod.DeepCopy(), budgets...)
				grace := int64(7)
				opts := &metav1.CreateOptions{}
				if dry {
					opts.DryRun = []string{metav1.DryRunAll}
				}
				_, err := New(Config{s, s, s}).Create(t.Context(), "a", &policyv1.Eviction{
					ObjectMeta: metav1.ObjectMeta{Name: "a"}, DeleteOptions: &metav1.DeleteOptions{GracePeriodSeconds: &grace}}, rest.ValidateAllObjectFunc, opts)
				checkErr(t, err, c.code, c.part)
				wantGone := c.code == 0 && !dry
				if gone := len(s.deleted) == 1; gone != wantGone {
					t.Errorf("deleted %v, want %v", gone, wantGone)
				}
				if wantGone && s.graces[0] != grace {
					t.Errorf("grace period %d, want %d", s.graces[0], grace)
				}
				if len(c.budgets) == 0 {
					return
				}
				left := c.left
				if dry {
					left = c.budgets[0].Status.DisruptionsAllowed
				}
				if got := s.pdbs["b"].Status.DisruptionsAllowed; got != left {
					t.Errorf("%d disruptions left, want %d", got, left)
				}
			})
		}
	}
}

func checkErr(t *testing.T, err error, code int32, parts string) {
	t.Helper()
	if code == 0 {
		if err != nil {
			t.Error(err)
		}
		return
	}
	s, ok := err.(apierrors.APIStatus)
	if !ok || s.Status().Code != code {
		t.Errorf("error %v, want code %d", err, code)
		return
	}
	text := s.Status().Message
	if d := s.Status().Details; d != nil {
		for _, c := range d.Causes {
			text += "|" + c.Message
		}
		if code == 429 && (d.RetryAfterSeconds != 10 || !apierrors.HasStatusCause(err, policyv1.DisruptionBudgetCause)) {
			t.Errorf("details %+v, want to retry after 10 s and the cause DisruptionBudget", d)
		}
	}
	for part := range strings.SplitSeq(parts, "|") {
		if !strings.Contains(text, part) {
			t.Errorf("%q, want a part %q", text, part)
		}
	}
}

func TestRefusals(t *testing.T) {
	s := newStore(pod("a", corev1.PodRunning, true), budget("b", 1))
	evict := func(ev *policyv1.Eviction, opts *metav1.CreateOptions) error {
		_, err := New(Config{s, s, s}).Create(t.Context(), "a", ev, nil, opts)
		return err
	}
	uid := types.UID("other")
	for _, c := range []struct {
		name string
		ev   *policyv1.Eviction
		code int32
		part string
	}{
		{"other name", &policyv1.Eviction{ObjectMeta: metav1.ObjectMeta{Name: "x"}}, 400, "does not match"},
		{"other UID", &policyv1.Eviction{ObjectMeta: metav1.ObjectMeta{Name: "a"}, DeleteOptions: &metav1.DeleteOptions{Preconditions: &metav1.Preconditions{UID: &uid}}}, 409, "UID in the precondition"},
	} {
		checkErr(t, evict(c.ev, &metav1.CreateOptions{}), c.code, c.part)
	}
	if s.pdbs["b"].Status.DisruptionsAllowed != 1 || len(s.deleted) != 0 {
		t.Error("a refused eviction was charged")
	}
}

// TestConcurrent: a budget of 3 never lets more than 3 of 10 concurrent evictions through.
func TestConcurrent(t *testing.T) {
	s := newStore(pod("p0", corev1.PodRunning, true), budget("b", 3))
	for i := range 10 {
		p := pod(fmt.Sprint("p", i), corev1.PodRunning, true)
		s.pods[p.Name] = p
	}
	var wg sync.WaitGroup
	var mu sync.Mutex
	refused := 0
	for i := range 10 {
		wg.Go(func() {
			name := fmt.Sprint("p", i)
			_, err := New(Config{s, s, s}).Create(t.Context(), name, &policyv1.Eviction{ObjectMeta: metav1.ObjectMeta{Name: name}}, nil, &metav1.CreateOptions{})
			if apierrors.IsTooManyRequests(err) {
				mu.Lock()
				refused++
				mu.Unlock()
			} else if err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if len(s.deleted) > 3 || len(s.deleted)+refused != 10 || s.pdbs["b"].Status.DisruptionsAllowed != int32(3-len(s.deleted)) {
		t.Errorf("%d evicted, %d refused, %d disruptions left", len(s.deleted), refused, s.pdbs["b"].Status.DisruptionsAllowed)
	}
}
