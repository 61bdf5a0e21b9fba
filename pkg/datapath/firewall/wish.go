package firewall

import (
	"encoding/binary"
	"net/netip"
	"slices"
	"strings"
)

// wish is the table for a configuration, and what is needed to follow small
// changes of it.
type wish struct {
	*table
	cfg Config
	// count of groups that want an element, and of elements that want a chain.
	count  map[place]int
	chains map[string]int
	// contested: two groups claim the same address and port. Who has it
	// depends on their order, so such a wish is always computed anew.
	contested bool
}

// place of an element.
type place struct {
	set string
	element
}

// claim of a group: an element with a value.
type claim struct {
	place
	value string
}

func newWish(cfg Config) *wish {
	w := &wish{
		table: &table{exists: true, chains: map[string]string{}, sets: map[string]string{},
			elements: map[string]map[element]string{}, build: map[string]chain{}},
		cfg: cfg, count: map[place]int{}, chains: map[string]int{},
	}
	for _, s := range specs {
		w.sets[s.name] = s.signature()
		w.elements[s.name] = map[element]string{}
	}
	for _, c := range fixedChains(cfg) {
		w.addChain(c)
	}
	for name, ps := range map[string][]netip.Prefix{"own": cfg.PodCIDRs, "cluster": cfg.Cluster, "direct": cfg.Direct, "svcnet": cfg.ServiceCIDRs} {
		w.addRanges(name, ps)
	}
	for _, g := range cfg.Groups {
		for c := range g.claims(cfg) {
			w.add(c)
		}
	}
	return w
}

func (w *wish) addChain(c chain) {
	w.table.chains[c.name] = c.signature()
	w.build[c.name] = c
}

// add what a group claims; the first to claim an element has it.
func (w *wish) add(c claim) {
	w.count[c.place]++
	if have, taken := w.elements[c.set][c.element]; taken {
		w.contested = w.contested || have != c.value || strings.HasPrefix(c.set, "svc")
		return
	}
	w.elements[c.set][c.element] = c.value
	if !strings.HasPrefix(c.set, "svc") {
		return
	}
	if w.chains[c.value]++; w.chains[c.value] == 1 {
		f, n, nodePort, sticky := parseChainName(c.value)
		w.addChain(chain{name: c.value, rules: []rule{f.pick(n, nodePort, sticky)}})
	}
}

func (w *wish) remove(c claim) {
	if w.count[c.place]--; w.count[c.place] > 0 {
		return
	}
	delete(w.count, c.place)
	delete(w.elements[c.set], c.element)
	if !strings.HasPrefix(c.set, "svc") {
		return
	}
	if w.chains[c.value]--; w.chains[c.value] == 0 {
		delete(w.chains, c.value)
		delete(w.table.chains, c.value)
		delete(w.build, c.value)
	}
}

// canFollow reports whether cfg differs in groups only.
func (w *wish) canFollow(cfg Config) bool { return !w.contested && sameFixed(w.cfg, cfg) }

// follow turns the wish into the one for cfg and returns the changes. What it
// costs depends on the groups that differ, and on nothing else. The wish is
// spoiled when it is contested afterwards.
func (w *wish) follow(cfg Config) []op {
	gone, added := differing(w.cfg.Groups, cfg.Groups)
	before := newShadow(w.table)
	for _, g := range gone {
		for c := range g.claims(cfg) {
			before.touch(c)
			w.remove(c)
		}
	}
	for _, g := range added {
		for c := range g.claims(cfg) {
			before.touch(c)
			w.add(c)
		}
	}
	w.cfg = cfg
	return before.diff()
}

func sameFixed(a, b Config) bool {
	return a.Device == b.Device && a.PodLinks == b.PodLinks && slices.Equal(a.PodCIDRs, b.PodCIDRs) &&
		slices.Equal(a.MeshAddrs, b.MeshAddrs) && slices.Equal(a.Cluster, b.Cluster) && slices.Equal(a.Direct, b.Direct) && slices.Equal(a.ServiceCIDRs, b.ServiceCIDRs) &&
		slices.Equal(a.Resolver, b.Resolver)
}

