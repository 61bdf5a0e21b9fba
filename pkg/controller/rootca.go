package controller

import (
	"context"
	"errors"
	"fmt"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/tools/cache"

	"meshd.dev/pkg/reconcile"
)

// rootCAName and rootCAKey are what pods mount to know the API server, named
// as Kubernetes names them.
const (
	rootCAName = "kube-root-ca.crt"
	rootCAKey  = "ca.crt"
)

// rootCA keeps the certificate of the cluster's CA in every namespace.
type rootCA struct {
	plane      *plane
	namespaces cache.SharedIndexInformer
	maps       cache.SharedIndexInformer
	loop       *reconcile.Loop
}

func newRootCA(p *plane) *rootCA {
	c := &rootCA{
		plane:      p,
		namespaces: p.shared.Core().V1().Namespaces().Informer(),
		maps:       p.rootCAs.Core().V1().ConfigMaps().Informer(),
	}
	c.loop = p.loop("rootca", c.do)
	watch(c.namespaces, c.loop.Kick, nil)
	watch(c.maps, c.loop.Kick, nil)
	return c
}

func (c *rootCA) Run(ctx context.Context) error {
	if len(c.plane.cfg.RootCA) == 0 || !synced(ctx, c.namespaces, c.maps) {
		return nil
	}
	return c.loop.Run(ctx)
}

func (c *rootCA) do(ctx context.Context) error {
	var errs []error
	for _, o := range c.namespaces.GetStore().List() {
		ns := o.(*corev1.Namespace)
		if ns.DeletionTimestamp != nil {
			continue
		}
		if err := c.publish(ctx, ns.Name); err != nil {
			errs = append(errs, fmt.Errorf("publish %s in namespace %s: %w", rootCAName, ns.Name, err))
		}
	}
	return errors.Join(errs...)
}

func (c *rootCA) publish(ctx context.Context, namespace string) error {
	want := &corev1.ConfigMap{
		ObjectMeta: metav1.ObjectMeta{Name: rootCAName, Namespace: namespace, Annotations: map[string]string{
			"kubernetes.io/description": "The certificate with which pods check who the API server is.",
		}},
		Data: map[string]string{rootCAKey: string(c.plane.cfg.RootCA)},
	}
	have, ok, err := c.maps.GetStore().GetByKey(namespace + "/" + rootCAName)
	if err != nil {
		return err
	}
	if !ok {
		_, err = c.plane.client.CoreV1().ConfigMaps(namespace).Create(ctx, want, metav1.CreateOptions{})
		if apierrors.IsAlreadyExists(err) || apierrors.HasStatusCause(err, corev1.NamespaceTerminatingCause) || apierrors.IsNotFound(err) {
			return nil // the informer will say so in a moment
		}
		return err
	}
	m := have.(*corev1.ConfigMap)
	if len(m.Data) == 1 && m.Data[rootCAKey] == want.Data[rootCAKey] {
		return nil
	}
	m = m.DeepCopy()
	m.Data = want.Data
	_, err = c.plane.client.CoreV1().ConfigMaps(namespace).Update(ctx, m, metav1.UpdateOptions{})
	if apierrors.IsNotFound(err) {
		return nil
	}
	return err
}
