package coredns

import (
	"encoding/binary"
	"io"
	"net"
	"net/netip"
	"runtime"
	"sync"

	"github.com/miekg/dns"

	mesh "meshd.dev/dns"
	"meshd.dev/dns/index"
)

const (
	// maxUDP bounds a response over UDP: more is cut into fragments somewhere
	// (dnsflagday.net/2020), so larger answers go over TCP.
	maxUDP = 1232
	// maxQuery is the longest query read; a query is one name and a few
	// options.
	maxQuery = 4096
	// udpBuffer is what the kernel may keep for a socket while we are not
	// looking, in octets; some thousand queries.
	udpBuffer = 1 << 20
)

// readers of one UDP socket.
func readers() int { return min(4, runtime.GOMAXPROCS(0)) }

// readUDP answers what comes in until the socket is closed or breaks. What the
// index knows is answered here and now; it takes less than handing it over.
func (s *Server) readUDP(conn *net.UDPConn) error {
	in := make([]byte, maxQuery)
	out := make([]byte, 0, maxUDP)
	reply := new(index.Reply)
	var waiting sync.WaitGroup
	defer waiting.Wait()
	for {
		n, from, err := conn.ReadFromUDPAddrPort(in)
		if err != nil {
			return err
		}
		if !s.serves(from.Addr()) {
			dropped.Inc()
			continue
		}
		var ok bool
		if out, ok = s.cfg.Index.Answer(out[:0], in[:n], reply, s.options); ok {
			mesh.Count(reply.Code, len(reply.Answer) > 0)
			// A response that cannot be sent is one that got lost.
			_, _ = conn.WriteToUDPAddrPort(out, from)
			continue
		}
		if !s.waiting.enter(from.Addr()) {
			dropped.Inc()
			continue
		}
		w := &udpWriter{Writer: packet{conn, from}, local: conn.LocalAddr(), from: from}
		query := append([]byte(nil), in[:n]...)
		waiting.Go(func() {
			defer s.waiting.leave(from.Addr())
			s.serveWire(w, query)
		})
	}
}

// serveWire has the chain answer a query as it came off the wire.
func (s *Server) serveWire(w *udpWriter, query []byte) {
	if len(query) < 12 {
		return
	}
	h := dns.Header{
		Id:      binary.BigEndian.Uint16(query),
		Bits:    binary.BigEndian.Uint16(query[2:]),
		Qdcount: binary.BigEndian.Uint16(query[4:]),
		Ancount: binary.BigEndian.Uint16(query[6:]),
		Nscount: binary.BigEndian.Uint16(query[8:]),
		Arcount: binary.BigEndian.Uint16(query[10:]),
	}
	msg := new(dns.Msg)
	switch accept(h) {
	case dns.MsgIgnore:
		return
	case dns.MsgRejectNotImplemented:
		w.refuse(h, dns.RcodeNotImplemented)
		return
	case dns.MsgReject:
		w.refuse(h, dns.RcodeFormatError)
		return
	}
	if err := msg.Unpack(query); err != nil {
		w.refuse(h, dns.RcodeFormatError)
		return
	}
	if opt := msg.IsEdns0(); opt != nil && opt.UDPSize() > maxUDP {
		opt.SetUDPSize(maxUDP)
	}
	s.serve(w, msg)
}

// accept is what miekg/dns accepts by default, without NOTIFY: no plugin of
// ours wants it, and an upstream should not get it.
func accept(h dns.Header) dns.MsgAcceptAction {
	action := dns.DefaultMsgAcceptFunc(h)
	if opcode := h.Bits >> 11 & 0xf; action != dns.MsgIgnore && opcode != dns.OpcodeQuery {
		return dns.MsgRejectNotImplemented
	}
	return action
}

// udpWriter sends one response; it is a dns.ResponseWriter.
type udpWriter struct {
	io.Writer
	local net.Addr
	from  netip.AddrPort
}

// packet writes to whoever asked.
type packet struct {
	conn *net.UDPConn
	from netip.AddrPort
}

func (p packet) Write(b []byte) (int, error) { return p.conn.WriteToUDPAddrPort(b, p.from) }

// refuse answers a query that could not be read beyond its header.
func (w *udpWriter) refuse(h dns.Header, rcode int) {
	m := new(dns.Msg)
	m.Id = h.Id
	m.Response = true
	m.Opcode = int(h.Bits >> 11 & 0xf)
	m.RecursionDesired = h.Bits>>8&1 == 1
	m.Rcode = rcode
	_ = w.WriteMsg(m)
}

func (w *udpWriter) WriteMsg(m *dns.Msg) error {
	b, err := m.Pack()
	if err != nil {
		return err
	}
	_, err = w.Write(b)
	return err
}

func (w *udpWriter) LocalAddr() net.Addr  { return w.local }
func (w *udpWriter) RemoteAddr() net.Addr { return net.UDPAddrFromAddrPort(w.from) }
func (w *udpWriter) Close() error         { return nil }
func (w *udpWriter) TsigStatus() error    { return nil }
func (w *udpWriter) TsigTimersOnly(bool)  {}
func (w *udpWriter) Hijack()              {}
