package rtnl

import (
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
	ctaIPv4Src    = 1
	ctaIPv6Src    = 3
	ctaFilter     = 25
	filterOrig    = 1 // CTA_FILTER_ORIG_FLAGS
	filterReply   = 2 // CTA_FILTER_REPLY_FLAGS
	filterIPSrc   = 1 // CTA_FILTER_F_CTA_IP_SRC
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
	m.nest(o.tuple|unix.NLA_F_NESTED, func() {
		m.nest(ctaTupleIP|unix.NLA_F_NESTED, func() { m.attrAddr(src, o.addr) })
	})
	m.nest(ctaFilter|unix.NLA_F_NESTED, func() { m.attrUint32(flags, filterIPSrc) })
}

// ForgetConnections deletes the tracked connections of addresses in the calling
// thread's network namespace. A kernel that cannot pick them out refuses; none
// deletes others.
func ForgetConnections(addrs []netip.Addr) error {
	c, err := open(unix.NETLINK_NETFILTER)
	if err != nil {
		return err
	}
	defer c.Close()
	var ops []Op
	for _, a := range addrs {
		ops = append(ops, connDel{a, ctaTupleOrig}, connDel{a, ctaTupleReply})
	}
	return c.Do(ops...)
}
