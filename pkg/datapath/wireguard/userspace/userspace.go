// Package userspace serves a WireGuard device from this process, for kernels
// that have none. It is the body of `meshd wireguard DEVICE`.
//
// The process owns the TUN link and the UDP sockets and answers on
// /var/run/wireguard/DEVICE.sock, the standard control socket, on which wg(8)
// and wgctrl find it. It starts without a key and without peers and does what
// it is told there. It knows nothing of meshd, so meshd may be restarted and
// upgraded while packets flow.
//
// When the process ends, for whatever reason, its link and with it every
// route into it are gone: pod traffic then hits the blackholes of package
// route, never the underlay in clear. SIGTERM therefore cuts the tunnels; an
// upgrade of meshd must leave this process alone (systemd: KillMode=process).
package userspace

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"runtime"
	"runtime/debug"
	"strconv"
	"sync"
	"time"

	"github.com/tailscale/wireguard-go/device"
	"github.com/tailscale/wireguard-go/tun"
	"golang.org/x/sys/unix"

	"meshd.dev/pkg/datapath/wireguard"
	"meshd.dev/pkg/mesh"
)

// Config of Run. Device is required.
type Config struct {
	// Device is the name of the link.
	Device string
	// MTU at the start; whoever drives the device changes it. Default 1420.
	MTU int
	Log *slog.Logger
}

// engine is what we use of a WireGuard implementation; the official module's
// device has the same methods.
type engine interface {
	IpcHandle(net.Conn)
	IpcSet(uapi string) error
	Wait() chan struct{}
	Close()
}

// Run serves the device until ctx ends or the link is deleted; the device is
// gone then. It returns an error at once when another process serves it.
// Parallelism and memory of the whole process are set for this one purpose.
func Run(ctx context.Context, cfg Config) error {
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	tune()
	unlock, err := lock(cfg.Device)
	if err != nil {
		return err
	}
	defer unlock()
	link, err := tun.CreateTUN(cfg.Device, cmp.Or(cfg.MTU, 1500-mesh.TunnelOverhead))
	if err != nil {
		return fmt.Errorf("make link %s: %w", cfg.Device, err)
	}
	bind := newBind()
	dev := newEngine(link, bind, cfg.Log)
	defer dev.Close() // closes the link too
	ctx, cancel := context.WithCancel(ctx)
	var follower sync.WaitGroup
	follower.Go(func() { bind.roaming.follow(ctx, dev.IpcSet, cfg.Log) })
	defer func() { cancel(); follower.Wait() }()
	control := &control{path: "/var/run/wireguard/" + cfg.Device + ".sock", handle: dev.IpcHandle}
	if err := control.open(); err != nil {
		return err
	}
	defer control.close()
	cfg.Log.Info("serving", "device", cfg.Device, "pid", os.Getpid(), "parallel", runtime.GOMAXPROCS(0))
	watch := time.NewTicker(time.Second)
	defer watch.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-dev.Wait():
			return fmt.Errorf("link %s is gone", cfg.Device)
		case <-watch.C:
			if err := control.check(); err != nil {
				cfg.Log.Warn("control socket", "err", err)
			}
		}
	}
}

// tune: few threads, because on small machines handing packets between cores
// costs more than it gains; and a ceiling for the collector to respect.
func tune() {
	runtime.GOMAXPROCS(max(1, runtime.NumCPU()/2))
	debug.SetGCPercent(200)
	debug.SetMemoryLimit(512 << 20)
}

func newEngine(link tun.Device, bind *bind, log *slog.Logger) engine {
	logger := &device.Logger{
		Verbosef: device.DiscardLogf,
		Errorf:   func(format string, args ...any) { log.Warn(fmt.Sprintf(format, args...)) },
	}
	// Short queues bound the memory a burst may take.
	queue := min(device.DefaultQueueInboundSize, max(2, runtime.NumCPU()))
	return device.NewDevice(link, bind, logger,
		device.WithQueueInboundSize(queue), device.WithQueueOutboundSize(queue))
}

// lock makes this process the only one to serve the device.
func lock(name string) (unlock func(), err error) {
	path := wireguard.LockPath(name)
	if err := os.MkdirAll("/var/run/wireguard", 0o755); err != nil {
		return nil, fmt.Errorf("lock device %s: %w", name, err)
	}
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("lock device %s: %w", name, err)
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		f.Close()
		return nil, fmt.Errorf("lock device %s: another process serves it: %w", name, err)
	}
	_ = f.Truncate(0)
	_, _ = f.WriteString(strconv.Itoa(os.Getpid()) + "\n")
	return func() { f.Close() }, nil // the file stays: removing it would race
}

// control is the control socket. It comes back when somebody deletes it.
type control struct {
	path   string
	handle func(net.Conn)

	mu       sync.Mutex
	listener net.Listener
	inode    uint64
	conns    map[net.Conn]bool
	wg       sync.WaitGroup
}

func (c *control) open() error {
	if err := os.Remove(c.path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("control socket: %w", err)
	}
	old := unix.Umask(0o077)
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: c.path, Net: "unix"})
	unix.Umask(old)
	if err != nil {
		return fmt.Errorf("control socket: %w", err)
	}
	l.SetUnlinkOnClose(false)
	c.mu.Lock()
	c.listener, c.inode = l, inode(c.path)
	if c.conns == nil {
		c.conns = map[net.Conn]bool{}
	}
	c.mu.Unlock()
	c.wg.Go(func() { c.accept(l) })
	return nil
}

func (c *control) accept(l net.Listener) {
	for {
		conn, err := l.Accept()
		if err != nil {
			return
		}
		c.mu.Lock()
		c.conns[conn] = true
		c.mu.Unlock()
		c.wg.Go(func() {
			c.handle(conn)
			c.mu.Lock()
			delete(c.conns, conn)
			c.mu.Unlock()
		})
	}
}

// check opens the socket again when it is not ours any more.
func (c *control) check() error {
	if c.inode != 0 && inode(c.path) == c.inode {
		return nil
	}
	c.listener.Close()
	return c.open()
}

func (c *control) close() {
	if inode(c.path) == c.inode {
		os.Remove(c.path)
	}
	c.listener.Close()
	c.mu.Lock()
	for conn := range c.conns {
		conn.Close()
	}
	c.mu.Unlock()
	c.wg.Wait()
}

func inode(path string) uint64 {
	var st unix.Stat_t
	if unix.Stat(path, &st) != nil {
		return 0
	}
	return st.Ino
}
