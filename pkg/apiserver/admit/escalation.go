package admit

import (
	"context"
	"slices"

	rbacv1 "k8s.io/api/rbac/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apiserver/pkg/admission"
	"k8s.io/apiserver/pkg/authentication/user"
	"k8s.io/apiserver/pkg/authorization/authorizer"
)

// RoleRules are the rules users have and roles stand for.
type RoleRules interface {
	ConfirmNoEscalation(ctx context.Context, rules []rbacv1.PolicyRule) error
	RulesOf(ctx context.Context, ref rbacv1.RoleRef, namespace string) ([]rbacv1.PolicyRule, error)
}

// Escalation keeps people from giving, by a role or a binding, rights they do
// not have themselves. Who may "escalate" the role or "bind" it may.
type Escalation struct {
	*admission.Handler
	authorizer authorizer.UnconditionalAuthorizer
	rules      RoleRules
}

// NewEscalation returns the plugin.
func NewEscalation(a authorizer.UnconditionalAuthorizer, rules RoleRules) Escalation {
	return Escalation{admission.NewHandler(admission.Create, admission.Update), a, rules}
}

// Validate implements admission.ValidationInterface.
func (e Escalation) Validate(ctx context.Context, a admission.Attributes, _ admission.ObjectInterfaces) error {
	if a.GetResource().Group != rbacv1.GroupName || slices.Contains(a.GetUserInfo().GetGroups(), user.SystemPrivilegedGroup) {
		return nil
	}
	verb, given, err := e.given(ctx, a)
	if err != nil {
		return admission.NewForbidden(a, err)
	}
	if len(given) == 0 || e.may(ctx, a, verb) {
		return nil
	}
	if err := e.rules.ConfirmNoEscalation(ctx, given); err != nil {
		return apierrors.NewForbidden(a.GetResource().GroupResource(), a.GetName(), err)
	}
	return nil
}

// everything is what a role that aggregates others can come to mean.
var everything = []rbacv1.PolicyRule{
	{APIGroups: []string{"*"}, Resources: []string{"*"}, Verbs: []string{"*"}},
	{NonResourceURLs: []string{"*"}, Verbs: []string{"*"}},
}

// given are the rights a hands out that were not handed out before, and the
// verb that allows handing out any.
func (e Escalation) given(ctx context.Context, a admission.Attributes) (verb string, given []rbacv1.PolicyRule, err error) {
	switch obj := a.GetObject().(type) {
	case *rbacv1.Role:
		old, _ := a.GetOldObject().(*rbacv1.Role)
		if old != nil && equality.Semantic.DeepEqual(old.Rules, obj.Rules) {
			return "", nil, nil
		}
		return "escalate", obj.Rules, nil
	case *rbacv1.ClusterRole:
		old, _ := a.GetOldObject().(*rbacv1.ClusterRole)
		if old != nil && equality.Semantic.DeepEqual(old.Rules, obj.Rules) && equality.Semantic.DeepEqual(old.AggregationRule, obj.AggregationRule) {
			return "", nil, nil
		}
		if obj.AggregationRule != nil {
			return "escalate", everything, nil
		}
		return "escalate", obj.Rules, nil
	case *rbacv1.RoleBinding:
		old, _ := a.GetOldObject().(*rbacv1.RoleBinding)
		if old != nil && equality.Semantic.DeepEqual(old.Subjects, obj.Subjects) {
			return "", nil, nil
		}
		given, err = e.rules.RulesOf(ctx, obj.RoleRef, a.GetNamespace())
		return "bind", given, err
	case *rbacv1.ClusterRoleBinding:
		old, _ := a.GetOldObject().(*rbacv1.ClusterRoleBinding)
		if old != nil && equality.Semantic.DeepEqual(old.Subjects, obj.Subjects) {
			return "", nil, nil
		}
		given, err = e.rules.RulesOf(ctx, obj.RoleRef, "")
		return "bind", given, err
	}
	return "", nil, nil
}

// may asks whether the user has the verb on the role in question.
func (e Escalation) may(ctx context.Context, a admission.Attributes, verb string) bool {
	attrs := authorizer.AttributesRecord{
		User: a.GetUserInfo(), Verb: verb, Namespace: a.GetNamespace(), ResourceRequest: true,
		APIGroup: rbacv1.GroupName, APIVersion: "v1", Resource: a.GetResource().Resource, Name: a.GetName(),
	}
	var ref *rbacv1.RoleRef
	switch obj := a.GetObject().(type) {
	case *rbacv1.RoleBinding:
		ref = &obj.RoleRef
	case *rbacv1.ClusterRoleBinding:
		ref = &obj.RoleRef
	}
	if ref != nil {
		attrs.Name, attrs.Resource = ref.Name, "roles"
		if ref.Kind == "ClusterRole" {
			attrs.Resource = "clusterroles"
		}
	}
	decision, _, err := e.authorizer.Authorize(ctx, attrs)
	return err == nil && decision == authorizer.DecisionAllow
}
