package reviews

import (
	"context"

	authorizationv1 "k8s.io/api/authorization/v1"
	"k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apiserver/pkg/authentication/user"
	"k8s.io/apiserver/pkg/authorization/authorizer"
	"k8s.io/apiserver/pkg/endpoints/request"
	"k8s.io/apiserver/pkg/registry/rest"
)

// Authorization are the resources of authorization.k8s.io/v1.
func Authorization(a authorizer.UnconditionalAuthorizer, rules authorizer.RuleResolver) map[string]rest.Storage {
	ask := asked{a}
	return map[string]rest.Storage{
		"subjectaccessreviews": question[*authorizationv1.SubjectAccessReview]{
			empty:    func() *authorizationv1.SubjectAccessReview { return &authorizationv1.SubjectAccessReview{} },
			singular: "subjectaccessreview", answer: ask.subject,
		},
		"localsubjectaccessreviews": question[*authorizationv1.LocalSubjectAccessReview]{
			empty:    func() *authorizationv1.LocalSubjectAccessReview { return &authorizationv1.LocalSubjectAccessReview{} },
			singular: "localsubjectaccessreview", namespaced: true, answer: ask.local,
		},
		"selfsubjectaccessreviews": question[*authorizationv1.SelfSubjectAccessReview]{
			empty:    func() *authorizationv1.SelfSubjectAccessReview { return &authorizationv1.SelfSubjectAccessReview{} },
			singular: "selfsubjectaccessreview", answer: ask.self,
		},
		"selfsubjectrulesreviews": question[*authorizationv1.SelfSubjectRulesReview]{
			empty:    func() *authorizationv1.SelfSubjectRulesReview { return &authorizationv1.SelfSubjectRulesReview{} },
			singular: "selfsubjectrulesreview",
			answer: func(ctx context.Context, r *authorizationv1.SelfSubjectRulesReview) error {
				return reviewRules(ctx, rules, r)
			},
		},
	}
}

type asked struct {
	authorizer.UnconditionalAuthorizer
}

func (a asked) subject(ctx context.Context, r *authorizationv1.SubjectAccessReview) error {
	if r.Spec.User == "" && len(r.Spec.Groups) == 0 {
		return errors.NewBadRequest("spec: at least one of user or groups must be specified")
	}
	u := &user.DefaultInfo{Name: r.Spec.User, UID: r.Spec.UID, Groups: r.Spec.Groups}
	for k, v := range r.Spec.Extra {
		if u.Extra == nil {
			u.Extra = map[string][]string{}
		}
		u.Extra[k] = v
	}
	return a.decide(ctx, u, r.Spec.ResourceAttributes, r.Spec.NonResourceAttributes, &r.Status)
}

func (a asked) local(ctx context.Context, r *authorizationv1.LocalSubjectAccessReview) error {
	ns := request.NamespaceValue(ctx)
	if r.Spec.ResourceAttributes == nil || r.Spec.ResourceAttributes.Namespace != ns {
		return errors.NewBadRequest("spec.resourceAttributes.namespace must match namespace: " + ns)
	}
	full := authorizationv1.SubjectAccessReview{Spec: r.Spec}
	err := a.subject(ctx, &full)
	r.Status = full.Status
	return err
}

func (a asked) self(ctx context.Context, r *authorizationv1.SelfSubjectAccessReview) error {
	u, err := asker(ctx)
	if err != nil {
		return err
	}
	return a.decide(ctx, u, r.Spec.ResourceAttributes, r.Spec.NonResourceAttributes, &r.Status)
}

func (a asked) decide(ctx context.Context, u user.Info, res *authorizationv1.ResourceAttributes, path *authorizationv1.NonResourceAttributes, status *authorizationv1.SubjectAccessReviewStatus) error {
	if (res == nil) == (path == nil) {
		return errors.NewBadRequest("spec: exactly one of nonResourceAttributes or resourceAttributes must be specified")
	}
	attrs := authorizer.AttributesRecord{User: u}
	if path != nil {
		attrs.Path, attrs.Verb = path.Path, path.Verb
	} else {
		resource(&attrs, res)
	}
	decision, reason, err := a.Authorize(ctx, attrs)
	*status = authorizationv1.SubjectAccessReviewStatus{
		Allowed: decision == authorizer.DecisionAllow, Denied: decision == authorizer.DecisionDeny,
		Reason: reason, EvaluationError: text(err),
	}
	return nil
}

// resource fills attrs with what res asks. A selector that does not parse is
// left out, which asks for more than was meant, never for less.
func resource(attrs *authorizer.AttributesRecord, res *authorizationv1.ResourceAttributes) {
	attrs.ResourceRequest = true
	attrs.Verb, attrs.Namespace, attrs.Name = res.Verb, res.Namespace, res.Name
	attrs.APIGroup, attrs.APIVersion, attrs.Resource, attrs.Subresource = res.Group, res.Version, res.Resource, res.Subresource
	if attrs.APIVersion == "" {
		attrs.APIVersion = "*"
	}
	if s := res.LabelSelector; s != nil && s.RawSelector != "" {
		selector, err := labels.Parse(s.RawSelector)
		if attrs.LabelSelectorParsingErr = err; err == nil {
			attrs.LabelSelectorRequirements, _ = selector.Requirements()
		}
	}
	if s := res.FieldSelector; s != nil && s.RawSelector != "" {
		selector, err := fields.ParseSelector(s.RawSelector)
		if attrs.FieldSelectorParsingErr = err; err == nil {
			attrs.FieldSelectorRequirements = selector.Requirements()
		}
	}
}

func reviewRules(ctx context.Context, rules authorizer.RuleResolver, r *authorizationv1.SelfSubjectRulesReview) error {
	u, err := asker(ctx)
	if err != nil {
		return err
	}
	if r.Spec.Namespace == "" {
		return errors.NewBadRequest("no namespace on request")
	}
	resources, paths, incomplete, err := rules.RulesFor(ctx, u, r.Spec.Namespace)
	r.Status = authorizationv1.SubjectRulesReviewStatus{
		Incomplete: incomplete, EvaluationError: text(err),
		ResourceRules: []authorizationv1.ResourceRule{}, NonResourceRules: []authorizationv1.NonResourceRule{},
	}
	for _, i := range resources {
		r.Status.ResourceRules = append(r.Status.ResourceRules, authorizationv1.ResourceRule{
			Verbs: i.GetVerbs(), APIGroups: i.GetAPIGroups(), Resources: i.GetResources(), ResourceNames: i.GetResourceNames()})
	}
	for _, i := range paths {
		r.Status.NonResourceRules = append(r.Status.NonResourceRules, authorizationv1.NonResourceRule{Verbs: i.GetVerbs(), NonResourceURLs: i.GetNonResourceURLs()})
	}
	return nil
}
