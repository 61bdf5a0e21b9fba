package controller

import (
	"context"
	"encoding/json"
	"fmt"
	"time"

	coordinationv1 "k8s.io/api/coordination/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/uuid"

	"meshd.dev/pkg/reconcile"
)

// echoLease is the lease the node lifecycle controller renews for itself,
// among those of the nodes so that it comes back in the same watch.
const echoLease = "controller.meshd.dev"

// echo renews it, beat after beat.
type echo struct {
	plane  *plane
	holder string
	loop   *reconcile.Loop
}

func newEcho(p *plane, beat time.Duration) *echo {
	e := &echo{plane: p, holder: string(uuid.NewUUID())}
	e.loop = p.loop("echo", e.renew, func(cfg *reconcile.Config) {
		cfg.Resync, cfg.MinBackoff, cfg.MaxBackoff = beat, beat, beat
	})
	return e
}

func (e *echo) run(ctx context.Context) error { return e.loop.Run(ctx) }

// isOurs says whether lease was written by this process.
func (e *echo) isOurs(lease *coordinationv1.Lease) bool {
	return lease.Spec.HolderIdentity != nil && *lease.Spec.HolderIdentity == e.holder
}

func (e *echo) renew(ctx context.Context) error {
	// An answer that takes longer is worth nothing, and must not keep the next
	// beat from being tried.
	ctx, cancel := context.WithTimeout(ctx, e.plane.cfg.NodeGracePeriod)
	defer cancel()
	now := metav1.NowMicro()
	leases := e.plane.client.CoordinationV1().Leases(corev1.NamespaceNodeLease)
	patch, err := json.Marshal(map[string]any{"spec": map[string]any{"holderIdentity": e.holder, "renewTime": now}})
	if err != nil {
		return err
	}
	_, err = leases.Patch(ctx, echoLease, types.MergePatchType, patch, metav1.PatchOptions{})
	if !apierrors.IsNotFound(err) {
		return err
	}
	if err := e.makeNamespace(ctx); err != nil {
		return err
	}
	_, err = leases.Create(ctx, &coordinationv1.Lease{
		ObjectMeta: metav1.ObjectMeta{Name: echoLease, Namespace: corev1.NamespaceNodeLease},
		Spec:       coordinationv1.LeaseSpec{HolderIdentity: &e.holder, RenewTime: &now},
	}, metav1.CreateOptions{})
	return err
}

// makeNamespace makes the namespace of the leases where nobody did yet.
func (e *echo) makeNamespace(ctx context.Context) error {
	_, err := e.plane.client.CoreV1().Namespaces().Create(ctx, &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: corev1.NamespaceNodeLease}}, metav1.CreateOptions{})
	if err != nil && !apierrors.IsAlreadyExists(err) {
		return fmt.Errorf("make namespace %s: %w", corev1.NamespaceNodeLease, err)
	}
	return nil
}
