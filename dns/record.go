package dns

import (
	"errors"
	"fmt"
	"net"

	"github.com/miekg/dns"

	"meshd.dev/dns/index"
)

var errNoUpstream = errors.New("target of an ExternalName service: no upstream to ask")

// targetError says that the target of an alias could not be resolved.
type targetError struct {
	target string
	answer *dns.Msg
}

func (e *targetError) Error() string {
	if e.answer == nil {
		return fmt.Sprintf("target %s of an ExternalName service: no answer", e.target)
	}
	return fmt.Sprintf("target %s of an ExternalName service: %s", e.target, dns.RcodeToString[e.answer.Rcode])
}

// appendRRs turns records into what miekg/dns packs; records without an owner
// get name.
func (m *Mesh) appendRRs(to []dns.RR, records []index.Record, name string) []dns.RR {
	for i := range records {
		r := &records[i]
		h := dns.RR_Header{Name: r.Owner, Rrtype: r.Type, Class: dns.ClassINET, Ttl: m.TTL}
		if h.Name == "" {
			h.Name = name
		}
		to = append(to, rr(r, h))
	}
	return to
}

func rr(r *index.Record, h dns.RR_Header) dns.RR {
	switch r.Type {
	case dns.TypeA:
		return &dns.A{Hdr: h, A: net.IP(r.Addr.AsSlice())}
	case dns.TypeAAAA:
		return &dns.AAAA{Hdr: h, AAAA: net.IP(r.Addr.AsSlice())}
	case dns.TypeCNAME:
		return &dns.CNAME{Hdr: h, Target: r.Target}
	case dns.TypeSRV:
		return &dns.SRV{Hdr: h, Weight: r.Weight, Port: r.Port, Target: r.Target}
	case dns.TypePTR:
		return &dns.PTR{Hdr: h, Ptr: r.Target}
	case dns.TypeNS:
		return &dns.NS{Hdr: h, Ns: r.Target}
	default:
		h.Ttl = index.VersionTTL
		return &dns.TXT{Hdr: h, Txt: []string{r.Text}}
	}
}

// soa is the record of the zone; its minimum is how long a denial is kept
// (RFC 2308 section 4).
func (m *Mesh) soa(zone string) dns.RR {
	s := index.SOA(zone, m.Index.Serial(), m.TTL)
	return &s
}
