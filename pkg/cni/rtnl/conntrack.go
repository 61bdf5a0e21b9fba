package rtnl

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"golang.org/x/sys/unix"
)

// Numbers of linux/netfilter/nfnetlink_conntrack.h.
const (
	ctGet         = 1<<8 | 1 // NFNL_SUBSYS_CTNETLINK, IPCTNL_MSG_CT_GET
	ctDelete      = 1<<8 | 2 // IPCTNL_MSG_CT_DELETE
	ctaTupleOrig  = 1
	ctaTupleReply = 2
	ctaTupleIP    = 1
	ctaTupleProto = 2
	ctaProtoNum   = 1
	ctaProtoDst   = 3 // CTA_PROTO_DST_PORT
	ctaIPv4Src    = 1
	ctaIPv4Dst    = 2
	ctaIPv6Src    = 3
	ctaIPv6Dst    = 4
	ctaID         = 12
	ctaZone       = 18
	ctaFilter     = 25
	filterOrig    = 1      // CTA_FILTER_ORIG_FLAGS
	filterReply   = 2      // CTA_FILTER_REPLY_FLAGS
	filterIPSrc   = 1 << 0 // CTA_FILTER_F_CTA_IP_SRC
	filterProto   = 1 << 3 // CTA_FILTER_F_CTA_PROTO_NUM
	filterDstPort = 1 << 5 // CTA_FILTER_F_CTA_PROTO_DST_PORT
)

// connDel deletes the tracked connections that an address started, or with
// tuple ctaTupleReply those that it answered.
type connDel struct {
	addr  netip.Addr
	tuple uint16
}

func (o connDel) String() string {
	if o.tuple == ctaTupleReply {
		return fmt.Sprintf("conntrack -D --reply-src %s", o.addr)
	}
	return fmt.Sprintf("conntrack -D --orig-src %s", o.addr)
}

func (o connDel) encode(m *message) {
	// Version 1 of struct nfgenmsg makes the kernel heed the family.
	m.begin(ctDelete, 0, family(o.addr), 1, 0, 0)
	src, flags := uint16(ctaIPv4Src), uint16(filterOrig)
	if o.addr.Is6() {
		src = ctaIPv6Src
	}
	if o.tuple == ctaTupleReply {
		flags = filterReply
	}
	m.nest(o.tuple|nested, func() {
		m.nest(ctaTupleIP|nested, func() { m.attrAddr(src, o.addr) })
	})
	m.nest(ctaFilter|nested, func() { m.attrUint32(flags, filterIPSrc) })
}

// flow is a tracked one as a dump has it.
type flow struct {
	family byte
	dst    netip.Addr
	proto  byte
	port   uint16
	// names are the attributes that name it, as the kernel sent them.
	names []attribute
}

type attribute struct {
	typ   uint16
	value []byte
}

func (o flow) String() string {
	return fmt.Sprintf("conntrack -D -p udp --orig-dst %s --orig-port-dst %d", o.dst, o.port)
}

func (o flow) encode(m *message) {
	m.begin(ctDelete, 0, o.family, unix.NFNETLINK_V0, 0, 0)
	for _, a := range o.names {
		m.attr(a.typ, a.value)
	}
}

func parseFlow(b []byte) (f flow) {
	if len(b) < 4 {
		return f
	}
	f.family = b[0]
	eachAttr(b[4:], func(typ uint16, v []byte) {
		switch typ {
		case ctaTupleOrig:
			eachAttr(v, f.tuple)
			f.names = append(f.names, attribute{typ | nested, slices.Clone(v)})
		case ctaID, ctaZone: // else a flow that began meanwhile, or of another zone, could be meant
			f.names = append(f.names, attribute{typ, slices.Clone(v)})
		}
	})
	return f
}

// tuple reads a part of the original direction.
func (f *flow) tuple(typ uint16, v []byte) {
	eachAttr(v, func(inner uint16, v []byte) {
		switch {
		case typ == ctaTupleIP && (inner == ctaIPv4Dst || inner == ctaIPv6Dst):
			f.dst, _ = netip.AddrFromSlice(v)
		case typ == ctaTupleProto && inner == ctaProtoNum && len(v) == 1:
			f.proto = v[0]
		case typ == ctaTupleProto && inner == ctaProtoDst && len(v) == 2:
			f.port = binary.BigEndian.Uint16(v)
		}
	})
}

// ForgetConnections deletes the tracked connections of addresses. A kernel
// that cannot pick them out refuses; none deletes others.
func (n *Netfilter) ForgetConnections(addrs []netip.Addr) error {
	var ops []Op
	for _, a := range addrs {
		ops = append(ops, connDel{a, ctaTupleOrig}, connDel{a, ctaTupleReply})
	}
	return n.conn.Do(ops...)
}

// ForgetFlows deletes the tracked UDP flows that were sent to a port of
// addresses that to says yes to: they go on being translated, or not, as they
// were when they began. Others that only pass through to such a port elsewhere
// stay: a flow that is forgotten comes out of this machine by another port.
func (n *Netfilter) ForgetFlows(port uint16, to func(netip.Addr) bool) error {
	var ops []Op
	for _, fam := range []byte{unix.AF_INET, unix.AF_INET6} {
		flows, err := n.flows(fam, port)
		if err != nil {
			return err
		}
		for _, f := range flows {
			if to(f.dst) {
				ops = append(ops, f)
			}
		}
	}
	for batch := range slices.Chunk(ops, maxForget) {
		// One that ended by itself meanwhile is as good.
		if err := n.conn.Do(batch...); err != nil && !errors.Is(err, unix.ENOENT) {
			return err
		}
	}
	return nil
}

// maxForget flows are deleted by one message: errors come back one by one and
// have to fit the socket's buffer.
const maxForget = 100

// flows lists those that were sent to a port. An old kernel does not pick them
// out and sends all there are.
func (n *Netfilter) flows(fam byte, port uint16) (all []flow, err error) {
	var m message
	m.begin(ctGet, 0, fam, unix.NFNETLINK_V0, 0, 0)
	m.nest(ctaTupleOrig|nested, func() {
		m.nest(ctaTupleProto|nested, func() {
			m.attr(ctaProtoNum, []byte{unix.IPPROTO_UDP})
			m.attr(ctaProtoDst, binary.BigEndian.AppendUint16(nil, port))
		})
	})
	m.nest(ctaFilter|nested, func() { m.attrUint32(filterOrig, filterProto|filterDstPort) })
	err = n.conn.dump(fmt.Sprintf("flows to port %d", port), m, unix.NLM_F_DUMP, func() { all = nil }, func(b []byte) {
		if f := parseFlow(b); f.proto == unix.IPPROTO_UDP && f.port == port {
			all = append(all, f)
		}
	})
	return all, err
}
