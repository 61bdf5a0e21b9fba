package controller

import (
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	storagev1 "k8s.io/api/storage/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
)

// A world is lines:
//
//	class NAME [default] [local|static|immediate] [path=P]
//	claim NAME class=C|- size=S [on=NODE] [volume=V] [bound]
//	volume NAME class=C size=S [node=N] [for=CLAIM[:UID]] [phase=P]
//
// Claims are in namespace d and have their name as UID; nodes are n1 and n2.
func storageWorld(t *testing.T, lines []string) storage {
	t.Helper()
	s := storage{claims: map[string]*corev1.PersistentVolumeClaim{}, volumes: map[string]*corev1.PersistentVolume{}, classes: map[string]*storagev1.StorageClass{}}
	for _, l := range lines {
		w := strings.Fields(l)
		switch w[0] {
		case "class":
			s.classes[w[1]] = worldClass(w[1], w[2:])
		case "claim":
			s.claims["d/"+w[1]] = worldClaim(w[1], w[2:])
		case "volume":
			s.volumes[w[1]] = worldVolume(w[1], w[2:])
		default:
			t.Fatalf("line %q", l)
		}
	}
	return s
}

func worldClass(name string, words []string) *storagev1.StorageClass {
	later := storagev1.VolumeBindingWaitForFirstConsumer
	c := &storagev1.StorageClass{ObjectMeta: metav1.ObjectMeta{Name: name, Annotations: map[string]string{}}, Parameters: map[string]string{}}
	for _, w := range words {
		k, v, _ := strings.Cut(w, "=")
		switch k {
		case "default":
			c.Annotations[defaultClass] = "true"
		case "local":
			c.Provisioner, c.VolumeBindingMode = localProvisioner, &later
		case "static":
			c.Provisioner, c.VolumeBindingMode = "kubernetes.io/no-provisioner", &later
		case "immediate":
			c.Provisioner = "kubernetes.io/no-provisioner"
		case "path":
			c.Parameters["path"] = v
		}
	}
	return c
}

func worldClaim(name string, words []string) *corev1.PersistentVolumeClaim {
	c := &corev1.PersistentVolumeClaim{ObjectMeta: metav1.ObjectMeta{Namespace: "d", Name: name, UID: types.UID(name), Annotations: map[string]string{}}}
	c.Spec.AccessModes = []corev1.PersistentVolumeAccessMode{corev1.ReadWriteOnce}
	for _, w := range words {
		k, v, _ := strings.Cut(w, "=")
		switch k {
		case "class":
			if v != "-" {
				c.Spec.StorageClassName = &v
			}
		case "size":
			c.Spec.Resources.Requests = corev1.ResourceList{corev1.ResourceStorage: resource.MustParse(v)}
		case "on":
			c.Annotations[selectedNode] = v
		case "volume":
			c.Spec.VolumeName = v
		case "bound":
			c.Status.Phase = corev1.ClaimBound
		}
	}
	return c
}

func worldVolume(name string, words []string) *corev1.PersistentVolume {
	p := &corev1.PersistentVolume{ObjectMeta: metav1.ObjectMeta{Name: name}}
	p.Spec.AccessModes = []corev1.PersistentVolumeAccessMode{corev1.ReadWriteOnce, corev1.ReadOnlyMany}
	p.Status.Phase = corev1.VolumeAvailable
	for _, w := range words {
		k, v, _ := strings.Cut(w, "=")
		switch k {
		case "class":
			p.Spec.StorageClassName = v
		case "size":
			p.Spec.Capacity = corev1.ResourceList{corev1.ResourceStorage: resource.MustParse(v)}
		case "node":
			p.Spec.NodeAffinity = &corev1.VolumeNodeAffinity{Required: onlyOn(hostNode(v))}
		case "for":
			claim, uid, _ := strings.Cut(v, ":")
			p.Spec.ClaimRef = &corev1.ObjectReference{Namespace: "d", Name: claim, UID: types.UID(uid)}
		case "phase":
			p.Status.Phase = corev1.PersistentVolumePhase(v)
		}
	}
	return p
}

func hostNode(name string) *corev1.Node {
	return &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name, Labels: map[string]string{corev1.LabelHostname: name}}}
}

