package serviceaccount

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"encoding/base64"
	"encoding/json"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	authenticationv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apiserver/pkg/admission"
	"k8s.io/apiserver/pkg/endpoints/request"
	"k8s.io/apiserver/pkg/registry/rest"
	"k8s.io/client-go/util/keyutil"
	"sigs.k8s.io/yaml"
)

// objects is a rest.Getter by namespace/name.
type objects struct {
	mu sync.Mutex
	m  map[string]runtime.Object
}

func (o *objects) Get(ctx context.Context, name string, _ *metav1.GetOptions) (runtime.Object, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if obj := o.m[request.NamespaceValue(ctx)+"/"+name]; obj != nil {
		return obj.DeepCopyObject(), nil
	}
	return nil, apierrors.NewNotFound(corev1.Resource("things"), name)
}

func (o *objects) set(key string, obj runtime.Object) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.m[key] = obj; obj == nil {
		delete(o.m, key)
	}
}

type cluster struct {
	*Tokens
	accounts, pods, secrets, nodes *objects
}

func ecKey(t testing.TB) *ecdsa.PrivateKey {
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func object(ns, name string) metav1.ObjectMeta {
	return metav1.ObjectMeta{Namespace: ns, Name: name, UID: types.UID("uid-" + name)}
}

func newCluster(t testing.TB, cfg Config) *cluster {
	t.Helper()
	if cfg.Issuer == "" {
		cfg.Issuer = "https://kubernetes.default.svc.cluster.local"
	}
	if cfg.Key == nil {
		cfg.Key = ecKey(t)
	}
	tokens, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	no := false
	pod := &corev1.Pod{ObjectMeta: object("default", "web"), Spec: corev1.PodSpec{ServiceAccountName: "web", NodeName: "n1"}}
	c := &cluster{Tokens: tokens,
		accounts: &objects{m: map[string]runtime.Object{
			"default/web":     &corev1.ServiceAccount{ObjectMeta: object("default", "web"), ImagePullSecrets: []corev1.LocalObjectReference{{Name: "pull"}}},
			"default/default": &corev1.ServiceAccount{ObjectMeta: object("default", "default")},
			"default/quiet":   &corev1.ServiceAccount{ObjectMeta: object("default", "quiet"), AutomountServiceAccountToken: &no},
		}},
		pods:    &objects{m: map[string]runtime.Object{"default/web": pod}},
		secrets: &objects{m: map[string]runtime.Object{"default/s": &corev1.Secret{ObjectMeta: object("default", "s")}}},
		nodes:   &objects{m: map[string]runtime.Object{"/n1": &corev1.Node{ObjectMeta: object("", "n1")}}},
	}
	tokens.Attach(Stores{c.accounts, c.pods, c.secrets, c.nodes})
	return c
}

func inDefault(ctx context.Context) context.Context { return request.WithNamespace(ctx, "default") }

func (c *cluster) request(ctx context.Context, account string, tr *authenticationv1.TokenRequest) (*authenticationv1.TokenRequest, error) {
	obj, err := c.REST().(rest.NamedCreater).Create(inDefault(ctx), account, tr, rest.ValidateAllObjectFunc, &metav1.CreateOptions{})
	if err != nil {
		return nil, err
	}
	return obj.(*authenticationv1.TokenRequest), nil
}

func want(change ...func(*authenticationv1.TokenRequest)) *authenticationv1.TokenRequest {
	tr := &authenticationv1.TokenRequest{}
	for _, c := range change {
		c(tr)
	}
	return tr
}

func bound(kind, name, uid string) func(*authenticationv1.TokenRequest) {
	return func(tr *authenticationv1.TokenRequest) {
		tr.Spec.BoundObjectRef = &authenticationv1.BoundObjectReference{APIVersion: "v1", Kind: kind, Name: name, UID: types.UID(uid)}
	}
}

func expires(seconds int64) func(*authenticationv1.TokenRequest) {
	return func(tr *authenticationv1.TokenRequest) { tr.Spec.ExpirationSeconds = &seconds }
}

func audience(a ...string) func(*authenticationv1.TokenRequest) {
	return func(tr *authenticationv1.TokenRequest) { tr.Spec.Audiences = a }
}

func TestTokenOfAPod(t *testing.T) {
	for name, key := range map[string]any{"ECDSA": ecKey(t), "RSA": must(rsa.GenerateKey(rand.Reader, 2048))} {
		c := newCluster(t, Config{Key: key})
		tr, err := c.request(t.Context(), "web", want(bound("Pod", "web", "uid-web")))
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		if *tr.Spec.ExpirationSeconds != 3600 || tr.Spec.Audiences[0] != c.cfg.Issuer || time.Until(tr.Status.ExpirationTimestamp.Time) > time.Hour {
			t.Errorf("%s: defaults: %+v, expires %v", name, tr.Spec, tr.Status.ExpirationTimestamp)
		}
		resp, ok, err := c.Authenticator().AuthenticateToken(t.Context(), tr.Status.Token)
		if err != nil || !ok {
			t.Fatalf("%s: authenticate: %v, %v", name, ok, err)
		}
		u := resp.User
		got := []any{u.GetName(), u.GetUID(), u.GetGroups(), u.GetExtra()["authentication.kubernetes.io/pod-name"], u.GetExtra()["authentication.kubernetes.io/node-name"]}
		exp := []any{"system:serviceaccount:default:web", "uid-web", []string{"system:serviceaccounts", "system:serviceaccounts:default"}, []string{"web"}, []string{"n1"}}
		if d := cmp.Diff(exp, got); d != "" {
			t.Errorf("%s: user (-want +got):\n%s", name, d)
		}
	}
}

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

func TestRequests(t *testing.T) {
	for _, tc := range []struct {
		name, account string
		tr            *authenticationv1.TokenRequest
		code          int32
		part          string
	}{
		{"unbound", "web", want(), 0, ""},
		{"bound to a secret", "web", want(bound("Secret", "s", "")), 0, ""},
		{"bound to a node", "web", want(bound("Node", "n1", "uid-n1")), 0, ""},
		{"no such account", "none", want(), 404, "not found"},
		{"pod of another account", "default", want(bound("Pod", "web", "")), 400, "pod running with different serviceaccount name"},
		{"pod with another UID", "web", want(bound("Pod", "web", "old")), 409, "might have been deleted and then recreated"},
		{"no such pod", "web", want(bound("Pod", "gone", "")), 404, "not found"},
		{"bound to something else", "web", want(bound("ConfigMap", "x", "")), 400, "cannot bind token to object of type /v1, Kind=ConfigMap"},
		{"too short", "web", want(expires(60)), 422, "less than 10 minutes"},
		{"too long", "web", want(expires(1 << 33)), 422, "larger than 2^32 seconds"},
		{"empty audience", "web", want(audience("")), 422, "spec.audiences[0]"},
		{"name of another", "web", want(func(tr *authenticationv1.TokenRequest) { tr.Name = "x" }), 422, "must match the service account name"},
		{"UID of another", "web", want(func(tr *authenticationv1.TokenRequest) { tr.UID = "x" }), 409, "does not match the UID of the service account"},
	} {
		_, err := newCluster(t, Config{}).request(t.Context(), tc.account, tc.tr)
		if tc.code == 0 && err != nil {
			t.Errorf("%s: %v", tc.name, err)
		}
		if tc.code == 0 {
			continue
		}
		s, ok := err.(apierrors.APIStatus)
		if !ok || s.Status().Code != tc.code || !strings.Contains(err.Error(), tc.part) {
			t.Errorf("%s: error %v, want code %d and a part %q", tc.name, err, tc.code, tc.part)
		}
	}
}

// TestRefusedTokens: a token lives no longer than what it is bound to.
func TestRefusedTokens(t *testing.T) {
	for _, tc := range []struct {
		name  string
		bound func(*authenticationv1.TokenRequest)
		then  func(c *cluster)
		part  string
	}{
		{"pod deleted", bound("Pod", "web", ""), func(c *cluster) { c.pods.set("default/web", nil) }, "invalidated"},
		{"pod replaced", bound("Pod", "web", ""), func(c *cluster) {
			p := &corev1.Pod{ObjectMeta: object("default", "web")}
			p.UID = "new"
			c.pods.set("default/web", p)
		}, "pod UID (new) does not match"},
		{"secret deleted", bound("Secret", "s", ""), func(c *cluster) { c.secrets.set("default/s", nil) }, "invalidated"},
		{"account deleted", func(*authenticationv1.TokenRequest) {}, func(c *cluster) { c.accounts.set("default/web", nil) }, "not found"},
		{"account replaced", func(*authenticationv1.TokenRequest) {}, func(c *cluster) {
			sa := &corev1.ServiceAccount{ObjectMeta: object("default", "web")}
			sa.UID = "new"
			c.accounts.set("default/web", sa)
		}, "service account UID (new) does not match"},
	} {
		c := newCluster(t, Config{})
		tr, err := c.request(t.Context(), "web", want(tc.bound))
		if err != nil {
			t.Fatal(err)
		}
		tc.then(c)
		_, ok, err := c.Authenticator().AuthenticateToken(t.Context(), tr.Status.Token)
		if ok || err == nil || !strings.Contains(err.Error(), tc.part) {
			t.Errorf("%s: %v, %v, want a part %q", tc.name, ok, err, tc.part)
		}
	}
}

func TestForeignTokens(t *testing.T) {
	key, other := ecKey(t), ecKey(t)
	ours := newCluster(t, Config{Key: key})
	token := func(c *cluster, tr *authenticationv1.TokenRequest) string {
		t.Helper()
		out, err := c.request(t.Context(), "web", tr)
		if err != nil {
			t.Fatal(err)
		}
		return out.Status.Token
	}
	good := token(ours, want())
	part := strings.Split(good, ".")
	forged := strings.Join([]string{part[0], base64.RawURLEncoding.EncodeToString([]byte(
		strings.Replace(string(must(base64.RawURLEncoding.DecodeString(part[1]))), ":web", ":admin", 1))), part[2]}, ".")
	none := base64.RawURLEncoding.EncodeToString([]byte(`{"alg":"none"}`)) + "." + part[1] + "."
	for _, tc := range []struct {
		name, token string
		ok, err     bool
	}{
		{"ours", good, true, false},
		{"signed by another key", token(newCluster(t, Config{Key: other}), want()), false, true},
		{"signed by an old key", token(newCluster(t, Config{Key: key}), want()), true, false},
		{"of another issuer", token(newCluster(t, Config{Key: key, Issuer: "https://elsewhere.example"}), want()), false, false},
		{"for another audience", token(ours, want(audience("vault"))), false, true},
		{"forged subject", forged, false, true},
		{"algorithm none", none, false, true},
		{"no token", "abcdef.0123456789abcdef", false, false},
	} {
		_, ok, err := ours.Authenticator().AuthenticateToken(t.Context(), tc.token)
		if ok != tc.ok || (err != nil) != tc.err {
			t.Errorf("%s: %v, %v; want ok %v, error %v", tc.name, ok, err, tc.ok, tc.err)
		}
	}
	rotated := newCluster(t, Config{Key: other, OldKeys: []any{key}})
	if _, ok, err := rotated.Authenticator().AuthenticateToken(t.Context(), good); !ok {
		t.Errorf("after rotation: %v", err)
	}
}

func TestNotAttached(t *testing.T) {
	c := newCluster(t, Config{})
	tr, err := c.request(t.Context(), "web", want())
	if err != nil {
		t.Fatal(err)
	}
	c.stores.Store(nil)
	if _, ok, err := c.Authenticator().AuthenticateToken(t.Context(), tr.Status.Token); ok || err == nil {
		t.Errorf("%v, %v: want an error before Attach", ok, err)
	}
	if _, err := c.request(t.Context(), "web", want()); !apierrors.IsServiceUnavailable(err) {
		t.Errorf("%v, want 503 before Attach", err)
	}
}

func TestMaxExpiration(t *testing.T) {
	tr, err := newCluster(t, Config{MaxExpiration: 2 * time.Hour}).request(t.Context(), "web", want(expires(100000)))
	if err != nil || *tr.Spec.ExpirationSeconds != 7200 {
		t.Errorf("%v, %v, want 7200", tr, err)
	}
}

func TestLoadKey(t *testing.T) {
	dir := t.TempDir()
	good := filepath.Join(dir, "key.pem")
	if err := os.WriteFile(good, must(keyutil.MarshalPrivateKeyToPEM(ecKey(t))), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := LoadKey(good); err != nil {
		t.Error(err)
	}
	bad := filepath.Join(dir, "bad.pem")
	os.WriteFile(bad, []byte("not a key"), 0o600)
	if _, err := LoadKey(bad); err == nil || !strings.Contains(err.Error(), "bad.pem: want an ECDSA or RSA private key") {
		t.Error(err)
	}
}

func TestDiscovery(t *testing.T) {
	c := newCluster(t, Config{})
	for path, part := range map[string]string{
		"/.well-known/openid-configuration": `"jwks_uri":"https://kubernetes.default.svc.cluster.local/openid/v1/jwks"`,
		"/openid/v1/jwks":                   `"kty":"EC"`,
	} {
		w := httptest.NewRecorder()
		c.Discovery()[path].ServeHTTP(w, httptest.NewRequest("GET", path, nil))
		if !strings.Contains(w.Body.String(), part) || !json.Valid(w.Body.Bytes()) || strings.Contains(w.Body.String(), `"d":`) {
			t.Errorf("%s: %s, want a part %s and no private key", path, w.Body, part)
		}
	}
}

func attributes(pod *corev1.Pod) admission.Attributes {
	return admission.NewAttributesRecord(pod, nil, corev1.SchemeGroupVersion.WithKind("Pod"), "default", pod.Name,
		corev1.SchemeGroupVersion.WithResource("pods"), "", admission.Create, nil, false, nil)
}

const injected = `- name: kube-api-access-X
  projected:
    defaultMode: 420
    sources:
    - serviceAccountToken:
        expirationSeconds: 3607
        path: token
    - configMap:
        items:
        - key: ca.crt
          path: ca.crt
        name: kube-root-ca.crt
    - downwardAPI:
        items:
        - fieldRef:
            apiVersion: v1
            fieldPath: metadata.namespace
          path: namespace
`

func TestAdmission(t *testing.T) {
	for _, tc := range []struct {
		name, spec string
		account    string
		mounted    string // containers with the token
		volumes    int
		pull       string
		err        string
	}{
		{"plain", `{containers: [{name: a}], initContainers: [{name: i}]}`, "default", "i a", 1, "", ""},
		{"named account", `{serviceAccountName: web, containers: [{name: a}]}`, "web", "a", 1, "pull", ""},
		{"own pull secret", `{serviceAccountName: web, imagePullSecrets: [{name: mine}], containers: [{name: a}]}`, "web", "a", 1, "mine", ""},
		{"pod says no", `{automountServiceAccountToken: false, containers: [{name: a}]}`, "default", "", 0, "", ""},
		{"account says no", `{serviceAccountName: quiet, containers: [{name: a}]}`, "quiet", "", 0, "", ""},
		{"pod says yes, account no", `{automountServiceAccountToken: true, serviceAccountName: quiet, containers: [{name: a}]}`, "quiet", "a", 1, "", ""},
		{"something is mounted there already", `{containers: [{name: a, volumeMounts: [{name: v, mountPath: /var/run/secrets/kubernetes.io/serviceaccount}]}, {name: b}], volumes: [{name: v}]}`, "default", "b", 2, "", ""},
		{"every container has something there", `{containers: [{name: a, volumeMounts: [{name: v, mountPath: /var/run/secrets/kubernetes.io/serviceaccount}]}], volumes: [{name: v}]}`, "default", "", 1, "", ""},
		{"the volume is there already", `{containers: [{name: a}], volumes: [{name: kube-api-access-abcde}]}`, "default", "a", 1, "", ""},
		{"no such account", `{serviceAccountName: none, containers: [{name: a}]}`, "none", "", 0, "", `error looking up service account default/none: serviceaccount "none" not found`},
	} {
		t.Run(tc.name, func(t *testing.T) {
			pod := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Name: "p", Namespace: "default"}}
			if err := yaml.UnmarshalStrict([]byte(tc.spec), &pod.Spec); err != nil {
				t.Fatal(err)
			}
			plugin := newCluster(t, Config{}).Admission()
			err := plugin.Admit(t.Context(), attributes(pod), nil)
			if tc.err != "" {
				if !apierrors.IsForbidden(err) || !strings.Contains(err.Error(), tc.err) {
					t.Errorf("error %v, want forbidden with %q", err, tc.err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if err := plugin.Validate(t.Context(), attributes(pod), nil); err != nil {
				t.Error(err)
			}
			var mounted []string
			volume := ""
			for _, c := range append(pod.Spec.InitContainers, pod.Spec.Containers...) {
				for _, m := range c.VolumeMounts {
					if strings.HasPrefix(m.Name, "kube-api-access-") && m.MountPath == MountPath && m.ReadOnly {
						mounted, volume = append(mounted, c.Name), m.Name
					}
				}
			}
			var pull []string
			for _, s := range pod.Spec.ImagePullSecrets {
				pull = append(pull, s.Name)
			}
			got := []any{pod.Spec.ServiceAccountName, pod.Spec.DeprecatedServiceAccount, strings.Join(mounted, " "), len(pod.Spec.Volumes), strings.Join(pull, " ")}
			if d := cmp.Diff([]any{tc.account, tc.account, tc.mounted, tc.volumes, tc.pull}, got); d != "" {
				t.Errorf("(-want +got)\n%s", d)
			}
			if tc.name == "plain" {
				y := strings.ReplaceAll(string(must(yaml.Marshal(pod.Spec.Volumes))), volume, "kube-api-access-X")
				if d := cmp.Diff(injected, y); d != "" {
					t.Errorf("volume (-want +got)\n%s", d)
				}
			}
		})
	}
}

// TestWaitsForTheDefaultAccount: a pod in a namespace made a moment ago.
func TestWaitsForTheDefaultAccount(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCluster(t, Config{})
		sa := c.accounts.m["default/default"]
		c.accounts.set("default/default", nil)
		pod := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Name: "p", Namespace: "default"}}
		if err := c.Admission().Admit(t.Context(), attributes(pod.DeepCopy()), nil); !apierrors.IsForbidden(err) {
			t.Errorf("error %v, want forbidden", err)
		}
		time.AfterFunc(waitFor/2, func() { c.accounts.set("default/default", sa) })
		if err := c.Admission().Admit(t.Context(), attributes(pod), nil); err != nil {
			t.Errorf("the account came in time: %v", err)
		}
	})
}

