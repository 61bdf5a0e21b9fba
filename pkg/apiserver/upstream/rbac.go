package upstream

import (
	"context"
	"errors"
	"fmt"

	rbacv1 "k8s.io/api/rbac/v1"
	"k8s.io/apiserver/pkg/authorization/authorizer"
	rbacinformers "k8s.io/client-go/informers/rbac/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/util/retry"
	"k8s.io/component-helpers/auth/rbac/reconciliation"
	rbacregistry "k8s.io/kubernetes/pkg/registry/rbac/validation"
	"k8s.io/kubernetes/plugin/pkg/auth/authorizer/rbac"
	"k8s.io/kubernetes/plugin/pkg/auth/authorizer/rbac/bootstrappolicy"
)

// RBAC decides by roles and bindings, and knows the rules a user has.
type RBAC struct {
	authorizer.Authorizer
	authorizer.RuleResolver
	rules rbacregistry.AuthorizationRuleResolver
}

// NewRBAC reads roles and bindings from informers.
func NewRBAC(in rbacinformers.Interface) *RBAC {
	roles := &rbac.RoleGetter{Lister: in.Roles().Lister()}
	bindings := &rbac.RoleBindingLister{Lister: in.RoleBindings().Lister()}
	clusterRoles := &rbac.ClusterRoleGetter{Lister: in.ClusterRoles().Lister()}
	clusterBindings := &rbac.ClusterRoleBindingLister{Lister: in.ClusterRoleBindings().Lister()}
	a := rbac.New(roles, bindings, clusterRoles, clusterBindings)
	return &RBAC{a, a, rbacregistry.NewDefaultRuleResolver(roles, bindings, clusterRoles, clusterBindings)}
}

// ConfirmNoEscalation refuses rules that the user in ctx does not have.
func (r *RBAC) ConfirmNoEscalation(ctx context.Context, rules []rbacv1.PolicyRule) error {
	return rbacregistry.ConfirmNoEscalation(ctx, r.rules, rules)
}

// RulesOf are the rules a role reference stands for.
func (r *RBAC) RulesOf(ctx context.Context, ref rbacv1.RoleRef, namespace string) ([]rbacv1.PolicyRule, error) {
	return r.rules.GetRoleReferenceRules(ctx, ref, namespace)
}

// EnsurePolicy creates the roles and bindings every cluster has, and puts
// back what somebody took from them.
func EnsurePolicy(ctx context.Context, client kubernetes.Interface) error {
	var errs []error
	run := func(what, name string, f func() error) {
		if ctx.Err() != nil {
			return
		}
		if err := retry.RetryOnConflict(retry.DefaultBackoff, f); err != nil {
			errs = append(errs, fmt.Errorf("ensure %s %s: %w", what, name, err))
		}
	}
	for _, role := range append(bootstrappolicy.ClusterRoles(), bootstrappolicy.ControllerRoles()...) {
		run("cluster role", role.Name, func() error {
			return ensureRole(reconciliation.ClusterRoleRuleOwner{ClusterRole: &role}, reconciliation.ClusterRoleModifier{Client: client.RbacV1().ClusterRoles()})
		})
	}
	for _, binding := range append(bootstrappolicy.ClusterRoleBindings(), bootstrappolicy.ControllerRoleBindings()...) {
		run("cluster role binding", binding.Name, func() error {
			return ensureBinding(reconciliation.ClusterRoleBindingAdapter{ClusterRoleBinding: &binding}, reconciliation.ClusterRoleBindingClientAdapter{Client: client.RbacV1().ClusterRoleBindings()})
		})
	}
	namespaces := client.CoreV1().Namespaces()
	for _, roles := range bootstrappolicy.NamespaceRoles() {
		for _, role := range roles {
			run("role", role.Namespace+"/"+role.Name, func() error {
				return ensureRole(reconciliation.RoleRuleOwner{Role: &role}, reconciliation.RoleModifier{Client: client.RbacV1(), NamespaceClient: namespaces})
			})
		}
	}
	for _, bindings := range bootstrappolicy.NamespaceRoleBindings() {
		for _, binding := range bindings {
			run("role binding", binding.Namespace+"/"+binding.Name, func() error {
				return ensureBinding(reconciliation.RoleBindingAdapter{RoleBinding: &binding}, reconciliation.RoleBindingClientAdapter{Client: client.RbacV1(), NamespaceClient: namespaces})
			})
		}
	}
	return errors.Join(append(errs, ctx.Err())...)
}

func ensureRole(role reconciliation.RuleOwner, client reconciliation.RuleOwnerModifier) error {
	_, err := (&reconciliation.ReconcileRoleOptions{Role: role, Client: client, Confirm: true}).Run()
	return err
}

func ensureBinding(binding reconciliation.RoleBinding, client reconciliation.RoleBindingModifier) error {
	_, err := (&reconciliation.ReconcileRoleBindingOptions{RoleBinding: binding, Client: client, Confirm: true}).Run()
	return err
}
