package controller

import (
	"context"
	"errors"
	"fmt"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"meshd.dev/pkg/reconcile"
)

// tokens deletes join tokens (bootstrap token Secrets of kube-system) that
// are past their time, so that what no longer opens a door does not lie about.
// The API server refuses an expired one in any case. It asks the API a few
// times a minute instead of holding secrets in memory.
type tokens struct {
	plane *plane
	loop  *reconcile.Loop
	now   func() time.Time
}

// tokenResync is how often expired tokens are looked for.
const tokenResync = 20 * time.Second

func newTokens(p *plane) *tokens {
	c := &tokens{plane: p, now: time.Now}
	c.loop = p.loop("tokens", c.do, func(cfg *reconcile.Config) { cfg.Resync = tokenResync })
	return c
}

func (c *tokens) Run(ctx context.Context) error { return c.loop.Run(ctx) }

func (c *tokens) do(ctx context.Context) error {
	secrets := c.plane.client.CoreV1().Secrets(metav1.NamespaceSystem)
	list, err := secrets.List(ctx, metav1.ListOptions{FieldSelector: "type=" + string(corev1.SecretTypeBootstrapToken)})
	if err != nil {
		return fmt.Errorf("list join tokens: %w", err)
	}
	var errs []error
	for i := range list.Items {
		s := &list.Items[i]
		if !tokenExpired(s, c.now()) {
			continue
		}
		err := secrets.Delete(ctx, s.Name, metav1.DeleteOptions{Preconditions: &metav1.Preconditions{UID: &s.UID, ResourceVersion: &s.ResourceVersion}})
		switch {
		case apierrors.IsNotFound(err) || apierrors.IsConflict(err):
		case err != nil:
			errs = append(errs, fmt.Errorf("delete expired join token %s: %w", s.Name, err))
		default:
			c.plane.cfg.Log.Info("expired join token deleted", "secret", s.Name)
		}
	}
	return errors.Join(errs...)
}

// tokenExpired says whether s is a join token whose time is over. One without
// an expiration never is; one whose expiration cannot be read is, because
// nothing can accept it either.
func tokenExpired(s *corev1.Secret, now time.Time) bool {
	raw, ok := s.Data["expiration"]
	if s.Type != corev1.SecretTypeBootstrapToken || !ok || len(raw) == 0 {
		return false
	}
	t, err := time.Parse(time.RFC3339, string(raw))
	return err != nil || !now.Before(t)
}
