package join

import (
	"cmp"
	"context"
	"crypto/sha256"
	"crypto/subtle"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"os"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/validation"
	"k8s.io/client-go/kubernetes"

	"meshd.dev/pkg/pki"
)

const (
	// JoinPath and RenewPath are served beside the Kubernetes API.
	JoinPath  = "/meshd.dev/v1/join"
	RenewPath = "/meshd.dev/v1/renew"
	// annotationIdentity on a Node is the hash of the key it joined with: the
	// name belongs to the holder of that key.
	annotationIdentity = "meshd.dev/identity"
	maxBody            = 16 << 10
)

// Cluster is what a node must know about the cluster it joins.
type Cluster struct {
	// Servers are host:port of the API servers.
	Servers       []string `json:"servers"`
	PodCIDRs      []string `json:"podCIDRs"`
	ServiceCIDRs  []string `json:"serviceCIDRs"`
	ClusterDomain string   `json:"clusterDomain"`
}

type request struct {
	// Token is "id.secret"; empty when renewing.
	Token string `json:"token,omitempty"`
	Node  string `json:"node"`
	// CSR in PEM; only its public key and its proof of possession count.
	CSR string `json:"csr"`
}

type response struct {
	Cert    string  `json:"cert"`
	CA      string  `json:"ca"`
	Cluster Cluster `json:"cluster"`
}

// Server answers joining nodes.
type Server struct {
	CA      *pki.CA
	Client  kubernetes.Interface
	Cluster Cluster
	Log     *slog.Logger
	// Patience is how long a caller may take to send a request; 0 is 10 s.
	Patience time.Duration
	// Now is the clock; nil is time.Now.
	Now func() time.Time
}

// refusal is an error the joining machine may see.
type refusal struct {
	code int
	text string
}

func (r refusal) Error() string { return r.text }

func refuse(code int, format string, args ...any) error {
	return refusal{code, fmt.Sprintf(format, args...)}
}

// Join serves JoinPath: a valid token and a certificate request become a
// certificate. A single-use token serves one key only; the holder of that key
// may ask again until the token expires, so that a crash on the way costs
// nothing.
func (s *Server) Join(w http.ResponseWriter, r *http.Request) {
	s.answer(w, r, func(ctx context.Context, req request, keyHash string) error {
		tok, err := s.token(ctx, req.Token)
		if err != nil {
			return err
		}
		if err := s.usable(tok, req.Node, keyHash); err != nil {
			return err
		}
		reserved, err := s.reserve(ctx, req.Node, keyHash)
		if err != nil {
			return err
		}
		err = s.consume(ctx, tok, req.Node, keyHash)
		if err != nil && reserved {
			undo, cancel := context.WithTimeout(context.WithoutCancel(ctx), 10*time.Second)
			defer cancel()
			err = errors.Join(err, s.Client.CoreV1().Nodes().Delete(undo, req.Node, metav1.DeleteOptions{}))
		}
		return err
	})
}

// Renew serves RenewPath: the holder of a valid node certificate gets a fresh
// one for the same node, as long as the Node object exists that was made when
// it joined. One that a removed node made of itself does not bear its key.
func (s *Server) Renew(w http.ResponseWriter, r *http.Request) {
	s.answer(w, r, func(ctx context.Context, req request, keyHash string) error {
		if err := s.holds(r, req.Node, keyHash); err != nil {
			return err
		}
		node, err := s.Client.CoreV1().Nodes().Get(ctx, req.Node, metav1.GetOptions{})
		if apierrors.IsNotFound(err) || err == nil && node.Annotations[annotationIdentity] != keyHash {
			return refuse(http.StatusForbidden, "node %s was removed from the cluster; join again with a new token", req.Node)
		}
		return err
	})
}

// holds checks that the connection's client certificate is this node's and
// that the request is for the same key.
func (s *Server) holds(r *http.Request, node, keyHash string) error {
	if r.TLS == nil || len(r.TLS.PeerCertificates) == 0 {
		return refuse(http.StatusUnauthorized, "renewing needs the node's client certificate")
	}
	leaf := r.TLS.PeerCertificates[0]
	roots := x509.NewCertPool()
	roots.AddCert(s.CA.Cert)
	if _, err := leaf.Verify(x509.VerifyOptions{Roots: roots, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}}); err != nil {
		return refuse(http.StatusUnauthorized, "client certificate: %v", err)
	}
	if leaf.Subject.CommonName != nodeUser(node) || hashKey(leaf.RawSubjectPublicKeyInfo) != keyHash {
		return refuse(http.StatusForbidden, "the client certificate is not that of node %s and this key", node)
	}
	return nil
}

