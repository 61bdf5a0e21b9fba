package registry

import (
	"reflect"
	"strings"

	corev1 "k8s.io/api/core/v1"
	eventsv1 "k8s.io/api/events/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/conversion"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	utilruntime "k8s.io/apimachinery/pkg/util/runtime"

	"meshd.dev/pkg/apiserver/upstream"
)

// NewScheme returns a scheme in which each type of k8s.io/api is its own
// internal version, so that nothing is ever converted. The exception is
// events.k8s.io, whose events are stored as core events.
func NewScheme() *runtime.Scheme {
	s := runtime.NewScheme()
	utilruntime.Must(upstream.AddToScheme(s))
	metav1.AddToGroupVersion(s, schema.GroupVersion{Version: "v1"})
	s.AddUnversionedTypes(schema.GroupVersion{Version: "v1"},
		&metav1.Status{}, &metav1.APIVersions{}, &metav1.APIGroupList{}, &metav1.APIGroup{}, &metav1.APIResourceList{})
	// Of a kind with several versions the stored one is the internal one.
	for _, k := range Kinds() {
		s.AddKnownTypes(schema.GroupVersion{Group: k.Group, Version: runtime.APIVersionInternal}, k.Object, k.List)
	}
	for _, gv := range s.PrioritizedVersionsAllGroups() {
		addInternal(s, gv)
	}
	events := schema.GroupVersion{Group: eventsv1.GroupName, Version: runtime.APIVersionInternal}
	s.AddKnownTypeWithName(events.WithKind("Event"), &corev1.Event{})
	s.AddKnownTypeWithName(events.WithKind("EventList"), &corev1.EventList{})
	utilruntime.Must(addEventConversions(s))
	return s
}

// addInternal registers the types of gv once more as internal version of
// their group, where there is none yet.
func addInternal(s *runtime.Scheme, gv schema.GroupVersion) {
	if gv.Version == runtime.APIVersionInternal || gv.Group == eventsv1.GroupName {
		return
	}
	internal := schema.GroupVersion{Group: gv.Group, Version: runtime.APIVersionInternal}
	known := s.KnownTypes(internal)
	for kind, t := range s.KnownTypes(gv) {
		if _, ok := known[kind]; ok || !strings.HasPrefix(t.PkgPath(), "k8s.io/api/") {
			continue
		}
		s.AddKnownTypeWithName(internal.WithKind(kind), reflect.New(t).Interface().(runtime.Object))
	}
}

// addEventConversions lets events.k8s.io be served over stored core events.
func addEventConversions(s *runtime.Scheme) error {
	for _, pair := range [][2]runtime.Object{
		{&eventsv1.Event{}, &corev1.Event{}}, {&corev1.Event{}, &eventsv1.Event{}},
		{&eventsv1.EventList{}, &corev1.EventList{}}, {&corev1.EventList{}, &eventsv1.EventList{}},
	} {
		err := s.AddConversionFunc(pair[0], pair[1], func(in, out any, _ conversion.Scope) error {
			return upstream.ConvertEvent(in.(runtime.Object), out.(runtime.Object))
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// Codecs are the wire formats of a scheme.
type Codecs struct {
	Scheme    *runtime.Scheme
	Factory   serializer.CodecFactory
	Parameter runtime.ParameterCodec
}

// NewCodecs returns the codecs of s.
func NewCodecs(s *runtime.Scheme) Codecs {
	return Codecs{Scheme: s, Factory: serializer.NewCodecFactory(s), Parameter: runtime.NewParameterCodec(s)}
}
