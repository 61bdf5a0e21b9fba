// Package link is a TUN link as the engine wants it: many packets a read and
// a write.
//
// A read takes the first packet as it comes and goes on, without waiting,
// until there is none or the batch is full: small packets then share the cost
// of everything that follows. Segments of one connection come in and go out as
// one large packet where the kernel can (TSO, USO); they are cut here, and put
// together again on the other side. Which offloads are in use is said by
// SetOffloads; a link starts without any, because kernels have got them wrong:
// the engine tries them out first (package userspace, probe.go). Should the
// kernel refuse one later all the same, it is given up and its packets are
// written singly.
//
// Buffers are fixed: one packet read ahead, and room for the headers of one
// batch.
package link

import (
	"errors"
	"fmt"
	"os"
	"sync"
	"sync/atomic"
	"syscall"

	"github.com/tailscale/wireguard-go/tun"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// batch is how many packets a read or write takes.
const batch = 128

// queueLength is how many packets wait in the link for this process.
const queueLength = 2000

// Device is a TUN link; it implements tun.Device. Use Open.
type Device struct {
	name  string
	index int32
	file  *os.File
	raw   syscall.RawConn
	// control is for questions about the link, in the namespace it was made.
	control int
	watch   *os.File
	events  chan tun.Event
	closing chan struct{}
	closed  sync.Once

	offloads atomic.Uint32
	in       reader
	out      writer
}

var _ tun.Device = (*Device)(nil)

// Offloads that may be in use, each for both families.
type Offloads uint32

const (
	TCP Offloads = 1 << iota // TSO
	UDP                      // USO
)

func (o Offloads) String() string {
	return [...]string{"none", "TCP", "UDP", "TCP and UDP"}[o&(TCP|UDP)]
}

// Open makes the link called name in the network namespace of the caller's
// thread.
func Open(name string, mtu int) (*Device, error) {
	file, err := attach(name)
	if err != nil {
		return nil, err
	}
	d, err := newDevice(name, file)
	if err != nil {
		return nil, err
	}
	if err := d.setMTU(mtu); err != nil {
		return nil, errors.Join(err, d.Close())
	}
	return d, nil
}

// Adopt goes on with the link called name that another process has made with
// Open, and has open as file; file may be closed afterwards.
func Adopt(name string, file *os.File) (*Device, error) {
	raw, err := file.SyscallConn()
	if err != nil {
		return nil, err
	}
	var fd int
	var refused error
	if err := raw.Control(func(old uintptr) { fd, refused = unix.FcntlInt(old, unix.F_DUPFD_CLOEXEC, 0) }); err != nil || refused != nil {
		return nil, errors.Join(err, refused)
	}
	return newDevice(name, os.NewFile(uintptr(fd), file.Name()))
}

// newDevice owns file, also when it fails.
func newDevice(name string, file *os.File) (_ *Device, err error) {
	d := &Device{name: name, file: file, events: make(chan tun.Event, 4), closing: make(chan struct{})}
	undo := []func(){func() { d.file.Close() }}
	done := false
	defer func() {
		if !done {
			for _, f := range undo {
				f()
			}
		}
	}()
	if d.raw, err = d.file.SyscallConn(); err != nil {
		return nil, err
	}
	if d.control, err = unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0); err != nil {
		return nil, err
	}
	undo = append(undo, func() { unix.Close(d.control) })
	if d.watch, err = changes(); err != nil {
		return nil, err
	}
	undo = append(undo, func() { d.watch.Close() })
	if d.index, err = d.ask(unix.SIOCGIFINDEX); err != nil {
		return nil, fmt.Errorf("find link %s: %w", name, err)
	}
	// What is made of one packet has to fit a batch: the rest would be lost, and
	// again each time it is sent.
	kernels := &netlink.Device{LinkAttrs: netlink.LinkAttrs{Name: name, Index: int(d.index)}}
	if err = netlink.LinkSetGSOMaxSegs(kernels, batch); err != nil {
		return nil, fmt.Errorf("set gso_max_segs %d of link %s: %w", batch, name, err)
	}
	// The kernel's 500 are half a second of a thousand packets; a process may
	// have to wait for its turn that long.
	if err = netlink.LinkSetTxQLen(kernels, queueLength); err != nil {
		return nil, fmt.Errorf("set txqueuelen %d of link %s: %w", queueLength, name, err)
	}
	d.in.take, d.out.put = d.fill, d.flush
	done = true
	go d.report() // ends with Close
	return d, nil
}

