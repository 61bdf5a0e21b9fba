package main

import (
	"strings"
	"testing"

	admissionv1 "k8s.io/api/admissionregistration/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apiserver/pkg/admission"
	"k8s.io/apiserver/pkg/admission/plugin/cel"
	"k8s.io/apiserver/pkg/admission/plugin/policy/validating"
	"k8s.io/apiserver/pkg/admission/plugin/webhook/matchconditions"
	celconfig "k8s.io/apiserver/pkg/apis/cel"
	"k8s.io/apiserver/pkg/authentication/user"
	"k8s.io/apiserver/pkg/cel/environment"
)

// policy of an overlay, compiled as an API server compiles it. An expression
// that does not compile denies everything, and says so.
func policy(t *testing.T, overlay, name string) validating.Validator {
	t.Helper()
	objects, _ := rendered(t, overlay)
	for _, obj := range objects {
		p, ok := obj.(*admissionv1.ValidatingAdmissionPolicy)
		if !ok || p.Name != name {
			continue
		}
		compiler, err := cel.NewCompositedCompiler(environment.MustBaseEnvSet(environment.DefaultCompatibilityVersion()))
		if err != nil {
			t.Fatal(err)
		}
		vars := cel.OptionalVariableDeclarations{HasAuthorizer: true}
		var variables []cel.NamedExpressionAccessor
		for _, v := range p.Spec.Variables {
			variables = append(variables, &validating.Variable{Name: v.Name, Expression: v.Expression})
		}
		compiler.CompileAndStoreVariables(variables, vars, environment.StoredExpressions)
		var conditions, checks, messages []cel.ExpressionAccessor
		for _, c := range p.Spec.MatchConditions {
			conditions = append(conditions, &matchconditions.MatchCondition{Name: c.Name, Expression: c.Expression})
		}
		for _, v := range p.Spec.Validations {
			checks = append(checks, &validating.ValidationCondition{Expression: v.Expression, Message: v.Message, Reason: v.Reason})
			var message cel.ExpressionAccessor
			if v.MessageExpression != "" {
				message = &validating.MessageExpressionCondition{MessageExpression: v.MessageExpression}
			}
			messages = append(messages, message)
		}
		compile := func(e []cel.ExpressionAccessor) cel.ConditionEvaluator {
			return compiler.CompileCondition(e, vars, environment.StoredExpressions)
		}
		matcher := matchconditions.NewMatcher(compile(conditions), p.Spec.FailurePolicy, "policy", "validate", p.Name)
		return validating.NewValidator(compile(checks), matcher, compile(nil), compile(messages), p.Spec.FailurePolicy, nil)
	}
	t.Fatalf("overlay %s has no policy %s", overlay, name)
	return nil
}

// says is why the policy denies that who makes old into new, or nothing.
func says(t *testing.T, v validating.Validator, who user.Info, sub string, old, new *corev1.Node) string {
	t.Helper()
	var o, n runtime.Object
	op, name := admission.Update, ""
	switch {
	case old == nil:
		op = admission.Create
	case new == nil:
		op = admission.Delete
	}
	if old != nil {
		o, name = old, old.Name
	}
	if new != nil {
		n, name = new, new.Name
	}
	gvr := corev1.SchemeGroupVersion.WithResource("nodes")
	kind := corev1.SchemeGroupVersion.WithKind("Node")
	attrs := admission.NewAttributesRecord(n, o, kind, "", name, gvr, sub, op, nil, false, who)
	result := v.Validate(t.Context(), gvr, &admission.VersionedAttributes{Attributes: attrs, VersionedKind: kind, VersionedObject: admission.NewLazyObject(n), VersionedOldObject: admission.NewLazyObject(o)},
		nil, nil, celconfig.RuntimeCELCostBudget, nil)
	var denied []string
	for _, d := range result.Decisions {
		if d.Evaluation == validating.EvalError {
			t.Errorf("the policy cannot be evaluated: %s", d.Message)
		}
		if d.Action != validating.ActionAdmit {
			denied = append(denied, d.Message)
		}
	}
	return strings.Join(denied, "; ")
}

// attempt is a change of a node, and what a policy says to it.
type attempt struct {
	name, sub string
	change    func(*corev1.Node)
	want      string
}

func policyNode() *corev1.Node {
	return &corev1.Node{
		ObjectMeta: metav1.ObjectMeta{Name: "m1", ResourceVersion: "7", Labels: map[string]string{"l": "1"}, Finalizers: []string{"example.com/x"},
			OwnerReferences: []metav1.OwnerReference{{APIVersion: "v1", Kind: "ConfigMap", Name: "owner"}}, Annotations: map[string]string{"meshd.dev/public-key": "own", "example.com/x": "1"}},
		Spec: corev1.NodeSpec{ProviderID: "p", Taints: []corev1.Taint{{Key: "t", Effect: corev1.TaintEffectNoSchedule}}},
		Status: corev1.NodeStatus{Addresses: []corev1.NodeAddress{{Type: corev1.NodeInternalIP, Address: "192.0.2.1"}},
			Conditions: []corev1.NodeCondition{{Type: corev1.NodeReady, Status: corev1.ConditionTrue}}},
	}
}

func (a attempt) try(t *testing.T, v validating.Validator, who user.Info) {
	t.Run(a.name, func(t *testing.T) {
		old := policyNode()
		changed := old.DeepCopy()
		a.change(changed)
		got := says(t, v, who, a.sub, old, changed)
		if (got == "") != (a.want == "") || !strings.Contains(got, a.want) {
			t.Errorf("denied with %q, want %q", got, a.want)
		}
	})
}

