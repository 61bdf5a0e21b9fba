package index

import (
	"net/netip"
	"slices"
	"sync"
)

// reverse finds the services an address belongs to. It is asked far less
// often than the table, so a lock is good enough. Nearly all addresses belong
// to one service.
type reverse struct {
	mu    sync.RWMutex
	first map[[16]byte]*slot
	more  map[[16]byte][]*slot
}

func (r *reverse) init() { r.first, r.more = map[[16]byte]*slot{}, map[[16]byte][]*slot{} }

func (r *reverse) get(a netip.Addr) []*service {
	r.mu.RLock()
	defer r.mu.RUnlock()
	first := r.first[a.As16()]
	if first == nil {
		return nil
	}
	found := []*service{first.service.Load()}
	for _, s := range r.more[a.As16()] {
		found = append(found, s.service.Load())
	}
	return found
}

// replace takes the addresses of the old content of a slot out and puts those
// of the new one in, in one step for readers.
func (r *reverse) replace(c replaced) {
	r.mu.Lock()
	defer r.mu.Unlock()
	c.old.addrs(func(a netip.Addr) { r.remove(a.As16(), c.slot) })
	c.new.addrs(func(a netip.Addr) { r.add(a.As16(), c.slot) })
}

func (r *reverse) add(key [16]byte, s *slot) {
	switch first := r.first[key]; {
	case first == nil:
		r.first[key] = s
	case first != s && !slices.Contains(r.more[key], s):
		r.more[key] = append(r.more[key], s)
	}
}

func (r *reverse) remove(key [16]byte, s *slot) {
	more := r.more[key]
	if r.first[key] != s {
		more = slices.DeleteFunc(more, func(o *slot) bool { return o == s })
	} else if len(more) > 0 {
		r.first[key], more = more[0], more[1:]
	} else {
		delete(r.first, key)
	}
	if len(more) == 0 {
		delete(r.more, key)
	} else {
		r.more[key] = more
	}
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
	for _, list := range [][]int32{s.ready4, s.ready6} {
		for _, i := range list {
			f(s.addr(i))
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
