package index

import "github.com/miekg/dns"

// VersionTTL is the TTL of the record that names the version of the
// specification, in seconds.
const VersionTTL = 28800

// SOA is the record of zone. Its TTL and its minimum are the time a denial may
// be kept, in seconds.
func SOA(zone string, serial, ttl uint32) dns.SOA {
	return dns.SOA{
		Hdr:     dns.RR_Header{Name: zone, Rrtype: dns.TypeSOA, Class: dns.ClassINET, Ttl: min(ttl, 300)},
		Ns:      "ns.dns." + zone,
		Mbox:    "hostmaster." + zone,
		Serial:  serial,
		Refresh: 7200,
		Retry:   1800,
		Expire:  86400,
		Minttl:  ttl,
	}
}
