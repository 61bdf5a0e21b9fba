package nodeauth

import (
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"maps"
	"slices"
	"strings"

	"k8s.io/apiserver/pkg/authentication/authenticator"
	requestx509 "k8s.io/apiserver/pkg/authentication/request/x509"
	"k8s.io/apiserver/pkg/authentication/user"
)

const (
	userPrefix = "system:node:"
	nodesGroup = user.NodesGroup
	// identityAnnotation on a Node is the hash of the key it joined with, as
	// pkg/join writes it; in a user's extra it is the hash of the key that user
	// proved to hold.
	identityAnnotation = "meshd.dev/identity"
)

// UserOf a client certificate: the common name and organizations, as
// everywhere in Kubernetes, and the hash of the certificate's key, by which a
// node is told from an earlier one of the same name.
var UserOf = requestx509.UserConversionFunc(func(chain []*x509.Certificate) (*authenticator.Response, bool, error) {
	resp, ok, err := requestx509.CommonNameUserConversion(chain)
	if err != nil || !ok {
		return resp, ok, err
	}
	extra := maps.Clone(resp.User.GetExtra())
	if extra == nil {
		extra = map[string][]string{}
	}
	extra[identityAnnotation] = []string{hashKey(chain[0].RawSubjectPublicKeyInfo)}
	resp.User = &user.DefaultInfo{Name: resp.User.GetName(), UID: resp.User.GetUID(), Groups: resp.User.GetGroups(), Extra: extra}
	return resp, true, nil
})

func hashKey(spki []byte) string {
	sum := sha256.Sum256(spki)
	return hex.EncodeToString(sum[:])
}

// identityOf is the hash of the key a user proved to hold, or empty.
func identityOf(u user.Info) string {
	if hashes := u.GetExtra()[identityAnnotation]; len(hashes) == 1 {
		return hashes[0]
	}
	return ""
}

// NodeName returns the node an identity speaks for. isNode is true for every
// member of system:nodes; such an identity with an empty name may do nothing.
func NodeName(u user.Info) (name string, isNode bool) {
	if u == nil || !slices.Contains(u.GetGroups(), nodesGroup) {
		return "", false
	}
	name, found := strings.CutPrefix(u.GetName(), userPrefix)
	if !found {
		return "", true
	}
	return name, true
}
