package controller

import (
	"fmt"
	"slices"

	corev1 "k8s.io/api/core/v1"
	storagev1 "k8s.io/api/storage/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/component-helpers/scheduling/corev1/nodeaffinity"

	"meshd.dev/pkg/controller/schedule"
)

const (
	// localProvisioner in a StorageClass means a folder on the disk of the node
	// the first pod that uses the claim was placed on.
	localProvisioner = "meshd.dev/local"
	// selectedNode is the annotation with which the scheduler tells where.
	selectedNode = "volume.kubernetes.io/selected-node"
	defaultClass = "storageclass.kubernetes.io/is-default-class"
)

const (
	reasonVolumeNode = "node(s) didn't match PersistentVolume's node affinity"
	reasonNoVolume   = "node(s) didn't find available persistent volumes to bind"
	reasonOtherNode  = "node(s) had another node selected for a volume of the pod"
)

// storage is the volumes, claims and classes of the cluster at one moment.
type storage struct {
	claims  map[string]*corev1.PersistentVolumeClaim // by namespace/name
	volumes map[string]*corev1.PersistentVolume
	classes map[string]*storagev1.StorageClass
}

// class of a claim, nil for none. A claim that names none has the default
// class, once there is one.
func (s storage) class(claim *corev1.PersistentVolumeClaim) *storagev1.StorageClass {
	if claim.Spec.StorageClassName != nil {
		return s.classes[*claim.Spec.StorageClassName]
	}
	return s.defaultClass()
}

// defaultClass is the newest of those marked so, as Kubernetes chooses.
func (s storage) defaultClass() *storagev1.StorageClass {
	var best *storagev1.StorageClass
	for _, c := range s.classes {
		if c.Annotations[defaultClass] != "true" {
			continue
		}
		if best == nil || best.CreationTimestamp.Before(&c.CreationTimestamp) || best.CreationTimestamp.Equal(&c.CreationTimestamp) && c.Name < best.Name {
			best = c
		}
	}
	return best
}

func waitsForConsumer(c *storagev1.StorageClass) bool {
	return c != nil && (c.Provisioner == localProvisioner || c.VolumeBindingMode != nil && *c.VolumeBindingMode == storagev1.VolumeBindingWaitForFirstConsumer)
}

func bound(claim *corev1.PersistentVolumeClaim) bool {
	return claim.Spec.VolumeName != "" && claim.Status.Phase == corev1.ClaimBound
}

// claimsOf are the claims pod uses. One that is missing is an error: the pod
// has to wait for it.
func (s storage) claimsOf(pod *corev1.Pod) ([]*corev1.PersistentVolumeClaim, error) {
	var claims []*corev1.PersistentVolumeClaim
	for _, v := range pod.Spec.Volumes {
		name := ""
		switch {
		case v.PersistentVolumeClaim != nil:
			name = v.PersistentVolumeClaim.ClaimName
		case v.Ephemeral != nil:
			return nil, fmt.Errorf("volume %s: ephemeral claims are not supported", v.Name)
		default:
			continue
		}
		claim := s.claims[pod.Namespace+"/"+name]
		if claim == nil || claim.DeletionTimestamp != nil {
			return nil, fmt.Errorf("persistentvolumeclaim %q not found", name)
		}
		claims = append(claims, claim)
	}
	return claims, nil
}

// filter says what the claims of pod ask of a node.
func (s storage) filter(pod *corev1.Pod) (schedule.VolumeFilter, error) {
	claims, err := s.claimsOf(pod)
	if err != nil || len(claims) == 0 {
		return nil, err
	}
	for _, c := range claims {
		if !bound(c) && (c.Spec.VolumeName != "" || !waitsForConsumer(s.class(c))) {
			return nil, fmt.Errorf("pod has unbound immediate PersistentVolumeClaims: %s", c.Name)
		}
		if bound(c) && s.volumes[c.Spec.VolumeName] == nil {
			return nil, fmt.Errorf("persistentvolumeclaim %q is bound to volume %s, which does not exist", c.Name, c.Spec.VolumeName)
		}
	}
	return func(n *corev1.Node) string {
		for _, c := range claims {
			if r := s.refuses(c, n); r != "" {
				return r
			}
		}
		return ""
	}, nil
}

