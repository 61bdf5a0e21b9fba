package userspace

import (
	"errors"
	"math/rand/v2"
	"sync"
	"syscall"
	_ "unsafe" // for linkname

	"github.com/tailscale/wireguard-go/conn"
	"golang.org/x/sys/unix"
)

// bind is one StdNetBind for each family of addresses, on the same port.
//
// A single one for both cannot be used: its Send takes the destination from a
// pool of addresses, and one that was last used for IPv4 is four bytes long
// when the sixteen of an IPv6 address are copied into it, so that packets to
// IPv6 peers go to a mixture of addresses as soon as there is an IPv4 peer
// (the same in the official module; TestPeersOfBothFamilies in this package
// fails with it).
type bind struct {
	four, six conn.Bind
	roaming   *roaming
}

func newBind() *bind { return &bind{conn.NewStdNetBind(), conn.NewStdNetBind(), newRoaming()} }

// controlFns are called for each new socket of package conn.
//
//go:linkname controlFns github.com/tailscale/wireguard-go/conn.controlFns
var controlFns []func(network, address string, c syscall.RawConn) error

// opening says what happens to sockets while a StdNetBind opens.
var opening struct {
	sync.Mutex
	hooked bool
	refuse string          // network that is not to be had
	four   syscall.RawConn // the IPv4 socket that was made
}

// openBind opens b on port, without the network to refuse, and returns its
// IPv4 socket.
func openBind(b conn.Bind, port uint16, refuse string) ([]conn.ReceiveFunc, syscall.RawConn, error) {
	opening.Lock()
	defer opening.Unlock()
	if !opening.hooked {
		opening.hooked = true
		controlFns = append(controlFns, func(network, _ string, c syscall.RawConn) error {
			if network == opening.refuse {
				return syscall.EAFNOSUPPORT // a StdNetBind then goes on without
			}
			if network == "udp4" {
				opening.four = c
			}
			return nil
		})
	}
	opening.refuse, opening.four = refuse, nil
	defer func() { opening.refuse, opening.four = "", nil }()
	fns, _, err := b.Open(port)
	return fns, opening.four, err
}

// replace puts a socket that is bound to nothing in the place of c, which
// sets its port free. Who reads from c waits until c is closed.
func replace(c syscall.RawConn) error {
	dead, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(dead)
	var err2 error
	err = c.Control(func(fd uintptr) { err2 = unix.Dup3(dead, int(fd), unix.O_CLOEXEC) })
	return errors.Join(err, err2)
}

// Open is on port in both families, or in IPv4 alone where there is no IPv6.
func (b *bind) Open(port uint16) (fns []conn.ReceiveFunc, actual uint16, err error) {
	for try := 0; ; try++ {
		actual = port
		if port == 0 {
			actual = uint16(32768 + rand.IntN(28000)) // both must be free
		}
		fns, err = b.open(actual)
		for i := range fns {
			fns[i] = b.roaming.receive(fns[i])
		}
		if err == nil || port != 0 || try == 100 || !errors.Is(err, syscall.EADDRINUSE) {
			return fns, actual, err
		}
	}
}

// open: a StdNetBind takes the port for IPv6 from its IPv4 socket, so the one
// for IPv6 opens both and gives the other back.
func (b *bind) open(port uint16) ([]conn.ReceiveFunc, error) {
	all, four, err := openBind(b.six, port, "")
	if err != nil {
		return nil, err
	}
	if len(all) < 2 { // this machine has no IPv6
		b.six.Close()
		fns, _, err := openBind(b.four, port, "udp6")
		return fns, err
	}
	if err := replace(four); err != nil {
		b.six.Close()
		return nil, err
	}
	fns, _, err := openBind(b.four, port, "udp6")
	if err != nil {
		b.six.Close()
		return nil, err
	}
	return append(fns, all[1]), nil // all[0] is of the socket given back
}

func (b *bind) Close() error { return errors.Join(b.four.Close(), b.six.Close()) }

func (b *bind) SetMark(mark uint32) error {
	return errors.Join(b.four.SetMark(mark), b.six.SetMark(mark))
}

func (b *bind) Send(bufs [][]byte, ep conn.Endpoint, offset int) error {
	if s, ok := ep.(*source); ok { // a cookie for whom we do not know
		ep = s.Endpoint
	}
	if caller := b.roaming.caller(bufs[0][offset:]); caller != nil {
		ep = caller
	}
	if ep.DstIP().Is6() {
		return b.six.Send(bufs, ep, offset)
	}
	return b.four.Send(bufs, ep, offset)
}

func (b *bind) ParseEndpoint(s string) (conn.Endpoint, error) {
	s, ours := unmark(s)
	if !ours {
		b.roaming.told()
	}
	return b.four.ParseEndpoint(s)
}

func (b *bind) BatchSize() int { return b.four.BatchSize() }
