package exchange

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"

	"meshd.dev/pkg/mesh"
)

// maxMessage bounds what a peer may send at once, in bytes.
const maxMessage = 8 << 10

// What a request is about.
const (
	opCheck   = "check"   // is the preshared key of Pair called Name with you?
	opOffer   = "offer"   // here is an encapsulation key for Pair
	opConfirm = "confirm" // I have the preshared key; do you use it now?
	opMiss    = "miss"    // you begin: I have no preshared key of Pair
	opSends   = "sends"   // to which key of mine do you send?
)

// request of one node to another, from which it is told by its pin.
type request struct {
	Op   string `json:"op"`
	From string `json:"from"`
	To   string `json:"to"`
	Pair Pair   `json:"pair"`
	// Name of a preshared key, for check.
	Name []byte `json:"name,omitempty"`
	// Data: the encapsulation key, or the word of confirmation.
	Data []byte `json:"data,omitempty"`
}

// response to a request.
type response struct {
	Error string `json:"error,omitempty"`
	// OK: the keys are called the same; it is stored and used.
	OK bool `json:"ok,omitempty"`
	// Data: the ciphertext and behind it the word of confirmation.
	Data  []byte   `json:"data,omitempty"`
	Sends *Sending `json:"sends,omitempty"`
}

// Pair of WireGuard keys: of the node that begins and of the other.
type Pair struct {
	First  mesh.Key `json:"first"`
	Second mesh.Key `json:"second"`
}

// Sending is to which key of the asking node a node sends, and over its second
// device or its first.
type Sending struct {
	Key    mesh.Key `json:"key"`
	Second bool     `json:"second"`
}

// A message is its length in four bytes and JSON.
func write(w io.Writer, message any) error {
	b, err := json.Marshal(message)
	if err != nil {
		return fmt.Errorf("write message: %w", err)
	}
	if len(b) > maxMessage {
		return fmt.Errorf("write message: %d bytes, the most are %d", len(b), maxMessage)
	}
	_, err = w.Write(append(binary.BigEndian.AppendUint32(nil, uint32(len(b))), b...))
	return err
}

func read(r io.Reader, message any) error {
	var head [4]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		return err
	}
	n := binary.BigEndian.Uint32(head[:])
	if n > maxMessage {
		return fmt.Errorf("read message: %d bytes, the most are %d", n, maxMessage)
	}
	b := make([]byte, n)
	if _, err := io.ReadFull(r, b); err != nil {
		return err
	}
	return parse(b, message)
}

// parse one object of a peer, which may be newer and say more than we know.
func parse(b []byte, message any) error {
	return decode(json.NewDecoder(bytes.NewReader(b)), message)
}

// parseStrictly one object that nobody but us writes.
func parseStrictly(b []byte, message any) error {
	d := json.NewDecoder(bytes.NewReader(b))
	d.DisallowUnknownFields()
	return decode(d, message)
}

func decode(d *json.Decoder, message any) error {
	if err := d.Decode(message); err != nil {
		return fmt.Errorf("read message: %w", err)
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return errors.New("read message: more than one")
	}
	return nil
}
