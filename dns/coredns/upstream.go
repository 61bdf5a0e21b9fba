package coredns

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/netip"
	"os"
	"slices"
	"strings"

	"github.com/miekg/dns"
)

// maxResolvConf is how much of a resolv.conf is read.
const maxResolvConf = 64 << 10

// reconcileUpstreams puts a new chain in place when the upstreams changed.
func (s *Server) reconcileUpstreams() error {
	upstreams, err := s.findUpstreams()
	if s.current() == nil || !slices.Equal(upstreams, s.upstreams) {
		next, failed := s.newChain(upstreams)
		if failed != nil {
			return errors.Join(err, failed)
		}
		s.replace(next)
		s.upstreams = upstreams
		s.sayUpstreams()
	}
	s.reportUpstream(err)
	return nil
}

func (s *Server) sayUpstreams() {
	if len(s.upstreams) == 0 {
		s.cfg.Log.Warn("no upstream for dns: names outside the cluster answer SERVFAIL", "looked in", s.cfg.ResolvConf)
		return
	}
	s.cfg.Log.Info("forwarding foreign names", "to", s.upstreams)
}

func (s *Server) reportUpstream(err error) {
	switch {
	case err != nil:
		s.cfg.Board.Fail(checkUpstream, err.Error(), "make the file readable for meshd")
	case len(s.upstreams) == 0:
		s.cfg.Board.Fail(checkUpstream, "no upstream: names outside the cluster answer SERVFAIL",
			"put a nameserver other than this node's mesh addresses into one of "+strings.Join(s.cfg.ResolvConf, ", "))
	case s.current().deaf():
		s.cfg.Board.Fail(checkUpstream, fmt.Sprintf("no answer from %s", join(s.upstreams)),
			"see whether this node can reach them on UDP and TCP port 53")
	default:
		s.cfg.Board.OK(checkUpstream)
	}
}

func join(addrs []netip.AddrPort) string {
	var b strings.Builder
	for i, a := range addrs {
		if i > 0 {
			b.WriteString(", ")
		}
		b.WriteString(a.String())
	}
	return b.String()
}

// deaf reports whether every upstream failed its last health checks.
func (c *chain) deaf() bool {
	if c.forward == nil {
		return false
	}
	for _, p := range c.forward.List() {
		if p.Fails() <= 2 {
			return false
		}
	}
	return true
}

// findUpstreams takes the configured ones, or those of the first file that
// names any; never ourselves. A file that is not there is as good as empty.
func (s *Server) findUpstreams() ([]netip.AddrPort, error) {
	own := s.wanted()
	if len(s.cfg.Upstreams) > 0 {
		return usable(s.cfg.Upstreams, own, s.cfg.Port), nil
	}
	var failures []error
	for _, path := range s.cfg.ResolvConf {
		found, err := readResolvConf(path)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			failures = append(failures, err)
		}
		if found = usable(found, own, s.cfg.Port); len(found) > 0 {
			return found, nil
		}
	}
	return nil, errors.Join(failures...)
}

// usable leaves out our own sockets, which would ask themselves for ever, and
// what CoreDNS would not take.
func usable(all []netip.AddrPort, own []netip.Addr, port uint16) []netip.AddrPort {
	var left []netip.AddrPort
	for _, a := range all {
		self := a.Port() == port && slices.Contains(own, a.Addr().WithZone(""))
		if a.IsValid() && !a.Addr().IsUnspecified() && !self && !slices.Contains(left, a) && len(left) < maxUpstreams {
			left = append(left, a)
		}
	}
	return left
}

func readResolvConf(path string) ([]netip.AddrPort, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("read upstreams: %w", err)
	}
	defer f.Close()
	return parseResolvConf(f)
}

// parseResolvConf reads the nameserver lines of resolv.conf(5); all else is
// for clients, and lines that make no sense are passed over, as libc does.
func parseResolvConf(r io.Reader) ([]netip.AddrPort, error) {
	conf, err := dns.ClientConfigFromReader(io.LimitReader(r, maxResolvConf))
	if err != nil {
		return nil, fmt.Errorf("read upstreams: %w", err)
	}
	var found []netip.AddrPort
	for _, server := range conf.Servers {
		if a, err := netip.ParseAddr(server); err == nil {
			found = append(found, netip.AddrPortFrom(a.Unmap(), 53))
		}
	}
	return found, nil
}
