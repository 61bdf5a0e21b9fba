package upstream

import (
	"fmt"

	corev1 "k8s.io/api/core/v1"
	eventsv1 "k8s.io/api/events/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/kubernetes/pkg/apis/core"
)

// ConvertEvent fills out from in: events or lists of events of core/v1 and
// events.k8s.io/v1.
func ConvertEvent(in, out runtime.Object) error {
	var via runtime.Object = &core.Event{}
	switch in.(type) {
	case *corev1.EventList, *eventsv1.EventList:
		via = &core.EventList{}
	case *corev1.Event, *eventsv1.Event:
	default:
		return fmt.Errorf("convert event: unknown type %T", in)
	}
	if err := convert(in, via); err != nil {
		return err
	}
	return convert(via, out)
}
