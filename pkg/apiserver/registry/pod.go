package registry

import (
	"context"
	"fmt"
	"strconv"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apiserver/pkg/registry/rest"
	"k8s.io/apiserver/pkg/storage"
	storeerr "k8s.io/apiserver/pkg/storage/errors"
	"k8s.io/apiserver/pkg/util/dryrun"

	"meshd.dev/pkg/apiserver/upstream"
)

func podKind() *Kind {
	return &Kind{Version: "v1", Resource: "pods", Short: []string{"po"}, Categories: []string{"all"},
		Object: &corev1.Pod{}, List: &corev1.PodList{}, Status: true, Generation: true, Index: "spec.nodeName",
		Create: newPod, UpdateStatus: keepPodStatus,
		Fields: func(obj runtime.Object) fields.Set {
			p := obj.(*corev1.Pod)
			ip := ""
			if len(p.Status.PodIPs) > 0 {
				ip = p.Status.PodIPs[0].IP
			}
			return fields.Set{
				"spec.nodeName": p.Spec.NodeName, "spec.restartPolicy": string(p.Spec.RestartPolicy), "spec.schedulerName": p.Spec.SchedulerName,
				"spec.serviceAccountName": p.Spec.ServiceAccountName, "spec.hostNetwork": strconv.FormatBool(p.Spec.HostNetwork),
				"status.phase": string(p.Status.Phase), "status.podIP": ip, "status.nominatedNodeName": p.Status.NominatedNodeName,
			}
		},
		Print: prints("Name,Ready,Status,Restarts,Age|IP,Node,Nominated Node,Readiness Gates", podCells)}
}

// newPod gives a pod the status it starts with.
func newPod(obj runtime.Object) {
	p := obj.(*corev1.Pod)
	p.Status = corev1.PodStatus{Phase: corev1.PodPending, QOSClass: upstream.QOSClass(p)}
	if len(p.Spec.SchedulingGates) > 0 {
		p.Status.Conditions = []corev1.PodCondition{{
			Type: corev1.PodScheduled, Status: corev1.ConditionFalse, Reason: corev1.PodReasonSchedulingGated,
			Message: "Scheduling is blocked due to non-empty scheduling gates",
		}}
	}
}

// keepPodStatus keeps what the first writer of the status decided.
func keepPodStatus(obj, old runtime.Object) {
	p, o := obj.(*corev1.Pod), old.(*corev1.Pod)
	if p.Status.QOSClass == "" {
		p.Status.QOSClass = o.Status.QOSClass
	}
	pairPodIPs(&p.Status)
	if p.Status.ObservedGeneration == 0 {
		p.Status.ObservedGeneration = o.Status.ObservedGeneration
	}
}

// pairPodIPs keeps podIP and podIPs the same.
func pairPodIPs(s *corev1.PodStatus) {
	var ips []string
	for _, ip := range s.PodIPs {
		ips = append(ips, ip.IP)
	}
	pairFirst(&s.PodIP, &ips)
	s.PodIPs = nil
	for _, ip := range ips {
		s.PodIPs = append(s.PodIPs, corev1.PodIP{IP: ip})
	}
}

// checkPodDelete settles how long a pod may take to end. One that runs
// nowhere, or no more, goes at once.
func checkPodDelete(obj runtime.Object, options *metav1.DeleteOptions) bool {
	p := obj.(*corev1.Pod)
	var period int64
	switch {
	case p.Spec.NodeName == "", p.Status.Phase == corev1.PodFailed, p.Status.Phase == corev1.PodSucceeded:
	case options.GracePeriodSeconds != nil:
		period = *options.GracePeriodSeconds
	case p.Spec.TerminationGracePeriodSeconds != nil:
		period = *p.Spec.TerminationGracePeriodSeconds
	}
	if period < 0 {
		period = 1
	}
	options.GracePeriodSeconds = &period
	return true
}

// EphemeralView is the ephemeralcontainers subresource of pods.
func (r *REST) EphemeralView() *View {
	return r.view(partStrategy{
		strategy: r.strategy,
		prepare: func(obj, old runtime.Object) {
			p, o := obj.(*corev1.Pod), old.(*corev1.Pod)
			containers := p.Spec.EphemeralContainers
			p.Spec, p.Status = o.Spec, o.Status
			metav1.ResetObjectMetaForStatus(&p.ObjectMeta, &o.ObjectMeta)
			p.Spec.EphemeralContainers = containers
		},
		validate: upstream.ValidateEphemeralContainers,
		locked:   []string{"status"},
	})
}

// Binding is the binding subresource of pods: it names the node of a pod,
// once.
type Binding struct{ pods *REST }

var (
	_ rest.NamedCreater                   = Binding{}
	_ rest.SubresourceObjectMetaPreserver = Binding{}
	_ rest.Creater                        = Bindings{}
	_ rest.SingularNameProvider           = Bindings{}
)

