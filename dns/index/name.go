package index

import (
	"fmt"
	"net/netip"
	"strings"

	"github.com/miekg/dns"
)

// maxLabels a name of 255 octets can have, and one more.
const maxLabels = 128

// Fold appends the wire format of a name in presentation format to dst, in
// lower case.
func Fold(dst []byte, name string) ([]byte, error) {
	var buf [256]byte
	n, err := dns.PackDomainName(name, buf[:], 0, nil, false)
	if err != nil {
		return dst, fmt.Errorf("name %q: %w", name, err)
	}
	lower(buf[:n])
	return append(dst, buf[:n]...), nil
}

// lower folds ASCII letters; the lengths of labels are below 'A' and keep
// their value.
func lower(b []byte) {
	for i, c := range b {
		if 'A' <= c && c <= 'Z' {
			b[i] = c + 'a' - 'A'
		}
	}
}

// labels is where the labels of a name in wire format begin.
type labels struct {
	name []byte
	at   [maxLabels]uint8
	n    int
}

// split finds the labels of a whole, uncompressed name; false when it is none.
func (l *labels) split(name []byte) bool {
	l.name, l.n = name, 0
	if len(name) > 255 {
		return false
	}
	for i := 0; i < len(name); i += int(name[i]) + 1 {
		if name[i] == 0 {
			return i == len(name)-1
		}
		if name[i] > 63 || l.n == maxLabels-1 {
			return false
		}
		l.at[l.n] = uint8(i)
		l.n++
	}
	return false
}

// label i from the left, without its length.
func (l *labels) label(i int) []byte {
	at := int(l.at[i])
	return l.name[at+1 : at+1+int(l.name[at])]
}

// from is the name from label i on.
func (l *labels) from(i int) []byte {
	if i == l.n {
		return l.name[len(l.name)-1:]
	}
	return l.name[l.at[i]:]
}

// serviceKey is the key of a service in the table, or "" when its names
// cannot stand in a DNS name.
func serviceKey(name, namespace string) string {
	if !isLabel(name) || !isLabel(namespace) {
		return ""
	}
	b := make([]byte, 0, len(name)+len(namespace)+2)
	b = append(append(b, byte(len(name))), name...)
	b = append(append(b, byte(len(namespace))), namespace...)
	lower(b)
	return string(b)
}

// isLabel reports whether s can be one label as it stands: letters, digits,
// hyphens and underscores (RFC 1123, and RFC 2782 for the underscore).
func isLabel(s string) bool {
	if len(s) == 0 || len(s) > 63 {
		return false
	}
	for _, c := range []byte(s) {
		switch {
		case 'a' <= c && c <= 'z', 'A' <= c && c <= 'Z', '0' <= c && c <= '9', c == '-', c == '_':
		default:
			return false
		}
	}
	return true
}

// equalFold compares a label in lower case with a string of any.
func equalFold(label []byte, s string) bool {
	if len(label) != len(s) {
		return false
	}
	for i, c := range []byte(s) {
		if 'A' <= c && c <= 'Z' {
			c += 'a' - 'A'
		}
		if label[i] != c {
			return false
		}
	}
	return true
}

// appendDashed appends the name an address has when nothing else names it:
// 10-1-2-3, fd00--7. A label does not end with a hyphen, so 0 follows one.
func appendDashed(dst []byte, a netip.Addr) []byte {
	start := len(dst)
	dst = a.AppendTo(dst)
	for i := start; i < len(dst); i++ {
		if dst[i] == '.' || dst[i] == ':' {
			dst[i] = '-'
		}
	}
	if dst[len(dst)-1] == '-' {
		dst = append(dst, '0')
	}
	return dst
}

// parseDashed reads a label such as 10-1-2-3 or fd00--7. Only exact wants the
// very spelling of appendDashed.
func parseDashed(label []byte, exact bool) (netip.Addr, bool) {
	if len(label) > 45 {
		return netip.Addr{}, false
	}
	var buf [48]byte
	text := append(buf[:0], label...)
	sep, hyphens, double := byte(':'), 0, false
	for i, c := range text {
		if c == '-' {
			hyphens++
			double = double || i > 0 && text[i-1] == '-'
		}
		if c == '.' || c == ':' || c == '%' {
			return netip.Addr{}, false
		}
	}
	if hyphens == 3 && !double {
		sep = '.'
	}
	for i, c := range text {
		if c == '-' {
			text[i] = sep
		}
	}
	a, err := netip.ParseAddr(string(text))
	if err != nil {
		return netip.Addr{}, false
	}
	a = a.Unmap()
	var again [48]byte
	if exact && string(appendDashed(again[:0], a)) != string(label) {
		return netip.Addr{}, false
	}
	return a, true
}

// externalTarget is the name an ExternalName service points at, fully
// qualified; "" when it is an address or no name at all.
func externalTarget(s string) string {
	if _, err := netip.ParseAddr(strings.TrimSuffix(s, ".")); err == nil || s == "" || s == "." {
		return ""
	}
	name := dns.Fqdn(s)
	if _, err := Fold(nil, name); err != nil {
		return ""
	}
	return name
}
