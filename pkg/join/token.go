// Package join brings a machine into a cluster: the token an administrator
// carries over, the server's side that turns a token into a client
// certificate for exactly one node, and the node's side that trusts the server
// by the CA's hash in the token before it sends a byte of it.
package join

import (
	"crypto/rand"
	"fmt"
	"hash/crc32"
	"regexp"
	"strings"
)

// Token is what `meshctl token create` prints and `meshd join --token` takes:
//
//	<id>.<secret>.<SHA-256 of the CA's public key, hex>.<CRC-32 of all before, hex>
//
// ID and secret have the form of Kubernetes' bootstrap tokens; the hash is
// kubeadm's; the CRC tells a mistyped token from a wrong one.
type Token struct {
	ID, Secret string
	CAHash     string
}

const (
	idLength     = 6
	secretLength = 16
)

var tokenForm = regexp.MustCompile(`^([a-z0-9]{6})\.([a-z0-9]{16})\.([0-9a-f]{64})\.([0-9a-f]{8})$`)

// NewToken makes a token of about 82 random bits for the CA of that hash.
func NewToken(caHash string) Token {
	return Token{ID: randomText(idLength), Secret: randomText(secretLength), CAHash: caHash}
}

func randomText(n int) string {
	const letters = "abcdefghijklmnopqrstuvwxyz0123456789"
	const fair = 256 - 256%len(letters) // bytes from here on would favour the first letters
	var text strings.Builder
	var b [1]byte
	for text.Len() < n {
		_, _ = rand.Read(b[:])
		if int(b[0]) < fair {
			text.WriteByte(letters[int(b[0])%len(letters)])
		}
	}
	return text.String()
}

func (t Token) body() string { return t.ID + "." + t.Secret + "." + t.CAHash }

// String is the form to hand over.
func (t Token) String() string {
	return fmt.Sprintf("%s.%08x", t.body(), crc32.ChecksumIEEE([]byte(t.body())))
}

// ParseToken reads what String wrote. Its error never repeats the secret.
func ParseToken(s string) (Token, error) {
	m := tokenForm.FindStringSubmatch(strings.TrimSpace(s))
	if m == nil {
		return Token{}, fmt.Errorf("token: want id.secret.ca-hash.checksum as `meshctl token create` prints it (6+16+64+8 characters and three dots), have %d characters and %d dots; copy the whole line", len(s), strings.Count(s, "."))
	}
	t := Token{ID: m[1], Secret: m[2], CAHash: m[3]}
	if sum := fmt.Sprintf("%08x", crc32.ChecksumIEEE([]byte(t.body()))); sum != m[4] {
		return Token{}, fmt.Errorf("token %s: mistyped, its checksum does not fit; copy it again, or make a new one with `meshctl token create`", t.ID)
	}
	return t, nil
}
