package index

import (
	"bytes"
	"net/netip"

	"github.com/miekg/dns"

	"meshd.dev/pkg/mesh"
)

// Lookup answers one question of class IN into r. name is in wire format and
// lower case, as Fold makes it; it is not kept.
//
// Whether a name exists never depends on the type asked for (RFC 4074,
// RFC 8020): Lookup first finds what the name is, then which of its records
// have the type.
func (x *Index) Lookup(r *Reply, name []byte, qtype uint16) {
	r.reset()
	l := &r.labels
	if !l.split(name) {
		return
	}
	if left := l.n - x.zoneLabels; left >= 0 && bytes.Equal(l.from(left), x.wire) {
		r.Zone = x.zone
		if !x.Ready() {
			r.Code = NotReady
			return
		}
		x.lookupZone(r, left, qtype)
		return
	}
	if a, zone := reverseAddr(l); zone != "" {
		r.Zone = zone
		if !x.Ready() {
			r.Code = NotReady
			return
		}
		x.lookupAddr(r, a, qtype)
	}
}

// lookupZone answers for a name with left labels before the zone.
func (x *Index) lookupZone(r *Reply, left int, qtype uint16) {
	r.Code = Missing
	if left == 0 {
		x.apex(r, qtype)
		return
	}
	switch last := r.labels.label(left - 1); {
	case string(last) == "svc":
		x.lookupService(r, left-1, qtype)
	case string(last) == "pod":
		x.lookupPod(r, left-1, qtype)
	case string(last) == "dns" && left == 1:
		r.Code = Exists
	case string(last) == "dns" && left == 2 && string(r.labels.label(0)) == "ns":
		r.Code = Exists
		r.Answer = x.appendNameservers(r.Answer, "", qtype)
	case string(last) == "dns-version" && left == 1:
		r.Code = Exists
		if qtype == dns.TypeTXT {
			r.Answer = append(r.Answer, Record{Type: dns.TypeTXT, Text: SpecVersion})
		}
	}
}

func (x *Index) apex(r *Reply, qtype uint16) {
	r.Code = Exists
	switch qtype {
	case dns.TypeSOA:
		r.SOA = true
	case dns.TypeNS:
		ns := "ns.dns." + x.zone
		r.Answer = append(r.Answer, Record{Type: dns.TypeNS, Target: ns})
		r.Extra = x.appendNameservers(r.Extra, ns, dns.TypeA)
		r.Extra = x.appendNameservers(r.Extra, ns, dns.TypeAAAA)
	}
}

func (x *Index) appendNameservers(to []Record, owner string, qtype uint16) []Record {
	for _, a := range *x.nameservers.Load() {
		to = appendAddr(to, owner, qtype, a)
	}
	return to
}

// appendAddr appends the record of a if it is of type qtype.
func appendAddr(to []Record, owner string, qtype uint16, a netip.Addr) []Record {
	if qtype == addrType(a) {
		to = append(to, Record{Owner: owner, Type: qtype, Addr: a})
	}
	return to
}

func addrType(a netip.Addr) uint16 {
	if a.Is4() {
		return dns.TypeA
	}
	return dns.TypeAAAA
}

func (x *Index) namespaceExists(name []byte) bool {
	_, ok := (*x.namespaces.Load())[string(name)]
	return ok
}

// lookupPod answers for <address>.<namespace>.pod: an address in a namespace
// that exists has its name whether a pod holds it or not ("insecure" in
// CoreDNS' kubernetes plugin, and what kubeadm sets).
func (x *Index) lookupPod(r *Reply, left int, qtype uint16) {
	if left == 0 {
		r.Code = Exists
		return
	}
	r.Pod = true
	if left > 2 || !x.namespaceExists(r.labels.label(left-1)) {
		return
	}
	if left == 1 {
		r.Code = Exists
		return
	}
	if a, ok := parseDashed(r.labels.label(0), false); ok {
		r.Code = Exists
		r.Answer = appendAddr(r.Answer, "", qtype, a)
	}
}

