package rtnl

import (
	"encoding/binary"
	"errors"
	"fmt"

	"golang.org/x/sys/unix"

	"meshd.dev/pkg/mesh"
)

// Numbers of linux/netfilter/nfnetlink.h and nf_tables.h.
const (
	batchBegin = 0x10
	batchEnd   = 0x11
	nftables   = unix.NFNL_SUBSYS_NFTABLES << 8

	nested = unix.NLA_F_NESTED
)

// Netfilter is a socket to the packet filter and the connection tracking of
// the network namespace in which it was opened. Not for concurrent use.
type Netfilter struct{ conn *Conn }

// OpenNetfilter opens a socket in the calling thread's network namespace.
func OpenNetfilter() (*Netfilter, error) {
	c, err := open(unix.NETLINK_NETFILTER)
	if err != nil {
		return nil, err
	}
	return &Netfilter{c}, nil
}

// Close closes the socket.
func (n *Netfilter) Close() error { return n.conn.Close() }

// ElementAdd puts an element into a set of a table of family inet. One that is
// there already is no error; one with another value is EBUSY.
type ElementAdd struct {
	Table string
	mesh.SetElement
}

func (o ElementAdd) String() string {
	return fmt.Sprintf("nft add element inet %s %s '{ %s }'", o.Table, o.Set, o.SetElement)
}

func (o ElementAdd) encode(m *message) {
	o.element(m, unix.NFT_MSG_NEWSETELEM, unix.NLM_F_CREATE)
}

// ElementDel takes an element out. One that is not there is ENOENT.
type ElementDel ElementAdd

func (o ElementDel) String() string {
	return fmt.Sprintf("nft delete element inet %s %s '{ %s }'", o.Table, o.Set, o.SetElement)
}

func (o ElementDel) encode(m *message) { ElementAdd(o).element(m, unix.NFT_MSG_DELSETELEM, 0) }

func (o ElementAdd) element(m *message, typ, flags uint16) {
	m.begin(nftables|typ, flags, unix.NFPROTO_INET, unix.NFNETLINK_V0, 0, 0)
	m.attrString(unix.NFTA_SET_ELEM_LIST_TABLE, o.Table)
	m.attrString(unix.NFTA_SET_ELEM_LIST_SET, o.Set)
	m.nest(unix.NFTA_SET_ELEM_LIST_ELEMENTS|nested, func() {
		m.nest(unix.NFTA_LIST_ELEM|nested, func() {
			m.nest(unix.NFTA_SET_ELEM_KEY|nested, func() { m.attr(unix.NFTA_DATA_VALUE, []byte(o.Key)) })
			if o.Value != "" {
				m.nest(unix.NFTA_SET_ELEM_DATA|nested, func() { m.attr(unix.NFTA_DATA_VALUE, []byte(o.Value)) })
			}
		})
	})
}

// batchMark begins or ends a transaction.
type batchMark uint16

func (b batchMark) String() string { return "nft transaction" }

func (b batchMark) encode(m *message) {
	subsystem := binary.BigEndian.AppendUint16(nil, unix.NFNL_SUBSYS_NFTABLES)
	m.begin(uint16(b), 0, unix.AF_UNSPEC, unix.NFNETLINK_V0, subsystem[0], subsystem[1])
}

// Do makes all changes to sets or none.
func (n *Netfilter) Do(ops ...Op) error {
	if len(ops) == 0 {
		return nil
	}
	all := append([]Op{batchMark(batchBegin)}, ops...)
	// The last change is acknowledged, not the mark behind it, which answers
	// only in new kernels.
	return n.conn.do(append(all, batchMark(batchEnd)), len(ops))
}

