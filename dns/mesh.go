// Package dns is the CoreDNS plugin "mesh": it answers for the services of a
// cluster out of a dns/index. README.md is its manual.
package dns

import (
	"context"
	"slices"
	"sync"

	"github.com/coredns/coredns/plugin"
	"github.com/coredns/coredns/plugin/pkg/fall"
	"github.com/coredns/coredns/request"
	"github.com/miekg/dns"

	"meshd.dev/dns/index"
)

// Name of the plugin and of its directive.
const Name = "mesh"

// DefaultTTL of records in seconds. Nothing here is cached, so a client that
// keeps a record this long is the only one who can be behind.
const DefaultTTL = 5

// maxAliases is how many CNAMEs are followed inside the zone.
const maxAliases = 8

// Mesh is the handler. Make one by filling the exported fields.
type Mesh struct {
	Next  plugin.Handler
	Index *index.Index
	// Zones answered for, normalised: the cluster domain and the reverse zones.
	Zones []string
	// TTL of records in seconds.
	TTL uint32
	// NoPods leaves out the names of pods.
	NoPods bool
	// Fall says for which zones names that do not exist go to the next plugin.
	Fall fall.F
	// Upstream resolves the targets of ExternalName services.
	Upstream Upstream

	replies sync.Pool // of *index.Reply
}

// Upstream looks up a name outside the zone; CoreDNS' upstream.New() does it
// through the whole chain of plugins.
type Upstream interface {
	Lookup(ctx context.Context, state request.Request, name string, typ uint16) (*dns.Msg, error)
}

// Name implements plugin.Handler.
func (m *Mesh) Name() string { return Name }

// CacheBypassZones tells the cache plugin to leave our names alone.
func (m *Mesh) CacheBypassZones() []string { return m.Zones }

// Ready implements ready.Readiness.
func (m *Mesh) Ready() bool { return m.Index.Ready() }

// ServeDNS implements plugin.Handler.
func (m *Mesh) ServeDNS(ctx context.Context, w dns.ResponseWriter, r *dns.Msg) (int, error) {
	state := request.Request{W: w, Req: r}
	if plugin.Zones(m.Zones).Matches(state.Name()) == "" {
		return plugin.NextOrFailure(Name, m.Next, ctx, w, r)
	}
	if state.QClass() != dns.ClassINET {
		return dns.RcodeRefused, nil
	}
	reply, _ := m.replies.Get().(*index.Reply)
	if reply == nil {
		reply = new(index.Reply)
	}
	defer m.replies.Put(reply)
	m.lookup(reply, state.Name(), state.QType())

	switch reply.Code {
	case index.Outside:
		return plugin.NextOrFailure(Name, m.Next, ctx, w, r)
	case index.NotReady:
		Count(reply.Code, false)
		return dns.RcodeServerFailure, nil
	case index.Missing:
		if m.Fall.Through(state.Name()) {
			return plugin.NextOrFailure(Name, m.Next, ctx, w, r)
		}
	}
	if isTransfer(state.QType()) {
		return dns.RcodeRefused, nil
	}
	Count(reply.Code, len(reply.Answer) > 0)
	return m.write(ctx, state, reply)
}

func isTransfer(qtype uint16) bool { return qtype == dns.TypeAXFR || qtype == dns.TypeIXFR }

// lookup asks the index. A name that cannot be packed did not come off the
// wire and is nobody's.
func (m *Mesh) lookup(reply *index.Reply, name string, qtype uint16) {
	var buf [256]byte
	wire, err := index.Fold(buf[:0], name)
	if err != nil {
		*reply = index.Reply{}
		return
	}
	m.Index.Lookup(reply, wire, qtype)
	if m.NoPods && reply.Pod {
		reply.Deny()
	}
}

// write sends the reply: the records, those an alias leads to, and the SOA
// when there are none.
func (m *Mesh) write(ctx context.Context, state request.Request, reply *index.Reply) (int, error) {
	msg := new(dns.Msg)
	msg.SetReply(state.Req)
	msg.Authoritative = true
	if reply.Code == index.Missing {
		msg.Rcode = dns.RcodeNameError
	}
	if reply.SOA {
		msg.Answer = []dns.RR{m.soa(reply.Zone)}
	}
	negative := len(reply.Answer) == 0 && !reply.SOA
	msg.Answer = m.appendRRs(msg.Answer, reply.Answer, state.QName())
	msg.Extra = m.appendRRs(nil, reply.Extra, state.QName())
	if reply.Alias {
		ended, err := m.follow(ctx, state, msg, reply)
		if err != nil {
			return dns.RcodeServerFailure, err
		}
		negative = !ended
	}
	if negative {
		msg.Ns = []dns.RR{m.soa(m.Index.Zone())}
		if reply.Zone != "" {
			msg.Ns = []dns.RR{m.soa(reply.Zone)}
		}
	}
	if err := state.W.WriteMsg(msg); err != nil {
		return dns.RcodeServerFailure, plugin.Error(Name, err)
	}
	return dns.RcodeSuccess, nil
}

// follow appends what the alias in reply leads to: inside the zone out of the
// index, outside through the chain. It reports whether the chain ended in
// something other than the absence of a record of ours.
func (m *Mesh) follow(ctx context.Context, state request.Request, msg *dns.Msg, reply *index.Reply) (bool, error) {
	seen := []string{state.Name()}
	for reply.Alias {
		target := reply.Answer[0].Target
		name := dns.CanonicalName(target)
		if slices.Contains(seen, name) || len(seen) > maxAliases {
			return true, nil // a loop answers with its links, and nothing resolves
		}
		seen = append(seen, name)
		if !dns.IsSubDomain(m.Index.Zone(), name) {
			return true, m.resolve(ctx, state, msg, target)
		}
		m.lookup(reply, name, state.QType())
		msg.Answer = m.appendRRs(msg.Answer, reply.Answer, target)
		msg.Extra = m.appendRRs(msg.Extra, reply.Extra, target)
	}
	return len(reply.Answer) > 0, nil
}

// resolve appends the records of a target outside the zone. That the target
// does not exist is no reason to deny the alias, which does; that it cannot
// be asked for is a failure.
func (m *Mesh) resolve(ctx context.Context, state request.Request, msg *dns.Msg, target string) error {
	if m.Upstream == nil {
		return plugin.Error(Name, errNoUpstream)
	}
	answer, err := m.Upstream.Lookup(ctx, state, target, state.QType())
	if err != nil {
		return plugin.Error(Name, err)
	}
	if answer == nil || answer.Rcode != dns.RcodeSuccess && answer.Rcode != dns.RcodeNameError {
		return plugin.Error(Name, &targetError{target, answer})
	}
	msg.Truncated = msg.Truncated || answer.Truncated
	msg.Answer = append(msg.Answer, answer.Answer...)
	return nil
}
