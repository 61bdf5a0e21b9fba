package controller

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"path"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	storagev1 "k8s.io/api/storage/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/tools/cache"
	"k8s.io/client-go/tools/record"

	"meshd.dev/pkg/reconcile"
)

// localClass is the StorageClass made where none of ours exists, and
// localFolder where its volumes are on each node unless its parameter "path"
// says otherwise.
const (
	localClass  = "local"
	localFolder = "/var/lib/meshd/volumes"
)

// volumeBinder gives claims their volumes: folders on the disk of the node
// the first pod went to (StorageClass with provisioner meshd.dev/local), or
// volumes a person made. Data is never deleted here: a volume whose claim is
// gone becomes Released and stays, folder and all, until a person deletes it;
// only the node could remove a folder, and losing data by accident is worse
// than keeping some too long.
type volumeBinder struct {
	plane                           *plane
	claims, volumes, classes, nodes cache.SharedIndexInformer
	recorder                        record.EventRecorder
	loop                            *reconcile.Loop
}

func newVolumeBinder(p *plane) *volumeBinder {
	c := &volumeBinder{
		plane:    p,
		claims:   p.shared.Core().V1().PersistentVolumeClaims().Informer(),
		volumes:  p.shared.Core().V1().PersistentVolumes().Informer(),
		classes:  p.shared.Storage().V1().StorageClasses().Informer(),
		nodes:    p.shared.Core().V1().Nodes().Informer(),
		recorder: p.recorder("volume-controller"),
	}
	c.loop = p.loop("volumes", c.do)
	for _, inf := range []cache.SharedIndexInformer{c.claims, c.volumes, c.classes} {
		watch(inf, c.loop.Kick, nil)
	}
	return c
}

func (c *volumeBinder) Run(ctx context.Context) error {
	if !synced(ctx, c.claims, c.volumes, c.classes, c.nodes) {
		return nil
	}
	return c.loop.Run(ctx)
}

func (c *volumeBinder) do(ctx context.Context) error {
	if err := c.ensureClass(ctx); err != nil {
		return err
	}
	var errs []error
	for _, s := range planVolumes(readStorage(c.claims, c.volumes, c.classes), c.nodeByName) {
		if err := s.do(ctx, c); err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", s, err))
		}
	}
	return errors.Join(errs...)
}

func (c *volumeBinder) nodeByName(name string) *corev1.Node {
	obj, ok, _ := c.nodes.GetStore().GetByKey(name)
	if !ok {
		return nil
	}
	return obj.(*corev1.Node)
}

// ensureClass makes the class "local" where there is no StorageClass at all,
// as the default, so that a plain claim works on a new cluster.
func (c *volumeBinder) ensureClass(ctx context.Context) error {
	if len(c.classes.GetStore().ListKeys()) > 0 {
		return nil
	}
	mode, keep := storagev1.VolumeBindingWaitForFirstConsumer, corev1.PersistentVolumeReclaimRetain
	_, err := c.plane.client.StorageV1().StorageClasses().Create(ctx, &storagev1.StorageClass{
		ObjectMeta:  metav1.ObjectMeta{Name: localClass, Annotations: map[string]string{defaultClass: "true"}},
		Provisioner: localProvisioner, VolumeBindingMode: &mode, ReclaimPolicy: &keep,
	}, metav1.CreateOptions{})
	if err != nil && !apierrors.IsAlreadyExists(err) {
		return fmt.Errorf("make storage class %s: %w", localClass, err)
	}
	return nil
}

func readStorage(claims, volumes, classes cache.SharedIndexInformer) storage {
	s := storage{
		claims:  map[string]*corev1.PersistentVolumeClaim{},
		volumes: map[string]*corev1.PersistentVolume{},
		classes: map[string]*storagev1.StorageClass{},
	}
	for _, o := range claims.GetStore().List() {
		claim := o.(*corev1.PersistentVolumeClaim)
		s.claims[claim.Namespace+"/"+claim.Name] = claim
	}
	for _, o := range volumes.GetStore().List() {
		s.volumes[o.(*corev1.PersistentVolume).Name] = o.(*corev1.PersistentVolume)
	}
	for _, o := range classes.GetStore().List() {
		s.classes[o.(*storagev1.StorageClass).Name] = o.(*storagev1.StorageClass)
	}
	return s
}

// volumeStep is one thing to write; its String is what a person would say.
type volumeStep interface {
	fmt.Stringer
	do(context.Context, *volumeBinder) error
}

// planVolumes decides the next step of every claim and volume. Each round
// does at most one step for each; what it wrote brings about the next round.
func planVolumes(s storage, node func(string) *corev1.Node) []volumeStep {
	var steps []volumeStep
	taken := map[string]bool{}
	for _, key := range sortedKeys(s.claims) {
		if step := claimStep(s, s.claims[key], node, taken); step != nil {
			steps = append(steps, step)
		}
	}
	for _, name := range sortedKeys(s.volumes) {
		if step := volumePhase(s, s.volumes[name]); step != nil && !taken[name] {
			steps = append(steps, step)
		}
	}
	return steps
}

