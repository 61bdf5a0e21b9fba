package coredns

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"
)

// socket is one address we answer on, over UDP and TCP.
type socket struct {
	udp   *net.UDPConn
	tcp   *tcpServer
	done  sync.WaitGroup
	fails chan error // why the socket no longer answers
}

// reconcileSockets opens what is wanted and not open, and closes what is open
// and not wanted or broken.
func (s *Server) reconcileSockets() error {
	wanted := s.wanted()
	var failures []error
	for _, addr := range wanted {
		if sock := s.sockets[addr]; sock != nil {
			err := sock.broken()
			if err == nil {
				continue
			}
			s.cfg.Log.Warn("dns socket broke, opening it again", "addr", addr, "err", err)
			sock.close()
			delete(s.sockets, addr)
		}
		sock, err := s.open(addr)
		if err != nil {
			failures = append(failures, err)
			continue
		}
		s.sockets[addr] = sock
		s.cfg.Log.Info("answering dns", "addr", addr, "port", s.cfg.Port)
	}
	for addr, sock := range s.sockets {
		if !slices.Contains(wanted, addr) {
			sock.close()
			delete(s.sockets, addr)
			s.cfg.Log.Info("no longer answering dns", "addr", addr)
		}
	}
	err := errors.Join(failures...)
	s.reportListening(wanted, err)
	return err
}

func (s *Server) reportListening(wanted []netip.Addr, err error) {
	switch {
	case err != nil:
		s.cfg.Board.Fail(checkListening, err.Error(),
			fmt.Sprintf("find what else listens on port %d (ss -lnup sport = %d) and stop it or bind it to another address", s.cfg.Port, s.cfg.Port))
	case len(wanted) == 0:
		s.cfg.Board.Fail(checkListening, "this node has no address in the mesh yet, so pods on it have no resolver",
			"wait until the controller gives the node a pod CIDR; see whether the server runs")
	default:
		s.cfg.Board.OK(checkListening)
	}
}

// open binds both sockets of addr and starts answering.
func (s *Server) open(addr netip.Addr) (*socket, error) {
	at := netip.AddrPortFrom(addr, s.cfg.Port)
	cfg := net.ListenConfig{Control: freebind(addr)}
	// The context only bounds the resolution of names, of which there is none.
	packets, err := cfg.ListenPacket(context.Background(), "udp", at.String())
	if err != nil {
		return nil, fmt.Errorf("answer dns on %s: %w", at, err)
	}
	listener, err := cfg.Listen(context.Background(), "tcp", at.String())
	if err != nil {
		packets.Close()
		return nil, fmt.Errorf("answer dns on %s: %w", at, err)
	}
	// The kernel gives what it allows; less is slower and not wrong.
	_ = packets.(*net.UDPConn).SetReadBuffer(udpBuffer)
	sock := &socket{udp: packets.(*net.UDPConn), fails: make(chan error, 1)}
	sock.tcp = s.newTCP(listener)
	sock.start(s)
	return sock, nil
}

// freebind lets a socket be bound to an address no device has yet, and keeps
// TCP from waiting out old connections.
func freebind(addr netip.Addr) func(network, address string, c syscall.RawConn) error {
	return func(_, _ string, c syscall.RawConn) error {
		var err error
		failed := c.Control(func(fd uintptr) {
			level, option := unix.SOL_IP, unix.IP_FREEBIND
			if addr.Is6() {
				level, option = unix.SOL_IPV6, unix.IPV6_FREEBIND
			}
			if err = unix.SetsockoptInt(int(fd), level, option, 1); err != nil {
				err = fmt.Errorf("set freebind: %w", err)
			}
		})
		return errors.Join(failed, err)
	}
}

func (k *socket) start(s *Server) {
	for range readers() {
		k.done.Go(func() { k.fail(s, s.readUDP(k.udp)) })
	}
	k.done.Go(func() { k.fail(s, k.tcp.serve()) })
}

// fail remembers the first reason a socket stopped for, and has the loop look
// at it.
func (k *socket) fail(s *Server, err error) {
	if err == nil || errors.Is(err, net.ErrClosed) {
		return
	}
	select {
	case k.fails <- err:
		s.loop.Kick()
	default:
	}
}

func (k *socket) broken() error {
	select {
	case err := <-k.fails:
		return err
	default:
		return nil
	}
}

// close ends the socket and waits until nobody uses it.
func (k *socket) close() {
	k.udp.Close()
	k.tcp.close()
	k.done.Wait()
}
