package dns_test

import (
	"context"
	"math/rand/v2"
	"net"
	"net/netip"
	"testing"
	"time"

	"github.com/miekg/dns"

	mesh "meshd.dev/dns"
	server "meshd.dev/dns/coredns"
	"meshd.dev/dns/index"
	"meshd.dev/pkg/status"
)

// BenchmarkOverUDP asks three servers about the same service of the same
// cluster, one question after the other from each of a few clients: meshd's
// own, CoreDNS with the plugin mesh, and CoreDNS with the plugin kubernetes.
// Compare them within a run; what the client and the kernel take is in all.
func BenchmarkOverUDP(b *testing.B) {
	o := randomObjects(rand.New(rand.NewPCG(1, 7)))
	x, err := index.New(index.Config{Zone: "cluster.local"})
	if err != nil {
		b.Fatal(err)
	}
	x.Apply(o.state())
	name := ""
	for _, s := range o.services {
		if len(s.Spec.ClusterIPs) == 1 && s.Spec.ClusterIPs[0][:3] == "10." {
			name = s.Name + "." + s.Namespace + ".svc.cluster.local."
		}
	}
	b.Run("meshd", func(b *testing.B) {
		load(b, meshd(b, x), name)
	})
	b.Run("coredns-mesh", func(b *testing.B) {
		b.Cleanup(mesh.Share("bench", x))
		load(b, coredns(b, "mesh cluster.local {\nindex bench\n}").RemoteAddr().String(), name)
	})
	b.Run("coredns-kubernetes", func(b *testing.B) {
		api := o.serveAPI()
		b.Cleanup(api.Close)
		at := coredns(b, "kubernetes cluster.local {\nendpoint "+api.URL+"\npods insecure\n}").RemoteAddr().String()
		b.Cleanup(api.CloseClientConnections)
		load(b, at, name)
	})
}

// meshd runs our server and returns where it listens.
func meshd(b *testing.B, x *index.Index) string {
	b.Helper()
	probe, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		b.Fatal(err)
	}
	at := probe.LocalAddr().(*net.UDPAddr).AddrPort()
	probe.Close()
	board := &status.Board{}
	s, err := server.New(server.Config{Index: x, Listen: []netip.Addr{at.Addr()}, Port: at.Port(), Board: board, ResolvConf: []string{"/nonexistent"}})
	if err != nil {
		b.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	b.Cleanup(func() { cancel(); <-done })
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for len(board.Checks()) < 3 {
		<-tick.C
	}
	return at.String()
}

func load(b *testing.B, at, name string) {
	b.Helper()
	m := new(dns.Msg)
	m.SetQuestion(name, dns.TypeA)
	query, err := m.Pack()
	if err != nil {
		b.Fatal(err)
	}
	b.SetParallelism(4)
	b.RunParallel(func(pb *testing.PB) {
		c, err := net.Dial("udp", at)
		if err != nil {
			b.Error(err)
			return
		}
		defer c.Close()
		buf := make([]byte, 512)
		for pb.Next() {
			_ = c.SetDeadline(time.Now().Add(5 * time.Second))
			if _, err := c.Write(query); err != nil {
				b.Error(err)
				return
			}
			if n, err := c.Read(buf); err != nil || n < 40 {
				b.Errorf("%d octets, %v", n, err)
				return
			}
		}
	})
}
