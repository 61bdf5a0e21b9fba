// Package userspace serves a WireGuard device from this process, for kernels
// that have none. It is the body of `meshd wireguard DEVICE`.
//
// The process owns the TUN link and the UDP sockets and answers on
// /var/run/wireguard/DEVICE.sock, the standard control socket, on which wg(8)
// and wgctrl find it. It starts without a key and without peers and does what
// it is told there. It knows nothing of meshd, so meshd may be restarted and
// upgraded while packets flow.
//
// When the process ends, for whatever reason, and meshd does not have its link
// open for the next one, the link and with it every route into it are gone: pod
// traffic then hits the blackholes of package route, never the underlay in
// clear. An upgrade of meshd must leave this process alone (systemd:
// KillMode=process).
// A process that begins anew sends every peer a handshake as soon as it is told
// of it (greet.go).
//
// The protocol is tailscale's device package, unchanged; link and sockets are
// ours (packages link and udp). What a small packet costs there is not
// encryption but the way through it: a system call and two goroutines woken on
// other threads. We do not carry a changed copy that takes a packet through in
// one goroutine, because measuring says that little is left to gain: with one
// running thread for each two CPUs the hand-over is a function call of the
// scheduler's, reads and writes take what is there, and the system calls, which
// never block, do not tell the scheduler. On two CPUs with both ends on them, a
// packet of 64 bytes at 10,000 a second costs 11 µs of CPU against 59 of
// official wireguard-go and 24 in a laboratory copy of the device package that
// did take it through in one goroutine, at two threads; a gigabyte in one TCP
// connection 2.5 s against 5.7 (test/bench tunnel has both in one run).
package userspace

import (
	"cmp"
	"context"
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"strconv"
	"sync"
	"syscall"
	"time"

	"github.com/tailscale/wireguard-go/device"
	"github.com/tailscale/wireguard-go/tun"
	"golang.org/x/sys/unix"

	"meshd.dev/pkg/datapath/wireguard"
	"meshd.dev/pkg/datapath/wireguard/userspace/link"
	"meshd.dev/pkg/mesh"
)

// Config of Run. Device is required.
type Config struct {
	// Device is the name of the link.
	Device string
	// MTU at the start; whoever drives the device changes it. Default 1420.
	MTU int
	// NoOffloads leaves segmentation to nobody but the sender. Otherwise what
	// the kernel gets right is used, from when that has been found out.
	NoOffloads bool
	// WhereNeeded is for a service that starts everywhere: it waits for ctx to
	// end where the kernel has WireGuard, and otherwise implies Second.
	WhereNeeded bool
	// TakeOver goes on where another process that serves the device is: it is
	// ended, and its link and configuration are this one's.
	TakeOver bool
	// Second has this process serve the second device of a key change as well,
	// when it is asked to on wireguard.AskPath.
	Second bool
	Log    *slog.Logger
}

// Flags sets what may be said on a command line.
func (cfg *Config) Flags(f *flag.FlagSet) {
	f.BoolVar(&cfg.WhereNeeded, "where-needed", false, "wait idly instead where the kernel has WireGuard, and serve DEVICE"+mesh.SecondSuffix+" as well when meshd asks for it; for a service that starts everywhere")
	f.BoolVar(&cfg.NoOffloads, "no-offloads", false, "use no segmentation offloads (TSO, USO, UDP_SEGMENT, UDP_GRO), though a trial finds that they work")
	f.BoolVar(&cfg.TakeOver, "take-over", false, "go on where another process carries the device: end it, keep the link and what it was told; for upgrades")
}

// Run serves the device until ctx ends or the link is deleted; the device is
// gone then. It returns an error at once when another process serves it, unless
// it is to take over.
// Parallelism and memory of the whole process are set for this one purpose.
func Run(ctx context.Context, cfg Config) error {
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	if cfg.WhereNeeded && wireguard.InKernel() {
		cfg.Log.Info("this kernel has WireGuard: nothing to do here", "device", cfg.Device)
		<-ctx.Done()
		return nil
	}
	cfg.Second = cfg.Second || cfg.WhereNeeded
	if _, err := os.Stat("/dev/net/tun"); err != nil {
		return fmt.Errorf("this kernel has neither WireGuard nor TUN: %w; load the module wireguard or tun, or use a kernel with one of them", err)
	}
	tune()
	return cfg.run(ctx)
}

func (cfg Config) run(ctx context.Context) error {
	begin, err := cfg.begin(ctx)
	if err != nil {
		return err
	}
	defer begin.unlock()
	l := begin.link
	bind, greeter := newBind(), newGreeter(cfg.Log)
	bind.opened, bind.roaming.first = greeter.kick, greeter.called
	dev := newEngine(l, bind, cfg.Log)
	greeter.dev = dev
	defer dev.Close() // closes the link too
	ctx, cancel := context.WithCancel(ctx)
	var helpers sync.WaitGroup
	helpers.Go(func() { bind.roaming.follow(ctx, dev.IpcSet, cfg.Log) })
	helpers.Go(func() { greeter.run(ctx, bind.open) })
	if !cfg.NoOffloads {
		helpers.Go(func() { useOffloads(ctx, l, bind, cfg.Log) })
	}
	defer func() { cancel(); helpers.Wait() }()
	if begin.config != "" {
		if err := dev.IpcSet(begin.config); err != nil {
			cfg.Log.Warn("some of what the process before was told", "err", err)
		}
		greeter.told(mentions(begin.config))
		greeter.kick()
	}
	second := cfg.serveSecond(ctx) // before the control socket, by which meshd knows that nobody listens here
	defer second.close()
	control := &control{path: wireguard.SocketPath(cfg.Device), handle: func(c net.Conn) { dev.IpcHandle(greeter.listen(c)) }}
	if err := control.open(); err != nil {
		return err
	}
	defer control.close()
	begin.ready()
	cfg.Log.Info("serving", "device", cfg.Device, "pid", os.Getpid(), "parallel", runtime.GOMAXPROCS(0))
	watch := time.NewTicker(time.Second)
	defer watch.Stop()
	trim := time.NewTicker(20 * time.Second)
	defer trim.Stop()
	var m memory
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-dev.Wait():
			return fmt.Errorf("link %s is gone", cfg.Device)
		case <-watch.C:
			if err := errors.Join(control.check(), second.check()); err != nil {
				cfg.Log.Warn("control socket", "err", err)
			}
		case <-trim.C:
			m.trim()
		}
	}
}

