package kube

import (
	"cmp"
	"context"
	"errors"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	"k8s.io/client-go/tools/cache"

	"meshd.dev/pkg/mesh"
)

// marks are what events said to read again.
type marks struct {
	nodes    map[string]bool
	services map[key]bool
	// others are all namespaces and ranges of services.
	others bool
	// heard is when the first of these events came.
	heard time.Time
}

// mark says what to read again.
func (w *Window) mark(what func(*marks)) {
	w.mu.Lock()
	if w.marks.heard.IsZero() {
		w.marks = marks{nodes: map[string]bool{}, services: map[key]bool{}, heard: time.Now()}
	}
	what(&w.marks)
	w.mu.Unlock()
	w.loop.Kick()
}

// other handles the objects that are few.
func (w *Window) other() cache.ResourceEventHandler {
	return handler(func(any) { w.mark(func(m *marks) { m.others = true }) })
}

// objects as they were read last: what did not change is not read again. None
// of the lists is ever changed in place.
type objects struct {
	nodes      []mesh.Node // sorted by name
	services   []*mesh.Service
	namespaces []string
	ranges     []netip.Prefix
	faults     map[string]error // by kind and name
	built      bool             // once
}

// rebuild makes the State anew out of what was read before and what events
// have marked since. Without an event, at the start and now and then, it reads
// everything.
func (w *Window) rebuild(context.Context) error {
	w.mu.Lock()
	m := w.marks
	w.marks = marks{}
	subscribers := slices.Clone(w.subscribers)
	w.mu.Unlock()
	if m.heard.IsZero() || !w.read.built {
		m = w.everything(m.heard)
	}
	r, old := &w.read, w.read
	if r.faults == nil {
		r.faults = map[string]error{}
	}
	news := w.readNodes(m.nodes)
	news = w.readServices(m.services) || news
	if m.others {
		r.namespaces = slices.Sorted(slices.Values(w.namespaces.GetStore().ListKeys()))
	}
	if m.others || len(m.services) > 0 {
		r.ranges = w.serviceCIDRs(r.services)
	}
	news = news || !slices.Equal(old.namespaces, r.namespaces) || !slices.Equal(old.ranges, r.ranges)
	r.built = true
	w.cfg.Board.Report("kube/objects", r.fault(), "correct the object named; what could be read of it is in use")
	state := &mesh.State{Nodes: r.nodes, Services: r.services, Namespaces: r.namespaces, ServiceCIDRs: r.ranges, Heard: m.heard}
	if old.built && !news || !old.built && same(w.state.Load(), state) {
		return nil
	}
	w.state.Store(state)
	for _, kick := range subscribers {
		kick()
	}
	return nil
}

// everything there is and was.
func (w *Window) everything(heard time.Time) marks {
	m := marks{nodes: map[string]bool{}, services: map[key]bool{}, others: true, heard: heard}
	for _, obj := range w.nodes.GetStore().List() {
		m.nodes[keyOf(obj).name] = true
	}
	for _, n := range w.read.nodes {
		m.nodes[n.Name] = true
	}
	for _, obj := range w.services.GetStore().List() {
		m.services[keyOf(obj)] = true
	}
	for _, s := range w.read.services {
		m.services[key{s.Namespace, s.Name}] = true
	}
	return m
}

// readNodes reads these again, and reports whether one is not as it was.
func (w *Window) readNodes(names map[string]bool) (news bool) {
	r := &w.read
	byName := make(map[string]mesh.Node, len(names))
	for name := range names {
		delete(r.faults, "node "+name)
		obj, exists, _ := w.nodes.GetStore().GetByKey(name) // never fails
		if exists {
			n, err := NodeOf(obj.(*corev1.Node))
			byName[name] = n
			r.note("node "+name, err)
		}
		old, was := (&mesh.State{Nodes: r.nodes}).Node(name)
		news = news || was != exists || exists && !old.Equal(byName[name])
	}
	if !news {
		return false
	}
	list := make([]mesh.Node, 0, len(r.nodes)+len(byName))
	for _, n := range r.nodes {
		if names[n.Name] {
			now, exists := byName[n.Name]
			if !exists {
				continue
			}
			delete(byName, n.Name)
			n = now
		}
		list = append(list, n)
	}
	if len(byName) > 0 {
		list = slices.AppendSeq(list, maps.Values(byName))
		slices.SortFunc(list, func(a, b mesh.Node) int { return strings.Compare(a.Name, b.Name) })
	}
	r.nodes = list
	return true
}

// readServices reads these again. An unchanged one keeps its pointer.
func (w *Window) readServices(keys map[key]bool) (news bool) {
	if len(keys) == 0 {
		return false
	}
	r := &w.read
	known := make(map[key]*mesh.Service, len(r.services))
	for _, s := range r.services {
		known[key{s.Namespace, s.Name}] = s
	}
	for k := range keys {
		text := "service " + k.namespace + "/" + k.name
		svc, err := w.service(k)
		r.note(text, err)
		old := known[k]
		switch {
		case svc == nil:
			delete(known, k)
		case old == nil || !equalService(old, svc):
			known[k] = svc
		default:
			continue
		}
		news = news || old != svc
	}
	if news {
		r.services = slices.SortedFunc(maps.Values(known), func(a, b *mesh.Service) int {
			return cmp.Or(cmp.Compare(a.Namespace, b.Namespace), cmp.Compare(a.Name, b.Name))
		})
	}
	return news
}

// service as the API has it; nil where it has none.
func (w *Window) service(k key) (*mesh.Service, error) {
	obj, exists, err := w.services.GetStore().GetByKey(k.namespace + "/" + k.name)
	if err != nil || !exists {
		return nil, err
	}
	objs, err := w.slices.GetIndexer().ByIndex(byService, k.namespace+"/"+k.name)
	if err != nil {
		return nil, err
	}
	list := make([]*discoveryv1.EndpointSlice, len(objs))
	for i, o := range objs {
		list[i] = o.(*discoveryv1.EndpointSlice)
	}
	return ServiceOf(obj.(*corev1.Service), list)
}

// note what is wrong with an object, or that nothing is.
func (r *objects) note(what string, err error) {
	if err == nil {
		delete(r.faults, what)
		return
	}
	r.faults[what] = err
}

// fault is all that is wrong, in a stable order.
func (r *objects) fault() error {
	var errs []error
	for _, what := range slices.Sorted(maps.Keys(r.faults)) {
		errs = append(errs, r.faults[what])
	}
	return errors.Join(errs...)
}
