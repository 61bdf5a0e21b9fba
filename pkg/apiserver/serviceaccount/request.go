package serviceaccount

import (
	"context"
	"fmt"
	"time"

	authenticationv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/validation/field"
	"k8s.io/apiserver/pkg/endpoints/request"
	"k8s.io/apiserver/pkg/registry/rest"
	"k8s.io/apiserver/pkg/warning"
	"k8s.io/kubernetes/pkg/apis/core"
	upstream "k8s.io/kubernetes/pkg/serviceaccount"
)

const (
	defaultExpiration = 3600 // seconds
	minExpiration     = 600
	maxExpiration     = 1 << 32
)

var tokenRequestKind = authenticationv1.SchemeGroupVersion.WithKind("TokenRequest")

type tokenREST struct{ t *Tokens }

var (
	_ rest.NamedCreater                   = (*tokenREST)(nil)
	_ rest.GroupVersionKindProvider       = (*tokenREST)(nil)
	_ rest.SubresourceObjectMetaPreserver = (*tokenREST)(nil)
)

// REST is the storage of serviceaccounts/token.
func (t *Tokens) REST() rest.Storage { return &tokenREST{t} }

func (*tokenREST) New() runtime.Object { return &authenticationv1.TokenRequest{} }
func (*tokenREST) Destroy()            {}

func (*tokenREST) GroupVersionKind(schema.GroupVersion) schema.GroupVersionKind {
	return tokenRequestKind
}

// PreserveRequestObjectMetaSystemFieldsOnSubresourceCreate keeps the UID in
// the request: it is compared with the account's.
func (*tokenREST) PreserveRequestObjectMetaSystemFieldsOnSubresourceCreate() bool { return true }

// Create makes a token for the service account of that name.
func (r *tokenREST) Create(ctx context.Context, name string, obj runtime.Object, validate rest.ValidateObjectFunc, _ *metav1.CreateOptions) (runtime.Object, error) {
	req, ok := obj.(*authenticationv1.TokenRequest)
	if !ok {
		return nil, apierrors.NewBadRequest(fmt.Sprintf("want an authentication.k8s.io/v1 TokenRequest, have %T", obj))
	}
	req = req.DeepCopy()
	stores, err := reader{r.t}.stores()
	if err != nil {
		return nil, err
	}
	sa, err := fetch[corev1.ServiceAccount](ctx, stores.ServiceAccounts, "serviceaccounts", request.NamespaceValue(ctx), name, true)
	if err != nil {
		return nil, err
	}
	now := time.Now()
	if err := r.complete(ctx, req, sa, now); err != nil {
		return nil, err
	}
	if validate != nil {
		if err := validate(ctx, req.DeepCopy()); err != nil {
			return nil, err
		}
	}
	b, err := bind(ctx, stores, sa, req.Spec.BoundObjectRef)
	if err != nil {
		return nil, err
	}
	seconds := *req.Spec.ExpirationSeconds
	claims, private, err := upstream.Claims(core.ServiceAccount{ObjectMeta: identity(sa.ObjectMeta)}, b.pod, b.secret, b.node, nil, nil, seconds, 0, req.Spec.Audiences, nil)
	if err != nil {
		return nil, apierrors.NewInternalError(fmt.Errorf("claims of a token: %w", err))
	}
	token, err := r.t.generator.GenerateToken(ctx, claims, private)
	if err != nil {
		return nil, apierrors.NewInternalError(fmt.Errorf("sign a token: %w", err))
	}
	// Taken before the claims, so never later than what the token says.
	req.Status = authenticationv1.TokenRequestStatus{
		Token:               token,
		ExpirationTimestamp: metav1.NewTime(now.Add(time.Duration(seconds) * time.Second)),
	}
	return req, nil
}

