package serviceip

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"sync"
	"time"

	"k8s.io/apimachinery/pkg/types"
)

var (
	errTaken    = errors.New("already allocated to another service")
	errReserved = errors.New("reserved for the service default/kubernetes")
	errFull     = errors.New("no free one left")
)

// An item is one thing a service can hold: an address or a node port.
type item struct {
	addr netip.Addr
	port uint16
}

func (i item) String() string {
	if i.addr.IsValid() {
		return "address " + i.addr.String()
	}
	return fmt.Sprintf("node port %d", i.port)
}

// A hold says who has an item. The stored service counts as one reference,
// and so does each write on its way that adds the item.
type hold struct {
	uid  types.UID
	refs int
	// missing is when a list of the stored services first lacked the item;
	// zero when it was seen or touched since.
	missing time.Time
}

// Pool knows who holds which address and node port. Its methods want the lock
// of the Allocator around them, except where they say otherwise.
type pool struct {
	mu     sync.Mutex
	held   map[item]*hold
	loaded bool
}

// claim adds one reference for uid to each item, or to none of them.
func (p *pool) claim(uid types.UID, items []item) {
	for _, it := range items {
		h := p.held[it]
		if h == nil || h.uid != uid {
			h = &hold{uid: uid}
			p.held[it] = h
		}
		h.refs++
		h.missing = time.Time{}
	}
}

// drop takes one reference of uid from each item.
func (p *pool) drop(uid types.UID, items []item) {
	for _, it := range items {
		h := p.held[it]
		if h == nil || h.uid != uid {
			continue
		}
		h.missing = time.Time{}
		if h.refs--; h.refs <= 0 {
			delete(p.held, it)
		}
	}
}

// forget takes all references of uid from the items: the service is gone.
func (p *pool) forget(uid types.UID, items []item) {
	for _, it := range items {
		if h := p.held[it]; h != nil && h.uid == uid {
			delete(p.held, it)
		}
	}
}

// freeFor reports whether uid may hold the item.
func (p *pool) freeFor(uid types.UID, it item) bool {
	h := p.held[it]
	return h == nil || h.uid == uid
}

// addrRange hands out addresses of one prefix. Offsets count from the network
// address. The upper part is used for automatic choice first, so that people
// who choose low addresses by hand seldom meet one that was taken.
type addrRange struct {
	prefix netip.Prefix
	first  uint32 // lowest offset that may be chosen automatically
	last   uint32
	band   uint32 // offsets below it are chosen automatically only when the rest is full
}

// maxAuto bounds the part of a large range from which addresses are chosen
// automatically, as Kubernetes does.
const maxAuto = 1 << 16

func newAddrRange(p netip.Prefix) (addrRange, error) {
	host := p.Addr().BitLen() - p.Bits()
	if host < 2 {
		return addrRange{}, fmt.Errorf("service CIDR %s: too small, want at least 4 addresses", p)
	}
	size := uint32(maxAuto)
	if host < 16 {
		size = 1 << host
	}
	r := addrRange{prefix: p.Masked(), first: 2, last: size - 1}
	if p.Addr().Is4() && host <= 16 {
		r.last-- // broadcast address
	}
	if size >= 16 {
		r.band = min(max(16, size/16), 256)
	}
	return r, nil
}

// kubernetes is the address of the service default/kubernetes.
func (r addrRange) kubernetes() netip.Addr { return r.prefix.Addr().Next() }

// check reports why an address may not be requested.
func (r addrRange) check(a netip.Addr) error {
	switch {
	case !r.prefix.Contains(a):
		return fmt.Errorf("not in the service range %s", r.prefix)
	case a == r.prefix.Addr():
		return errors.New("the network address of the service range")
	case a.Is4() && !r.prefix.Contains(a.Next()):
		return errors.New("the broadcast address of the service range")
	}
	return nil
}

func (r addrRange) at(offset uint32) netip.Addr {
	b := r.prefix.Addr().As16()
	carry := uint64(offset)
	for i := 15; i >= 0 && carry > 0; i-- {
		carry += uint64(b[i])
		b[i] = byte(carry)
		carry >>= 8
	}
	a := netip.AddrFrom16(b)
	if r.prefix.Addr().Is4() {
		return a.Unmap()
	}
	return a
}

// pick chooses a free address, without holding it.
func (r addrRange) pick(free func(item) bool) (netip.Addr, error) {
	try := func(o uint32) bool { return free(item{addr: r.at(o)}) }
	if o, ok := pickBanded(r.first, r.band, r.last, try); ok {
		return r.at(o), nil
	}
	return netip.Addr{}, fmt.Errorf("service range %s: %w", r.prefix, errFull)
}

// PortRange is a range of node ports, both ends included.
type PortRange struct{ First, Last uint16 }

func (r PortRange) String() string { return fmt.Sprintf("%d-%d", r.First, r.Last) }

func (r PortRange) contains(port int32) bool {
	return port >= int32(r.First) && port <= int32(r.Last)
}

// pick chooses a free port, without holding it.
func (r PortRange) pick(free func(item) bool) (uint16, error) {
	size := uint32(r.Last) - uint32(r.First) + 1
	band := uint32(0)
	if size >= 16 {
		band = min(max(16, size/32), 128)
	}
	try := func(o uint32) bool { return free(item{port: uint16(o)}) }
	if o, ok := pickBanded(uint32(r.First), uint32(r.First)+band, uint32(r.Last), try); ok {
		return uint16(o), nil
	}
	return 0, fmt.Errorf("node port range %s: %w", r, errFull)
}

// pickBanded looks for a number that satisfies ok in [band, last], starting at
// a random place, and then in [first, band).
func pickBanded(first, band, last uint32, ok func(uint32) bool) (uint32, bool) {
	band = min(max(band, first), last)
	n := last - band + 1
	start := rand.Uint32N(n)
	for i := range n {
		if o := band + (start+i)%n; ok(o) {
			return o, true
		}
	}
	for o := first; o < band; o++ {
		if ok(o) {
			return o, true
		}
	}
	return 0, false
}
