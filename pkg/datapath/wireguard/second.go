package wireguard

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"meshd.dev/pkg/mesh"
)

// Where somebody else starts the process of the first device, as a DaemonSet of
// its own does, a second device that this process started would end with it: a
// container takes its children along. So that process is asked to serve the
// second one too. It is sent the name and a line feed, and answers "ok" when the
// device is there, or what went wrong. An older one does not listen, nor does
// one that is not of meshd; then we start the second one after all.

// AskPath is where whoever serves the device called first is asked for its
// second one. It is in a folder because wgctrl takes every socket beside
// DEVICE.sock for a device, named by what stands before the dot.
func AskPath(first string) string { return "/var/run/wireguard/" + first + ".d/second" }

// SocketPath is the standard control socket of a userspace device.
func SocketPath(name string) string { return "/var/run/wireguard/" + name + ".sock" }

// Answered is what the process says when it serves the device.
const Answered = "ok"

// askForSecond reports whether there is somebody to ask, and then how that went.
func (d *Device) askForSecond(ctx context.Context) (asked bool, err error) {
	first := strings.TrimSuffix(d.opts.Name, mesh.SecondSuffix)
	conn, err := call(ctx, AskPath(first))
	if nobody(err) {
		conn, err := call(ctx, SocketPath(first))
		if nobody(err) {
			return true, fmt.Errorf("nothing serves %s, and so nobody %s: does `meshd wireguard --where-needed %[1]s` run (DaemonSet meshd-wireguard)?", first, d.opts.Name)
		}
		if err == nil {
			conn.Close()
		}
		return false, nil // it serves, and listens only there
	}
	if err != nil {
		return true, fmt.Errorf("ask for %s: %w", d.opts.Name, err)
	}
	defer conn.Close()
	if err := d.question(ctx, conn); err != nil {
		return true, fmt.Errorf("ask for %s on %s: %w", d.opts.Name, AskPath(first), err)
	}
	return true, nil
}

func (d *Device) question(ctx context.Context, conn net.Conn) error {
	defer context.AfterFunc(ctx, func() { conn.Close() })()
	// Its own patience is spawnTimeout, and two may ask.
	_ = conn.SetDeadline(time.Now().Add(2 * spawnTimeout))
	if _, err := fmt.Fprintln(conn, d.opts.Name); err != nil {
		return err
	}
	answer, err := bufio.NewReader(io.LimitReader(conn, 1<<10)).ReadString('\n')
	if err != nil {
		return fmt.Errorf("no answer: %w", err)
	}
	if answer = strings.TrimSpace(answer); answer != Answered {
		return errors.New(answer)
	}
	return nil
}

func call(ctx context.Context, path string) (net.Conn, error) {
	return new(net.Dialer).DialContext(ctx, "unix", path)
}

// nobody listens: there is no socket, or whoever made it is gone.
func nobody(err error) bool {
	return errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ECONNREFUSED)
}
