package kube

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
)

// Event is something a person should know about an object who looks at it.
type Event struct {
	About corev1.ObjectReference
	// Reason is one word, Message some sentences; of a long one the end is cut.
	Reason, Message string
	// Again is how soon the same may be said again; 0: not while the first
	// event is kept, whoever says it.
	Again time.Duration
}

// maxEventMessage is what the API takes.
const maxEventMessage = 1024

// name is the same for the same event about the same object within a time of
// Again: that is how it is told once, whoever tells it and however often.
func (e Event) name(at time.Time) string {
	turn := int64(0)
	if e.Again > 0 {
		turn = at.Unix() / int64(e.Again/time.Second)
	}
	sum := sha256.Sum256(fmt.Appendf(nil, "%s\x00%s\x00%s\x00%d", e.About.UID, e.Reason, e.Message, turn))
	return strings.TrimRight(fmt.Sprintf("%.180s", e.About.Name), "-.") + "." + hex.EncodeToString(sum[:8])
}

// Say writes a Warning event, in the name of the meshd of a node. It needs no
// right but to create events.
func Say(ctx context.Context, client kubernetes.Interface, node string, e Event) error {
	now := metav1.Now()
	namespace := e.About.Namespace
	if namespace == "" {
		namespace = metav1.NamespaceDefault
	}
	message := Short(e.Message, maxEventMessage)
	_, err := client.CoreV1().Events(namespace).Create(ctx, &corev1.Event{
		ObjectMeta:     metav1.ObjectMeta{Namespace: namespace, Name: e.name(now.Time)},
		InvolvedObject: e.About, Type: corev1.EventTypeWarning, Reason: e.Reason, Message: message,
		Source: corev1.EventSource{Component: eventSource, Host: node}, ReportingController: eventSource, ReportingInstance: node,
		FirstTimestamp: now, LastTimestamp: now, Count: 1,
	}, metav1.CreateOptions{})
	if err != nil && !apierrors.IsAlreadyExists(err) {
		return fmt.Errorf("say of %s %s/%s %q: %w", e.About.Kind, e.About.Namespace, e.About.Name, e.Reason, err)
	}
	return nil
}

const eventSource = "meshd"

// Short cuts text to at most n bytes, and says so by its last character.
func Short(text string, n int) string {
	if len(text) <= n {
		return text
	}
	const more = "…"
	cut := n - len(more)
	for cut > 0 && text[cut]&0xc0 == 0x80 { // inside of a character
		cut--
	}
	return text[:cut] + more
}

// Reference is what an event about the pod is about.
func (p Pod) Reference() corev1.ObjectReference {
	return corev1.ObjectReference{APIVersion: "v1", Kind: "Pod", Namespace: p.Namespace, Name: p.Name, UID: p.UID}
}

// Reference is what an event about the policy is about.
func (p Policy) Reference() corev1.ObjectReference {
	return corev1.ObjectReference{APIVersion: "networking.k8s.io/v1", Kind: "NetworkPolicy", Namespace: p.Namespace, Name: p.Name, UID: p.UID}
}