// NewBinding binds pods of r.
func NewBinding(r *REST) Binding { return Binding{r} }

// New implements rest.Storage.
func (Binding) New() runtime.Object { return &corev1.Binding{} }

// Destroy does nothing: the store is that of pods.
func (Binding) Destroy() {}

// NamespaceScoped implements rest.Scoper.
func (Binding) NamespaceScoped() bool { return true }

// PreserveRequestObjectMetaSystemFieldsOnSubresourceCreate lets UID and
// resource version through: they are preconditions.
func (Binding) PreserveRequestObjectMetaSystemFieldsOnSubresourceCreate() bool { return true }

// Create implements rest.NamedCreater.
func (b Binding) Create(ctx context.Context, name string, obj runtime.Object, validate rest.ValidateObjectFunc, options *metav1.CreateOptions) (runtime.Object, error) {
	binding, ok := obj.(*corev1.Binding)
	if !ok {
		return nil, apierrors.NewBadRequest(fmt.Sprintf("not a Binding object: %T", obj))
	}
	if name != binding.Name {
		return nil, apierrors.NewBadRequest("name in URL does not match name in Binding object")
	}
	if rules, ok := upstream.RulesFor(binding); ok {
		if errs := rules.Create(binding); len(errs) > 0 {
			return nil, apierrors.NewInvalid(schema.GroupKind{Kind: "Binding"}, name, errs)
		}
	}
	if validate != nil {
		if err := validate(ctx, binding.DeepCopyObject()); err != nil {
			return nil, err
		}
	}
	if err := b.assign(ctx, binding, dryrun.IsDryRun(options.DryRun)); err != nil {
		return nil, err
	}
	return &metav1.Status{Status: metav1.StatusSuccess}, nil
}

func (b Binding) assign(ctx context.Context, binding *corev1.Binding, dry bool) error {
	key, err := b.pods.KeyFunc(ctx, binding.Name)
	if err != nil {
		return err
	}
	pre := &storage.Preconditions{}
	if binding.UID != "" {
		pre.UID = &binding.UID
	}
	if binding.ResourceVersion != "" {
		pre.ResourceVersion = &binding.ResourceVersion
	}
	update := storage.SimpleUpdate(func(obj runtime.Object) (runtime.Object, error) {
		return bind(obj.(*corev1.Pod), binding)
	})
	err = b.pods.Storage.GuaranteedUpdate(ctx, key, &corev1.Pod{}, false, pre, update, dry, nil)
	pods := schema.GroupResource{Resource: "pods"}
	err = storeerr.InterpretUpdateError(storeerr.InterpretGetError(err, pods, binding.Name), pods, binding.Name)
	if _, ok := err.(apierrors.APIStatus); err != nil && !ok {
		return apierrors.NewConflict(schema.GroupResource{Resource: "pods/binding"}, binding.Name, err)
	}
	return err
}

func bind(p *corev1.Pod, binding *corev1.Binding) (runtime.Object, error) {
	switch {
	case p.DeletionTimestamp != nil:
		return nil, fmt.Errorf("pod %s is being deleted, cannot be assigned to a host", p.Name)
	case p.Spec.NodeName != "":
		return nil, fmt.Errorf("pod %s is already assigned to node %q", p.Name, p.Spec.NodeName)
	case len(p.Spec.SchedulingGates) > 0:
		return nil, fmt.Errorf("pod %s has non-empty .spec.schedulingGates", p.Name)
	}
	p.Spec.NodeName = binding.Target.Name
	p.Status.NominatedNodeName = ""
	for k, v := range binding.Annotations {
		metav1.SetMetaDataAnnotation(&p.ObjectMeta, k, v)
	}
	setPodCondition(&p.Status, corev1.PodCondition{Type: corev1.PodScheduled, Status: corev1.ConditionTrue, LastTransitionTime: metav1.Now()})
	return p, nil
}

func setPodCondition(status *corev1.PodStatus, c corev1.PodCondition) {
	for i := range status.Conditions {
		if status.Conditions[i].Type == c.Type {
			status.Conditions[i] = c
			return
		}
	}
	status.Conditions = append(status.Conditions, c)
}

// Bindings is the resource of its own that binds pods, older than the
// subresource.
type Bindings struct{ Binding }

// Create implements rest.Creater.
func (b Bindings) Create(ctx context.Context, obj runtime.Object, validate rest.ValidateObjectFunc, options *metav1.CreateOptions) (runtime.Object, error) {
	binding, ok := obj.(*corev1.Binding)
	if !ok {
		return nil, apierrors.NewBadRequest(fmt.Sprintf("not a Binding object: %T", obj))
	}
	return b.Binding.Create(ctx, binding.Name, obj, validate, options)
}

// GetSingularName implements rest.SingularNameProvider.
func (Bindings) GetSingularName() string { return "binding" }

