package serviceaccount

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apiserver/pkg/admission"
	"k8s.io/apiserver/pkg/storage/names"
	upstream "k8s.io/kubernetes/pkg/serviceaccount"
)

// PluginName of the admission plugin, as in Kubernetes.
const PluginName = "ServiceAccount"

const (
	defaultAccount = "default"
	// MountPath is where a container finds its token.
	MountPath = "/var/run/secrets/kubernetes.io/serviceaccount"
	// volumePrefix marks the volume with the token.
	volumePrefix = "kube-api-access-"

	// The default account of a new namespace is made by a controller; a pod
	// that comes before it waits a little.
	waitFor, waitStep = 2 * time.Second, 100 * time.Millisecond
)

type podAdmission struct {
	*admission.Handler
	t *Tokens
}

var (
	_ admission.MutationInterface   = (*podAdmission)(nil)
	_ admission.ValidationInterface = (*podAdmission)(nil)
)

// Admission returns the plugin that gives a new pod its service account, the
// volume with its token and the account's image pull secrets.
func (t *Tokens) Admission() interface {
	admission.MutationInterface
	admission.ValidationInterface
} {
	return &podAdmission{admission.NewHandler(admission.Create), t}
}

// podOf is the new pod of a; nil when a is about something else.
func podOf(a admission.Attributes) *corev1.Pod {
	if a.GetResource().GroupResource() != corev1.Resource("pods") || a.GetSubresource() != "" || a.GetOperation() != admission.Create {
		return nil
	}
	pod, _ := a.GetObject().(*corev1.Pod)
	return pod
}

func isMirror(pod *corev1.Pod) bool {
	_, mirror := pod.Annotations[corev1.MirrorPodAnnotationKey]
	return mirror
}

func (p *podAdmission) Admit(ctx context.Context, a admission.Attributes, _ admission.ObjectInterfaces) error {
	pod := podOf(a)
	if pod == nil || isMirror(pod) {
		return nil
	}
	if pod.Spec.ServiceAccountName == "" {
		pod.Spec.ServiceAccountName = defaultAccount
	}
	pod.Spec.DeprecatedServiceAccount = pod.Spec.ServiceAccountName
	sa, err := p.account(ctx, a.GetNamespace(), pod.Spec.ServiceAccountName)
	if err != nil {
		return refuse(a, pod, err)
	}
	if automounts(sa, pod) {
		mountToken(pod, names.SimpleNameGenerator.GenerateName)
	}
	if len(pod.Spec.ImagePullSecrets) == 0 {
		pod.Spec.ImagePullSecrets = slices.Clone(sa.ImagePullSecrets)
	}
	return nil
}

func (p *podAdmission) Validate(ctx context.Context, a admission.Attributes, _ admission.ObjectInterfaces) error {
	pod := podOf(a)
	switch {
	case pod == nil:
		return nil
	case isMirror(pod):
		return validateMirror(a, pod)
	case pod.Spec.ServiceAccountName == "":
		return admission.NewForbidden(a, fmt.Errorf("no service account specified for pod %s/%s", a.GetNamespace(), pod.Name))
	}
	if _, err := p.account(ctx, a.GetNamespace(), pod.Spec.ServiceAccountName); err != nil {
		return refuse(a, pod, err)
	}
	return nil
}

// validateMirror: what a node made up may not get at secrets through it.
func validateMirror(a admission.Attributes, pod *corev1.Pod) error {
	if pod.Spec.ServiceAccountName != "" {
		return admission.NewForbidden(a, fmt.Errorf("a mirror pod may not reference service accounts"))
	}
	for _, v := range pod.Spec.Volumes {
		if v.Secret != nil {
			return admission.NewForbidden(a, fmt.Errorf("a mirror pod may not reference secrets"))
		}
		if v.Projected == nil {
			continue
		}
		for _, s := range v.Projected.Sources {
			if s.Secret != nil || s.ServiceAccountToken != nil {
				return admission.NewForbidden(a, fmt.Errorf("a mirror pod may not reference secrets or use ServiceAccountToken volume projections"))
			}
		}
	}
	return nil
}

func refuse(a admission.Attributes, pod *corev1.Pod, err error) error {
	return admission.NewForbidden(a, fmt.Errorf("error looking up service account %s/%s: %w", a.GetNamespace(), pod.Spec.ServiceAccountName, err))
}

// account reads the service account; for the default one it waits a moment.
func (p *podAdmission) account(ctx context.Context, namespace, name string) (*corev1.ServiceAccount, error) {
	deadline := time.Now().Add(waitFor)
	for {
		sa, err := reader{p.t}.GetServiceAccount(ctx, namespace, name)
		if err == nil || !apierrors.IsNotFound(err) {
			return sa, err
		}
		if name != defaultAccount || time.Now().After(deadline) {
			return nil, apierrors.NewNotFound(corev1.Resource("serviceaccount"), name)
		}
		select {
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-time.After(waitStep):
		}
	}
}

// automounts: the pod's wish comes before the account's; the default is yes.
func automounts(sa *corev1.ServiceAccount, pod *corev1.Pod) bool {
	if m := pod.Spec.AutomountServiceAccountToken; m != nil {
		return *m
	}
	m := sa.AutomountServiceAccountToken
	return m == nil || *m
}

// mountToken mounts the token in each container that has nothing at MountPath.
// A volume with the prefix that is there already is used.
func mountToken(pod *corev1.Pod, generate func(string) string) {
	var volume string
	i := slices.IndexFunc(pod.Spec.Volumes, func(v corev1.Volume) bool { return strings.HasPrefix(v.Name, volumePrefix) })
	if i >= 0 {
		volume = pod.Spec.Volumes[i].Name
	} else {
		volume = generate(volumePrefix)
	}
	mount := corev1.VolumeMount{Name: volume, ReadOnly: true, MountPath: MountPath}
	needed := false
	for _, containers := range [][]corev1.Container{pod.Spec.InitContainers, pod.Spec.Containers} {
		for j := range containers {
			c := &containers[j]
			if !slices.ContainsFunc(c.VolumeMounts, func(m corev1.VolumeMount) bool { return m.MountPath == MountPath }) {
				c.VolumeMounts = append(c.VolumeMounts, mount)
				needed = true
			}
		}
	}
	if needed && i < 0 {
		pod.Spec.Volumes = append(pod.Spec.Volumes, corev1.Volume{Name: volume, VolumeSource: corev1.VolumeSource{Projected: tokenVolume()}})
	}
}

// tokenVolume holds the token, the CA to check the API server with, and the
// namespace.
func tokenVolume() *corev1.ProjectedVolumeSource {
	return &corev1.ProjectedVolumeSource{
		DefaultMode: new(corev1.ProjectedVolumeSourceDefaultMode),
		Sources: []corev1.VolumeProjection{
			{ServiceAccountToken: &corev1.ServiceAccountTokenProjection{
				Path: "token", ExpirationSeconds: new(int64(upstream.WarnOnlyBoundTokenExpirationSeconds)),
			}},
			{ConfigMap: &corev1.ConfigMapProjection{
				LocalObjectReference: corev1.LocalObjectReference{Name: "kube-root-ca.crt"},
				Items:                []corev1.KeyToPath{{Key: "ca.crt", Path: "ca.crt"}},
			}},
			{DownwardAPI: &corev1.DownwardAPIProjection{
				Items: []corev1.DownwardAPIVolumeFile{{Path: "namespace", FieldRef: &corev1.ObjectFieldSelector{APIVersion: "v1", FieldPath: "metadata.namespace"}}},
			}},
		},
	}
}
