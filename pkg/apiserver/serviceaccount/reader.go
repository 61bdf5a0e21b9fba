package serviceaccount

import (
	"context"
	"fmt"

	admissionregistrationv1 "k8s.io/api/admissionregistration/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apiserver/pkg/endpoints/request"
	"k8s.io/apiserver/pkg/registry/rest"
)

// reader reads what tokens name. Lookups are answered from the watch cache of
// a store when it has the object, else from storage, so that a token of an
// object made a moment ago is believed; one deleted a moment ago may be
// believed for as long as the cache lags.
type reader struct{ t *Tokens }

func (r reader) stores() (*Stores, error) {
	s := r.t.stores.Load()
	if s == nil {
		return nil, apierrors.NewServiceUnavailable("service accounts cannot be read yet")
	}
	return s, nil
}

// fetch gets an object of type T in a context of its own: the request at hand
// is about something else.
func fetch[T any](ctx context.Context, from rest.Getter, resource, namespace, name string, live bool) (*T, error) {
	ctx = request.WithNamespace(request.WithRequestInfo(ctx, &request.RequestInfo{
		IsResourceRequest: true, Verb: "get", APIVersion: "v1", Resource: resource, Namespace: namespace, Name: name,
	}), namespace)
	get := func(version string) (*T, error) {
		obj, err := from.Get(ctx, name, &metav1.GetOptions{ResourceVersion: version})
		if err != nil {
			return nil, err
		}
		out, ok := any(obj).(*T)
		if !ok {
			return nil, apierrors.NewInternalError(fmt.Errorf("%s %q: unexpected type %T", resource, name, obj))
		}
		return out, nil
	}
	if !live {
		if out, err := get("0"); err == nil {
			return out, nil
		}
	}
	return get("")
}

func (r reader) GetServiceAccount(ctx context.Context, namespace, name string) (*corev1.ServiceAccount, error) {
	s, err := r.stores()
	if err != nil {
		return nil, err
	}
	return fetch[corev1.ServiceAccount](ctx, s.ServiceAccounts, "serviceaccounts", namespace, name, false)
}

func (r reader) GetPod(ctx context.Context, namespace, name string) (*corev1.Pod, error) {
	s, err := r.stores()
	if err != nil {
		return nil, err
	}
	return fetch[corev1.Pod](ctx, s.Pods, "pods", namespace, name, false)
}

func (r reader) GetSecret(ctx context.Context, namespace, name string) (*corev1.Secret, error) {
	s, err := r.stores()
	if err != nil {
		return nil, err
	}
	return fetch[corev1.Secret](ctx, s.Secrets, "secrets", namespace, name, false)
}

func (r reader) GetNode(ctx context.Context, name string) (*corev1.Node, error) {
	s, err := r.stores()
	if err != nil {
		return nil, err
	}
	return fetch[corev1.Node](ctx, s.Nodes, "nodes", "", name, false)
}

func (reader) GetValidatingWebhookConfiguration(context.Context, string) (*admissionregistrationv1.ValidatingWebhookConfiguration, error) {
	return nil, errNoWebhooks
}

func (reader) GetMutatingWebhookConfiguration(context.Context, string) (*admissionregistrationv1.MutatingWebhookConfiguration, error) {
	return nil, errNoWebhooks
}

var errNoWebhooks = fmt.Errorf("tokens bound to webhook configurations are not supported")
