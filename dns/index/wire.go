package index

import (
	"encoding/binary"

	"github.com/miekg/dns"
)

// Options of Answer.
type Options struct {
	// TTL of records in seconds.
	TTL uint32
	// NoPods leaves out the names of pods.
	NoPods bool
	// MaxSize bounds a response in octets, whatever size the client says it
	// takes, and is the size the response says we take. Default 1232, which
	// no sane path fragments.
	MaxSize int
}

const (
	headerSize  = 12
	optSize     = 11
	minResponse = 512 // what every client takes (RFC 1035 section 2.3.4)

	flagResponse      = 1 << 15
	flagAuthoritative = 1 << 10
	flagTruncated     = 1 << 9
	flagRecursion     = 1 << 8 // desired; copied
	flagChecking      = 1 << 4 // disabled; copied
	maskOpcode        = 0xf << 11
	flagDO            = 1 << 15 // of the OPT record
)

// Answer appends the response to query, a message as it came off the wire, to
// dst. It knows the common questions only: one question of class IN, at most a
// plain OPT record, and an answer of addresses or a denial. For anything else
// it returns false, and the message goes to a server that knows the rest. r is
// scratch space and afterwards holds what was found.
func (x *Index) Answer(dst, query []byte, r *Reply, o Options) ([]byte, bool) {
	if o.MaxSize == 0 {
		o.MaxSize = 1232
	}
	q := &r.question
	if !q.parse(query) {
		return dst, false
	}
	x.Lookup(r, q.name(), q.qtype)
	if o.NoPods && r.Pod {
		r.Deny()
	}
	o.MaxSize = max(o.MaxSize, minResponse)
	if !q.plain(r) || r.Zone != x.zone || r.Code != Exists && r.Code != Missing {
		return dst, false
	}
	return x.appendResponse(dst, q, r, o), true
}

// question is the part of a message that Answer reads. It lives in a Reply,
// so that it is not allocated for every question.
type question struct {
	message []byte
	end     int // of the question section
	qtype   uint16
	edns    bool
	do      bool
	size    int // the client takes

	folded [256]byte
	length int
}

func (q *question) name() []byte { return q.folded[:q.length] }

// plain reports whether r can be written by appendResponse.
func (q *question) plain(r *Reply) bool {
	if r.Alias || r.SOA || len(r.Extra) > 0 || q.qtype == dns.TypeAXFR || q.qtype == dns.TypeIXFR {
		return false
	}
	return len(r.Answer) == 0 || q.qtype == dns.TypeA || q.qtype == dns.TypeAAAA
}

func (q *question) parse(m []byte) bool {
	if len(m) < headerSize {
		return false
	}
	flags := binary.BigEndian.Uint16(m[2:])
	counts := binary.BigEndian.Uint64(m[4:]) // questions, answers, authority, additional
	if flags&(flagResponse|maskOpcode|flagTruncated) != 0 || counts>>16 != 1<<32 || counts&0xffff > 1 {
		return false
	}
	q.message, q.edns, q.do, q.size = m, false, false, minResponse
	if !q.parseName() || len(m) < q.end+4 {
		return false
	}
	q.qtype = binary.BigEndian.Uint16(m[q.end:])
	class := binary.BigEndian.Uint16(m[q.end+2:])
	q.end += 4
	if class != dns.ClassINET {
		return false
	}
	if counts&0xffff == 0 {
		return len(m) == q.end
	}
	return q.parseOPT(m[q.end:])
}

// parseName folds the name of the question.
func (q *question) parseName() bool {
	m := q.message[headerSize:]
	for i := 0; i < len(m) && i < len(q.folded)-1; i += int(m[i]) + 1 {
		if m[i] > 63 {
			return false
		}
		if m[i] == 0 {
			q.length = i + 1
			q.end = headerSize + q.length
			copy(q.folded[:], m[:q.length])
			lower(q.folded[:q.length])
			return true
		}
	}
	return false
}

