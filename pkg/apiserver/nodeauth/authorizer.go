package nodeauth

import (
	"context"
	"fmt"
	"time"

	"k8s.io/apiserver/pkg/authorization/authorizer"
)

const (
	// patience is how long a refusal waits for the index to catch up.
	patience = time.Second
	// maxWaiting bounds the requests that wait at a time; more are refused
	// at once.
	maxWaiting = 64
)

type nodeAuthorizer struct {
	index    *Index
	patience time.Duration
	waiting  chan struct{}
}

// NewAuthorizer returns the authorizer of agents. It has no opinion on anyone
// else.
func NewAuthorizer(x *Index) authorizer.Authorizer { return newAuthorizer(x, patience) }

func newAuthorizer(x *Index, patience time.Duration) authorizer.Authorizer {
	n := &nodeAuthorizer{index: x, patience: patience, waiting: make(chan struct{}, maxWaiting)}
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
	seen := n.index.next()
	ok, more := n.check(node, a)
	if !ok && more {
		ok = n.wait(ctx, seen, node, a)
	}
	if ok {
		return authorizer.DecisionAllow, "", nil
	}
	if more && !n.index.HasSynced() {
		return authorizer.DecisionNoOpinion, "the pods of the nodes are not known yet, try again", nil
	}
	return authorizer.DecisionNoOpinion, fmt.Sprintf("node %q has no pod that needs this, nor is it its own", node), nil
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

// wait checks again after each change of the index, for a short while.
func (n *nodeAuthorizer) wait(ctx context.Context, changed <-chan struct{}, node string, a authorizer.Attributes) bool {
	select {
	case n.waiting <- struct{}{}:
		defer func() { <-n.waiting }()
	default:
		return false
	}
	ctx, cancel := context.WithTimeout(ctx, n.patience)
	defer cancel()
	for {
		select {
		case <-ctx.Done():
			return false
		case <-changed:
		}
		changed = n.index.next()
		if ok, _ := n.check(node, a); ok {
			return true
		}
	}
}