func TestPlanVolumes(t *testing.T) {
	for _, tc := range []struct {
		name  string
		world []string
		want  string
	}{
		{"a claim without class gets the default one", []string{"class local default local", "claim a class=- size=1Gi"}, "give claim d/a storage class local"},
		{"no default: it waits", []string{"class local local", "claim a class=- size=1Gi"}, ""},
		{"a local claim waits for its first pod", []string{"class local local", "claim a class=local size=1Gi"}, ""},
		{"and then is made where that goes", []string{"class local local", "claim a class=local size=1Gi on=n1"}, "make volume pvc-a for claim d/a on node n1"},
		{"made but not bound, as after a crash", []string{"class local local", "claim a class=local size=1Gi on=n1", "volume pvc-a class=local size=1Gi node=n1 for=a:a phase=Pending"}, "bind claim d/a to volume pvc-a"},
		{"half bound", []string{"class local local", "claim a class=local size=1Gi on=n1 volume=pvc-a", "volume pvc-a class=local size=1Gi node=n1 for=a:a phase=Bound"}, "bind claim d/a to volume pvc-a"},
		{"bound: nothing to do", []string{"class local local", "claim a class=local size=1Gi on=n1 volume=pvc-a bound", "volume pvc-a class=local size=1Gi for=a:a phase=Bound"}, ""},
		{"the node it was to be on is gone", []string{"class local local", "claim a class=local size=1Gi on=n9"}, ""},
		{"the smallest that is large enough", []string{"class s immediate", "claim a class=s size=5Gi", "volume v1 class=s size=1Gi", "volume v9 class=s size=9Gi", "volume v6 class=s size=6Gi"}, "bind claim d/a to volume v6"},
		{"one volume, two claims", []string{"class s immediate", "claim a class=s size=5Gi", "claim b class=s size=5Gi", "volume v class=s size=9Gi"}, "bind claim d/a to volume v"},
		{"kept for another claim", []string{"class s immediate", "claim a class=s size=5Gi", "claim b class=s size=5Gi", "volume v class=s size=9Gi for=b"}, "bind claim d/b to volume v"},
		{"static with a node", []string{"class s static", "claim a class=s size=5Gi on=n2", "volume v1 class=s size=9Gi node=n1", "volume v2 class=s size=9Gi node=n2"}, "bind claim d/a to volume v2"},
		{"its claim is gone", []string{"volume v class=s size=1Gi for=a:a phase=Bound"}, "volume v is released"},
		{"its claim was made anew", []string{"claim a class=s size=1Gi", "volume v class=s size=1Gi for=a:old phase=Bound"}, "volume v is released"},
		{"released ones go to nobody", []string{"class s immediate", "claim a class=s size=1Gi", "volume v class=s size=1Gi for=b:b phase=Released"}, ""},
		{"a new one is available", []string{"volume v class=s size=1Gi phase=Pending"}, "volume v is available"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			var got []string
			nodes := func(name string) *corev1.Node {
				if name == "n1" || name == "n2" {
					return hostNode(name)
				}
				return nil
			}
			for _, s := range planVolumes(storageWorld(t, tc.world), nodes) {
				got = append(got, s.String())
			}
			if g := strings.Join(got, "; "); g != tc.want {
				t.Errorf("\n got %s\nwant %s", g, tc.want)
			}
		})
	}
}

func TestVolumeFilter(t *testing.T) {
	for _, tc := range []struct {
		name  string
		world []string
		want  string
	}{
		{"no such claim", nil, `persistentvolumeclaim "a" not found`},
		{"not placed yet", []string{"class local local", "claim a class=local size=1Gi"}, "n1, n2"},
		{"a node was chosen", []string{"class local local", "claim a class=local size=1Gi on=n2"}, "n1: node(s) had another node selected for a volume of the pod, n2"},
		{"bound to a disk of n1", []string{"claim a class=s size=1Gi volume=v bound", "volume v class=s size=1Gi node=n1"}, "n1, n2: node(s) didn't match PersistentVolume's node affinity"},
		{"bound to one that is gone", []string{"claim a class=s size=1Gi volume=v bound"}, `persistentvolumeclaim "a" is bound to volume v, which does not exist`},
		{"nobody will make it now", []string{"class s immediate", "claim a class=s size=1Gi"}, "pod has unbound immediate PersistentVolumeClaims: a"},
		{"no class at all", []string{"claim a class=- size=1Gi"}, "pod has unbound immediate PersistentVolumeClaims: a"},
		{"static volume on n2 only", []string{"class s static", "claim a class=s size=1Gi", "volume v class=s size=1Gi node=n2"}, "n1: node(s) didn't find available persistent volumes to bind, n2"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			pod := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: "d", Name: "p"}}
			pod.Spec.Volumes = []corev1.Volume{{Name: "data", VolumeSource: corev1.VolumeSource{PersistentVolumeClaim: &corev1.PersistentVolumeClaimVolumeSource{ClaimName: "a"}}}}
			filter, err := storageWorld(t, tc.world).filter(pod)
			var got []string
			if err != nil {
				got = append(got, err.Error())
			} else {
				for _, n := range []string{"n1", "n2"} {
					line := n
					if r := filter(hostNode(n)); r != "" {
						line += ": " + r
					}
					got = append(got, line)
				}
			}
			if g := strings.Join(got, ", "); g != tc.want {
				t.Errorf("\n got %s\nwant %s", g, tc.want)
			}
		})
	}
}

func TestLocalVolume(t *testing.T) {
	claim := worldClaim("a", []string{"class=local", "size=1Gi"})
	v, err := makeVolume{claim, worldClass("local", []string{"local"}), hostNode("n1")}.volume()
	if err != nil || v.Spec.HostPath.Path != "/var/lib/meshd/volumes/pvc-a" || !reaches(v, hostNode("n1")) || reaches(v, hostNode("n2")) {
		t.Errorf("a folder on n1 only, want it: %+v %v", v, err)
	}
	for _, path := range []string{"relative", "/a/../etc", "/", "/a//b", "/a/", ""} {
		if _, err := (makeVolume{claim, worldClass("local", []string{"local", "path=" + path}), hostNode("n1")}).volume(); err == nil {
			t.Errorf("path %q is taken", path)
		}
	}
}