func sortedKeys[V any](m map[string]V) []string {
	keys := make([]string, 0, len(m))
	for k := range m {
		keys = append(keys, k)
	}
	slices.Sort(keys)
	return keys
}

// claimStep is the next step towards a bound claim, nil when it is bound or
// has to wait for a consumer, a volume or a person.
func claimStep(s storage, claim *corev1.PersistentVolumeClaim, node func(string) *corev1.Node, taken map[string]bool) volumeStep {
	if claim.DeletionTimestamp != nil || bound(claim) || claim.Status.Phase == corev1.ClaimLost {
		return nil
	}
	if claim.Spec.VolumeName != "" {
		v := s.volumes[claim.Spec.VolumeName]
		if v == nil || v.Spec.ClaimRef != nil && !isFor(v, claim) {
			return nil
		}
		taken[v.Name] = true
		return bindClaim{claim, v}
	}
	class := s.class(claim)
	if claim.Spec.StorageClassName == nil {
		if class == nil {
			return nil
		}
		return setClass{claim, class.Name}
	}
	chosen := node(claim.Annotations[selectedNode])
	if waitsForConsumer(class) && chosen == nil {
		return nil
	}
	if v := s.match(claim, chosen); v != nil && !taken[v.Name] {
		taken[v.Name] = true
		return bindClaim{claim, v}
	}
	if class != nil && class.Provisioner == localProvisioner {
		return makeVolume{claim, class, chosen}
	}
	return nil
}

// volumePhase keeps the phase of a volume true: Available while nobody has
// it, Released once the claim that had it is gone.
func volumePhase(s storage, v *corev1.PersistentVolume) volumeStep {
	want := v.Status.Phase
	switch ref := v.Spec.ClaimRef; {
	case v.DeletionTimestamp != nil:
	case ref == nil:
		want = corev1.VolumeAvailable
	case ref.UID == "":
		want = corev1.VolumeAvailable
	default:
		claim := s.claims[ref.Namespace+"/"+ref.Name]
		if claim == nil || claim.UID != ref.UID {
			want = corev1.VolumeReleased
		}
	}
	if want == v.Status.Phase {
		return nil
	}
	return setPhase{v, want}
}

// setClass gives a claim without a class the default one.
type setClass struct {
	claim *corev1.PersistentVolumeClaim
	class string
}

func (s setClass) String() string {
	return fmt.Sprintf("give claim %s/%s storage class %s", s.claim.Namespace, s.claim.Name, s.class)
}

func (s setClass) do(ctx context.Context, c *volumeBinder) error {
	return c.patchClaim(ctx, s.claim, map[string]any{"spec": map[string]any{"storageClassName": s.class}})
}

// makeVolume makes the volume of a claim on the node its pod goes to. Its
// name follows from the claim, so that a second try finds the first.
type makeVolume struct {
	claim *corev1.PersistentVolumeClaim
	class *storagev1.StorageClass
	node  *corev1.Node
}

func (s makeVolume) String() string {
	return fmt.Sprintf("make volume %s for claim %s/%s on node %s", volumeName(s.claim), s.claim.Namespace, s.claim.Name, s.node.Name)
}

func volumeName(claim *corev1.PersistentVolumeClaim) string { return "pvc-" + string(claim.UID) }

func (s makeVolume) do(ctx context.Context, c *volumeBinder) error {
	v, err := s.volume()
	if err != nil {
		c.recorder.Event(s.claim, corev1.EventTypeWarning, "ProvisioningFailed", err.Error())
		return err
	}
	if _, err := c.plane.client.CoreV1().PersistentVolumes().Create(ctx, v, metav1.CreateOptions{}); err != nil && !apierrors.IsAlreadyExists(err) {
		return err
	}
	c.plane.cfg.Log.Info(s.String())
	c.recorder.Eventf(s.claim, corev1.EventTypeNormal, "ProvisioningSucceeded", "Successfully provisioned volume %s", v.Name)
	return nil
}

func (s makeVolume) volume() (*corev1.PersistentVolume, error) {
	folder := localFolder
	if p, ok := s.class.Parameters["path"]; ok {
		folder = p
	}
	if !path.IsAbs(folder) || path.Clean(folder) != folder || folder == "/" {
		return nil, fmt.Errorf("storage class %s: parameter path %q: want an absolute, clean path", s.class.Name, folder)
	}
	if volumeMode(s.claim.Spec.VolumeMode) != corev1.PersistentVolumeFilesystem {
		return nil, errors.New("volume mode Block: a local volume is a folder, want Filesystem")
	}
	reclaim, kind := corev1.PersistentVolumeReclaimRetain, corev1.HostPathDirectoryOrCreate
	return &corev1.PersistentVolume{
		ObjectMeta: metav1.ObjectMeta{Name: volumeName(s.claim), Annotations: map[string]string{"pv.kubernetes.io/provisioned-by": localProvisioner}},
		Spec: corev1.PersistentVolumeSpec{
			Capacity:                      corev1.ResourceList{corev1.ResourceStorage: s.claim.Spec.Resources.Requests[corev1.ResourceStorage]},
			AccessModes:                   s.claim.Spec.AccessModes,
			PersistentVolumeReclaimPolicy: reclaim,
			StorageClassName:              s.class.Name,
			ClaimRef:                      claimRef(s.claim),
			NodeAffinity:                  &corev1.VolumeNodeAffinity{Required: onlyOn(s.node)},
			PersistentVolumeSource:        corev1.PersistentVolumeSource{HostPath: &corev1.HostPathVolumeSource{Path: path.Join(folder, volumeName(s.claim)), Type: &kind}},
		},
	}, nil
}

