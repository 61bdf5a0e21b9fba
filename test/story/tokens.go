package story

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"
)

// Tokens is the story of who may join: each kind of bad token is refused with a
// sentence a person understands, a good one serves one machine.
func Tokens() []Step {
	return []Step{
		{"three machines, meshd server on m1", serverAndTwoMore},
		{"a mistyped token is called mistyped", refusedToken("mistyped", mistyped)},
		{"a revoked token is not known", refusedToken("not known here", revoked)},
		{"an expired token is called expired", refusedToken("expired", expired)},
		{"a good token lets m2 join", goodToken},
		{"a used token is called used", usedToken},
		{"a name that is taken is refused", takenName},
		{"only m1 and m2 are nodes", func(ctx context.Context, w *World) (string, error) { return w.NodesReady(ctx, Names[:2]) }},
	}
}

func serverAndTwoMore(ctx context.Context, w *World) (string, error) {
	if err := w.BuildImages(ctx); err != nil {
		return "", err
	}
	if err := w.Boot(ctx, Names...); err != nil {
		return "", err
	}
	return "", w.StartServer(ctx)
}

// refusedToken has m2 join with a token that is bad in one way.
func refusedToken(says string, bad func(context.Context, *World) (string, error)) func(context.Context, *World) (string, error) {
	return func(ctx context.Context, w *World) (string, error) {
		token, err := bad(ctx, w)
		if err != nil {
			return "", err
		}
		return w.refusedJoin(ctx, "m2", "m2", token, says)
	}
}

// refusedJoin joins and wants it to end with an error that holds says.
func (w *World) refusedJoin(ctx context.Context, machine, node, token, says string) (string, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, time.Minute, errors.New("meshd join goes on"))
	defer cancel()
	m := w.Machine(machine)
	_, err := m.Run(ctx, "meshd", "join", w.Machine("m1").IPv4().String(), "--token", token,
		"--node-name", node, "--node-ip", m.IPv4().String())
	switch {
	case ctx.Err() != nil:
		return "", context.Cause(ctx)
	case err == nil:
		return "", errors.New("meshd join ended well")
	case !strings.Contains(err.Error(), says):
		return "", fmt.Errorf("want an error with %q in it, got: %w", says, err)
	}
	text := err.Error()
	return text[strings.LastIndex(text, "meshd: ")+len("meshd: "):], nil
}

func mistyped(ctx context.Context, w *World) (string, error) {
	token, err := w.Token(ctx)
	if err != nil || len(token) < 20 {
		return "", fmt.Errorf("token %q: %w", token, err)
	}
	b := []byte(token)
	if b[12] == 'a' {
		b[12] = 'b'
	} else {
		b[12] = 'a'
	}
	return string(b), nil
}

func revoked(ctx context.Context, w *World) (string, error) {
	token, err := w.Token(ctx)
	if err != nil {
		return "", err
	}
	id, _, _ := strings.Cut(token, ".")
	_, err = w.Machine("m1").Run(ctx, "meshctl", "token", "revoke", id)
	return token, err
}

func expired(ctx context.Context, w *World) (string, error) {
	token, err := w.Token(ctx, "--ttl", "1s")
	time.Sleep(2 * time.Second) // the token's life
	return token, err
}

func goodToken(ctx context.Context, w *World) (string, error) {
	token, err := w.Token(ctx)
	if err != nil {
		return "", err
	}
	w.used = token
	if err := w.Join(ctx, "m2", token); err != nil {
		return "", err
	}
	return w.NodesReady(ctx, Names[:2])
}

func usedToken(ctx context.Context, w *World) (string, error) {
	return w.refusedJoin(ctx, "m3", "m3", w.used, "already used")
}

func takenName(ctx context.Context, w *World) (string, error) {
	token, err := w.Token(ctx)
	if err != nil {
		return "", err
	}
	return w.refusedJoin(ctx, "m3", "m2", token, "has joined already")
}
