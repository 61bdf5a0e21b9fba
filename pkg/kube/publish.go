package kube

import (
	"context"
	"encoding/json"
	"fmt"
	"net/netip"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes"

	"meshd.dev/pkg/mesh"
)

// Record is what a node says of itself to its peers.
type Record struct {
	PublicKey mesh.Key
	Endpoints []netip.AddrPort
}

// Publish writes the record on the Node object of that name, if it differs.
// The object must exist.
func Publish(ctx context.Context, client kubernetes.Interface, node string, r Record) error {
	want := map[string]string{
		mesh.AnnotationPublicKey: r.PublicKey.String(),
		mesh.AnnotationEndpoints: FormatEndpoints(r.Endpoints),
	}
	obj, err := client.CoreV1().Nodes().Get(ctx, node, metav1.GetOptions{})
	if err != nil {
		return fmt.Errorf("publish node record: %w", err)
	}
	differs := false
	for k, v := range want {
		differs = differs || obj.Annotations[k] != v
	}
	if !differs {
		return nil
	}
	patch, err := json.Marshal(map[string]any{"metadata": map[string]any{"annotations": want}})
	if err != nil {
		return fmt.Errorf("publish node record: %w", err)
	}
	if _, err := client.CoreV1().Nodes().Patch(ctx, node, types.MergePatchType, patch, metav1.PatchOptions{}); err != nil {
		return fmt.Errorf("publish node record: %w", err)
	}
	return nil
}
