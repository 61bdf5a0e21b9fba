package rtnl

import (
	"encoding/binary"
	"fmt"

	"golang.org/x/sys/unix"
)

// Numbers of linux/pkt_sched.h.
const (
	tbfParms  = 1          // TCA_TBF_PARMS
	tbfRate64 = 4          // TCA_TBF_RATE64
	tbfBurst  = 6          // TCA_TBF_BURST
	atRoot    = 0xffffffff // TC_H_ROOT
	ethernet  = 1          // TC_LINKLAYER_ETHERNET
	// tbfHandle is the handle 1: of our qdiscs.
	tbfHandle = 1 << 16
)

// Tbf is a token bucket as the root qdisc of a link: tc-tbf(8).
type Tbf struct {
	Index int
	Name  string // for String only
	// Rate in bytes a second, Burst and Limit (of the queue) in bytes.
	Rate         uint64
	Burst, Limit uint32
}

func (o Tbf) String() string {
	return fmt.Sprintf("tc qdisc add dev %s root handle 1: tbf rate %dbps burst %d limit %d", o.Name, o.Rate, o.Burst, o.Limit)
}

func (o Tbf) encode(m *message) {
	m.begin(unix.RTM_NEWQDISC, unix.NLM_F_CREATE|unix.NLM_F_EXCL, tcmsg(o.Index, tbfHandle, atRoot)...)
	m.attrString(unix.TCA_KIND, "tbf")
	m.nest(unix.TCA_OPTIONS, func() {
		m.attr(tbfParms, o.parms())
		m.attr(tbfRate64, binary.NativeEndian.AppendUint64(nil, o.Rate))
		m.attrUint32(tbfBurst, o.Burst)
	})
}

// parms is struct tc_tbf_qopt: two struct tc_ratespec (the second, the peak
// rate, empty), limit, buffer, mtu. The burst has an attribute of its own.
func (o Tbf) parms() []byte {
	b := []byte{0, ethernet, 0, 0, 0, 0, 0, 0}
	b = binary.NativeEndian.AppendUint32(b, uint32(min(o.Rate, 1<<32-1)))
	b = append(b, make([]byte, 12)...)
	b = binary.NativeEndian.AppendUint32(b, o.Limit)
	return append(b, make([]byte, 8)...)
}

// Tbf reads the token bucket at a link's root; ok says that there is one.
func (c *Conn) Tbf(index int) (t Tbf, ok bool, err error) {
	var m message
	m.begin(unix.RTM_GETQDISC, 0, tcmsg(index, 0, 0)...)
	err = c.dump("qdiscs", m, unix.NLM_F_DUMP, func() { t, ok = Tbf{}, false }, func(b []byte) {
		if q, found := parseTbf(b); found && q.Index == index {
			t, ok = q, true
		}
	})
	return t, ok, err
}

func parseTbf(b []byte) (t Tbf, ok bool) {
	if len(b) < 20 || binary.NativeEndian.Uint32(b[12:]) != atRoot {
		return t, false
	}
	t.Index = int(int32(binary.NativeEndian.Uint32(b[4:])))
	eachAttr(b[20:], func(typ uint16, v []byte) {
		switch typ {
		case unix.TCA_KIND:
			ok = text(v) == "tbf"
		case unix.TCA_OPTIONS:
			t.parseOptions(v)
		}
	})
	return t, ok
}

func (t *Tbf) parseOptions(b []byte) {
	eachAttr(b, func(typ uint16, v []byte) {
		switch {
		case typ == tbfParms && len(v) >= 28:
			t.Rate = max(t.Rate, uint64(binary.NativeEndian.Uint32(v[8:])))
			t.Limit = binary.NativeEndian.Uint32(v[24:])
		case typ == tbfRate64 && len(v) >= 8:
			t.Rate = binary.NativeEndian.Uint64(v)
		}
	})
}

func tcmsg(index int, handle, parent uint32) []byte {
	b := make([]byte, 4, 20)
	b = binary.NativeEndian.AppendUint32(b, uint32(int32(index)))
	b = binary.NativeEndian.AppendUint32(b, handle)
	b = binary.NativeEndian.AppendUint32(b, parent)
	return append(b, 0, 0, 0, 0)
}
