package userspace

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"meshd.dev/pkg/datapath/wireguard"
)

// predecessor is the process that serves the device now, and what it hands on
// without knowing: the link, with its addresses and routes, which lives on with
// whoever has it open, and what the process was told. Sessions end with it; the
// greetings of this process make new ones. So an upgrade of this program costs
// a handshake and not a link. Packets to be sent wait in the link until this process reads it, and are lost from
// then until it knows the peer.
type predecessor struct {
	pid int
	// process is that process even when another one has its number.
	process *os.Process
	file    *os.File
	// config is for the control socket of the successor.
	config string
}

// patience is how long a predecessor may take to answer and to end.
const patience = 10 * time.Second

// findPredecessor returns nil if no process serves the device.
func findPredecessor(device string) (*predecessor, error) {
	unlock, err := lock(device)
	if err == nil {
		unlock()
		return nil, nil
	}
	p, err := findHolder(device)
	if err != nil {
		return nil, fmt.Errorf("take over device %s: %w", device, err)
	}
	return p, nil
}

func findHolder(device string) (p *predecessor, err error) {
	running, err := wireguard.ProcessOf(device)
	if err != nil {
		return nil, err
	}
	running.Life.Close() // process is as good
	p = &predecessor{pid: running.Pid, file: os.NewFile(uintptr(running.Link), "/dev/net/tun")}
	done := false
	defer func() {
		if !done {
			p.file.Close()
		}
	}()
	if p.process, err = os.FindProcess(p.pid); err != nil {
		return nil, fmt.Errorf("process %d: %w", p.pid, err)
	}
	if p.config, err = configOf(device); err != nil {
		return nil, err
	}
	done = true
	return p, nil
}

// configOf asks a control socket for what a successor must be told.
func configOf(device string) (string, error) {
	c, err := net.DialTimeout("unix", wireguard.SocketPath(device), patience)
	if err != nil {
		return "", err
	}
	defer c.Close()
	if err := c.SetDeadline(time.Now().Add(patience)); err != nil {
		return "", err
	}
	if _, err := io.WriteString(c, "get=1\n\n"); err != nil {
		return "", err
	}
	return parseConfig(bufio.NewReader(c))
}

// parseConfig turns the answer to a question about a device into lines that
// make another one like it.
func parseConfig(r *bufio.Reader) (string, error) {
	var config strings.Builder
	for {
		line, err := r.ReadString('\n')
		if err != nil {
			return "", fmt.Errorf("answer on the control socket: %w", err)
		}
		name, value, _ := strings.Cut(strings.TrimSuffix(line, "\n"), "=")
		switch name {
		case "errno":
			if value != "0" {
				return "", fmt.Errorf("the control socket answered errno=%s", value)
			}
			return config.String(), nil
		case "private_key", "listen_port", "fwmark",
			"public_key", "preshared_key", "endpoint", "persistent_keepalive_interval", "allowed_ip":
			config.WriteString(line)
		}
	}
}

// end has it end, and returns when its lock is ours.
func (p *predecessor) end(ctx context.Context, device string) (unlock func(), err error) {
	defer p.process.Release()
	if err := p.process.Signal(unix.SIGTERM); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return nil, fmt.Errorf("end process %d: %w", p.pid, err)
	}
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for {
		if unlock, err = lock(device); err == nil {
			return unlock, nil
		}
		select {
		case <-ctx.Done():
			return nil, fmt.Errorf("take over device %s: process %d does not end: %w", device, p.pid, err)
		case <-tick.C:
		}
	}
}
