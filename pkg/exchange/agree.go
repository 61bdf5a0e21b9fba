package exchange

import (
	"crypto/mlkem"
	"fmt"
	"time"

	"meshd.dev/pkg/mesh"
)

// settle makes sure that both ends have the same preshared key of two keys.
func (x *Exchange) settle(c *conn, n mesh.Node, p *peer, own, theirs mesh.Key) error {
	pair := x.pair(n.Name, own, theirs)
	req := request{From: x.cfg.Node, To: n.Name, Pair: pair}
	if !x.begins(n.Name) {
		req.Op = opMiss
		_, err := c.ask(req)
		return err
	}
	if e, ok, _ := x.store.get(n, own, theirs); ok {
		req.Op, req.Name = opCheck, Secret(e.PSK).name()
		resp, err := c.ask(req)
		if err != nil {
			return err
		}
		if resp.OK {
			x.markChecked(p, pair)
			return nil
		}
		req.Name = nil
	}
	if err := x.agree(c, n, req, own, theirs); err != nil {
		return err
	}
	x.markChecked(p, pair)
	x.cfg.Log.Info("agreed on a preshared key", "node", n.Name, "own", own, "peer", theirs)
	x.cfg.Changed(n.Name)
	return nil
}

func (x *Exchange) markChecked(p *peer, pair Pair) {
	x.mu.Lock()
	defer x.mu.Unlock()
	for old, at := range p.checked {
		if time.Since(at) > 2*recheck {
			delete(p.checked, old)
		}
	}
	p.checked[pair] = time.Now()
}

// agree on a new preshared key; we begin.
func (x *Exchange) agree(c *conn, n mesh.Node, req request, own, theirs mesh.Key) error {
	key, err := mlkem.GenerateKey768()
	if err != nil {
		return fmt.Errorf("make encapsulation key: %w", err)
	}
	req.Op, req.Data = opOffer, key.EncapsulationKey().Bytes()
	resp, err := c.ask(req)
	if err != nil {
		return err
	}
	if len(resp.Data) <= mlkem.CiphertextSize768 {
		return fmt.Errorf("answer of %d bytes, want a ciphertext of %d and a word behind it", len(resp.Data), mlkem.CiphertextSize768)
	}
	shared, err := key.Decapsulate(resp.Data[:mlkem.CiphertextSize768])
	if err != nil {
		return fmt.Errorf("read ciphertext: %w", err)
	}
	a, err := derive(shared, c.ConnectionState(), x.cfg.Node, n.Name, req.Pair)
	if err != nil {
		return err
	}
	if err := confirms(a.second, resp.Data[mlkem.CiphertextSize768:]); err != nil {
		return err
	}
	req.Op, req.Data = opConfirm, a.first
	if resp, err = c.ask(req); err != nil {
		return err
	}
	if !resp.OK {
		return fmt.Errorf("%s does not use the new preshared key", n.Name)
	}
	return x.store.put(n, own, theirs, a.psk, x.usefulNow(n))
}

// pending is what the other end of a connection has offered and not yet
// confirmed.
type pending struct {
	pair Pair
	agreed
}

// offered answers an offer.
func (x *Exchange) offered(c *conn, n mesh.Node, req request) (*pending, []byte, error) {
	key, err := mlkem.NewEncapsulationKey768(req.Data)
	if err != nil {
		return nil, nil, fmt.Errorf("read encapsulation key: %w", err)
	}
	shared, ciphertext := key.Encapsulate()
	a, err := derive(shared, c.ConnectionState(), n.Name, x.cfg.Node, req.Pair)
	if err != nil {
		return nil, nil, err
	}
	return &pending{req.Pair, a}, append(ciphertext, a.second...), nil
}

// confirmed stores what was offered, and has it used.
func (x *Exchange) confirmed(p *pending, n mesh.Node, req request) error {
	if p == nil || p.pair != req.Pair {
		return fmt.Errorf("confirms what was not offered")
	}
	if err := confirms(p.first, req.Data); err != nil {
		return err
	}
	if err := x.store.put(n, p.pair.Second, p.pair.First, p.psk, x.usefulNow(n)); err != nil {
		return err
	}
	x.cfg.Log.Info("agreed on a preshared key", "node", n.Name, "own", p.pair.Second, "peer", p.pair.First)
	x.cfg.Changed(n.Name)
	return nil
}