// parseOPT reads an OPT record of version 0 without options (RFC 6891).
func (q *question) parseOPT(b []byte) bool {
	if len(b) != optSize || b[0] != 0 || binary.BigEndian.Uint16(b[1:]) != dns.TypeOPT {
		return false
	}
	if b[5] != 0 || b[6] != 0 || binary.BigEndian.Uint16(b[9:]) != 0 {
		return false
	}
	q.edns = true
	q.do = binary.BigEndian.Uint16(b[7:])&flagDO != 0
	q.size = max(minResponse, int(binary.BigEndian.Uint16(b[3:])))
	return true
}

func (x *Index) appendResponse(dst []byte, q *question, r *Reply, o Options) []byte {
	start := len(dst)
	flags := binary.BigEndian.Uint16(q.message[2:])&(flagRecursion|flagChecking) | flagResponse | flagAuthoritative
	if r.Code == Missing {
		flags |= uint16(dns.RcodeNameError)
	}
	dst = append(dst, q.message[:q.end]...)
	room := min(q.size, o.MaxSize) - q.end
	if q.edns {
		room -= optSize
	}
	answers, authority, additional := 0, 0, 0
	if len(r.Answer) == 0 {
		dst = x.appendSOA(dst, r, o.TTL)
		authority = 1
	}
	for i := range r.Answer {
		a := r.Answer[i].Addr
		if room -= 12 + a.BitLen()/8; room < 0 {
			flags |= flagTruncated
			break
		}
		dst = append(dst, 0xc0, headerSize)
		dst = binary.BigEndian.AppendUint16(dst, r.Answer[i].Type)
		dst = appendRecord(dst, o.TTL, a.BitLen()/8)
		if a.Is4() {
			b := a.As4()
			dst = append(dst, b[:]...)
		} else {
			b := a.As16()
			dst = append(dst, b[:]...)
		}
		answers++
	}
	if q.edns {
		dst = appendOPT(dst, o.MaxSize, q.do)
		additional = 1
	}
	h := dst[start:]
	binary.BigEndian.PutUint16(h[2:], flags)
	binary.BigEndian.PutUint16(h[6:], uint16(answers))
	binary.BigEndian.PutUint16(h[8:], uint16(authority))
	binary.BigEndian.PutUint16(h[10:], uint16(additional))
	return dst
}

// appendRecord appends what comes between the type of a record and its data.
func appendRecord(dst []byte, ttl uint32, length int) []byte {
	dst = binary.BigEndian.AppendUint16(dst, dns.ClassINET)
	dst = binary.BigEndian.AppendUint32(dst, ttl)
	return binary.BigEndian.AppendUint16(dst, uint16(length))
}

func appendOPT(dst []byte, size int, do bool) []byte {
	flags := uint16(0)
	if do {
		flags = flagDO
	}
	dst = append(dst, 0)
	dst = binary.BigEndian.AppendUint16(dst, dns.TypeOPT)
	dst = binary.BigEndian.AppendUint16(dst, uint16(size))
	dst = append(dst, 0, 0)
	dst = binary.BigEndian.AppendUint16(dst, flags)
	return append(dst, 0, 0)
}

// appendSOA appends the SOA record of the zone, the names in it as pointers
// into the question.
func (x *Index) appendSOA(dst []byte, r *Reply, ttl uint32) []byte {
	const mname, rname = "\x02ns\x03dns", "\x0ahostmaster"
	apex := uint16(0xc000 | headerSize + int(r.labels.at[r.labels.n-x.zoneLabels]))
	soa := SOA(r.Zone, x.Serial(), ttl)
	dst = binary.BigEndian.AppendUint16(dst, apex)
	dst = binary.BigEndian.AppendUint16(dst, dns.TypeSOA)
	dst = appendRecord(dst, soa.Hdr.Ttl, len(mname)+2+len(rname)+2+5*4)
	dst = binary.BigEndian.AppendUint16(append(dst, mname...), apex)
	dst = binary.BigEndian.AppendUint16(append(dst, rname...), apex)
	for _, n := range [...]uint32{soa.Serial, soa.Refresh, soa.Retry, soa.Expire, soa.Minttl} {
		dst = binary.BigEndian.AppendUint32(dst, n)
	}
	return dst
}
