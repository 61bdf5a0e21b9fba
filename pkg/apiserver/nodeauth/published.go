package nodeauth

import (
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"net/netip"
	"strconv"
	"strings"
)

// The annotations of ours that a node writes for its peers, as pkg/mesh names
// them, which this package may not import.
const (
	keyAnnotation       = "meshd.dev/public-key"
	endpointsAnnotation = "meshd.dev/endpoints"
	nextKeyAnnotation   = "meshd.dev/next-key"
	exchangeAnnotation  = "meshd.dev/key-exchange"
)

// publishedAnnotations are all that a node may write on itself of ours.
var publishedAnnotations = []string{keyAnnotation, endpointsAnnotation, nextKeyAnnotation, exchangeAnnotation}

// maxEndpoints is how many a peer reads.
const maxEndpoints = 16

// publicKey is a WireGuard public key; the zero publicKey is none. Keys are
// compared as bytes, because base64 has several spellings of the same ones.
type publicKey [32]byte

func parseKey(text string) (publicKey, error) {
	b, err := base64.StdEncoding.DecodeString(text)
	if err != nil || len(b) != len(publicKey{}) || publicKey(b) == (publicKey{}) {
		return publicKey{}, fmt.Errorf("%.80q: want 32 bytes in base64 that are not all zero", text)
	}
	return publicKey(b), nil
}

// parseNextKey reads a key, a space and a port.
func parseNextKey(text string) (publicKey, error) {
	word, port, _ := strings.Cut(text, " ")
	if !isPort(port) {
		return publicKey{}, fmt.Errorf("%.80q: want a public key, a space and a port", text)
	}
	return parseKey(word)
}

func isPort(text string) bool {
	n, err := strconv.ParseUint(text, 10, 16)
	return err == nil && n > 0
}

// checkExchange wants a port, a space and the hash of a key.
func checkExchange(text string) error {
	port, pin, _ := strings.Cut(text, " ")
	if b, err := hex.DecodeString(pin); !isPort(port) || err != nil || len(b) != 32 {
		return fmt.Errorf("annotation %s is %.100q: want a port, a space and 64 hex digits", exchangeAnnotation, text)
	}
	return nil
}

// checkEndpoints wants 1 to 16 endpoints that a peer could send to.
func checkEndpoints(text string) error {
	parts := strings.SplitN(text, ",", maxEndpoints+1)
	if len(parts) > maxEndpoints {
		return fmt.Errorf("annotation %s: more than %d endpoints", endpointsAnnotation, maxEndpoints)
	}
	for _, part := range parts {
		ep, err := netip.ParseAddrPort(part)
		if err != nil || !usable(ep.Addr().Unmap()) || ep.Port() == 0 {
			return fmt.Errorf("annotation %s: endpoint %.80q: want address:port of a unicast address", endpointsAnnotation, part)
		}
	}
	return nil
}

// usable reports whether an address means the same machine to every peer.
func usable(a netip.Addr) bool {
	return a.IsGlobalUnicast() && a.Zone() == ""
}

// checkPublished looks at what a node says to its peers where it says something
// new. It may always take its word back.
func (r *restriction) checkPublished(node string, now, before map[string]string) error {
	var errs []error
	for name, parse := range map[string]func(string) (publicKey, error){keyAnnotation: parseKey, nextKeyAnnotation: parseNextKey} {
		if text, is := now[name]; is && text != before[name] {
			errs = append(errs, r.checkKey(node, name, text, parse))
		}
	}
	if text, is := now[exchangeAnnotation]; is && text != before[exchangeAnnotation] {
		errs = append(errs, checkExchange(text))
	}
	if text, is := now[endpointsAnnotation]; is && text != before[endpointsAnnotation] {
		errs = append(errs, checkEndpoints(text))
	}
	return errors.Join(errs...)
}

// checkKey refuses a key that another Node carries: peers know each other by
// key, so the second one to have it takes the first one's traffic or cuts it
// off. Two that write the same new key in the same moment both pass.
func (r *restriction) checkKey(node, annotation, text string, parse func(string) (publicKey, error)) error {
	key, err := parse(text)
	if err != nil {
		return fmt.Errorf("annotation %s is %w", annotation, err)
	}
	if !r.index.HasSynced() {
		return errors.New("the keys of the nodes are not known yet, try again")
	}
	if other, taken := r.index.keyOwner(key, node); taken {
		return fmt.Errorf("annotation %s: node %q has it; give this machine a key of its own, or delete that node if it was this machine", annotation, other)
	}
	return nil
}
