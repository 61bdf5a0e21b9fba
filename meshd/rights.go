package main

import (
	"context"
	"errors"
	"fmt"
	"strings"

	authorizationv1 "k8s.io/api/authorization/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
)

// right is something `meshd agent` must be allowed to do.
type right struct{ verb, group, resource, subresource string }

func (r right) String() string {
	s := r.verb + " " + r.resource
	if r.group != "" {
		s += "." + r.group
	}
	if r.subresource != "" {
		s += "/" + r.subresource
	}
	return s
}

// rights are those without which there is no network. With insights the
// ClusterRole in manifests/base/rbac.yaml grants these and no others.
var rights = []right{
	{"get", "", "nodes", ""}, {"list", "", "nodes", ""}, {"watch", "", "nodes", ""}, {"patch", "", "nodes", ""},
	{"patch", "", "nodes", "status"},
	{"list", "", "services", ""}, {"watch", "", "services", ""},
	{"list", "", "namespaces", ""}, {"watch", "", "namespaces", ""},
	{"list", "discovery.k8s.io", "endpointslices", ""}, {"watch", "discovery.k8s.io", "endpointslices", ""},
	{"list", "networking.k8s.io", "servicecidrs", ""}, {"watch", "networking.k8s.io", "servicecidrs", ""},
}

// insights are rights without which less is known and told: kube/pods,
// kube/policies and kube/events say so.
var insights = []right{
	{"list", "", "pods", ""}, {"watch", "", "pods", ""},
	{"list", "networking.k8s.io", "networkpolicies", ""}, {"watch", "networking.k8s.io", "networkpolicies", ""},
	{"create", "", "events", ""},
}

// errUnasked: the cluster could not be asked, which says nothing of rights.
var errUnasked = errors.New("the API did not answer")

// missingRights asks the cluster which of the rights these credentials lack.
func missingRights(ctx context.Context, client kubernetes.Interface) error {
	var missing []string
	for _, r := range rights {
		review, err := client.AuthorizationV1().SelfSubjectAccessReviews().Create(ctx, &authorizationv1.SelfSubjectAccessReview{
			Spec: authorizationv1.SelfSubjectAccessReviewSpec{ResourceAttributes: &authorizationv1.ResourceAttributes{
				Verb: r.verb, Group: r.group, Resource: r.resource, Subresource: r.subresource}},
		}, metav1.CreateOptions{})
		switch {
		case apierrors.IsUnauthorized(err):
			return fmt.Errorf("the API does not know these credentials: %w", err)
		case err != nil:
			return fmt.Errorf("%w: %w", errUnasked, err)
		case !review.Status.Allowed:
			missing = append(missing, r.String())
		}
	}
	if len(missing) > 0 {
		return fmt.Errorf("these credentials may not: %s", strings.Join(missing, ", "))
	}
	return nil
}
