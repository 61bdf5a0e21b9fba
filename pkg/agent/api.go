package agent

import (
	"context"
	"fmt"

	authv1 "k8s.io/api/authentication/v1"
	v1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// token asks for a token of the pod's service account, bound to the pod.
func (a *Agent) token(ctx context.Context, pod *v1.Pod, audience string, seconds int64) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, apiLimit)
	defer cancel()
	req := &authv1.TokenRequest{Spec: authv1.TokenRequestSpec{
		ExpirationSeconds: &seconds,
		BoundObjectRef:    &authv1.BoundObjectReference{APIVersion: "v1", Kind: "Pod", Name: pod.Name, UID: pod.UID},
	}}
	if audience != "" {
		req.Spec.Audiences = []string{audience}
	}
	account := pod.Spec.ServiceAccountName
	if account == "" {
		account = "default"
	}
	got, err := a.client.CoreV1().ServiceAccounts(pod.Namespace).CreateToken(ctx, account, req, metav1.CreateOptions{})
	if err != nil {
		return "", fmt.Errorf("token of service account %s/%s: %w", pod.Namespace, account, err)
	}
	return got.Status.Token, nil
}

// claim finds the volume a claim is bound to.
func (a *Agent) claim(ctx context.Context, namespace, name string) (*v1.PersistentVolume, error) {
	ctx, cancel := context.WithTimeout(ctx, apiLimit)
	defer cancel()
	pvc, err := a.client.CoreV1().PersistentVolumeClaims(namespace).Get(ctx, name, metav1.GetOptions{})
	if err != nil {
		return nil, fmt.Errorf("claim %s/%s: %w", namespace, name, err)
	}
	if pvc.Spec.VolumeName == "" || pvc.Status.Phase != v1.ClaimBound {
		return nil, fmt.Errorf("claim %s/%s is not bound to a volume yet", namespace, name)
	}
	pv, err := a.client.CoreV1().PersistentVolumes().Get(ctx, pvc.Spec.VolumeName, metav1.GetOptions{})
	if err != nil {
		return nil, fmt.Errorf("volume %s of claim %s/%s: %w", pvc.Spec.VolumeName, namespace, name, err)
	}
	return pv, nil
}
