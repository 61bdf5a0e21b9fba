package index

import "sync/atomic"

// node is what the index knows about a machine: whether its endpoints are
// worth an answer. Endpoints point at it, so marking it is one store.
type node struct{ down atomic.Bool }

func (n *node) up() bool { return n == nil || !n.down.Load() }

// nodes gives every name of a node one node.
type nodes struct{ byName map[string]*node }

func (t *nodes) get(name string) *node {
	if name == "" {
		return nil
	}
	n, ok := t.byName[name]
	if !ok {
		n = &node{}
		t.byName[name] = n
	}
	return n
}

// crowded reports whether so many names were seen, next to the live nodes of
// the cluster, that it is time to forget some.
func (t *nodes) crowded(live int) bool { return len(t.byName) > 4096+4*live }

// forgetUp forgets the nodes that are not down; those in use come back when
// the services are compiled again.
func (t *nodes) forgetUp() {
	for name, n := range t.byName {
		if n.up() {
			delete(t.byName, name)
		}
	}
}
