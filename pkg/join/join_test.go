package join

import (
	"crypto/tls"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/kubernetes/fake"

	"meshd.dev/pkg/pki"
)

// bench is a server with its CA, reachable at address.
type bench struct {
	client  kubernetes.Interface
	ca      *pki.CA
	address string
	now     time.Time
}

func newBench(t *testing.T) *bench {
	dir := t.TempDir()
	ca, err := pki.LoadOrCreateCA(dir, "meshd-ca")
	if err != nil {
		t.Fatal(err)
	}
	cert, key, err := ca.Keep(dir, "server", pki.Identity{User: "meshd-apiserver", DNSNames: []string{ServerName}})
	if err != nil {
		t.Fatal(err)
	}
	pair, err := tls.LoadX509KeyPair(cert, key)
	if err != nil {
		t.Fatal(err)
	}
	b := &bench{client: fake.NewClientset(), ca: ca, now: time.Now()}
	s := &Server{CA: ca, Client: b.client, Cluster: Cluster{PodCIDRs: []string{"10.244.0.0/16"}}, Log: slog.New(slog.DiscardHandler), Patience: time.Second, Now: func() time.Time { return b.now }}
	mux := http.NewServeMux()
	mux.HandleFunc(JoinPath, s.Join)
	mux.HandleFunc(RenewPath, s.Renew)
	srv := httptest.NewUnstartedServer(mux)
	srv.TLS = &tls.Config{Certificates: []tls.Certificate{pair}, ClientAuth: tls.RequestClientCert}
	srv.StartTLS()
	t.Cleanup(srv.Close)
	b.address = srv.Listener.Addr().String()
	return b
}

func (b *bench) token(t *testing.T, life time.Duration, info TokenInfo) Token {
	tok := NewToken(pki.Hash(b.ca.Cert))
	if err := CreateToken(t.Context(), b.client, tok, life, info); err != nil {
		t.Fatal(err)
	}
	return tok
}

func TestJoin(t *testing.T) {
	for _, c := range []struct {
		name string
		do   func(t *testing.T, b *bench, join func(dir string, tok Token, node string) error) error
		want string // part of the error; empty for none
	}{
		{"a token is good for one node", func(t *testing.T, b *bench, join func(string, Token, string) error) error {
			return join("a", b.token(t, time.Minute, TokenInfo{}), "m2")
		}, ""},
		{"the same machine may ask again", func(t *testing.T, b *bench, join func(string, Token, string) error) error {
			tok := b.token(t, time.Minute, TokenInfo{})
			if err := join("a", tok, "m2"); err != nil {
				return err
			}
			return join("a", tok, "m2")
		}, ""},
		{"another machine may not use it again", func(t *testing.T, b *bench, join func(string, Token, string) error) error {
			tok := b.token(t, time.Minute, TokenInfo{})
			if err := join("a", tok, "m2"); err != nil {
				return err
			}
			return join("b", tok, "m3")
		}, "already used, by node m2"},
		{"a reusable one serves many", func(t *testing.T, b *bench, join func(string, Token, string) error) error {
			tok := b.token(t, time.Minute, TokenInfo{Reusable: true})
			if err := join("a", tok, "m2"); err != nil {
				return err
			}
			return join("b", tok, "m3")
		}, ""},
		{"a name has one owner", func(t *testing.T, b *bench, join func(string, Token, string) error) error {
			if err := join("a", b.token(t, time.Minute, TokenInfo{}), "m2"); err != nil {
				return err
			}
			return join("b", b.token(t, time.Minute, TokenInfo{}), "m2")
		}, "a node named m2 has joined already"},
		{"expired", func(t *testing.T, b *bench, join func(string, Token, string) error) error {
			tok := b.token(t, time.Minute, TokenInfo{})
			b.now = b.now.Add(2 * time.Minute)
			return join("a", tok, "m2")
		}, "expired at"},
		{"revoked", func(t *testing.T, b *bench, join func(string, Token, string) error) error {
			tok := b.token(t, time.Minute, TokenInfo{})
			if err := RevokeToken(t.Context(), b.client, tok.ID); err != nil {
				return err
			}
			return join("a", tok, "m2")
		}, "not known here"},
		{"wrong secret", func(t *testing.T, b *bench, join func(string, Token, string) error) error {
			tok := b.token(t, time.Minute, TokenInfo{})
			tok.Secret = "0123456789abcdef"
			return join("a", tok, "m2")
		}, "not known here"},
		{"another cluster's CA", func(t *testing.T, b *bench, join func(string, Token, string) error) error {
			tok := b.token(t, time.Minute, TokenInfo{})
			tok.CAHash = strings.Repeat("0", 64)
			return join("a", tok, "m2")
		}, "not the one in the token"},
		{"a bad node name", func(t *testing.T, b *bench, join func(string, Token, string) error) error {
			return join("a", b.token(t, time.Minute, TokenInfo{}), "M_2")
		}, "node name \"M_2\""},
		{"a node cannot have the name by which the API server is known", func(t *testing.T, b *bench, join func(string, Token, string) error) error {
			return join("a", b.token(t, time.Minute, TokenInfo{}), ServerName)
		}, "node name \"kubernetes\""},
		{"nor that of every machine", func(t *testing.T, b *bench, join func(string, Token, string) error) error {
			return join("a", b.token(t, time.Minute, TokenInfo{}), "localhost")
		}, "node name \"localhost\""},
		{"a lost race leaves no node behind", func(t *testing.T, b *bench, join func(string, Token, string) error) error {
			tok := b.token(t, time.Minute, TokenInfo{})
			if err := join("a", tok, "m2"); err != nil {
				return err
			}
			err := join("b", tok, "m3")
			if _, get := b.client.CoreV1().Nodes().Get(t.Context(), "m3", metav1.GetOptions{}); get == nil {
				t.Error("node m3 exists")
			}
			return err
		}, "already used"},
	} {
		t.Run(c.name, func(t *testing.T) {
			b, dir := newBench(t), t.TempDir()
			err := c.do(t, b, func(machine string, tok Token, node string) error {
				creds := Credentials{Dir: dir + "/" + machine}
				if err := creds.Join(t.Context(), b.address, tok, node); err != nil {
					return err
				}
				if name, err := creds.Node(); err != nil || name != node || !creds.Joined() {
					t.Errorf("joined as %q, %v, want %s", name, err, node)
				}
				return nil
			})
			if c.want == "" && err != nil || c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want)) {
				t.Errorf("error %v, want %q", err, c.want)
			}
		})
	}
}

