package main

import (
	"net/netip"
	"slices"
	"time"

	"meshd.dev/pkg/datapath"
	"meshd.dev/pkg/datapath/wireguard"
	"meshd.dev/pkg/exchange"
	"meshd.dev/pkg/kube"
	"meshd.dev/pkg/mesh"
	"meshd.dev/pkg/status"
)

// newExchange talks with the other nodes about keys, on the TCP port whose
// number is that of the tunnels.
func (n *node) newExchange() error {
	var err error
	n.exchange, err = exchange.New(exchange.Config{
		Node:  n.cfg.NodeName,
		Dir:   n.cfg.state("node"),
		Port:  n.cfg.ListenPort,
		Moved: func() { n.publishing.Kick() },
		State: func() *mesh.State {
			return n.window.State()
		},
		Keys: func() (current, next mesh.Key) {
			keys := n.datapath.Rotation().Keys
			return keys.Current, keys.Next
		},
		Sends: func(node string) (exchange.Sending, bool) {
			s, ok := n.datapath.SendsTo(node)
			return exchange.Sending(s), ok
		},
		Heard: func(node string, s exchange.Sending, asked time.Time) {
			n.datapath.Heard(node, datapath.Sending(s), asked)
		},
		Changed: func(node string) { n.datapath.PSKChanged(node) },
		Board:   n.board,
		Log:     n.log.With("part", "exchange"),
	})
	if err != nil {
		return err
	}
	n.window.Subscribe(n.exchange.Kick)
	return nil
}

// psk is what two nodes agreed on, for the datapath.
func (n *node) psk(peer mesh.Node, own, key mesh.Key) datapath.PSK {
	a := n.exchange.PSK(peer, own, key)
	return datapath.PSK{Secret: wireguard.Secret(a.PSK), Wait: a.Wait, Firm: a.Firm}
}

// keysChanged tells the peers, and talks with them about the new ones.
func (n *node) keysChanged() {
	n.publishing.Kick()
	n.exchange.Kick()
}

// record is what this node says of itself; false while it is not known what
// it may say.
func (n *node) record() (kube.Record, bool) {
	keys, known := n.datapath.Published()
	r := kube.Record{PublicKey: keys.Current, Exchange: n.exchange.Published()}
	if !keys.Next.IsZero() {
		r.NextKey, r.NextPort = keys.Next, uint16(n.datapath.SecondPort())
	}
	first := slices.Clone(n.cfg.endpoints)
	for _, a := range n.addresses() {
		first = append(first, netip.AddrPortFrom(a, uint16(n.cfg.ListenPort)))
	}
	r.Endpoints = n.datapath.Endpoints(first...)
	return r, known
}

// keys is the answer to /keys.
func (n *node) keys() status.Keys {
	r := n.datapath.Rotation()
	doc := status.Keys{
		Node: n.cfg.NodeName, Key: r.Current.String(), Generation: r.Generation, Made: r.Made, Stage: string(r.Stage()),
		Wanted: r.Wanted, Waiting: r.Waiting, Due: r.Due,
	}
	if !r.Next.IsZero() {
		doc.Next = r.Next.String()
	}
	state := n.window.State()
	if state == nil {
		return doc
	}
	for _, p := range state.Nodes {
		if p.Name == n.cfg.NodeName {
			continue
		}
		line := status.KeyPeer{Node: p.Name, Key: p.PublicKey.String(), Changing: string(wireguard.StageOf(p.PublicKey, p.NextKey))}
		own, theirs := r.Current, p.PublicKey
		if s, ok := n.datapath.SendsTo(p.Name); ok && s.Second {
			line.Second, theirs = true, s.Key
			if !r.Next.IsZero() {
				own = r.Next
			}
		}
		line.PSKMade, line.PSKWhy = n.exchange.Status(p, own, theirs)
		doc.Peers = append(doc.Peers, line)
	}
	return doc
}

// rotate is the answer to POST /keys/rotate.
func (n *node) rotate() any {
	n.datapath.RotateKey()
	return n.keys()
}

// minKeyRotation keeps a mistaken schedule from being at it all the time.
const minKeyRotation = 10 * time.Minute
