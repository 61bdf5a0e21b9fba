package upstream

import (
	"context"
	"errors"
	"fmt"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/metadata"
	"k8s.io/client-go/rest"
	"k8s.io/kubernetes/pkg/controller/namespace/deletion"
)

// NewEmptier returns the function that empties a namespace that is being
// deleted, one pass a call, and takes its finalizer off when nothing is left.
// It is the inside of the namespace controller, without the five seconds that
// one waits before the first pass and after each.
//
// An error for which errors.Is(err, ErrContent) holds means that it goes on,
// and what is left needs time: call again.
func NewEmptier(ctx context.Context, rc *rest.Config) (func(ctx context.Context, name string) error, error) {
	client, err := kubernetes.NewForConfig(rc)
	if err != nil {
		return nil, fmt.Errorf("client of namespace controller: %w", err)
	}
	meta, err := metadata.NewForConfig(rc)
	if err != nil {
		return nil, fmt.Errorf("client of namespace controller: %w", err)
	}
	d := deletion.NewNamespacedResourcesDeleter(ctx, client.CoreV1().Namespaces(), meta, client.CoreV1(),
		client.Discovery().ServerPreferredNamespacedResources, corev1.FinalizerKubernetes)
	return func(ctx context.Context, name string) error {
		err := d.Delete(ctx, name)
		if left := (*deletion.ResourcesRemainingError)(nil); errors.As(err, &left) {
			return fmt.Errorf("namespace %s: %w", name, ErrContent)
		}
		return err
	}, nil
}

// ErrContent says that a namespace is not empty yet.
var ErrContent = errors.New("content remains")