// Elements reads a set. A set or table that is not there is ENOENT.
func (n *Netfilter) Elements(table, set string) ([]mesh.SetElement, error) {
	var m message
	m.begin(nftables|unix.NFT_MSG_GETSETELEM, 0, unix.NFPROTO_INET, unix.NFNETLINK_V0, 0, 0)
	m.attrString(unix.NFTA_SET_ELEM_LIST_TABLE, table)
	m.attrString(unix.NFTA_SET_ELEM_LIST_SET, set)
	var all []mesh.SetElement
	err := n.conn.dump(fmt.Sprintf("set %s of table inet %s", set, table), m, unix.NLM_F_DUMP, func() { all = nil }, func(b []byte) {
		if len(b) < 4 {
			return
		}
		eachAttr(b[4:], func(typ uint16, v []byte) {
			if typ == unix.NFTA_SET_ELEM_LIST_ELEMENTS {
				eachAttr(v, func(_ uint16, v []byte) { all = append(all, parseElement(set, v)) })
			}
		})
	})
	return all, err
}

func parseElement(set string, b []byte) mesh.SetElement {
	e := mesh.SetElement{Set: set}
	eachAttr(b, func(typ uint16, v []byte) {
		switch typ {
		case unix.NFTA_SET_ELEM_KEY:
			e.Key = dataValue(v)
		case unix.NFTA_SET_ELEM_DATA:
			e.Value = dataValue(v)
		}
	})
	return e
}

func dataValue(b []byte) (value string) {
	eachAttr(b, func(typ uint16, v []byte) {
		if typ == unix.NFTA_DATA_VALUE {
			value = string(v)
		}
	})
	return value
}

// HasSet says whether there is such a set.
func (n *Netfilter) HasSet(table, set string) (bool, error) {
	var m message
	m.begin(nftables|unix.NFT_MSG_GETSET, 0, unix.NFPROTO_INET, unix.NFNETLINK_V0, 0, 0)
	m.attrString(unix.NFTA_SET_TABLE, table)
	m.attrString(unix.NFTA_SET_NAME, set)
	err := n.conn.dump(fmt.Sprintf("set %s of table inet %s", set, table), m, 0, func() {}, func([]byte) {})
	if errors.Is(err, unix.ENOENT) {
		return false, nil
	}
	return err == nil, err
}

// HasRules says whether a chain has any rule; jumps are how many rules lead to
// it. A chain that is not there has none.
func (n *Netfilter) HasRules(table, chain string, jumps uint32) (bool, error) {
	use, err := n.chainUse(table, chain)
	if err != nil || use > jumps {
		return err == nil, err
	}
	// The count is quick to ask for, but has what a transaction under way is
	// about to delete gone already: only what is in force counts.
	var m message
	m.begin(nftables|unix.NFT_MSG_GETRULE, 0, unix.NFPROTO_INET, unix.NFNETLINK_V0, 0, 0)
	m.attrString(unix.NFTA_RULE_TABLE, table)
	m.attrString(unix.NFTA_RULE_CHAIN, chain)
	found := false
	err = n.conn.dump(fmt.Sprintf("chain %s of table inet %s", chain, table), m, unix.NLM_F_DUMP,
		func() { found = false }, func([]byte) { found = true })
	return found, err
}

// chainUse counts a chain's rules and those that lead to it.
func (n *Netfilter) chainUse(table, chain string) (use uint32, err error) {
	var m message
	m.begin(nftables|unix.NFT_MSG_GETCHAIN, 0, unix.NFPROTO_INET, unix.NFNETLINK_V0, 0, 0)
	m.attrString(unix.NFTA_CHAIN_TABLE, table)
	m.attrString(unix.NFTA_CHAIN_NAME, chain)
	err = n.conn.dump(fmt.Sprintf("chain %s of table inet %s", chain, table), m, 0, func() {}, func(b []byte) {
		if len(b) < 4 {
			return
		}
		eachAttr(b[4:], func(typ uint16, v []byte) {
			if typ == unix.NFTA_CHAIN_USE && len(v) == 4 {
				use = binary.BigEndian.Uint32(v)
			}
		})
	})
	if errors.Is(err, unix.ENOENT) {
		return 0, nil
	}
	return use, err
}