func TestRenewNeedsTheNodesOwnKeyAndNode(t *testing.T) {
	b := newBench(t)
	creds := Credentials{Dir: t.TempDir()}
	if err := creds.Join(t.Context(), b.address, b.token(t, time.Minute, TokenInfo{}), "m2"); err != nil {
		t.Fatal(err)
	}
	renew := func(node string) error {
		cert, err := tls.LoadX509KeyPair(creds.Cert(), creds.Key())
		if err != nil {
			t.Fatal(err)
		}
		tlsConfig := &tls.Config{InsecureSkipVerify: true, Certificates: []tls.Certificate{cert}}
		_, err = creds.ask(t.Context(), b.address, RenewPath, tlsConfig, request{Node: node})
		return err
	}
	if err := renew("m2"); err != nil {
		t.Errorf("renew: %v", err)
	}
	if err := renew("m3"); err == nil || !strings.Contains(err.Error(), "not that of node m3") {
		t.Errorf("renew as another node: %v", err)
	}
	if err := b.client.CoreV1().Nodes().Delete(t.Context(), "m2", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	if err := renew("m2"); err == nil || !strings.Contains(err.Error(), "was removed") {
		t.Errorf("renew of a removed node: %v", err)
	}
	// Its agent, which still has a certificate, registers it again.
	if _, err := b.client.CoreV1().Nodes().Create(t.Context(), &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "m2"}}, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	if err := renew("m2"); err == nil || !strings.Contains(err.Error(), "was removed") {
		t.Errorf("renew of a node that came back by itself: %v", err)
	}
}

// A machine that reaches the server by another address than the one it
// advertises goes on doing so after its certificate was renewed.
func TestRenewingKeepsTheWayToTheServer(t *testing.T) {
	creds := Credentials{Dir: t.TempDir()}
	told := Cluster{Servers: []string{"10.0.0.1:6443", "10.0.0.2:6443"}}
	joined := told
	joined.Servers = append([]string{"192.0.2.7:6443"}, told.Servers...)
	if err := creds.keep(response{Cluster: joined}); err != nil {
		t.Fatal(err)
	}
	if err := creds.keepFrom("192.0.2.7:6443", response{Cluster: told}); err != nil {
		t.Fatal(err)
	}
	got, err := creds.Cluster()
	if err != nil || !slices.Equal(got.Servers, joined.Servers) {
		t.Errorf("servers %v, %v, want %v", got.Servers, err, joined.Servers)
	}
}

// Whoever has no token yet may not hold connections for ever.
func TestAnUnknownCallerMustBeQuick(t *testing.T) {
	b := newBench(t)
	conn, err := tls.Dial("tcp", b.address, &tls.Config{InsecureSkipVerify: true})
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if _, err := io.WriteString(conn, "POST "+JoinPath+" HTTP/1.1\r\nHost: a\r\nContent-Length: 100\r\n\r\n{"); err != nil {
		t.Fatal(err)
	}
	if err := conn.SetReadDeadline(time.Now().Add(30 * time.Second)); err != nil { // for a server that waits for ever
		t.Fatal(err)
	}
	answer, err := io.ReadAll(conn)
	if err != nil || !strings.HasPrefix(string(answer), "HTTP/1.1 408 ") {
		t.Errorf("answer %.60q, %v, want a refusal", answer, err)
	}
}

func TestMistypedTokens(t *testing.T) {
	tok := NewToken(strings.Repeat("ab", 32))
	text := tok.String()
	if got, err := ParseToken(" " + text + "\n"); err != nil || got != tok {
		t.Errorf("ParseToken(String) = %v, %v", got, err)
	}
	for i := range text { // every single wrong letter is noticed
		b := []byte(text)
		if b[i]++; b[i] == '/' || b[i] == 'g' || b[i] == '{' || b[i] == ':' {
			b[i] -= 2
		}
		if _, err := ParseToken(string(b)); err == nil {
			t.Errorf("letter %d changed: accepted", i)
		}
	}
	for _, s := range []string{"", "abc", text[:len(text)-1], text + "0"} {
		if _, err := ParseToken(s); err == nil || !strings.Contains(err.Error(), "want id.secret") {
			t.Errorf("ParseToken(%q): %v", s, err)
		}
	}
}

func FuzzParseToken(f *testing.F) {
	f.Add(NewToken(strings.Repeat("0", 64)).String())
	f.Add("a.b.c.d")
	f.Fuzz(func(t *testing.T, s string) {
		if tok, err := ParseToken(s); err == nil && tok.String() != strings.TrimSpace(s) {
			t.Errorf("%q reads as %v", s, tok)
		}
	})
}

func FuzzParseRequest(f *testing.F) {
	f.Add([]byte(`{"token":"a.b","node":"m2","csr":"-----BEGIN CERTIFICATE REQUEST-----\n"}`))
	f.Fuzz(func(t *testing.T, b []byte) { _, _, _ = parseRequest(b) })
}