// start is what a process begins with.
type start struct {
	link   *link.Device
	unlock func()
	config string
	ready  func() // says that the control socket is open, once
}

// begin makes a link, or goes on with one: a predecessor's that ends for that,
// or one that whoever started this process has for it.
func (cfg Config) begin(ctx context.Context) (s start, err error) {
	s.ready = func() {}
	inherited, ok := wireguard.Inherited(cfg.Device)
	if ok {
		starter := os.NewFile(wireguard.ReadyDescriptor, "ready")
		unix.CloseOnExec(wireguard.ReadyDescriptor)
		s.ready = func() { starter.Close() }
	}
	var p *predecessor
	if cfg.TakeOver {
		if p, err = findPredecessor(cfg.Device); err != nil {
			return s, err
		}
	}
	if p != nil {
		defer p.file.Close() // the link has its own by then
		if s.unlock, err = p.end(ctx, cfg.Device); err != nil {
			return s, err
		}
		s.config = p.config
		s.link, err = link.Adopt(cfg.Device, p.file)
	} else {
		if s.unlock, err = lock(cfg.Device); err != nil {
			return s, err
		}
		if inherited.Link {
			file := os.NewFile(wireguard.LinkDescriptor, "/dev/net/tun")
			defer file.Close()
			s.link, err = link.Adopt(cfg.Device, file)
		} else {
			s.link, err = link.Open(cfg.Device, cmp.Or(cfg.MTU, 1500-mesh.TunnelOverhead))
		}
	}
	if err != nil {
		s.unlock()
	}
	return s, err
}

// tune: few threads, because handing packets between cores costs more than it
// gains while they wait for each other; and a tight collector, since next to
// nothing is allocated for packets, but a thousand peers have their share. No
// priority of its own: at nice -10 on a busy machine it ran for nearly each small
// packet alone, at two to three times the CPU a packet.
func tune() {
	runtime.GOMAXPROCS(max(1, runtime.NumCPU()/2))
	debug.SetGCPercent(50)
	debug.SetMemoryLimit(512 << 20)
}

// memory of the process that no file backs, after it was last trimmed.
type memory struct{ kept uint64 }

// trim gives memory back that a burst took, of packets or of handshakes: the
// runtime keeps it for two minutes, or while nothing is allocated for ever.
func (m *memory) trim() {
	const slack = 2 << 20
	if now := committed(); m.kept == 0 || now > m.kept+slack {
		debug.FreeOSMemory()
		m.kept = committed()
	}
}

func committed() uint64 {
	var s runtime.MemStats
	runtime.ReadMemStats(&s)
	return s.Sys - s.HeapReleased
}

// staged is how many reads of the link may wait for a session with their peer.
// What was read at once, and is more than 2 KB, keeps a buffer of 128 KB, be it
// for one peer or for many: the engine's own 128 reads come to 16 MB for a peer
// that is not there.
const staged = 16

func newEngine(link tun.Device, bind *bind, log *slog.Logger) *device.Device {
	said := &complaints{log: log, kinds: map[string]kind{}}
	logger := &device.Logger{Verbosef: device.DiscardLogf, Errorf: said.errorf}
	// Short queues bound the memory a burst may take.
	queue := min(device.DefaultQueueInboundSize, max(2, runtime.NumCPU()))
	return device.NewDevice(link, bind, logger,
		device.WithQueueInboundSize(queue), device.WithQueueOutboundSize(queue), device.WithQueueStagedSize(staged))
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
	if err := os.MkdirAll(filepath.Dir(c.path), 0o700); err != nil {
		return fmt.Errorf("control socket: %w", err)
	}
	l, err := (&net.ListenConfig{Control: ownerOnly}).Listen(context.Background(), "unix", c.path)
	if err != nil {
		return fmt.Errorf("control socket: %w", err)
	}
	l.(*net.UnixListener).SetUnlinkOnClose(false)
	c.mu.Lock()
	c.listener, c.inode = l, inode(c.path)
	if c.conns == nil {
		c.conns = map[net.Conn]bool{}
	}
	c.mu.Unlock()
	c.wg.Go(func() { c.accept(l) })
	return nil
}

// ownerOnly, from before the socket has its name; a umask would be that of the
// whole process.
func ownerOnly(_, _ string, raw syscall.RawConn) error {
	var err error
	if failed := raw.Control(func(fd uintptr) { err = unix.Fchmod(int(fd), 0o600) }); failed != nil {
		return failed
	}
	return err
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
