package kube

import (
	"context"
	"encoding/json"
	"fmt"
	"net/netip"
	"slices"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes"

	"meshd.dev/pkg/mesh"
)

// Record is what a node says of itself to its peers.
type Record struct {
	PublicKey mesh.Key
	// NextKey and NextPort while the node changes its key; zero otherwise.
	NextKey  mesh.Key
	NextPort uint16
	// Exchange is zero when the node does not talk about keys.
	Exchange  mesh.Exchange
	Endpoints []netip.AddrPort
}

// annotations of the record; nil stands for one that shall not be there.
func (r Record) annotations() map[string]*string {
	next, exchange := (*string)(nil), (*string)(nil)
	if !r.NextKey.IsZero() {
		next = new(FormatNextKey(r.NextKey, r.NextPort))
	}
	if r.Exchange.Port != 0 {
		exchange = new(FormatExchange(r.Exchange))
	}
	return map[string]*string{
		mesh.AnnotationPublicKey:   new(r.PublicKey.String()),
		mesh.AnnotationEndpoints:   new(FormatEndpoints(r.Endpoints)),
		mesh.AnnotationNextKey:     next,
		mesh.AnnotationKeyExchange: exchange,
	}
}

// Stands reports whether a node as the API has it says what the record says.
func (r Record) Stands(n mesh.Node) bool {
	return n.PublicKey == r.PublicKey && n.NextKey == r.NextKey && n.NextPort == r.NextPort && n.Exchange == r.Exchange &&
		slices.Equal(n.Endpoints, r.Endpoints)
}

// Publish writes the record on the Node object of that name, if it differs.
// The object must exist.
func Publish(ctx context.Context, client kubernetes.Interface, node string, r Record) error {
	want := r.annotations()
	obj, err := client.CoreV1().Nodes().Get(ctx, node, metav1.GetOptions{})
	if err != nil {
		return fmt.Errorf("publish node record: %w", err)
	}
	differs := false
	for k, v := range want {
		have, is := obj.Annotations[k]
		differs = differs || is != (v != nil) || v != nil && have != *v
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
