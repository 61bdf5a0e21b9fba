package firewall

import (
	"fmt"
	"reflect"
	"slices"

	"meshd.dev/pkg/mesh"
)

// localPods are the pods of this node as the CNI plugin recorded them.
//
// The plugin puts a pod's elements into the sets itself, after its record is
// on disk, and takes them out before the record goes; it needs no daemon for
// that. What is done here brings them back when somebody flushed the table,
// and takes away those nobody has a record of. Because records are read after
// the rules, an element without a record is one that has to go.
type localPods struct {
	read func() ([]mesh.LocalPod, error)
	// groups of the last time, by link: one that did not change keeps its
	// pointer.
	groups map[string]*Group
	last   []*Group
	known  bool
}

// join puts the groups of the pods behind others. When the records cannot be
// read, the pods stay as they were.
func (l *localPods) join(others []*Group) ([]*Group, error) {
	if l.read == nil {
		return others, nil
	}
	pods, err := l.read()
	if err != nil && !l.known {
		return nil, fmt.Errorf("read which pods are attached here: %w", err)
	}
	if err == nil {
		l.take(pods)
	}
	return slices.Concat(others, l.last), nil
}

func (l *localPods) take(pods []mesh.LocalPod) {
	now := make(map[string]*Group, len(pods))
	l.last = nil
	for _, p := range pods {
		g := l.groups[p.Link]
		if g == nil || !reflect.DeepEqual(*g.pod, p) {
			g = &Group{pod: &p}
		}
		now[p.Link] = g
		l.last = append(l.last, g)
	}
	l.groups, l.known = now, true
}
