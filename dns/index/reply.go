package index

import "net/netip"

// Code is the kind of an answer.
type Code uint8

const (
	// Outside means the index has nothing to say about the name: it is in
	// another zone, or the address of a reverse name belongs to nobody here.
	Outside Code = iota
	// NotReady means no State was applied yet: SERVFAIL, for a NXDOMAIN would
	// be believed and kept.
	NotReady
	// Exists means the name exists; without an answer that is NODATA
	// (RFC 2308 section 2.2).
	Exists
	// Missing means neither the name nor anything below it exists: NXDOMAIN.
	Missing
)

func (c Code) String() string {
	return [...]string{"outside", "not ready", "exists", "missing"}[c]
}

// Record is one resource record. Which fields count depends on Type.
type Record struct {
	// Owner is fully qualified; "" is the name that was asked for.
	Owner string
	Type  uint16
	// Addr of A and AAAA.
	Addr netip.Addr
	// Target of CNAME, SRV, PTR and NS, fully qualified.
	Target string
	// Port and Weight of SRV; the priority is always 0.
	Port, Weight uint16
	// Text of TXT.
	Text string
}

// Reply is the answer to one question. Reuse it: its slices grow to the
// largest answer seen and are not allocated again.
type Reply struct {
	Code Code
	// Zone is the apex of the zone the name is in, the owner of the SOA.
	Zone   string
	Answer []Record
	Extra  []Record
	// Alias means the only answer is a CNAME and the question was for another
	// type: whoever answers goes on with its target.
	Alias bool
	// Pod means the name is one of a pod, <address>.<namespace>.pod, or the
	// namespace above it. Nobody checks that a pod has the address; whoever
	// does not want such names turns the reply into one with Deny.
	Pod bool
	// SOA means the zone's own SOA record is the answer.
	SOA bool

	labels   labels
	question question
}

func (r *Reply) reset() {
	r.Code, r.Zone, r.Alias, r.Pod, r.SOA = Outside, "", false, false, false
	r.Answer, r.Extra = r.Answer[:0], r.Extra[:0]
}

// Deny makes the reply one to a name that does not exist.
func (r *Reply) Deny() {
	r.Code, r.Alias = Missing, false
	r.Answer, r.Extra = r.Answer[:0], r.Extra[:0]
}
