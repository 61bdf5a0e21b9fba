package reviews

import (
	"context"
	"net/http"

	authenticationv1 "k8s.io/api/authentication/v1"
	"k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apiserver/pkg/authentication/authenticator"
	"k8s.io/apiserver/pkg/authentication/user"
	"k8s.io/apiserver/pkg/registry/rest"
)

// Authentication are the resources of authentication.k8s.io/v1.
func Authentication(a authenticator.Request, audiences authenticator.Audiences) map[string]rest.Storage {
	return map[string]rest.Storage{
		"tokenreviews": question[*authenticationv1.TokenReview]{
			empty:    func() *authenticationv1.TokenReview { return &authenticationv1.TokenReview{} },
			singular: "tokenreview",
			answer: func(_ context.Context, r *authenticationv1.TokenReview) error {
				return reviewToken(a, audiences, r)
			},
		},
		"selfsubjectreviews": question[*authenticationv1.SelfSubjectReview]{
			empty:    func() *authenticationv1.SelfSubjectReview { return &authenticationv1.SelfSubjectReview{} },
			singular: "selfsubjectreview",
			answer: func(ctx context.Context, r *authenticationv1.SelfSubjectReview) error {
				u, err := asker(ctx)
				if err != nil {
					return err
				}
				r.CreationTimestamp = metav1.Now()
				r.Status.UserInfo = userInfo(u)
				return nil
			},
		},
	}
}

// reviewToken asks a about a request that carries nothing but the token.
func reviewToken(a authenticator.Request, audiences authenticator.Audiences, r *authenticationv1.TokenReview) error {
	if r.Spec.Token == "" {
		return errors.NewBadRequest("token is required for TokenReview in authentication")
	}
	want := authenticator.Audiences(r.Spec.Audiences)
	if len(want) == 0 {
		want = audiences
	}
	req := &http.Request{Header: http.Header{"Authorization": {"Bearer " + r.Spec.Token}}}
	if len(want) > 0 {
		req = req.WithContext(authenticator.WithAudiences(context.Background(), want))
	}
	resp, ok, err := a.AuthenticateRequest(req)
	r.Status = authenticationv1.TokenReviewStatus{Authenticated: ok, Error: text(err)}
	if resp == nil || resp.User == nil {
		return nil
	}
	if len(want) > 0 && len(want.Intersect(resp.Audiences)) == 0 {
		r.Status = authenticationv1.TokenReviewStatus{Error: "the token is not meant for the audience asked for"}
		return nil
	}
	r.Status.User, r.Status.Audiences = userInfo(resp.User), resp.Audiences
	return nil
}

func userInfo(u user.Info) authenticationv1.UserInfo {
	info := authenticationv1.UserInfo{Username: u.GetName(), UID: u.GetUID(), Groups: u.GetGroups()}
	for k, v := range u.GetExtra() {
		if info.Extra == nil {
			info.Extra = map[string]authenticationv1.ExtraValue{}
		}
		info.Extra[k] = v
	}
	return info
}