// refuses says why claim cannot be used on n, or "".
func (s storage) refuses(claim *corev1.PersistentVolumeClaim, n *corev1.Node) string {
	switch chosen := claim.Annotations[selectedNode]; {
	case bound(claim):
		if !reaches(s.volumes[claim.Spec.VolumeName], n) {
			return reasonVolumeNode
		}
	case chosen != "" && chosen != n.Name:
		return reasonOtherNode
	case s.class(claim).Provisioner != localProvisioner && s.match(claim, n) == nil:
		return reasonNoVolume
	}
	return ""
}

// reaches says whether the volume can be used on n.
func reaches(v *corev1.PersistentVolume, n *corev1.Node) bool {
	if v.Spec.NodeAffinity == nil || v.Spec.NodeAffinity.Required == nil {
		return true
	}
	ok, err := nodeaffinity.NewLazyErrorNodeSelector(v.Spec.NodeAffinity.Required).Match(n)
	return ok && err == nil
}

// match finds the smallest volume nobody has that claim can take, on n when
// that is not nil. One that names the claim beforehand comes first.
func (s storage) match(claim *corev1.PersistentVolumeClaim, n *corev1.Node) *corev1.PersistentVolume {
	var best *corev1.PersistentVolume
	for _, v := range s.volumes {
		switch {
		case v.DeletionTimestamp != nil || n != nil && !reaches(v, n):
		case v.Spec.ClaimRef != nil:
			if isFor(v, claim) {
				return v
			}
		case !fits(v, claim):
		case best == nil || smaller(v, best):
			best = v
		}
	}
	return best
}

// isFor says whether v names claim as its own.
func isFor(v *corev1.PersistentVolume, claim *corev1.PersistentVolumeClaim) bool {
	r := v.Spec.ClaimRef
	return r != nil && r.Namespace == claim.Namespace && r.Name == claim.Name && (r.UID == "" || r.UID == claim.UID)
}

func smaller(a, b *corev1.PersistentVolume) bool {
	qa, qb := a.Spec.Capacity[corev1.ResourceStorage], b.Spec.Capacity[corev1.ResourceStorage]
	if c := qa.Cmp(qb); c != 0 {
		return c < 0
	}
	return a.Name < b.Name
}

// fits says whether a volume nobody has gives what claim asks for.
func fits(v *corev1.PersistentVolume, claim *corev1.PersistentVolumeClaim) bool {
	class := ""
	if claim.Spec.StorageClassName != nil {
		class = *claim.Spec.StorageClassName
	}
	sel := labels.Everything()
	if claim.Spec.Selector != nil {
		var err error
		if sel, err = metav1.LabelSelectorAsSelector(claim.Spec.Selector); err != nil {
			return false
		}
	}
	have, want := v.Spec.Capacity[corev1.ResourceStorage], claim.Spec.Resources.Requests[corev1.ResourceStorage]
	return v.Status.Phase != corev1.VolumeReleased && v.Status.Phase != corev1.VolumeFailed &&
		v.Spec.StorageClassName == class && have.Cmp(want) >= 0 && sel.Matches(labels.Set(v.Labels)) &&
		volumeMode(v.Spec.VolumeMode) == volumeMode(claim.Spec.VolumeMode) &&
		!slices.ContainsFunc(claim.Spec.AccessModes, func(m corev1.PersistentVolumeAccessMode) bool { return !slices.Contains(v.Spec.AccessModes, m) })
}

func volumeMode(m *corev1.PersistentVolumeMode) corev1.PersistentVolumeMode {
	if m == nil {
		return corev1.PersistentVolumeFilesystem
	}
	return *m
}
