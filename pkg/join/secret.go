package join

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
)

// Keys of a token's Secret: Kubernetes' own for bootstrap tokens, and ours.
const (
	keyID          = "token-id"
	keySecret      = "token-secret"
	keyExpiration  = "expiration"
	keyDescription = "description"
	keyReusable    = "meshd-reusable"
	keyUsedBy      = "meshd-used-by"
)

func secretName(id string) string { return "bootstrap-token-" + id }

// TokenInfo is what may be shown of a token.
type TokenInfo struct {
	ID          string    `json:"id"`
	Description string    `json:"description,omitempty"`
	Expires     time.Time `json:"expires,omitzero"`
	Reusable    bool      `json:"reusable"`
	// UsedBy is node/key hash of the node a single-use token served.
	UsedBy string `json:"usedBy,omitempty"`
}

// CreateToken stores a token in the cluster. A life of 0 never expires.
func CreateToken(ctx context.Context, client kubernetes.Interface, t Token, life time.Duration, info TokenInfo) error {
	obj := &corev1.Secret{
		ObjectMeta: metav1.ObjectMeta{Name: secretName(t.ID), Namespace: metav1.NamespaceSystem},
		Type:       corev1.SecretTypeBootstrapToken,
		StringData: map[string]string{keyID: t.ID, keySecret: t.Secret, keyDescription: info.Description},
	}
	if life > 0 {
		obj.StringData[keyExpiration] = time.Now().Add(life).UTC().Format(time.RFC3339)
	}
	if info.Reusable {
		obj.StringData[keyReusable] = "true"
	}
	// StringData is write-only sugar that only some servers unfold.
	obj.Data = map[string][]byte{}
	for k, v := range obj.StringData {
		obj.Data[k] = []byte(v)
	}
	obj.StringData = nil
	if _, err := client.CoreV1().Secrets(obj.Namespace).Create(ctx, obj, metav1.CreateOptions{}); err != nil {
		return fmt.Errorf("create token: %w", err)
	}
	return nil
}

// ListTokens in order of expiry.
func ListTokens(ctx context.Context, client kubernetes.Interface) ([]TokenInfo, error) {
	list, err := client.CoreV1().Secrets(metav1.NamespaceSystem).List(ctx, metav1.ListOptions{FieldSelector: "type=" + string(corev1.SecretTypeBootstrapToken)})
	if err != nil {
		return nil, fmt.Errorf("list tokens: %w", err)
	}
	var infos []TokenInfo
	for i := range list.Items {
		info, err := readInfo(&list.Items[i])
		if err != nil {
			return nil, err
		}
		infos = append(infos, info)
	}
	slices.SortFunc(infos, func(a, b TokenInfo) int { return cmp.Or(a.Expires.Compare(b.Expires), cmp.Compare(a.ID, b.ID)) })
	return infos, nil
}

// RevokeToken removes a token; nodes that joined with it stay.
func RevokeToken(ctx context.Context, client kubernetes.Interface, id string) error {
	err := client.CoreV1().Secrets(metav1.NamespaceSystem).Delete(ctx, secretName(id), metav1.DeleteOptions{})
	if apierrors.IsNotFound(err) {
		return fmt.Errorf("revoke token %s: there is none of that id; `meshctl token list` shows them", id)
	}
	if err != nil {
		return fmt.Errorf("revoke token %s: %w", id, err)
	}
	return nil
}

func readInfo(obj *corev1.Secret) (TokenInfo, error) {
	info := TokenInfo{
		ID:          string(obj.Data[keyID]),
		Description: string(obj.Data[keyDescription]),
		Reusable:    string(obj.Data[keyReusable]) == "true",
		UsedBy:      string(obj.Data[keyUsedBy]),
	}
	if e := string(obj.Data[keyExpiration]); e != "" {
		t, err := time.Parse(time.RFC3339, e)
		if err != nil {
			return info, fmt.Errorf("token %s: expiration %q: want RFC 3339", info.ID, e)
		}
		info.Expires = t
	}
	return info, nil
}

// UsedNode is the node a single-use token served, or empty.
func (t TokenInfo) UsedNode() string {
	node, _, _ := strings.Cut(t.UsedBy, "/")
	return node
}
