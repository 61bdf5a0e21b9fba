// Package rtnl speaks rtnetlink: as much of it as attaching a pod takes, many
// requests in one system call, and no more code than a plugin that starts in
// two milliseconds can carry; and of nfnetlink elements of sets, and forgetting
// connections. rtnetlink(7), linux/rtnetlink.h, linux/netfilter/nf_tables.h.
//
// A request is a plain value (VethAdd, AddrAdd, ElementAdd, …) that prints as
// the ip(8), tc(8) or nft(8) command it stands for.
package rtnl

import (
	"encoding/binary"
	"errors"
	"fmt"
	"strings"

	"golang.org/x/sys/unix"
)

// Conn is a netlink socket. It belongs to the network namespace in which it
// was opened, whatever namespace its user is in later. Not for concurrent use.
type Conn struct {
	fd  int
	seq uint32
	buf []byte
}

// Open opens a socket in the calling thread's network namespace.
func Open() (*Conn, error) { return open(unix.NETLINK_ROUTE) }

func open(protocol int) (*Conn, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, protocol)
	if err != nil {
		return nil, fmt.Errorf("open netlink socket: %w", err)
	}
	// Both only make answers better: the kernel's own words for an error, and
	// dumps that hold only what was asked for. Old kernels lack them.
	_ = unix.SetsockoptInt(fd, unix.SOL_NETLINK, unix.NETLINK_EXT_ACK, 1)
	_ = unix.SetsockoptInt(fd, unix.SOL_NETLINK, unix.NETLINK_GET_STRICT_CHK, 1)
	return &Conn{fd: fd, buf: make([]byte, 64<<10)}, nil
}

// Close closes the socket.
func (c *Conn) Close() error { return unix.Close(c.fd) }

// Op is one change.
type Op interface {
	// String is the change as a person would type it.
	String() string
	encode(*message)
}

// OpError is an Op that the kernel refused. Unwrap gives the errno.
type OpError struct {
	Op     string
	Errno  unix.Errno
	Reason string // the kernel's words, if it had any
}

func (e *OpError) Error() string {
	if e.Reason != "" {
		return fmt.Sprintf("%s: %v (%s)", e.Op, e.Errno, strings.TrimSuffix(e.Reason, "."))
	}
	return fmt.Sprintf("%s: %v", e.Op, e.Errno)
}

func (e *OpError) Unwrap() error { return e.Errno }

// Do hands all ops to the kernel in one message. The kernel goes on after one
// that it refuses; the error is about the first.
func (c *Conn) Do(ops ...Op) error {
	if len(ops) == 0 {
		return nil
	}
	return c.do(ops, len(ops)-1)
}

// do asks for an answer to ops[last].
func (c *Conn) do(ops []Op, last int) error {
	first := c.seq + 1
	var b []byte
	for i, op := range ops {
		c.seq++
		m := message{b: b, start: len(b)}
		op.encode(&m)
		flags := uint16(unix.NLM_F_REQUEST)
		if i == last {
			flags |= unix.NLM_F_ACK // errors come without it
		}
		b = m.finish(flags, c.seq)
	}
	if err := unix.Sendto(c.fd, b, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return fmt.Errorf("%s: send: %w", ops[0], err)
	}
	return c.collect(ops[:last+1], first)
}

// collect reads answers until the last op's has come.
func (c *Conn) collect(ops []Op, first uint32) error {
	var failed error
	for {
		done, err := c.receive(func(h header, payload []byte) bool {
			i := int(h.seq - first)
			if h.typ != unix.NLMSG_ERROR || i < 0 || i >= len(ops) {
				return false
			}
			err := ackError(ops[i], h, payload)
			if err != nil && failed == nil {
				failed = err
			}
			// A transaction that is refused as a whole has no other answer
			// than the one to its beginning.
			_, whole := ops[i].(batchMark)
			return i == len(ops)-1 || whole && err != nil
		})
		if err != nil {
			return fmt.Errorf("%s: %w", ops[0], err)
		}
		if done {
			return failed
		}
	}
}

// ackError is nil for an acknowledgement.
func ackError(op Op, h header, payload []byte) error {
	errno := ackErrno(payload)
	if errno == 0 {
		return nil
	}
	return &OpError{Op: op.String(), Errno: errno, Reason: ackReason(h, payload)}
}

func ackErrno(payload []byte) unix.Errno {
	if len(payload) < 4 {
		return unix.EBADMSG
	}
	return unix.Errno(-int32(binary.NativeEndian.Uint32(payload)))
}

// ackReason finds NLMSGERR_ATTR_MSG, which stands after the error code and the
// request it answers (of which only the header when the answer is capped).
func ackReason(h header, payload []byte) string {
	const requestHeader = 16
	if h.flags&unix.NLM_F_ACK_TLVS == 0 || len(payload) < 4+requestHeader {
		return ""
	}
	skip := requestHeader
	if h.flags&unix.NLM_F_CAPPED == 0 {
		skip = align(int(binary.NativeEndian.Uint32(payload[4:])))
	}
	if 4+skip > len(payload) {
		return ""
	}
	reason := ""
	eachAttr(payload[4+skip:], func(typ uint16, v []byte) {
		if typ == unix.NLMSGERR_ATTR_MSG {
			reason = strings.TrimRight(string(v), "\x00")
		}
	})
	return reason
}

// errInterrupted: what was read changed while it was read.
var errInterrupted = errors.New("dump interrupted")

// maxDumps bounds how often an interrupted dump is started again.
const maxDumps = 20

// dump sends a request and gives each answer's payload to f, which must start
// afresh when restart is called.
func (c *Conn) dump(what string, req message, flags uint16, restart func(), f func(payload []byte)) error {
	var err error
	for range maxDumps {
		restart()
		if err = c.dumpOnce(req, flags, f); !errors.Is(err, errInterrupted) {
			break
		}
	}
	if err != nil {
		return fmt.Errorf("read %s: %w", what, err)
	}
	return nil
}

func (c *Conn) dumpOnce(req message, flags uint16, f func(payload []byte)) error {
	c.seq++
	seq := c.seq
	b := req.finish(unix.NLM_F_REQUEST|flags, seq)
	if err := unix.Sendto(c.fd, b, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return fmt.Errorf("send: %w", err)
	}
	var result error
	for {
		done, err := c.receive(func(h header, payload []byte) bool {
			if h.seq != seq {
				return false
			}
			if h.flags&unix.NLM_F_DUMP_INTR != 0 {
				result = errInterrupted
			}
			switch h.typ {
			case unix.NLMSG_DONE:
				return true
			case unix.NLMSG_ERROR:
				if errno := ackErrno(payload); errno != 0 {
					result = errno
				}
				return true
			}
			f(payload)
			return flags&unix.NLM_F_DUMP == 0
		})
		if err != nil {
			return err
		}
		if done {
			return result
		}
	}
}

// receive reads once and gives each message to f until f is done.
func (c *Conn) receive(f func(h header, payload []byte) bool) (done bool, err error) {
	n, _, err := unix.Recvfrom(c.fd, c.buf, 0)
	if errors.Is(err, unix.EINTR) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("receive: %w", err)
	}
	for b := c.buf[:n]; len(b) >= headerLen; {
		h := readHeader(b)
		if int(h.len) < headerLen || int(h.len) > len(b) {
			return false, unix.EBADMSG
		}
		if f(h, b[headerLen:h.len]) {
			return true, nil
		}
		b = b[min(align(int(h.len)), len(b)):]
	}
	return false, nil
}
