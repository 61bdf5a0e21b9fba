package index

import (
	"net/netip"
	"slices"
	"sync"
)

// reverse finds the services an address belongs to. It is asked far less
// often than the table, so a lock is good enough.
type reverse struct {
	mu     sync.RWMutex
	byAddr map[[16]byte][]*slot
}

func (r *reverse) get(a netip.Addr) []*slot {
	r.mu.RLock()
	defer r.mu.RUnlock()
	return r.byAddr[a.As16()]
}

// replace takes the addresses of the old content of a slot out and puts those
// of the new one in, in one step for readers.
func (r *reverse) replace(c replaced) {
	r.mu.Lock()
	defer r.mu.Unlock()
	c.old.addrs(func(a netip.Addr) {
		key := a.As16()
		// A reader may hold the slice: never change it in place.
		left := slices.DeleteFunc(slices.Clone(r.byAddr[key]), func(s *slot) bool { return s == c.slot })
		if len(left) == 0 {
			delete(r.byAddr, key)
			return
		}
		r.byAddr[key] = left
	})
	c.new.addrs(func(a netip.Addr) {
		key := a.As16()
		if slots := r.byAddr[key]; !slices.Contains(slots, c.slot) {
			r.byAddr[key] = append(slices.Clip(slots), c.slot)
		}
	})
}

// addrs calls f with every address of s that has a name.
func (s *service) addrs(f func(netip.Addr)) {
	if s == nil {
		return
	}
	for _, list := range [][]netip.Addr{s.vips4, s.vips6} {
		for _, a := range list {
			f(a)
		}
	}
	for _, list := range [][]endpoint{s.endpoints4, s.endpoints6} {
		for _, e := range list {
			f(e.addr)
		}
	}
}

// reverseAddr reads a name below in-addr.arpa or ip6.arpa (RFC 1035 section
// 3.5, RFC 3596 section 2.5) and says which of the two zones it is in; the
// address is not valid when the name stands for none.
func reverseAddr(l *labels) (a netip.Addr, zone string) {
	if l.n < 2 || string(l.label(l.n-1)) != "arpa" {
		return a, ""
	}
	switch string(l.label(l.n - 2)) {
	case "in-addr":
		return reverse4(l), "in-addr.arpa."
	case "ip6":
		return reverse6(l), "ip6.arpa."
	}
	return a, ""
}

func reverse4(l *labels) netip.Addr {
	if l.n != 6 {
		return netip.Addr{}
	}
	var b [4]byte
	for i := range b {
		digits := l.label(3 - i)
		if len(digits) > 3 || len(digits) > 1 && digits[0] == '0' {
			return netip.Addr{}
		}
		n := 0
		for _, d := range digits {
			if d < '0' || d > '9' {
				return netip.Addr{}
			}
			n = n*10 + int(d-'0')
		}
		if n > 255 {
			return netip.Addr{}
		}
		b[i] = byte(n)
	}
	return netip.AddrFrom4(b)
}

func reverse6(l *labels) netip.Addr {
	if l.n != 34 {
		return netip.Addr{}
	}
	var b [16]byte
	for i := range 32 {
		digit := l.label(31 - i)
		if len(digit) != 1 {
			return netip.Addr{}
		}
		var n byte
		switch d := digit[0]; {
		case '0' <= d && d <= '9':
			n = d - '0'
		case 'a' <= d && d <= 'f':
			n = d - 'a' + 10
		default:
			return netip.Addr{}
		}
		b[i/2] = b[i/2]<<4 | n
	}
	return netip.AddrFrom16(b).Unmap()
}
