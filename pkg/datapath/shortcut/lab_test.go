package shortcut

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"runtime"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"meshd.dev/pkg/datapath/firewall"
	"meshd.dev/pkg/datapath/internal/testns"
	"meshd.dev/pkg/mesh"
	"meshd.dev/pkg/status"
)

func TestMain(m *testing.M) { testns.Main(m) }

// lab is a machine with pods 10.244.1.N and fd00:10:244:1::N, and services
// 10.96.0.N. It is made as the CNI plugin makes it.
type lab struct {
	testing.TB
	join  func(testing.TB)
	board *status.Board
	fw    *firewall.Table
	cfg   firewall.Config

	mu   sync.Mutex
	pods []mesh.LocalPod
}

func newLab(t *testing.T, pods ...int) *lab {
	join := testns.New(t)
	if err := haveTCX(); err != nil {
		t.Skip("no tcx in this kernel: " + err.Error())
	}
	p, a := netip.MustParsePrefix, netip.MustParseAddr
	l := &lab{TB: t, join: join, board: &status.Board{}}
	l.fw = firewall.New(nil, l.list)
	l.cfg = firewall.Config{
		Device: "mesh0", PodLinks: mesh.PodLinkPrefix,
		PodCIDRs:     []netip.Prefix{p("10.244.1.0/24"), p("fd00:10:244:1::/64")},
		MeshAddrs:    []netip.Addr{a("10.244.1.1"), a("fd00:10:244:1::1")},
		Cluster:      []netip.Prefix{p("10.244.0.0/16"), p("fd00:10:244::/48")},
		ServiceCIDRs: []netip.Prefix{p("10.96.0.0/16"), p("fd00:10:96::/112")},
	}
	testns.Sh(t, `sysctl -qw net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1
		ip link add mesh0 type veth peer name other; ip link set mesh0 up; ip link set other up
		ip address add 10.244.1.1/32 dev mesh0; ip address add fd00:10:244:1::1/128 dev mesh0 nodad
		ip route add 10.96.0.0/16 dev mesh0; ip route add fd00:10:96::/112 dev mesh0`)
	l.protect()
	for _, n := range pods {
		l.attach(n, fmt.Sprintf("p%d", n), 1500)
	}
	return l
}

func (l *lab) list() ([]mesh.LocalPod, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return slices.Clone(l.pods), nil
}

func (l *lab) protect() {
	l.Helper()
	if _, err := l.fw.Apply(context.Background(), l.cfg); err != nil {
		l.Fatal(err)
	}
}

// attach pod n as name, which is its namespace, and part of its link's name.
func (l *lab) attach(n int, name string, mtu int) {
	l.Helper()
	l.mu.Lock()
	l.pods = append(l.pods, mesh.LocalPod{Link: "msh" + name, Addrs: []netip.Addr{addr4(n), addr6(n)}})
	l.mu.Unlock()
	l.protect()
	l.Cleanup(func() { _ = testns.Exec("ip", "netns", "del", name) })
	testns.Sh(l, strings.NewReplacer("NAME", name, "MTU", fmt.Sprint(mtu), "A4", addr4(n).String(), "A6", addr6(n).String(), "MAC", podMAC(n)).Replace(`
		ip netns add NAME
		ip link add mshNAME mtu MTU address 0a:6d:65:73:68:01 type veth peer name eth0 mtu MTU address MAC netns NAME
		sysctl -qw net.ipv4.conf.mshNAME.rp_filter=1 net.ipv6.conf.mshNAME.accept_ra=0 net.ipv6.conf.mshNAME.addr_gen_mode=1
		ip link set mshNAME up
		ip -n NAME link set lo up; ip -n NAME link set eth0 up
		ip -n NAME address add A4/32 dev eth0; ip -n NAME address add A6/128 dev eth0 nodad
		ip -n NAME neigh add 169.254.1.1 lladdr 0a:6d:65:73:68:01 dev eth0
		ip -n NAME neigh add fe80::1 lladdr 0a:6d:65:73:68:01 dev eth0
		ip -n NAME route add default via 169.254.1.1 dev eth0 onlink
		ip -n NAME -6 route add default via fe80::1 dev eth0 onlink
		ip neigh add A4 lladdr MAC dev mshNAME; ip neigh add A6 lladdr MAC dev mshNAME
		ip route add A4/32 dev mshNAME proto 78; ip route add A6/128 dev mshNAME proto 78`))
}

// detach what is there under name, as the plugin does: meshd need not live for
// it, the link goes down, and dies with the namespace.
func (l *lab) detach(name string) {
	l.Helper()
	testns.Sh(l, "ip link set msh"+name+" down")
	l.mu.Lock()
	defer l.mu.Unlock()
	l.pods = slices.DeleteFunc(l.pods, func(p mesh.LocalPod) bool { return p.Link == "msh"+name })
}

func addr4(n int) netip.Addr { return netip.AddrFrom4([4]byte{10, 244, 1, byte(n)}) }
func addr6(n int) netip.Addr { return netip.MustParseAddr(fmt.Sprintf("fd00:10:244:1::%d", n)) }
func podMAC(n int) string    { return fmt.Sprintf("0a:58:0a:f4:01:%02x", n) }

// assure makes conntrack take all that was said over UDP for assured, as it
// does by itself with what goes on for two seconds.
func (l *lab) assure() {
	l.Helper()
	updated := 0
	for _, family := range []string{"ipv4", "ipv6"} {
		said := testns.Sh(l, "conntrack -U -f "+family+" -p udp -u ASSURED 2>&1 || true") // it fails where there is none
		n := 0
		_, _ = fmt.Sscanf(said[max(0, strings.LastIndex(said, "): ")):], "): %d flow entries have been updated", &n)
		updated += n
	}
	if updated == 0 {
		l.Fatal("conntrack(8) found nothing to take for assured")
	}
}

