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
// second one too, over a socket beside the first one's. It is sent the name and
// a line feed, and answers "ok" when the device is there, or what went wrong.
// An older one has no such socket; then we start the second one after all.

// AskPath is that socket. It does not end in .sock, for those are devices.
func AskPath(first string) string { return "/var/run/wireguard/" + first + ".second" }

// Answered is what the process says when it serves the device.
const Answered = "ok"

// askForSecond reports whether there is somebody to ask, and then how that went.
func (d *Device) askForSecond(ctx context.Context) (asked bool, err error) {
	path := AskPath(strings.TrimSuffix(d.opts.Name, mesh.SecondSuffix))
	conn, err := (&net.Dialer{}).DialContext(ctx, "unix", path)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ECONNREFUSED) {
		return false, nil
	}
	if err != nil {
		return true, fmt.Errorf("ask for %s: %w", d.opts.Name, err)
	}
	defer conn.Close()
	_ = conn.SetDeadline(time.Now().Add(spawnTimeout + time.Second)) // its own patience is spawnTimeout
	if _, err := fmt.Fprintln(conn, d.opts.Name); err != nil {
		return true, fmt.Errorf("ask for %s: %w", d.opts.Name, err)
	}
	answer, err := bufio.NewReader(io.LimitReader(conn, 1<<10)).ReadString('\n')
	if err != nil {
		return true, fmt.Errorf("ask for %s: no answer on %s: %w", d.opts.Name, path, err)
	}
	if answer = strings.TrimSpace(answer); answer != Answered {
		return true, fmt.Errorf("ask for %s on %s: %s", d.opts.Name, path, answer)
	}
	return true, nil
}
