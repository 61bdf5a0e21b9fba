package upstream

import (
	"context"

	rbacinformers "k8s.io/client-go/informers/rbac/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/kubernetes/pkg/controller/clusterroleaggregation"
)

// AggregateRoles returns a loop that fills cluster roles made of others
// (admin, edit, view). Call it before the informers start.
func AggregateRoles(in rbacinformers.Interface, client kubernetes.Interface) func(context.Context) error {
	c := clusterroleaggregation.NewClusterRoleAggregation(in.ClusterRoles(), client.RbacV1())
	return func(ctx context.Context) error {
		c.Run(ctx, 1)
		return nil
	}
}
