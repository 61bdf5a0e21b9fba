package serviceaccount

import (
	"crypto/ecdsa"
	"crypto/rsa"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"sync/atomic"
	"time"

	"k8s.io/apiserver/pkg/authentication/authenticator"
	"k8s.io/apiserver/pkg/authentication/token/cache"
	"k8s.io/apiserver/pkg/registry/rest"
	"k8s.io/client-go/util/keyutil"
	upstream "k8s.io/kubernetes/pkg/serviceaccount"
)

// cacheFor is how long a good token is believed without looking again.
const cacheFor = 10 * time.Second

// Config of Tokens. Issuer and Key are required.
type Config struct {
	// Issuer is the https URL in the claim "iss".
	Issuer string
	// Key signs; it is an *ecdsa.PrivateKey or *rsa.PrivateKey.
	Key any
	// OldKeys are public or private keys whose tokens are still believed.
	OldKeys []any
	// Audiences of the API server itself; default: the issuer.
	Audiences []string
	// MaxExpiration shortens longer requests; zero is no limit below the
	// 2^32 seconds of the API.
	MaxExpiration time.Duration
}

// Stores are where accounts and what tokens are bound to are read. A
// *genericregistry.Store is one.
type Stores struct {
	ServiceAccounts, Pods, Secrets, Nodes rest.Getter
}

// Tokens signs and believes tokens of service accounts.
type Tokens struct {
	cfg       Config
	generator upstream.TokenGenerator
	authn     authenticator.Token
	metadata  upstream.OpenIDMetadataProvider
	stores    atomic.Pointer[Stores]
}

// LoadKey reads an ECDSA or RSA private key from a PEM file.
func LoadKey(path string) (any, error) {
	key, err := keyutil.PrivateKeyFromFile(path)
	if err != nil {
		return nil, fmt.Errorf("service account key %s: want an ECDSA or RSA private key in PEM: %w", path, err)
	}
	return key, nil
}

// New checks cfg and returns Tokens that refuse everything until Attach.
func New(cfg Config) (*Tokens, error) {
	if cfg.Issuer == "" || cfg.Key == nil {
		return nil, errors.New("service account tokens: want an issuer and a key")
	}
	if len(cfg.Audiences) == 0 {
		cfg.Audiences = []string{cfg.Issuer}
	}
	t := &Tokens{cfg: cfg}
	var err error
	if t.generator, err = upstream.JWTTokenGenerator(cfg.Issuer, cfg.Key); err != nil {
		return nil, fmt.Errorf("service account key: %w", err)
	}
	keys, err := publicKeys(append([]any{cfg.Key}, cfg.OldKeys...))
	if err != nil {
		return nil, err
	}
	getter, err := upstream.StaticPublicKeysGetter(keys)
	if err != nil {
		return nil, fmt.Errorf("service account keys: %w", err)
	}
	authn := upstream.JWTTokenAuthenticator([]string{cfg.Issuer}, getter, cfg.Audiences, upstream.NewValidator(reader{t}))
	t.authn = cache.New(authn, false, cacheFor, 0)
	t.metadata, err = upstream.NewOpenIDMetadataProvider(cfg.Issuer, cfg.Issuer+upstream.JWKSPath, "", getter)
	if err != nil {
		return nil, fmt.Errorf("service account issuer %q: %w", cfg.Issuer, err)
	}
	return t, nil
}

// publicKeys takes the public half of each key.
func publicKeys(keys []any) ([]any, error) {
	var public []any
	for _, k := range keys {
		switch k := k.(type) {
		case *ecdsa.PrivateKey:
			public = append(public, &k.PublicKey)
		case *rsa.PrivateKey:
			public = append(public, &k.PublicKey)
		case *ecdsa.PublicKey, *rsa.PublicKey:
			public = append(public, k)
		default:
			return nil, fmt.Errorf("service account key: %T is neither ECDSA nor RSA", k)
		}
	}
	return public, nil
}

// Attach gives the stores; tokens are made and believed from then on.
func (t *Tokens) Attach(s Stores) { t.stores.Store(&s) }

// Audiences are those of the API server.
func (t *Tokens) Audiences() authenticator.Audiences { return slices.Clone(t.cfg.Audiences) }

// Authenticator believes the tokens REST makes. It has no opinion on tokens of
// another issuer.
func (t *Tokens) Authenticator() authenticator.Token { return t.authn }

// Discovery has the two documents by which others check our tokens: the OIDC
// provider configuration and the public keys. The cluster role
// system:service-account-issuer-discovery allows to read them.
func (t *Tokens) Discovery() map[string]http.Handler {
	return map[string]http.Handler{
		upstream.OpenIDConfigPath: document("application/json", t.metadata.GetConfigJSON),
		upstream.JWKSPath:         document("application/jwk-set+json", t.metadata.GetKeysetJSON),
	}
}

func document(mime string, content func() ([]byte, int)) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method != http.MethodGet && r.Method != http.MethodHead {
			w.Header().Set("Allow", "GET, HEAD")
			http.Error(w, "want GET", http.StatusMethodNotAllowed)
			return
		}
		body, maxAge := content()
		w.Header().Set("Content-Type", mime)
		w.Header().Set("Cache-Control", fmt.Sprintf("public, max-age=%d", maxAge))
		w.Write(body)
	})
}
