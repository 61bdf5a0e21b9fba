package exchange

import (
	"crypto/hkdf"
	"crypto/hmac"
	"crypto/sha256"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"fmt"
)

// Secret is a preshared key.
type Secret [32]byte

// String hides it.
func (s Secret) String() string { return "(hidden)" }

// GoString hides it from %#v as well.
func (s Secret) GoString() string { return s.String() }

// agreed is what both ends derive.
type agreed struct {
	psk Secret
	// words by which each shows the other that it has it.
	first, second []byte
}

const label = "meshd preshared key 1"

// derive from the secret of ML-KEM and the TLS session; first is the node that
// began.
func derive(shared []byte, tls tls.ConnectionState, first, second string, pair Pair) (agreed, error) {
	salt, err := tls.ExportKeyingMaterial("EXPORTER-meshd-psk", nil, 32)
	if err != nil {
		return agreed{}, fmt.Errorf("derive preshared key: %w", err)
	}
	return expand(shared, salt, first, second, pair)
}

func expand(shared, salt []byte, first, second string, pair Pair) (agreed, error) {
	info := []byte(label)
	for _, part := range [][]byte{[]byte(first), []byte(second), pair.First[:], pair.Second[:]} {
		info = binary.BigEndian.AppendUint32(info, uint32(len(part)))
		info = append(info, part...)
	}
	out, err := hkdf.Key(sha256.New, shared, salt, string(info), 96)
	if err != nil {
		return agreed{}, fmt.Errorf("derive preshared key: %w", err)
	}
	return agreed{psk: Secret(out[:32]), first: out[32:64], second: out[64:]}, nil
}

// confirms reports whether the other end has the same.
func confirms(want, got []byte) error {
	if !hmac.Equal(want, got) {
		return errors.New("the other end derived another preshared key")
	}
	return nil
}

// name of a preshared key, by which two nodes see that they have the same
// without telling it.
func (s Secret) name() []byte {
	mac := hmac.New(sha256.New, s[:])
	mac.Write([]byte(label + " name"))
	return mac.Sum(nil)[:8]
}
