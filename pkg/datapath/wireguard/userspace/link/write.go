package link

import (
	"errors"
	"fmt"
	"os"
	"sync"
	"unsafe"

	"golang.org/x/sys/unix"
)

// writer is the state of Write.
type writer struct {
	put func(fd uintptr) bool // flush, made once

	sync.Mutex // guards what follows
	groups     groups
	packets    [batch][]byte
	header     [headerSize]byte
	vector     [batch + 1]unix.Iovec
	// pieces of vector are what flush writes; errno is how it went.
	pieces int
	errno  unix.Errno
}

// Write implements tun.Device: it hands packets, which begin at offset in each
// of bufs, to the kernel. Packets of a flow stay in order. What was in bufs is
// not the same afterwards.
func (d *Device) Write(bufs [][]byte, offset int) (written int, err error) {
	w := &d.out
	w.Lock()
	defer w.Unlock()
	for len(bufs) > 0 {
		n := min(len(bufs), batch)
		for i, b := range bufs[:n] {
			if w.packets[i] = b[offset:]; len(b) == offset {
				return written, fmt.Errorf("write to %s: packet %d is empty", d.name, i)
			}
		}
		more, e := d.write(w.packets[:n])
		written, bufs = written+more, bufs[n:]
		if errors.Is(e, os.ErrClosed) {
			return written, e
		}
		if err == nil {
			err = e
		}
		clear(w.packets[:n])
	}
	return written, err
}

func (d *Device) write(packets [][]byte) (written int, err error) {
	w := &d.out
	w.groups.sort(packets, d.Offloads())
	for _, g := range w.groups.list {
		n, e := d.writeGroup(g)
		written += n
		if errors.Is(e, os.ErrClosed) {
			return written, e
		}
		if err == nil {
			err = e
		}
	}
	return written, err
}

// writeGroup writes a group as one packet. When the kernel takes it for
// nonsense, it will never be asked again, and the packets go one by one.
func (d *Device) writeGroup(g group) (int, error) {
	w := &d.out
	if g.count == 1 {
		return d.writeOne(w.groups.packets[g.first])
	}
	head := w.groups.packets[g.first]
	var saved [128]byte
	copy(saved[:], head[:g.headers])
	header := w.header[:]
	w.groups.merge(g, header)
	w.vector[0] = piece(header)
	w.vector[1] = piece(head)
	pieces := 2
	for i := g.first; i != g.last; pieces++ {
		i = w.groups.next[i]
		w.vector[pieces] = piece(w.groups.packets[i][g.headers:])
	}
	err := d.writev(pieces)
	if err == nil {
		return g.count, nil
	}
	if !errors.Is(err, unix.EINVAL) {
		return 0, err
	}
	d.offloads.And(^uint32(g.offload))
	copy(head, saved[:g.headers])
	written := 0
	for i := g.first; ; i = w.groups.next[i] {
		n, err := d.writeOne(w.groups.packets[i])
		if written += n; err != nil || i == g.last {
			return written, err
		}
	}
}

func (d *Device) writeOne(packet []byte) (int, error) {
	w := &d.out
	clear(w.header[:])
	w.vector[0], w.vector[1] = piece(w.header[:]), piece(packet)
	if err := d.writev(2); err != nil {
		return 0, err
	}
	return 1, nil
}

func piece(b []byte) unix.Iovec { return unix.Iovec{Base: &b[0], Len: uint64(len(b))} }

// writev writes the first pieces of the vector.
func (d *Device) writev(pieces int) error {
	w := &d.out
	w.pieces = pieces
	err := d.raw.Write(w.put)
	clear(w.vector[:pieces])
	if err == nil && w.errno != 0 {
		err = fmt.Errorf("write to %s: %w", d.name, w.errno)
	}
	return d.gone(err)
}

// flush is writev(2) of a descriptor that does not block: the scheduler need
// not know of it.
func (d *Device) flush(fd uintptr) bool {
	w := &d.out
	for {
		_, _, w.errno = unix.RawSyscall(unix.SYS_WRITEV, fd, uintptr(unsafe.Pointer(&w.vector[0])), uintptr(w.pieces))
		if w.errno != unix.EINTR {
			return w.errno != unix.EAGAIN
		}
	}
}
