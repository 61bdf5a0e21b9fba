package nodeauth

import (
	"encoding/base64"
	"errors"
	"fmt"
	"net/netip"
	"strings"
)

// The annotations of ours that a node writes for its peers, as pkg/mesh names
// them, which this package may not import.
const (
	keyAnnotation       = "meshd.dev/public-key"
	endpointsAnnotation = "meshd.dev/endpoints"
)

// maxEndpoints is how many a peer reads.
const maxEndpoints = 16

// publicKey is a WireGuard public key; the zero publicKey is none. Keys are
// compared as bytes, because base64 has several spellings of the same ones.
type publicKey [32]byte

func parseKey(text string) (publicKey, error) {
	b, err := base64.StdEncoding.DecodeString(text)
	if err != nil || len(b) != len(publicKey{}) || publicKey(b) == (publicKey{}) {
		return publicKey{}, fmt.Errorf("annotation %s is %.80q: want 32 bytes in base64 that are not all zero", keyAnnotation, text)
	}
	return publicKey(b), nil
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
	if text, is := now[keyAnnotation]; is && text != before[keyAnnotation] {
		errs = append(errs, r.checkKey(node, text))
	}
	if text, is := now[endpointsAnnotation]; is && text != before[endpointsAnnotation] {
		errs = append(errs, checkEndpoints(text))
	}
	return errors.Join(errs...)
}

// checkKey refuses a key that another Node carries: peers know each other by
// key, so the second one to have it takes the first one's traffic or cuts it
// off. Two that write the same new key in the same moment both pass.
func (r *restriction) checkKey(node, text string) error {
	key, err := parseKey(text)
	if err != nil {
		return err
	}
	if !r.index.HasSynced() {
		return errors.New("the keys of the nodes are not known yet, try again")
	}
	if other, taken := r.index.keyOwner(key, node); taken {
		return fmt.Errorf("annotation %s: node %q has it; give this machine a key of its own, or delete that node if it was this machine", keyAnnotation, other)
	}
	return nil
}
