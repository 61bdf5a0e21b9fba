package link

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"

	"github.com/tailscale/wireguard-go/tun"
	"golang.org/x/sys/unix"
)

// changes is a socket that has something to read when a link changed.
func changes() (*os.File, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.NETLINK_ROUTE)
	if err != nil {
		return nil, err
	}
	if err := unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK, Groups: unix.RTMGRP_LINK}); err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("listen for changes of links: %w", err)
	}
	return os.NewFile(uintptr(fd), "netlink"), nil
}

// Events tells of the link going up or down and of a new MTU.
func (d *Device) Events() <-chan tun.Event { return d.events }

// report looks at the link whenever it changed, and tells what is different:
// messages may be lost, states are not.
func (d *Device) report() {
	defer unix.Close(d.control)
	defer close(d.events)
	var up bool
	var mtu int32
	for buf := make([]byte, 1<<16); ; {
		if flags, err := d.ask(unix.SIOCGIFFLAGS); err == nil && flags&unix.IFF_UP != 0 != up {
			up = !up
			event := tun.Event(tun.EventDown)
			if up {
				event = tun.EventUp
			}
			if !d.tell(event) {
				return
			}
		}
		if now, err := d.ask(unix.SIOCGIFMTU); err == nil && now != mtu {
			if mtu = now; !d.tell(tun.EventMTUUpdate) {
				return
			}
		}
		for {
			n, err := d.watch.Read(buf)
			if errors.Is(err, os.ErrClosed) {
				return
			}
			if err != nil || concerns(buf[:n], d.index) { // an error is messages lost
				break
			}
		}
	}
}

func (d *Device) tell(e tun.Event) bool {
	select {
	case d.events <- e:
		return true
	case <-d.closing:
		return false
	}
}

// concerns says whether netlink messages are about the link with that index.
func concerns(msgs []byte, index int32) bool {
	for len(msgs) >= unix.SizeofNlMsghdr+unix.SizeofIfInfomsg {
		length := int(binary.NativeEndian.Uint32(msgs))
		if int32(binary.NativeEndian.Uint32(msgs[unix.SizeofNlMsghdr+4:])) == index {
			return true
		}
		if length = (length + 3) &^ 3; length < unix.SizeofNlMsghdr || length > len(msgs) {
			return false
		}
		msgs = msgs[length:]
	}
	return false
}
