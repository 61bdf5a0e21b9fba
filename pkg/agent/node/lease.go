package node

import (
	"context"
	"fmt"
	"time"

	coordv1 "k8s.io/api/coordination/v1"
	v1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// lease is the one last written.
type lease struct{ last *coordv1.Lease }

// renew says that the node lives.
func (n *Node) renew(ctx context.Context) error {
	if n.wasRemoved() {
		return n.removedError()
	}
	ctx, cancel := context.WithTimeout(ctx, max(3*time.Second, 2*n.cfg.LeaseInterval))
	defer cancel()
	leases := n.cfg.Client.CoordinationV1().Leases(v1.NamespaceNodeLease)
	n.mu.Lock()
	last, uid := n.lease.last, n.uid
	n.mu.Unlock()
	var err error
	if last == nil {
		last, err = leases.Get(ctx, n.cfg.Name, metav1.GetOptions{})
	}
	next := n.next(last)
	if len(next.OwnerReferences) == 0 && uid != "" {
		next.OwnerReferences = []metav1.OwnerReference{{APIVersion: "v1", Kind: "Node", Name: n.cfg.Name, UID: uid}}
	}
	switch {
	case apierrors.IsNotFound(err):
		next, err = leases.Create(ctx, next, metav1.CreateOptions{})
	case err == nil:
		next, err = leases.Update(ctx, next, metav1.UpdateOptions{})
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	if err != nil {
		n.lease.last = nil // read again
		return fmt.Errorf("renew lease of node %s: %w", n.cfg.Name, err)
	}
	n.lease.last = next
	return nil
}

func (n *Node) next(last *coordv1.Lease) *coordv1.Lease {
	l := &coordv1.Lease{ObjectMeta: metav1.ObjectMeta{Name: n.cfg.Name, Namespace: v1.NamespaceNodeLease}}
	if last != nil && last.Name != "" {
		l = last.DeepCopy()
	}
	now := metav1.NewMicroTime(time.Now())
	seconds := int32(max(1, (4*n.cfg.LeaseInterval+time.Second-1)/time.Second))
	l.Spec.HolderIdentity, l.Spec.RenewTime, l.Spec.LeaseDurationSeconds = &n.cfg.Name, &now, &seconds
	return l
}