func (s *Server) answer(w http.ResponseWriter, r *http.Request, allow func(context.Context, request, string) error) {
	resp, node, err := s.serve(w, r, allow)
	if err == nil {
		s.Log.Info("issued node certificate", "node", node, "to", r.RemoteAddr)
		w.Header().Set("Content-Type", "application/json")
		_ = json.NewEncoder(w).Encode(resp)
		return
	}
	s.Log.Warn("refused node certificate", "node", node, "to", r.RemoteAddr, "err", err)
	var ref refusal
	if errors.As(err, &ref) {
		http.Error(w, ref.text, ref.code)
		return
	}
	http.Error(w, "the server could not answer; its log says why, try again", http.StatusInternalServerError)
}

func (s *Server) serve(w http.ResponseWriter, r *http.Request, allow func(context.Context, request, string) error) (response, string, error) {
	if r.Method != http.MethodPost {
		return response{}, "", refuse(http.StatusMethodNotAllowed, "want POST")
	}
	body, err := s.read(w, r)
	if err != nil {
		return response{}, "", err
	}
	req, csr, err := parseRequest(body)
	if err != nil {
		return response{}, "", refuse(http.StatusBadRequest, "%v", err)
	}
	if err := allow(r.Context(), req, hashKey(csr.RawSubjectPublicKeyInfo)); err != nil {
		return response{}, req.Node, err
	}
	cert, err := s.CA.Sign(NodeIdentity(req.Node), csr.PublicKey)
	if err != nil {
		return response{}, req.Node, err
	}
	return response{Cert: string(pki.EncodeCert(cert)), CA: string(pki.EncodeCert(s.CA.Cert)), Cluster: s.Cluster}, req.Node, nil
}

// read takes the body of a caller nobody knows yet: a small one, and soon.
func (s *Server) read(w http.ResponseWriter, r *http.Request) ([]byte, error) {
	conn := http.NewResponseController(w)
	patience := cmp.Or(s.Patience, 10*time.Second)
	if err := conn.SetReadDeadline(time.Now().Add(patience)); err != nil && !errors.Is(err, http.ErrNotSupported) {
		return nil, fmt.Errorf("limit the time of a request: %w", err)
	}
	body, err := io.ReadAll(io.LimitReader(r.Body, maxBody))
	if errors.Is(err, os.ErrDeadlineExceeded) {
		return nil, refuse(http.StatusRequestTimeout, "the request took longer than %s", patience)
	}
	if err != nil {
		return nil, err
	}
	// From here on the connection is read only to see whether it ends.
	_ = conn.SetReadDeadline(time.Time{})
	return body, nil
}

func parseRequest(body []byte) (request, *x509.CertificateRequest, error) {
	var req request
	if err := json.Unmarshal(body, &req); err != nil {
		return req, nil, fmt.Errorf("join request: %w", err)
	}
	if err := CheckName(req.Node); err != nil {
		return req, nil, err
	}
	block, _ := pem.Decode([]byte(req.CSR))
	if block == nil || block.Type != "CERTIFICATE REQUEST" {
		return req, nil, errors.New("certificate request: want PEM of type CERTIFICATE REQUEST")
	}
	csr, err := x509.ParseCertificateRequest(block.Bytes)
	if err == nil {
		err = csr.CheckSignature()
	}
	if err != nil {
		return req, nil, fmt.Errorf("certificate request: %w", err)
	}
	return req, csr, nil
}

// token finds the Secret of a presented token and checks everything but its use.
func (s *Server) token(ctx context.Context, presented string) (*corev1.Secret, error) {
	id, secret, _ := strings.Cut(presented, ".")
	if len(id) != idLength || len(secret) != secretLength {
		return nil, refuse(http.StatusBadRequest, "token: want id.secret")
	}
	unknown := refuse(http.StatusUnauthorized, "token %s is not known here: wrong, expired and removed, or revoked; make a new one with `meshctl token create` on a server", id)
	obj, err := s.Client.CoreV1().Secrets(metav1.NamespaceSystem).Get(ctx, secretName(id), metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		return nil, unknown
	}
	if err != nil {
		return nil, fmt.Errorf("read token %s: %w", id, err)
	}
	if obj.Type != corev1.SecretTypeBootstrapToken || subtle.ConstantTimeCompare(obj.Data[keySecret], []byte(secret)) != 1 {
		return nil, unknown
	}
	info, err := readInfo(obj)
	if err != nil {
		return nil, err
	}
	if !info.Expires.IsZero() && !s.now().Before(info.Expires) {
		return nil, refuse(http.StatusUnauthorized, "token %s expired at %s; make a new one with `meshctl token create` on a server", id, info.Expires.Format(time.RFC3339))
	}
	return obj, nil
}