// differing groups: what both lists begin and end with is the same.
func differing(old, now []*Group) (gone, added []*Group) {
	for len(old) > 0 && len(now) > 0 && old[0] == now[0] {
		old, now = old[1:], now[1:]
	}
	for len(old) > 0 && len(now) > 0 && old[len(old)-1] == now[len(now)-1] {
		old, now = old[:len(old)-1], now[:len(now)-1]
	}
	stays := make(map[*Group]bool, len(now))
	for _, g := range now {
		stays[g] = true
	}
	for _, g := range old {
		if stays[g] {
			delete(stays, g)
		} else {
			gone = append(gone, g)
		}
	}
	for _, g := range now {
		if stays[g] {
			added = append(added, g)
		}
	}
	return gone, added
}

// shadow is what the touched places of a table were before.
type shadow struct {
	now      *table
	elements map[string]map[element]string
	absent   map[place]bool
	chains   map[string]bool // was there?
}

func newShadow(t *table) *shadow {
	return &shadow{t, map[string]map[element]string{}, map[place]bool{}, map[string]bool{}}
}

func (s *shadow) touch(c claim) {
	if strings.HasPrefix(c.set, "svc") {
		if _, seen := s.chains[c.value]; !seen {
			_, s.chains[c.value] = s.now.chains[c.value]
		}
	}
	if _, seen := s.elements[c.set][c.element]; seen || s.absent[c.place] {
		return
	}
	value, ok := s.now.elements[c.set][c.element]
	if !ok {
		s.absent[c.place] = true
		return
	}
	if s.elements[c.set] == nil {
		s.elements[c.set] = map[element]string{}
	}
	s.elements[c.set][c.element] = value
}

// diff is the same as the diff of whole tables, of the touched places alone.
func (s *shadow) diff() []op {
	part := func(get func(set string, e element) (string, bool)) *table {
		t := &table{exists: true, sets: s.now.sets, chains: map[string]string{}, elements: map[string]map[element]string{}, build: s.now.build}
		put := func(set string, e element) {
			if v, ok := get(set, e); ok {
				if t.elements[set] == nil {
					t.elements[set] = map[element]string{}
				}
				t.elements[set][e] = v
			}
		}
		for set, es := range s.elements {
			for e := range es {
				put(set, e)
			}
		}
		for p := range s.absent {
			put(p.set, p.element)
		}
		return t
	}
	want := part(func(set string, e element) (string, bool) { v, ok := s.now.elements[set][e]; return v, ok })
	have := part(func(set string, e element) (string, bool) { v, ok := s.elements[set][e]; return v, ok })
	for name, was := range s.chains {
		if was {
			have.chains[name] = ""
		}
		if _, is := s.now.chains[name]; is {
			want.chains[name] = ""
		}
	}
	return diff(want, have)
}

// claims of a group.
func (g *Group) claims(cfg Config) func(yield func(claim) bool) {
	return func(yield func(claim) bool) {
		put := func(set string, f family, value string, key ...[]byte) bool {
			return yield(claim{place{set + string(f), element{key: joinKey(key...)}}, value})
		}
		vips := map[netip.Addr]bool{}
		for _, s := range g.Services {
			proto := s.Protocol.Number()
			if proto == 0 || !s.Addr.IsValid() {
				continue
			}
			f, addr, port := familyOf(s.Addr), s.Addr.AsSlice(), binary.BigEndian.AppendUint16(nil, s.Port)
			if !s.Addr.IsUnspecified() && !vips[s.Addr] {
				vips[s.Addr] = true
				if !put("vip", f, "", addr) {
					return
				}
			}
			if len(s.Endpoints) == 0 {
				continue
			}
			if !put("svc", f, chainName(f, len(s.Endpoints), s.Addr.IsUnspecified(), s.Sticky), addr, []byte{proto}, port) {
				return
			}
			for slot, e := range s.Endpoints {
				value := joinKey(e.Addr().AsSlice(), binary.BigEndian.AppendUint16(nil, e.Port()))
				if !put("ep", f, value, addr, []byte{proto}, port, native(uint32(slot))) {
					return
				}
			}
		}
		if g.pod != nil {
			for _, e := range g.pod.Elements() {
				if !yield(claim{place{e.Set, element{key: e.Key}}, e.Value}) {
					return
				}
			}
		}
		for _, a := range g.Local {
			for _, m := range cfg.MeshAddrs {
				if m.Is4() == a.Is4() && !put("self", familyOf(a), joinKey(m.AsSlice()), a.AsSlice(), a.AsSlice()) {
					return
				}
			}
		}
	}
}
