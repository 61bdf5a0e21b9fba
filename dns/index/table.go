package index

import (
	"hash/maphash"
	"maps"
	"sync/atomic"
)

// shards is chosen so that adding a service to ten thousand copies about 40
// entries.
const shards = 256

// slot is the place of one service. It stays the same for as long as the
// service exists; its content is swapped whole.
type slot struct{ service atomic.Pointer[service] }

// table finds the service of two labels in wire format: <name><namespace>, as
// they stand next to each other in a question. Readers see immutable maps.
type table struct {
	seed   maphash.Seed
	shards [shards]atomic.Pointer[map[string]*slot]
}

func (t *table) init() {
	t.seed = maphash.MakeSeed()
	for i := range t.shards {
		t.shards[i].Store(&map[string]*slot{})
	}
}

func (t *table) get(key []byte) *service {
	m := *t.shards[maphash.Bytes(t.seed, key)%shards].Load()
	s := m[string(key)]
	if s == nil {
		return nil
	}
	return s.service.Load()
}

func (t *table) len() int {
	n := 0
	for i := range t.shards {
		n += len(*t.shards[i].Load())
	}
	return n
}

// replaced says what a change did to a slot.
type replaced struct {
	slot     *slot
	old, new *service
}

// apply carries out changes: contents are swapped in place, and a shard that
// gains or loses services is copied once, whatever their number.
func (t *table) apply(changes []change) []replaced {
	done := make([]replaced, 0, len(changes))
	dirty := map[int]map[string]*slot{}
	for _, c := range changes {
		key := c.key()
		if key == "" {
			continue
		}
		i := int(maphash.String(t.seed, key) % shards)
		m := dirty[i]
		if m == nil {
			m = *t.shards[i].Load()
		}
		at, known := m[key]
		if known && c.entry != nil {
			done = append(done, replaced{at, at.service.Swap(c.entry), c.entry})
			continue
		}
		if !known && c.entry == nil {
			continue
		}
		if dirty[i] == nil {
			m = maps.Clone(m)
			dirty[i] = m
		}
		if c.entry == nil {
			delete(m, key)
			done = append(done, replaced{slot: at, old: at.service.Load()})
			continue
		}
		at = &slot{}
		at.service.Store(c.entry)
		m[key] = at
		done = append(done, replaced{slot: at, new: c.entry})
	}
	for i, m := range dirty {
		t.shards[i].Store(&m)
	}
	return done
}

func (c change) key() string {
	s := c.new
	if s == nil {
		s = c.old
	}
	return serviceKey(s.Name, s.Namespace)
}