// onlyOn selects n by its hostname label, or by its name where it has none.
func onlyOn(n *corev1.Node) *corev1.NodeSelector {
	term := corev1.NodeSelectorTerm{MatchFields: []corev1.NodeSelectorRequirement{{Key: "metadata.name", Operator: corev1.NodeSelectorOpIn, Values: []string{n.Name}}}}
	if host := n.Labels[corev1.LabelHostname]; host != "" {
		term = corev1.NodeSelectorTerm{MatchExpressions: []corev1.NodeSelectorRequirement{{Key: corev1.LabelHostname, Operator: corev1.NodeSelectorOpIn, Values: []string{host}}}}
	}
	return &corev1.NodeSelector{NodeSelectorTerms: []corev1.NodeSelectorTerm{term}}
}

func claimRef(claim *corev1.PersistentVolumeClaim) *corev1.ObjectReference {
	return &corev1.ObjectReference{Kind: "PersistentVolumeClaim", APIVersion: "v1", Namespace: claim.Namespace, Name: claim.Name, UID: claim.UID}
}

// bindClaim makes claim and volume point at each other: the volume first,
// because it can belong to one claim only and the API server sees to that.
type bindClaim struct {
	claim  *corev1.PersistentVolumeClaim
	volume *corev1.PersistentVolume
}

func (s bindClaim) String() string {
	return fmt.Sprintf("bind claim %s/%s to volume %s", s.claim.Namespace, s.claim.Name, s.volume.Name)
}

func (s bindClaim) do(ctx context.Context, c *volumeBinder) error {
	if r := s.volume.Spec.ClaimRef; r == nil || r.UID == "" {
		if err := c.patchVolume(ctx, s.volume, map[string]any{"metadata": map[string]any{"resourceVersion": s.volume.ResourceVersion}, "spec": map[string]any{"claimRef": claimRef(s.claim)}}); err != nil {
			return err
		}
	}
	if s.claim.Spec.VolumeName == "" {
		bindMark := map[string]any{"annotations": map[string]any{"pv.kubernetes.io/bind-completed": "yes"}}
		if err := c.patchClaim(ctx, s.claim, map[string]any{"metadata": bindMark, "spec": map[string]any{"volumeName": s.volume.Name}}); err != nil {
			return err
		}
	}
	if err := c.patchVolume(ctx, s.volume, phase(corev1.VolumeBound), "status"); err != nil {
		return err
	}
	if err := c.patchClaim(ctx, s.claim, map[string]any{"status": map[string]any{
		"phase": corev1.ClaimBound, "accessModes": s.volume.Spec.AccessModes, "capacity": s.volume.Spec.Capacity}}, "status"); err != nil {
		return err
	}
	c.plane.cfg.Log.Info(s.String())
	return nil
}

// setPhase writes the phase of a volume.
type setPhase struct {
	volume *corev1.PersistentVolume
	phase  corev1.PersistentVolumePhase
}

func (s setPhase) String() string {
	return fmt.Sprintf("volume %s is %s", s.volume.Name, strings.ToLower(string(s.phase)))
}

func (s setPhase) do(ctx context.Context, c *volumeBinder) error {
	return c.patchVolume(ctx, s.volume, phase(s.phase), "status")
}

func phase(p corev1.PersistentVolumePhase) map[string]any {
	return map[string]any{"status": map[string]any{"phase": p}}
}

func (c *volumeBinder) patchVolume(ctx context.Context, v *corev1.PersistentVolume, patch map[string]any, sub ...string) error {
	b, err := json.Marshal(patch)
	if err != nil {
		return err
	}
	_, err = c.plane.client.CoreV1().PersistentVolumes().Patch(ctx, v.Name, types.MergePatchType, b, metav1.PatchOptions{}, sub...)
	return err
}

func (c *volumeBinder) patchClaim(ctx context.Context, claim *corev1.PersistentVolumeClaim, patch map[string]any, sub ...string) error {
	b, err := json.Marshal(patch)
	if err != nil {
		return err
	}
	_, err = c.plane.client.CoreV1().PersistentVolumeClaims(claim.Namespace).Patch(ctx, claim.Name, types.MergePatchType, b, metav1.PatchOptions{}, sub...)
	return err
}