// podCells say in one word how a pod is; the first thing that is wrong wins.
func podCells(p *corev1.Pod) []any {
	s := summarize(p)
	restarts := itoa(s.restarts)
	if s.restarts > 0 && !s.lastRestart.IsZero() {
		restarts += " (" + age(s.lastRestart) + " ago)"
	}
	ip := ""
	if len(p.Status.PodIPs) > 0 {
		ip = p.Status.PodIPs[0].IP
	}
	gates := "<none>"
	if n := len(p.Spec.ReadinessGates); n > 0 {
		open := 0
		for _, g := range p.Spec.ReadinessGates {
			if podCondition(p, g.ConditionType) {
				open++
			}
		}
		gates = fmt.Sprintf("%d/%d", open, n)
	}
	return []any{p.Name, fmt.Sprintf("%d/%d", s.ready, s.total), s.reason, restarts, age(p.CreationTimestamp),
		orNone(ip), orNone(p.Spec.NodeName), orNone(p.Status.NominatedNodeName), gates}
}

type podSummary struct {
	ready, total, restarts int
	reason                 string
	lastRestart            metav1.Time
}

func summarize(p *corev1.Pod) podSummary {
	s := podSummary{total: len(p.Spec.Containers), reason: string(p.Status.Phase)}
	if p.Status.Reason != "" {
		s.reason = p.Status.Reason
	}
	for _, c := range p.Status.Conditions {
		if c.Type == corev1.PodScheduled && c.Reason == corev1.PodReasonSchedulingGated {
			s.reason = c.Reason
		}
	}
	if !s.initContainers(p) || podCondition(p, corev1.PodInitialized) {
		s.containers(p)
	}
	switch over := p.Status.Phase == corev1.PodFailed || p.Status.Phase == corev1.PodSucceeded; {
	case p.DeletionTimestamp != nil && p.Status.Reason == "NodeLost":
		s.reason = "Unknown"
	case p.DeletionTimestamp != nil && !over:
		s.reason = "Terminating"
	}
	return s
}

func (s *podSummary) count(c corev1.ContainerStatus) {
	s.restarts += int(c.RestartCount)
	if t := c.LastTerminationState.Terminated; t != nil && s.lastRestart.Before(&t.FinishedAt) {
		s.lastRestart = t.FinishedAt
	}
}

// initContainers reports whether the pod is still initializing.
func (s *podSummary) initContainers(p *corev1.Pod) bool {
	sidecar := map[string]bool{}
	for _, c := range p.Spec.InitContainers {
		if c.RestartPolicy != nil && *c.RestartPolicy == corev1.ContainerRestartPolicyAlways {
			sidecar[c.Name] = true
			s.total++
		}
	}
	for i, c := range p.Status.InitContainerStatuses {
		if sidecar[c.Name] || p.Status.Phase == corev1.PodPending {
			s.count(c)
		}
		switch t, w := c.State.Terminated, c.State.Waiting; {
		case t != nil && t.ExitCode == 0:
			continue
		case sidecar[c.Name] && deref(c.Started):
			if c.Ready {
				s.ready++
			}
			continue
		case t != nil:
			s.reason = "Init:" + terminated(t)
		case w != nil && w.Reason != "" && w.Reason != "PodInitializing":
			s.reason = "Init:" + w.Reason
		default:
			s.reason = fmt.Sprintf("Init:%d/%d", i, len(p.Spec.InitContainers))
		}
		return true
	}
	return false
}

func (s *podSummary) containers(p *corev1.Pod) {
	running, failed := false, ""
	for i := len(p.Status.ContainerStatuses) - 1; i >= 0; i-- {
		c := p.Status.ContainerStatuses[i]
		s.count(c)
		switch {
		case c.State.Waiting != nil && c.State.Waiting.Reason != "":
			s.reason = c.State.Waiting.Reason
		case c.State.Terminated != nil:
			s.reason = terminated(c.State.Terminated)
			if c.State.Terminated.ExitCode != 0 {
				failed = s.reason
			}
		case c.Ready && c.State.Running != nil:
			running = true
			s.ready++
		}
	}
	if s.reason != "Completed" {
		return
	}
	switch {
	case running && podCondition(p, corev1.PodReady):
		s.reason = "Running"
	case failed != "":
		s.reason = failed
	case running:
		s.reason = "NotReady"
	}
}

func terminated(t *corev1.ContainerStateTerminated) string {
	switch {
	case t.Reason != "":
		return t.Reason
	case t.Signal != 0:
		return "Signal:" + itoa(t.Signal)
	}
	return "ExitCode:" + itoa(t.ExitCode)
}

func podCondition(p *corev1.Pod, kind corev1.PodConditionType) bool {
	for _, c := range p.Status.Conditions {
		if c.Type == kind {
			return c.Status == corev1.ConditionTrue
		}
	}
	return false
}
