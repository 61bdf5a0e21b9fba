package route

import (
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"meshd.dev/pkg/mesh"
)

// batch of requests in one go: the answers have to fit the socket's buffer,
// each with what the kernel needs to hold it.
const batch = 64

// change does the ops over a socket that stays open: its port is how events of
// what we do are known, and opening one takes longer than a route.
// There are at most a batch of ops; it returns an error for each.
func (t *Table) change(ops []routeOp) []error {
	errs := make([]error, len(ops))
	all := func(err error) []error {
		for i := range errs {
			errs[i] = err
		}
		return errs
	}
	if t.conn == nil {
		c, err := netlink.Dial(unix.NETLINK_ROUTE, nil)
		if err != nil {
			return all(fmt.Errorf("open netlink: %w", err))
		}
		t.conn = c
		t.port.Store(c.PID())
	}
	msgs := make([]netlink.Message, len(ops))
	for i, o := range ops {
		m, err := o.message()
		if err != nil {
			return all(err)
		}
		msgs[i] = m
	}
	if _, err := t.conn.SendMessages(msgs); err != nil {
		return all(errors.Join(err, t.hangUp()))
	}
	for i, o := range ops {
		_, err := t.conn.Receive()
		var refused *netlink.OpError
		var errno unix.Errno
		if err != nil && !(errors.As(err, &refused) && errors.As(err, &errno) && errno != unix.ENOBUFS) {
			// Which answer belongs to what is not known any more.
			for ; i < len(ops); i++ {
				errs[i] = err
			}
			return append(errs[:len(ops)-1], errors.Join(errs[len(ops)-1], t.hangUp()))
		}
		errs[i] = o.judge(err)
	}
	return errs
}

// judge what the kernel said.
func (o routeOp) judge(err error) error {
	switch {
	case o.verb == "del":
		return gone(err)
	case o.verb == "add" && errors.Is(err, unix.EEXIST):
		return fmt.Errorf("somebody else has a route there: %w", err)
	}
	return err
}

func (t *Table) hangUp() error {
	if t.conn == nil {
		return nil
	}
	err := t.conn.Close()
	t.conn = nil
	t.port.Store(0)
	return err
}

// plain: a route as we make them, which its own words are enough to take away.
func (o routeOp) plain() bool { return o.entry.odd == "" }

// message is the request: struct rtmsg of linux/rtnetlink.h and attributes.
func (o routeOp) message() (netlink.Message, error) {
	e := o.entry
	kind, flags := unix.RTM_NEWROUTE, netlink.Create
	switch o.verb {
	case "add":
		flags |= netlink.Excl
	case "replace":
		flags |= netlink.Replace
	case "del":
		kind, flags = unix.RTM_DELROUTE, 0
	}
	family, scope, typ := unix.AF_INET, unix.RT_SCOPE_LINK, unix.RTN_UNICAST
	if e.dst.Addr().Is6() {
		family = unix.AF_INET6
	}
	if e.blackhole {
		typ, scope = unix.RTN_BLACKHOLE, unix.RT_SCOPE_UNIVERSE
	}
	if o.verb == "del" {
		scope = unix.RT_SCOPE_NOWHERE // whatever it has
	}
	ae := netlink.NewAttributeEncoder()
	ae.ByteOrder = binary.NativeEndian
	ae.Bytes(unix.RTA_DST, e.dst.Addr().AsSlice())
	if e.link != 0 {
		ae.Uint32(unix.RTA_OIF, uint32(e.link))
	}
	if e.src.IsValid() {
		ae.Bytes(unix.RTA_PREFSRC, e.src.AsSlice())
	}
	if e.metric != 0 {
		ae.Uint32(unix.RTA_PRIORITY, uint32(e.metric))
	}
	if e.mtu != 0 && o.verb != "del" {
		ae.Nested(unix.RTA_METRICS, func(ae *netlink.AttributeEncoder) error {
			ae.Uint32(unix.RTAX_MTU, uint32(e.mtu))
			return nil
		})
	}
	attrs, err := ae.Encode()
	rtmsg := []byte{byte(family), byte(e.dst.Bits()), 0, 0, unix.RT_TABLE_MAIN, mesh.RouteProtocol, byte(scope), byte(typ), 0, 0, 0, 0}
	return netlink.Message{Header: netlink.Header{Type: netlink.HeaderType(kind), Flags: netlink.Request | netlink.Acknowledge | flags}, Data: append(rtmsg, attrs...)}, err
}
