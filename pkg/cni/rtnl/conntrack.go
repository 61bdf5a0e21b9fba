package rtnl

import (
	"encoding/binary"
	"fmt"
	"net/netip"

	"golang.org/x/sys/unix"
)

// Numbers of linux/netfilter/nfnetlink_conntrack.h.
const (
	ctDelete      = 1<<8 | 2 // NFNL_SUBSYS_CTNETLINK, IPCTNL_MSG_CT_DELETE
	ctaTupleOrig  = 1
	ctaTupleReply = 2
	ctaTupleIP    = 1
	ctaTupleProto = 2
	ctaProtoNum   = 1
	ctaProtoDst   = 3 // CTA_PROTO_DST_PORT
	ctaIPv4Src    = 1
	ctaIPv6Src    = 3
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

// portDel deletes the tracked UDP flows that were sent to a port, of whatever
// address.
type portDel struct {
	family byte
	port   uint16
}

func (o portDel) String() string {
	return fmt.Sprintf("conntrack -D -p udp --orig-port-dst %d", o.port)
}

func (o portDel) encode(m *message) {
	m.begin(ctDelete, 0, o.family, 1, 0, 0)
	m.nest(ctaTupleOrig|nested, func() {
		m.nest(ctaTupleProto|nested, func() {
			m.attr(ctaProtoNum, []byte{unix.IPPROTO_UDP})
			m.attr(ctaProtoDst, binary.BigEndian.AppendUint16(nil, o.port))
		})
	})
	m.nest(ctaFilter|nested, func() { m.attrUint32(filterOrig, filterProto|filterDstPort) })
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

// ForgetFlows deletes the tracked UDP flows to a port, of both families: they
// go on being translated, or not, as they were when they began.
func (n *Netfilter) ForgetFlows(port uint16) error {
	return n.conn.Do(portDel{unix.AF_INET, port}, portDel{unix.AF_INET6, port})
}
