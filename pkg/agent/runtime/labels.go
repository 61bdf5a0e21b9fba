package runtime

// The labels and annotations by which pods are found again. The labels are the
// kubelet's, so that other tools know them too.
const (
	LabelPodName       = "io.kubernetes.pod.name"
	LabelPodNamespace  = "io.kubernetes.pod.namespace"
	LabelPodUID        = "io.kubernetes.pod.uid"
	LabelContainerName = "io.kubernetes.container.name"

	AnnotationHash        = "io.kubernetes.container.hash"
	AnnotationRestarts    = "io.kubernetes.container.restartCount"
	AnnotationMessagePath = "io.kubernetes.container.terminationMessagePath"
	AnnotationMessageFrom = "io.kubernetes.container.terminationMessagePolicy"
	AnnotationMessageFile = "meshd.dev/termination-message-file"
	AnnotationBackoff     = "meshd.dev/backoff"
)
