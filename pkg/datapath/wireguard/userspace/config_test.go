package userspace

import (
	"bufio"
	"slices"
	"strings"
	"testing"

	"github.com/tailscale/wireguard-go/device"
)

func TestParseConfig(t *testing.T) {
	for _, tc := range []struct{ name, in, want, err string }{
		{"everything", "private_key=aa\nlisten_port=1\nfwmark=2\npublic_key=bb\npreshared_key=cc\nprotocol_version=1\nendpoint=1.2.3.4:5\n" +
			"last_handshake_time_sec=1\nlast_handshake_time_nsec=2\ntx_bytes=3\nrx_bytes=4\npersistent_keepalive_interval=5\nallowed_ip=10.0.0.0/8\nerrno=0\n\n",
			"private_key=aa\nlisten_port=1\nfwmark=2\npublic_key=bb\npreshared_key=cc\nendpoint=1.2.3.4:5\npersistent_keepalive_interval=5\nallowed_ip=10.0.0.0/8\n", ""},
		{"nothing", "errno=0\n\n", "", ""},
		{"refused", "errno=22\n\n", "", "errno=22"},
		{"cut off", "private_key=aa\npublic", "", "EOF"},
	} {
		got, err := parseConfig(bufio.NewReader(strings.NewReader(tc.in)))
		if got != tc.want || (err == nil) != (tc.err == "") || err != nil && !strings.Contains(err.Error(), tc.err) {
			t.Errorf("%s: %q, %v; want %q, %q", tc.name, got, err, tc.want, tc.err)
		}
	}
}

func TestMark(t *testing.T) {
	for _, s := range []string{"roaming:192.0.2.1:51820", "roaming:[2001:db8::1]:51820|2001:db8::2", "roaming:[fe80::1%eth0]:7|fe80::2"} {
		if p, ours := unmark(s); !ours || mark(p) != s {
			t.Errorf("%s: %s, %t", s, mark(p), ours)
		}
	}
	for _, s := range []string{"192.0.2.1:51820", "roaming:", "roaming:1.2.3.4:5|nobody", ""} {
		if p, ours := unmark(s); ours {
			t.Errorf("%q is ours: %+v", s, p)
		}
	}
}

func TestMentions(t *testing.T) {
	key := strings.Repeat("ab", 32)
	for _, tc := range []struct {
		in   string
		want []mention
	}{
		{"private_key=" + key + "\nendpoint=1.2.3.4:5\n", nil},
		{"public_key=" + key + "\nallowed_ip=10.0.0.0/8\n", []mention{{}}},
		{"public_key=" + key + "\nendpoint=1.2.3.4:5\npublic_key=" + key + "\nremove=true\n", []mention{{placed: true}, {removed: true}}},
		{"public_key=zz\nendpoint", []mention{{placed: true}}},
	} {
		got := mentions(tc.in)
		for i := range got {
			got[i].key = device.NoisePublicKey{}
		}
		if !slices.Equal(got, tc.want) {
			t.Errorf("%q: %+v, want %+v", tc.in, got, tc.want)
		}
	}
	if got := mentions("public_key=" + key + "\n"); got[0].key[31] != 0xab {
		t.Errorf("key %x", got[0].key)
	}
}