func TestMirrorPods(t *testing.T) {
	plugin := newCluster(t, Config{}).Admission()
	for spec, part := range map[string]string{
		`{containers: [{name: a}]}`:                                                            "",
		`{serviceAccountName: web, containers: [{name: a}]}`:                                   "may not reference service accounts",
		`{volumes: [{name: v, secret: {secretName: s}}]}`:                                      "may not reference secrets",
		`{volumes: [{name: v, projected: {sources: [{serviceAccountToken: {path: token}}]}}]}`: "ServiceAccountToken",
	} {
		pod := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Name: "p", Annotations: map[string]string{corev1.MirrorPodAnnotationKey: "x"}}}
		if err := yaml.UnmarshalStrict([]byte(spec), &pod.Spec); err != nil {
			t.Fatal(err)
		}
		if err := plugin.Admit(t.Context(), attributes(pod), nil); err != nil {
			t.Error(err)
		}
		err := plugin.Validate(t.Context(), attributes(pod), nil)
		if part == "" && err != nil || part != "" && (err == nil || !strings.Contains(err.Error(), part)) {
			t.Errorf("%s: %v, want a part %q", spec, err, part)
		}
	}
}

func FuzzAuthenticateToken(f *testing.F) {
	c := newCluster(f, Config{})
	tr, err := c.request(context.Background(), "web", want())
	if err != nil {
		f.Fatal(err)
	}
	f.Add(tr.Status.Token)
	f.Add("a.b.c")
	f.Fuzz(func(t *testing.T, token string) {
		// Another spelling of the signature is fine, another subject is not.
		resp, ok, _ := c.Authenticator().AuthenticateToken(context.Background(), token)
		if ok && resp.User.GetName() != "system:serviceaccount:default:web" {
			t.Errorf("%q believed to be %s", token, resp.User.GetName())
		}
	})
}
