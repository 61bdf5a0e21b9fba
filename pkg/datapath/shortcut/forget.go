package shortcut

import (
	"errors"
	"fmt"
	"net/netip"

	mdl "github.com/mdlayher/netlink"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// forget has conntrack forget the TCP connections that leave the shortcut:
// those between pods of this machine with one of leaving at an end. It has not
// followed their windows, and would call what it sees next invalid, which a
// firewall may drop. One that it forgot it takes up again, from the middle and
// without looking at windows. Translated ones were never on the shortcut.
//
// The table may have a million entries, so they are looked at as they come and
// only those that are to go are kept. (A filter in the kernel, CTA_FILTER since
// 5.8, would save the copying, for a question for each address and end.)
func forget(leaving, local map[netip.Addr]bool) error {
	var errs []error
	for _, family := range []uint8{unix.AF_INET, unix.AF_INET6} {
		if err := forgetFamily(family, between{leaving, local}); err != nil {
			errs = append(errs, fmt.Errorf("forget connections of pods that leave the shortcut: %w", err))
		}
	}
	return errors.Join(errs...)
}

func forgetFamily(family uint8, b between) error {
	var found [][]byte
	for try := 0; ; try++ {
		err := ask(family, nl.IPCTNL_MSG_CT_GET, unix.NLM_F_DUMP, nil, func(entry []byte) {
			if f, err := parseFlow(entry); err == nil && b.match(f) {
				found = append(found, append([]byte(nil), entry...))
			}
		})
		if errors.Is(err, netlink.ErrDumpInterrupted) && try < 10 {
			continue // who was found twice is gone the second time
		}
		if err != nil && !errors.Is(err, unix.ENOENT) {
			return err
		}
		break
	}
	var errs []error
	for _, entry := range found {
		if err := ask(family, nl.IPCTNL_MSG_CT_DELETE, unix.NLM_F_ACK, entry, func([]byte) {}); err != nil && !errors.Is(err, unix.ENOENT) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

const nfgenmsg = 4 // bytes of that header

// ask conntrack; each message of the answer goes to tell without its header.
func ask(family uint8, what, flags int, data []byte, tell func([]byte)) error {
	req := nl.NewNetlinkRequest(int(netlink.ConntrackTable)<<8|what, flags)
	req.AddData(&nl.Nfgenmsg{NfgenFamily: family, Version: nl.NFNETLINK_V0})
	if data != nil {
		req.AddRawData(data)
	}
	return req.ExecuteIter(unix.NETLINK_NETFILTER, 0, func(msg []byte) bool {
		if len(msg) >= nfgenmsg {
			tell(msg[nfgenmsg:])
		}
		return true
	})
}

// flow of conntrack, as its first packet went and as answers to it go.
type flow struct{ there, back way }

type way struct {
	src, dst         netip.Addr
	protocol         uint8
	srcPort, dstPort uint16
}

// between pods.
type between struct{ leaving, local map[netip.Addr]bool }

func (b between) match(f flow) bool {
	w := f.there
	back := way{src: w.dst, dst: w.src, protocol: w.protocol, srcPort: w.dstPort, dstPort: w.srcPort}
	return w.protocol == unix.IPPROTO_TCP && b.local[w.src] && b.local[w.dst] && (b.leaving[w.src] || b.leaving[w.dst]) && f.back == back
}

// parseFlow out of the attributes of an entry (linux/netfilter/nfnetlink_conntrack.h).
func parseFlow(entry []byte) (f flow, err error) {
	ad, err := mdl.NewAttributeDecoder(entry)
	if err != nil {
		return f, err
	}
	for ad.Next() {
		switch ad.Type() {
		case nl.CTA_TUPLE_ORIG:
			ad.Nested(f.there.parse)
		case nl.CTA_TUPLE_REPLY:
			ad.Nested(f.back.parse)
		}
	}
	return f, ad.Err()
}

func (w *way) parse(ad *mdl.AttributeDecoder) error {
	for ad.Next() {
		switch ad.Type() {
		case nl.CTA_TUPLE_IP:
			ad.Nested(w.parseAddrs)
		case nl.CTA_TUPLE_PROTO:
			ad.Nested(w.parsePorts)
		}
	}
	return ad.Err()
}

func (w *way) parseAddrs(ad *mdl.AttributeDecoder) error {
	for ad.Next() {
		a, ok := netip.AddrFromSlice(ad.Bytes())
		if !ok {
			return fmt.Errorf("an address of %d bytes", len(ad.Bytes()))
		}
		switch ad.Type() {
		case nl.CTA_IP_V4_SRC, nl.CTA_IP_V6_SRC:
			w.src = a.Unmap()
		case nl.CTA_IP_V4_DST, nl.CTA_IP_V6_DST:
			w.dst = a.Unmap()
		}
	}
	return ad.Err()
}

func (w *way) parsePorts(ad *mdl.AttributeDecoder) error {
	for ad.Next() {
		b := ad.Bytes()
		port := func() uint16 {
			if len(b) != 2 {
				return 0
			}
			return uint16(b[0])<<8 | uint16(b[1])
		}
		switch ad.Type() {
		case nl.CTA_PROTO_NUM:
			if len(b) != 1 {
				return fmt.Errorf("a protocol of %d bytes", len(b))
			}
			w.protocol = b[0]
		case nl.CTA_PROTO_SRC_PORT:
			w.srcPort = port()
		case nl.CTA_PROTO_DST_PORT:
			w.dstPort = port()
		}
	}
	return ad.Err()
}