// complete fills what the client left out and refuses what does not fit.
func (r *tokenREST) complete(ctx context.Context, req *authenticationv1.TokenRequest, sa *corev1.ServiceAccount, now time.Time) error {
	var errs field.ErrorList
	metaPath := field.NewPath("metadata")
	if req.Name != "" && req.Name != sa.Name {
		errs = append(errs, field.Invalid(metaPath.Child("name"), req.Name, "must match the service account name if specified"))
	}
	if req.Namespace != "" && req.Namespace != sa.Namespace {
		errs = append(errs, field.Invalid(metaPath.Child("namespace"), req.Namespace, "must match the service account namespace if specified"))
	}
	if len(errs) == 0 && req.UID != "" && req.UID != sa.UID {
		return apierrors.NewConflict(authenticationv1.Resource("tokenrequests"), sa.Name,
			fmt.Errorf("the UID in the token request (%s) does not match the UID of the service account (%s)", req.UID, sa.UID))
	}
	spec := &req.Spec
	if len(spec.Audiences) == 0 {
		spec.Audiences = r.t.Audiences()
	}
	if spec.ExpirationSeconds == nil {
		spec.ExpirationSeconds = new(int64(defaultExpiration))
	}
	switch s, path := *spec.ExpirationSeconds, field.NewPath("spec", "expirationSeconds"); {
	case s < minExpiration:
		errs = append(errs, field.Invalid(path, s, "may not specify a duration less than 10 minutes"))
	case s > maxExpiration:
		errs = append(errs, field.Invalid(path, s, "may not specify a duration larger than 2^32 seconds"))
	}
	for i, a := range spec.Audiences {
		if a == "" {
			errs = append(errs, field.Invalid(field.NewPath("spec", "audiences").Index(i), a, "must not be empty"))
		}
	}
	if len(errs) > 0 {
		return apierrors.NewInvalid(tokenRequestKind.GroupKind(), sa.Name, errs)
	}
	if limit := int64(r.t.cfg.MaxExpiration / time.Second); limit > 0 && *spec.ExpirationSeconds > limit {
		warning.AddWarning(ctx, "", fmt.Sprintf("requested expiration of %d seconds shortened to %d seconds", *spec.ExpirationSeconds, limit))
		spec.ExpirationSeconds = &limit
	}
	req.Name, req.Namespace, req.UID = sa.Name, sa.Namespace, sa.UID
	req.CreationTimestamp = metav1.NewTime(now)
	req.Status = authenticationv1.TokenRequestStatus{}
	return nil
}

// binding is what a token lives with; at most one of pod, secret, node unless
// the node is the pod's.
type binding struct {
	pod    *core.Pod
	secret *core.Secret
	node   *core.Node
}

func bind(ctx context.Context, s *Stores, sa *corev1.ServiceAccount, ref *authenticationv1.BoundObjectReference) (binding, error) {
	var b binding
	if ref == nil {
		return b, nil
	}
	var uid types.UID
	switch kind := schema.FromAPIVersionAndKind(ref.APIVersion, ref.Kind); {
	case kind.Group == "" && kind.Kind == "Pod":
		pod, err := fetch[corev1.Pod](ctx, s.Pods, "pods", sa.Namespace, ref.Name, true)
		if err != nil {
			return b, err
		}
		if pod.Spec.ServiceAccountName != sa.Name {
			return b, apierrors.NewBadRequest(fmt.Sprintf("cannot bind token for serviceaccount %q to pod running with different serviceaccount name.", sa.Name))
		}
		uid, b.pod = pod.UID, &core.Pod{ObjectMeta: identity(pod.ObjectMeta)}
		if b.node, err = nodeOf(ctx, s, pod); err != nil {
			return b, err
		}
	case kind.Group == "" && kind.Kind == "Node":
		node, err := fetch[corev1.Node](ctx, s.Nodes, "nodes", "", ref.Name, true)
		if err != nil {
			return b, err
		}
		uid, b.node = node.UID, &core.Node{ObjectMeta: identity(node.ObjectMeta)}
	case kind.Group == "" && kind.Kind == "Secret":
		secret, err := fetch[corev1.Secret](ctx, s.Secrets, "secrets", sa.Namespace, ref.Name, true)
		if err != nil {
			return b, err
		}
		uid, b.secret = secret.UID, &core.Secret{ObjectMeta: identity(secret.ObjectMeta)}
	default:
		return b, apierrors.NewBadRequest(fmt.Sprintf("cannot bind token to object of type %s, want a Pod, Node or Secret of v1", kind))
	}
	if ref.UID != "" && ref.UID != uid {
		return b, apierrors.NewConflict(schema.GroupResource{Resource: ref.Kind}, ref.Name,
			fmt.Errorf("the UID in the bound object reference (%s) does not match the UID in record. The object might have been deleted and then recreated", ref.UID))
	}
	return b, nil
}

// nodeOf is the node a pod is bound to; one that is gone counts by its name.
func nodeOf(ctx context.Context, s *Stores, pod *corev1.Pod) (*core.Node, error) {
	if pod.Spec.NodeName == "" {
		return nil, nil
	}
	node, err := fetch[corev1.Node](ctx, s.Nodes, "nodes", "", pod.Spec.NodeName, false)
	if apierrors.IsNotFound(err) {
		return &core.Node{ObjectMeta: metav1.ObjectMeta{Name: pod.Spec.NodeName}}, nil
	}
	if err != nil {
		return nil, err
	}
	return &core.Node{ObjectMeta: identity(node.ObjectMeta)}, nil
}

// identity is all of an object that goes into a token.
func identity(m metav1.ObjectMeta) metav1.ObjectMeta {
	return metav1.ObjectMeta{Namespace: m.Namespace, Name: m.Name, UID: m.UID}
}
