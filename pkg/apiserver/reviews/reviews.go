package reviews

import (
	"context"
	"fmt"
	"strings"

	"k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apiserver/pkg/authentication/user"
	"k8s.io/apiserver/pkg/endpoints/request"
	"k8s.io/apiserver/pkg/registry/rest"
)

// question is a resource that can be created and is answered at once. O is
// the object, whose status the answer goes into.
type question[O runtime.Object] struct {
	empty      func() O
	singular   string
	namespaced bool
	answer     func(ctx context.Context, obj O) error
}

var (
	_ rest.Creater              = question[runtime.Object]{}
	_ rest.Scoper               = question[runtime.Object]{}
	_ rest.SingularNameProvider = question[runtime.Object]{}
)

// New implements rest.Storage.
func (q question[O]) New() runtime.Object { return q.empty() }

// Destroy does nothing.
func (q question[O]) Destroy() {}

// NamespaceScoped implements rest.Scoper.
func (q question[O]) NamespaceScoped() bool { return q.namespaced }

// GetSingularName implements rest.SingularNameProvider.
func (q question[O]) GetSingularName() string { return q.singular }

// Create implements rest.Creater.
func (q question[O]) Create(ctx context.Context, obj runtime.Object, validate rest.ValidateObjectFunc, _ *metav1.CreateOptions) (runtime.Object, error) {
	o, ok := obj.(O)
	if !ok {
		return nil, errors.NewBadRequest(fmt.Sprintf("not a %s: %T", q.singular, obj))
	}
	if validate != nil {
		if err := validate(ctx, obj.DeepCopyObject()); err != nil {
			return nil, err
		}
	}
	if err := q.answer(ctx, o); err != nil {
		return nil, err
	}
	return obj, nil
}

func asker(ctx context.Context) (user.Info, error) {
	u, ok := request.UserFrom(ctx)
	if !ok {
		return nil, errors.NewBadRequest("no user present on request")
	}
	return u, nil
}

// text of an error that goes into an answer; "" for none.
func text(err error) string {
	if err == nil {
		return ""
	}
	return strings.TrimSpace(err.Error())
}