// attach makes the link, with a header before each packet.
func attach(name string) (*os.File, error) {
	fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, fmt.Errorf("open /dev/net/tun: %w", err)
	}
	req, err := unix.NewIfreq(name)
	if err == nil {
		req.SetUint16(unix.IFF_TUN | unix.IFF_NO_PI | unix.IFF_VNET_HDR)
		err = unix.IoctlIfreq(fd, unix.TUNSETIFF, req)
	}
	if err == nil {
		err = unix.IoctlSetInt(fd, unix.TUNSETOFFLOAD, 0)
	}
	if err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("TUN link %s: %w", name, err)
	}
	return os.NewFile(uintptr(fd), "/dev/net/tun"), nil
}

// SetOffloads says which offloads are used from now on, and returns what of it
// the kernel knows.
func (d *Device) SetOffloads(want Offloads) (Offloads, error) {
	kernel := func(o Offloads) (flags int) {
		if o != 0 {
			flags = unix.TUN_F_CSUM
		}
		if o&TCP != 0 {
			flags |= unix.TUN_F_TSO4 | unix.TUN_F_TSO6
		}
		if o&UDP != 0 {
			flags |= unix.TUN_F_USO4 | unix.TUN_F_USO6
		}
		return flags
	}
	for _, try := range []Offloads{want, want &^ UDP, 0} { // USO came with Linux 6.2
		var refused error
		err := d.raw.Control(func(fd uintptr) { refused = unix.IoctlSetInt(int(fd), unix.TUNSETOFFLOAD, kernel(try)) })
		if err != nil {
			return 0, err
		}
		if refused == nil {
			d.offloads.Store(uint32(try))
			return try, nil
		}
	}
	return 0, fmt.Errorf("link %s takes no offloads", d.name)
}

// Offloads in use.
func (d *Device) Offloads() Offloads { return Offloads(d.offloads.Load()) }

// Name of the link, as it was given.
func (d *Device) Name() (string, error) { return d.name, nil }

// File is the descriptor of the link.
func (d *Device) File() *os.File { return d.file }

// BatchSize is how many packets Read and Write take.
func (d *Device) BatchSize() int { return batch }

// MTU of the link now.
func (d *Device) MTU() (int, error) {
	mtu, err := d.ask(unix.SIOCGIFMTU)
	if err != nil {
		return 0, fmt.Errorf("MTU of %s: %w", d.name, err)
	}
	return int(mtu), nil
}

func (d *Device) setMTU(mtu int) error {
	req, err := unix.NewIfreq(d.name)
	if err != nil {
		return err
	}
	req.SetUint32(uint32(mtu))
	if err := unix.IoctlIfreq(d.control, unix.SIOCSIFMTU, req); err != nil {
		return fmt.Errorf("set MTU %d of %s: %w", mtu, d.name, err)
	}
	return nil
}

// ask reads a number the kernel has for the link.
func (d *Device) ask(what uint) (int32, error) {
	req, err := unix.NewIfreq(d.name)
	if err != nil {
		return 0, err
	}
	if err := unix.IoctlIfreq(d.control, what, req); err != nil {
		return 0, err
	}
	return int32(req.Uint32()), nil
}

// gone makes os.ErrClosed of errors that say that the link was closed or
// deleted.
func (d *Device) gone(err error) error {
	select {
	case <-d.closing:
	default:
		if !errors.Is(err, unix.EBADFD) { // deleted
			return err
		}
	}
	if err != nil && !errors.Is(err, os.ErrClosed) {
		err = fmt.Errorf("%w: %w", os.ErrClosed, err)
	}
	return err
}

// Close deletes the link, and ends Read, Write and Events.
func (d *Device) Close() (err error) {
	d.closed.Do(func() {
		close(d.closing)
		err = errors.Join(d.file.Close(), d.watch.Close())
	})
	return err
}