// shortcut as meshd starts it, brought to rest.
func (l *lab) shortcut() *Shortcut {
	l.Helper()
	s := New(Config{Pods: l.list, Board: l.board})
	s.begun.Store(true)
	l.round(s)
	if s.program == nil {
		l.Fatal("no program: " + s.why)
	}
	l.Cleanup(func() {
		if s.program != nil {
			s.program.close()
		}
	})
	return s
}

func (l *lab) round(s *Shortcut) {
	l.Helper()
	if err := s.apply(context.Background()); err != nil {
		l.Fatal(err)
	}
	if plan, err := s.Plan(); len(plan) > 0 || err != nil {
		l.Fatalf("the second time there is something to do: %q, %v", plan, err)
	}
}

// taken counts the packets that go the short way while f runs.
func (l *lab) taken(s *Shortcut, f func()) uint64 {
	l.Helper()
	before := s.program.packets()
	f()
	return s.program.packets() - before
}

// in runs f on a thread in a pod's namespace, where it may open sockets.
func (l *lab) in(pod string, f func()) {
	l.Helper()
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // for good: the thread ends
		ns, err := os.Open("/run/netns/" + pod)
		if err == nil {
			err = unix.Setns(int(ns.Fd()), unix.CLONE_NEWNET)
			ns.Close()
		}
		if err == nil {
			f()
		}
		done <- err
	}()
	if err := <-done; err != nil {
		l.Fatalf("enter pod %s: %v", pod, err)
	}
}

// serve answers on a port of a pod, TCP and UDP: each line or datagram comes
// back behind the pod's name and the client's address.
func (l *lab) serve(pod string, n int, port uint16) {
	l.Helper()
	for _, a := range []netip.Addr{addr4(n), addr6(n)} {
		at := netip.AddrPortFrom(a, port)
		var tcp *net.TCPListener
		var udp *net.UDPConn
		var err1, err2 error
		l.in(pod, func() {
			tcp, err1 = net.ListenTCP("tcp", net.TCPAddrFromAddrPort(at))
			udp, err2 = net.ListenUDP("udp", net.UDPAddrFromAddrPort(at))
		})
		if err := errors.Join(err1, err2); err != nil {
			l.Fatal(err)
		}
		l.Cleanup(func() { tcp.Close(); udp.Close() })
		go func() {
			for {
				c, err := tcp.AcceptTCP()
				if err != nil {
					return
				}
				go echo(c, pod)
			}
		}()
		go func() {
			b := make([]byte, 65536)
			for {
				n, from, err := udp.ReadFromUDPAddrPort(b)
				if err != nil {
					return
				}
				_, _ = udp.WriteToUDPAddrPort(fmt.Appendf(nil, "%s saw %s: %s", pod, from.Addr().Unmap(), b[:n]), from)
			}
		}()
	}
}

func echo(c *net.TCPConn, pod string) {
	defer c.Close()
	in := bufio.NewReaderSize(c, 1<<20)
	from := c.RemoteAddr().(*net.TCPAddr).AddrPort().Addr().Unmap()
	for {
		line, err := in.ReadString('\n')
		if err != nil {
			return
		}
		if _, err := fmt.Fprintf(c, "%s saw %s: %s", pod, from, line); err != nil {
			return
		}
	}
}

// client is a socket of a pod.
type client struct {
	l  *lab
	c  net.Conn
	in *bufio.Reader
}

// dial from a pod, from a port of its own if sport is not 0.
func (l *lab) dial(pod, network, to string, sport int) *client {
	l.Helper()
	c, err := l.try(pod, network, to, sport)
	if err != nil {
		l.Fatalf("%s to %s: %v", pod, to, err)
	}
	return c
}

func (l *lab) try(pod, network, to string, sport int) (*client, error) {
	d := net.Dialer{Timeout: 5 * time.Second}
	if sport != 0 && network == "tcp" {
		d.LocalAddr = &net.TCPAddr{Port: sport}
	} else if sport != 0 {
		d.LocalAddr = &net.UDPAddr{Port: sport}
	}
	d.Control = func(_, _ string, c syscall.RawConn) error {
		var err error
		err2 := c.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEADDR, 1) })
		return errors.Join(err, err2)
	}
	var c net.Conn
	var err error
	l.in(pod, func() { c, err = d.Dial(network, to) })
	if err != nil {
		return nil, err
	}
	l.Cleanup(func() { c.Close() })
	return &client{l, c, bufio.NewReaderSize(c, 1<<20)}, nil
}

// ask sends a line so many times, one after the other, and wants each answer.
func (c *client) ask(times int, line, want string) {
	c.l.Helper()
	for i := range times {
		if got, err := c.once(line); err != nil || got != want {
			c.l.Fatalf("the %dth time %.80q was answered %.80q, %v; want %.80q", i+1, line, got, err, want)
		}
	}
}

func (c *client) once(line string) (string, error) {
	_ = c.c.SetDeadline(time.Now().Add(5 * time.Second))
	if _, err := io.WriteString(c.c, line+"\n"); err != nil {
		return "", err
	}
	got, err := c.in.ReadString('\n')
	return strings.TrimSuffix(got, "\n"), err
}

func says(pod string, from netip.Addr, line string) string {
	return fmt.Sprintf("%s saw %s: %s", pod, from, line)
}

func linkIndex(t testing.TB, name string) int {
	t.Helper()
	link, err := netlink.LinkByName(name)
	if err != nil {
		t.Fatal(err)
	}
	return link.Attrs().Index
}
