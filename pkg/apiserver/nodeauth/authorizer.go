package nodeauth

import (
	"context"
	"fmt"
	"time"

	"k8s.io/apiserver/pkg/authentication/user"
	"k8s.io/apiserver/pkg/authorization/authorizer"
)

const (
	// patience is how long a refusal waits for the index to catch up.
	patience = time.Second
	// maxWaiting bounds the requests that wait at a time for the same kind of
	// news; more are refused at once.
	maxWaiting = 64
)

type nodeAuthorizer struct {
	index    *Index
	patience time.Duration
	// Those that wait for a Node and those that wait for a pod: a removed node
	// that asks and asks does not use up the patience with the others.
	forNode, forPods chan struct{}
}

// NewAuthorizer returns the authorizer of agents. It has no opinion on anyone
// else.
func NewAuthorizer(x *Index) authorizer.Authorizer { return newAuthorizer(x, patience) }

func newAuthorizer(x *Index, patience time.Duration) authorizer.Authorizer {
	n := &nodeAuthorizer{index: x, patience: patience, forNode: make(chan struct{}, maxWaiting), forPods: make(chan struct{}, maxWaiting)}
	return authorizer.AuthorizerFunc(n.authorize)
}

func (n *nodeAuthorizer) authorize(ctx context.Context, a authorizer.Attributes) (authorizer.Decision, string, error) {
	node, isNode := NodeName(a.GetUser())
	switch {
	case !isNode:
		return authorizer.DecisionNoOpinion, "", nil
	case node == "":
		return authorizer.DecisionDeny, fmt.Sprintf("user %q is in group %s but is not a node, want %sNAME", a.GetUser().GetName(), nodesGroup, userPrefix), nil
	case !a.IsResourceRequest():
		return authorizer.DecisionNoOpinion, "", nil
	}
	if d, why := n.member(ctx, node, a.GetUser()); d != authorizer.DecisionAllow {
		return d, why, nil
	}
	ok, more := n.check(node, a)
	if !ok && more {
		ok = n.wait(ctx, n.forPods, func() bool { ok, _ := n.check(node, a); return ok })
	}
	if ok {
		return authorizer.DecisionAllow, "", nil
	}
	if more && !n.index.HasSynced() {
		return authorizer.DecisionNoOpinion, "the pods of the nodes are not known yet, try again", nil
	}
	return authorizer.DecisionNoOpinion, fmt.Sprintf("node %q has no pod that needs this, nor is it its own", node), nil
}

// member allows a node to go on that joined under the name it bears, and
// denies everything to one whose Node is gone or belongs to another key. The
// machine that joined a moment ago is waited for.
func (n *nodeAuthorizer) member(ctx context.Context, node string, u user.Info) (authorizer.Decision, string) {
	known := func() bool { return n.index.isMember(node, u) }
	if known() || n.wait(ctx, n.forNode, known) {
		return authorizer.DecisionAllow, ""
	}
	synced := n.index.HasSynced() // asked before the last look, not after
	switch {
	case known():
		return authorizer.DecisionAllow, ""
	case !synced:
		return authorizer.DecisionNoOpinion, "the nodes are not known yet, try again"
	}
	if _, exists := n.index.member(node); exists {
		return authorizer.DecisionDeny, fmt.Sprintf("node %q joined with another key than the one of this certificate: this machine was removed, and another has its name", node)
	}
	return authorizer.DecisionDeny, fmt.Sprintf("node %q is not in the cluster: it was removed, or has not joined", node)
}

// check reports whether a rule allows a, and whether news from the index could
// still change a refusal.
func (n *nodeAuthorizer) check(node string, a authorizer.Attributes) (ok, more bool) {
	for _, r := range rules {
		if !r.covers(a) {
			continue
		}
		if r.needsPods {
			more = more || a.GetName() != ""
			if !n.index.HasSynced() {
				continue
			}
		}
		if r.scope(n.index, node, a) {
			return true, false
		}
	}
	return false, more
}

// wait asks again after each change of the index, for a short while.
func (n *nodeAuthorizer) wait(ctx context.Context, waiting chan struct{}, holds func() bool) bool {
	select {
	case waiting <- struct{}{}:
		defer func() { <-waiting }()
	default:
		return false
	}
	ctx, cancel := context.WithTimeout(ctx, n.patience)
	defer cancel()
	for {
		changed := n.index.next()
		if holds() {
			return true
		}
		select {
		case <-ctx.Done():
			return false
		case <-changed:
		}
	}
}