// lookupService answers for a name with left labels before svc.<zone>.
func (x *Index) lookupService(r *Reply, left int, qtype uint16) {
	l := &r.labels
	switch {
	case left == 0:
		r.Code = Exists
		return
	case left == 1:
		if x.namespaceExists(l.label(0)) {
			r.Code = Exists
		}
		return
	case left > 4:
		return
	}
	key := l.name[l.at[left-2]:l.at[left]]
	s := x.services.get(key)
	switch {
	case s == nil:
	case s.ExternalName != "":
		if left == 2 && s.target != "" {
			r.alias(s.target, qtype)
		}
	case left == 2:
		x.answerService(r, s, qtype)
	case left == 3:
		x.answerBelow(r, s, l.label(0), qtype)
	case left == 4:
		answerPort(r, s, l.label(0), l.label(1), qtype)
	}
}

// alias answers with a CNAME, which stands for every type (RFC 1034 section
// 3.6.2).
func (r *Reply) alias(target string, qtype uint16) {
	r.Code = Exists
	r.Alias = qtype != dns.TypeCNAME
	r.Answer = append(r.Answer, Record{Type: dns.TypeCNAME, Target: target})
}

// answerService answers for the name of a service itself.
func (x *Index) answerService(r *Reply, s *service, qtype uint16) {
	if s.Headless && !s.ready() {
		return // NXDOMAIN, says the specification, section 2.4.1
	}
	r.Code = Exists
	switch qtype {
	case dns.TypeA:
		x.answerAddrs(r, s, s.vips4, s.ready4, qtype)
	case dns.TypeAAAA:
		x.answerAddrs(r, s, s.vips6, s.ready6, qtype)
	case dns.TypeSRV:
		answerSRV(r, s, portFilter{})
	}
}

func (x *Index) answerAddrs(r *Reply, s *service, vips []netip.Addr, ready []int32, qtype uint16) {
	if !s.Headless {
		for _, a := range vips {
			r.Answer = append(r.Answer, Record{Type: qtype, Addr: a})
		}
		return
	}
	start := 0
	if len(ready) > 1 {
		start = int(x.turn.Add(1) % uint32(len(ready)))
	}
	for _, all := range [...]bool{false, true} {
		r.Answer = s.appendAddrs(r.Answer, ready[start:], qtype, all)
		r.Answer = s.appendAddrs(r.Answer, ready[:start], qtype, all)
		if len(r.Answer) > 0 { // else all are down, which means more likely we are
			return
		}
	}
}

// appendAddrs appends the addresses of endpoints: all, or those on a node that
// is up.
func (s *service) appendAddrs(to []Record, endpoints []int32, qtype uint16, all bool) []Record {
	for _, i := range endpoints {
		if all || s.up(i) {
			to = append(to, Record{Type: qtype, Addr: s.addr(i)})
		}
	}
	return to
}

// answerBelow answers for one label below a service: the name of an endpoint,
// or _tcp, which holds the names of ports.
func (x *Index) answerBelow(r *Reply, s *service, label []byte, qtype uint16) {
	if label[0] == '_' {
		if s.hasPort(portFilter{protocol: label[1:]}) {
			r.Code = Exists
		}
		return
	}
	dashed, _ := parseDashed(label, true)
	named := func(i int32) bool { return s.isNamed(i, label, dashed) }
	up := s.anyUp(named)
	for i := range s.count() {
		if !named(i) {
			continue
		}
		r.Code = Exists
		a := s.addr(i)
		if qtype == addrType(a) && (!up || s.up(i)) && !hasAddr(r.Answer, a) {
			r.Answer = append(r.Answer, Record{Type: qtype, Addr: a})
		}
	}
	if r.Code == Exists && qtype == dns.TypeSRV {
		answerEndpointSRV(r, s, portFilter{}, named)
	}
}

// anyUp reports whether one of the wanted endpoints is on a node that is not
// down.
func (s *service) anyUp(want func(i int32) bool) bool {
	for i := range s.count() {
		if s.up(i) && want(i) {
			return true
		}
	}
	return false
}

func hasAddr(records []Record, a netip.Addr) bool {
	for i := range records {
		if records[i].Addr == a {
			return true
		}
	}
	return false
}

// answerPort answers for _port._protocol below a service (RFC 2782).
func answerPort(r *Reply, s *service, port, protocol []byte, qtype uint16) {
	if port[0] != '_' || protocol[0] != '_' || len(port) == 1 || len(protocol) == 1 {
		return
	}
	f := portFilter{name: port[1:], protocol: protocol[1:]}
	if !s.hasPort(f) {
		return
	}
	r.Code = Exists
	if qtype == dns.TypeSRV {
		answerSRV(r, s, f)
	}
}