func (s *Server) usable(tok *corev1.Secret, node, keyHash string) error {
	info, err := readInfo(tok)
	if err != nil {
		return err
	}
	if info.Reusable || info.UsedBy == "" || info.UsedBy == node+"/"+keyHash {
		return nil
	}
	by, _, _ := strings.Cut(info.UsedBy, "/")
	return refuse(http.StatusUnauthorized, "token %s was already used, by node %s; make a new one with `meshctl token create` on a server", info.ID, by)
}

// consume marks the token as used by this key. The API server's check of the
// resource version makes exactly one of many racing nodes win.
func (s *Server) consume(ctx context.Context, tok *corev1.Secret, node, keyHash string) error {
	for {
		if err := s.usable(tok, node, keyHash); err != nil {
			return err
		}
		if string(tok.Data[keyReusable]) == "true" {
			return nil
		}
		tok = tok.DeepCopy()
		tok.Data[keyUsedBy] = []byte(node + "/" + keyHash)
		_, err := s.Client.CoreV1().Secrets(tok.Namespace).Update(ctx, tok, metav1.UpdateOptions{})
		if !apierrors.IsConflict(err) {
			return err
		}
		if tok, err = s.Client.CoreV1().Secrets(tok.Namespace).Get(ctx, tok.Name, metav1.GetOptions{}); err != nil {
			return err
		}
	}
}

// reserve makes the Node object, by which the name belongs to this key; it
// reports whether it is new.
func (s *Server) reserve(ctx context.Context, name, keyHash string) (bool, error) {
	node := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name, Annotations: map[string]string{annotationIdentity: keyHash}}}
	_, err := s.Client.CoreV1().Nodes().Create(ctx, node, metav1.CreateOptions{})
	if err == nil {
		return true, nil
	}
	if !apierrors.IsAlreadyExists(err) {
		return false, fmt.Errorf("reserve node %s: %w", name, err)
	}
	node, err = s.Client.CoreV1().Nodes().Get(ctx, name, metav1.GetOptions{})
	if err != nil {
		return false, fmt.Errorf("reserve node %s: %w", name, err)
	}
	if node.Annotations[annotationIdentity] != keyHash {
		return false, refuse(http.StatusConflict, "a node named %s has joined already; join under another --node-name, or remove the old one first with `meshctl kubectl delete node %s`", name, name)
	}
	return false, nil
}

// Reserve makes the Node object of the machine whose credentials these are; the
// server does it for itself, which joins without a token.
func (s *Server) Reserve(ctx context.Context, c Credentials) error {
	cert, err := pki.LoadCert(c.Cert())
	if err != nil {
		return fmt.Errorf("reserve own node: %w", err)
	}
	name, err := c.Node()
	if err != nil {
		return fmt.Errorf("reserve own node: %w", err)
	}
	keyHash := hashKey(cert.RawSubjectPublicKeyInfo)
	_, err = s.reserve(ctx, name, keyHash)
	if _, refused := errors.AsType[refusal](err); !refused {
		return err
	}
	// Whoever holds the CA may take the name over, say after its key was lost.
	patch := fmt.Sprintf(`{"metadata":{"annotations":{%q:%q}}}`, annotationIdentity, keyHash)
	_, err = s.Client.CoreV1().Nodes().Patch(ctx, name, types.MergePatchType, []byte(patch), metav1.PatchOptions{})
	return err
}

func (s *Server) now() time.Time {
	if s.Now != nil {
		return s.Now()
	}
	return time.Now()
}

// CheckName says why a node cannot be called name. A node's certificate is
// good for serving under its name, and so it must not be a name by which the
// API server or every machine is known: its holder could pass for them.
func CheckName(name string) error {
	if errs := validation.IsDNS1123Label(name); len(errs) > 0 {
		return fmt.Errorf("node name %.80q: %s", name, strings.Join(errs, "; "))
	}
	if name == ServerName || name == "localhost" {
		return fmt.Errorf("node name %q: the API server is known by it; choose another --node-name", name)
	}
	return nil
}

// NodeIdentity is who a node is to the API server, and to whoever dials its
// agent.
func NodeIdentity(node string) pki.Identity {
	return pki.Identity{User: nodeUser(node), Groups: []string{"system:nodes"}, DNSNames: []string{node}}
}

func nodeUser(node string) string { return "system:node:" + node }

func hashKey(spki []byte) string {
	sum := sha256.Sum256(spki)
	return hex.EncodeToString(sum[:])
}