func TestAllocateMayGiveRangesOnly(t *testing.T) {
	v := policy(t, "eks", "meshd-allocate")
	who := &user.DefaultInfo{Name: "system:serviceaccount:meshd:meshd-allocate"}
	give := func(n *corev1.Node) {
		n.ResourceVersion = "8"
		n.Spec.PodCIDR, n.Spec.PodCIDRs = "10.244.1.0/24", []string{"10.244.1.0/24"}
	}
	for _, a := range []attempt{
		{"ranges", "", give, ""},
		{"a key", "", func(n *corev1.Node) { n.Annotations["meshd.dev/public-key"] = "other" }, "no annotations, labels"},
		{"a key with the ranges", "", func(n *corev1.Node) { give(n); n.Annotations["meshd.dev/public-key"] = "other" }, "no annotations, labels"},
		{"no annotations", "", func(n *corev1.Node) { n.Annotations = nil }, "no annotations, labels"},
		{"a label", "", func(n *corev1.Node) { n.Labels["l"] = "2" }, "no annotations, labels"},
		{"a finalizer", "", func(n *corev1.Node) { n.Finalizers = nil }, "no annotations, labels"},
		{"an owner", "", func(n *corev1.Node) { n.OwnerReferences = []metav1.OwnerReference{{Name: "x"}} }, "no annotations, labels"},
		{"a taint away", "", func(n *corev1.Node) { give(n); n.Spec.Taints = nil }, "no taints"},
		{"a cordon", "", func(n *corev1.Node) { n.Spec.Unschedulable = true }, "no taints"},
		{"another cloud machine", "", func(n *corev1.Node) { n.Spec.ProviderID = "q" }, "no taints"},
		{"the status", "status", func(*corev1.Node) {}, "nothing of their status"},
	} {
		a.try(t, v, who)
	}

	had := policyNode()
	give(had)
	other := had.DeepCopy()
	other.Spec.PodCIDR, other.Spec.PodCIDRs = "10.244.2.0/24", []string{"10.244.2.0/24"}
	if got := says(t, v, who, "", had, other); !strings.Contains(got, "nodes that have none") {
		t.Errorf("another range for a node that has one: denied with %q", got)
	}
	for name, pair := range map[string][2]*corev1.Node{"a new node": {nil, had}, "a node less": {had, nil}} {
		if got := says(t, v, who, "", pair[0], pair[1]); !strings.Contains(got, "makes and deletes no nodes") {
			t.Errorf("%s: denied with %q", name, got)
		}
	}
	if got := says(t, v, &user.DefaultInfo{Name: "system:node:m1"}, "", had, other); got != "" {
		t.Errorf("somebody else is denied: %q", got)
	}
}

func TestMeshdMayWriteItsOwnNodeOnly(t *testing.T) {
	v := policy(t, "kubeadm", "meshd-own-node")
	who := func(node string) user.Info {
		return &user.DefaultInfo{Name: "system:serviceaccount:meshd:meshd", Extra: map[string][]string{"authentication.kubernetes.io/node-name": {node}}}
	}
	for _, a := range []attempt{
		{"its key", "", func(n *corev1.Node) { n.ResourceVersion = "8"; n.Annotations["meshd.dev/public-key"] = "next" }, ""},
		{"its key away", "", func(n *corev1.Node) { delete(n.Annotations, "meshd.dev/public-key") }, ""},
		{"its condition", "status", func(n *corev1.Node) {
			n.Status.Conditions = append(n.Status.Conditions, corev1.NodeCondition{Type: corev1.NodeNetworkUnavailable, Status: corev1.ConditionFalse})
		}, ""},
		{"another condition", "status", func(n *corev1.Node) { n.Status.Conditions[0].Status = corev1.ConditionFalse }, "no condition but NetworkUnavailable"},
		{"another annotation", "", func(n *corev1.Node) { n.Annotations["example.com/x"] = "2" }, "begin with meshd.dev/"},
		{"a label", "", func(n *corev1.Node) { n.Labels["l"] = "2" }, "writes no labels"},
		{"a finalizer", "", func(n *corev1.Node) { n.Finalizers = nil }, "writes no labels"},
		{"another owner in the place of one", "", func(n *corev1.Node) { n.OwnerReferences[0].Name = "other" }, "writes no labels"},
		{"a taint away", "", func(n *corev1.Node) { n.Spec.Taints = nil }, "writes no labels"},
		{"its addresses", "status", func(n *corev1.Node) { n.Status.Addresses = nil }, "nothing of a node's status"},
		{"its runtime's handlers", "status", func(n *corev1.Node) { n.Status.RuntimeHandlers = []corev1.NodeRuntimeHandler{{Name: "x"}} }, "nothing of a node's status"},
		{"its configuration", "status", func(n *corev1.Node) { n.Status.Config = &corev1.NodeConfigStatus{Error: "x"} }, "nothing of a node's status"},
		{"its features", "status", func(n *corev1.Node) { n.Status.Features = &corev1.NodeFeatures{} }, "nothing of a node's status"},
	} {
		a.try(t, v, who("m1"))
	}
	changed := policyNode()
	changed.Annotations["meshd.dev/public-key"] = "other"
	for name, who := range map[string]user.Info{"of another node": who("m2"), "without a node": &user.DefaultInfo{Name: "system:serviceaccount:meshd:meshd"}} {
		if got := says(t, v, who, "", policyNode(), changed); !strings.Contains(got, "may not write to node m1") {
			t.Errorf("meshd %s: denied with %q", name, got)
		}
	}
	for name, pair := range map[string][2]*corev1.Node{"a new node": {nil, changed}, "a node less": {changed, nil}} {
		if got := says(t, v, who("m1"), "", pair[0], pair[1]); !strings.Contains(got, "makes and deletes no nodes") {
			t.Errorf("%s: denied with %q", name, got)
		}
	}
}