// portFilter picks ports; what is nil picks all. With a name or a protocol
// given, only ports that have a name count, for only they have records.
type portFilter struct{ name, protocol []byte }

func (f portFilter) match(name string, protocol mesh.Protocol) bool {
	if f.protocol == nil {
		return true
	}
	return name != "" && equalFold(f.protocol, string(protocol)) && (f.name == nil || equalFold(f.name, name))
}

func (s *service) hasPort(f portFilter) bool {
	if !s.Headless {
		for _, p := range s.Ports {
			if f.match(p.Name, p.Protocol) {
				return true
			}
		}
		return false
	}
	for i := range s.Endpoints {
		if e := &s.Endpoints[i]; e.Ready && e.Addr.IsValid() && hasEndpointPort(e, f) {
			return true
		}
	}
	return false
}

func hasEndpointPort(e *mesh.Endpoint, f portFilter) bool {
	for _, p := range e.Ports {
		if f.match(p.Name, p.Protocol) {
			return true
		}
	}
	return false
}

// answerSRV answers with the ports of a service that f picks, and with the
// addresses of what they point at.
func answerSRV(r *Reply, s *service, f portFilter) {
	if s.Headless {
		answerEndpointSRV(r, s, f, func(int32) bool { return true })
		return
	}
	for _, p := range s.Ports {
		if f.match(p.Name, p.Protocol) {
			r.appendSRV(s.fqdn, p.Port)
		}
	}
	if len(r.Answer) > 0 {
		for _, a := range s.vips4 {
			r.Extra = appendAddr(r.Extra, s.fqdn, dns.TypeA, a)
		}
		for _, a := range s.vips6 {
			r.Extra = appendAddr(r.Extra, s.fqdn, dns.TypeAAAA, a)
		}
	}
	r.weigh()
}

// answerEndpointSRV does the same with the endpoints that want picks.
func answerEndpointSRV(r *Reply, s *service, f portFilter, want func(i int32) bool) {
	usable := func(i int32) bool {
		e := &s.Endpoints[i]
		return e.Ready && e.Addr.IsValid() && want(i) && hasEndpointPort(e, f)
	}
	up := s.anyUp(usable)
	seen := map[srvKey]bool{}
	once := func(k srvKey) bool {
		before := seen[k]
		seen[k] = true
		return !before
	}
	for i := range s.count() {
		if !usable(i) || up && !s.up(i) {
			continue
		}
		e, name := &s.Endpoints[i], s.endpointName(i)
		for _, p := range e.Ports {
			if f.match(p.Name, p.Protocol) && once(srvKey{name: name, port: p.Port}) {
				r.appendSRV(name, p.Port)
			}
		}
		if a := s.addr(i); once(srvKey{name: name, addr: a}) {
			r.Extra = appendAddr(r.Extra, name, addrType(a), a)
		}
	}
	r.weigh()
}

type srvKey struct {
	name string
	port uint16
	addr netip.Addr
}

func (r *Reply) appendSRV(target string, port uint16) {
	r.Answer = append(r.Answer, Record{Type: dns.TypeSRV, Target: target, Port: port})
}

// weigh gives every SRV record the same share of 100, and at least 1.
func (r *Reply) weigh() {
	for i := range r.Answer {
		r.Answer[i].Weight = uint16(max(1, 100/len(r.Answer)))
	}
}

// lookupAddr answers for the reverse name of a.
func (x *Index) lookupAddr(r *Reply, a netip.Addr, qtype uint16) {
	if !a.IsValid() {
		return
	}
	for _, s := range x.reverse.get(a) {
		for _, name := range s.namesOf(a) {
			r.Code = Exists
			if qtype == dns.TypePTR && !hasTarget(r.Answer, name) {
				r.Answer = append(r.Answer, Record{Type: dns.TypePTR, Target: name})
			}
		}
	}
}

// namesOf are the names a has because of s.
func (s *service) namesOf(a netip.Addr) []string {
	var names []string
	for _, vips := range [][]netip.Addr{s.vips4, s.vips6} {
		for _, vip := range vips {
			if vip == a {
				names = append(names, s.fqdn)
			}
		}
	}
	for i := range s.count() {
		if s.Endpoints[i].Ready && s.addr(i) == a {
			names = append(names, s.endpointName(i))
		}
	}
	return names
}

func hasTarget(records []Record, target string) bool {
	for i := range records {
		if records[i].Target == target {
			return true
		}
	}
	return false
}
