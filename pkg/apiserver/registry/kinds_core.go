package registry

import (
	"fmt"
	"strconv"
	"strings"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apiserver/pkg/registry/rest"
)

func itoa[T ~int | ~int32 | ~int64](n T) string { return strconv.FormatInt(int64(n), 10) }

// eventTTL is how long events are kept, in seconds.
const eventTTL = 3600

// coreKinds are those of the group without a name, except pods and namespaces.
func coreKinds() []*Kind {
	all := []string{"all"}
	return []*Kind{
		podKind(), namespaceKind(), nodeKind(), serviceKind(), eventKind(),
		{Version: "v1", Resource: "configmaps", Short: []string{"cm"}, Object: &corev1.ConfigMap{}, List: &corev1.ConfigMapList{},
			Print: prints("Name,Data#,Age", func(c *corev1.ConfigMap) []any {
				return []any{c.Name, int64(len(c.Data) + len(c.BinaryData)), age(c.CreationTimestamp)}
			})},
		{Version: "v1", Resource: "secrets", Object: &corev1.Secret{}, List: &corev1.SecretList{},
			Fields: func(obj runtime.Object) fields.Set { return fields.Set{"type": string(obj.(*corev1.Secret).Type)} },
			Create: func(obj runtime.Object) { mergeStringData(obj.(*corev1.Secret)) },
			Update: func(obj, old runtime.Object) {
				s := obj.(*corev1.Secret)
				mergeStringData(s)
				if s.Type == "" {
					s.Type = old.(*corev1.Secret).Type
				}
			},
			Print: prints("Name,Type,Data#,Age", func(s *corev1.Secret) []any {
				return []any{s.Name, string(s.Type), int64(len(s.Data)), age(s.CreationTimestamp)}
			})},
		{Version: "v1", Resource: "serviceaccounts", Short: []string{"sa"}, Object: &corev1.ServiceAccount{}, List: &corev1.ServiceAccountList{},
			Print: prints("Name,Age", func(s *corev1.ServiceAccount) []any { return []any{s.Name, age(s.CreationTimestamp)} })},
		{Version: "v1", Resource: "endpoints", Singular: "endpoints", Short: []string{"ep"}, Object: &corev1.Endpoints{}, List: &corev1.EndpointsList{},
			CreateOnPut: true,
			Print: prints("Name,Endpoints,Age", func(e *corev1.Endpoints) []any {
				return []any{e.Name, few(addresses(e)), age(e.CreationTimestamp)}
			})},
		{Version: "v1", Resource: "persistentvolumes", Short: []string{"pv"}, Object: &corev1.PersistentVolume{}, List: &corev1.PersistentVolumeList{},
			Cluster: true, Status: true,
			Create: func(obj runtime.Object) { obj.(*corev1.PersistentVolume).Status.Phase = corev1.VolumePending },
			Fields: func(obj runtime.Object) fields.Set {
				return fields.Set{"name": obj.(*corev1.PersistentVolume).Name}
			},
			Print: prints("Name,Capacity,Access Modes,Reclaim Policy,Status,Claim,StorageClass,Reason,Age|VolumeMode", volumeCells)},
		{Version: "v1", Resource: "persistentvolumeclaims", Short: []string{"pvc"}, Object: &corev1.PersistentVolumeClaim{}, List: &corev1.PersistentVolumeClaimList{},
			Status: true,
			Create: func(obj runtime.Object) { obj.(*corev1.PersistentVolumeClaim).Status.Phase = corev1.ClaimPending },
			Fields: func(obj runtime.Object) fields.Set {
				return fields.Set{"name": obj.(*corev1.PersistentVolumeClaim).Name}
			},
			Print: prints("Name,Status,Volume,Capacity,Access Modes,StorageClass,Age|VolumeMode", claimCells)},
		{Version: "v1", Resource: "limitranges", Short: []string{"limits"}, Object: &corev1.LimitRange{}, List: &corev1.LimitRangeList{}},
		{Version: "v1", Resource: "resourcequotas", Short: []string{"quota"}, Object: &corev1.ResourceQuota{}, List: &corev1.ResourceQuotaList{}, Status: true,
			Print: prints("Name,Request,Age", func(q *corev1.ResourceQuota) []any { return []any{q.Name, quotaUse(q), age(q.CreationTimestamp)} })},
		{Version: "v1", Resource: "podtemplates", Object: &corev1.PodTemplate{}, List: &corev1.PodTemplateList{}, Generation: true},
		{Version: "v1", Resource: "replicationcontrollers", Short: []string{"rc"}, Categories: all,
			Object: &corev1.ReplicationController{}, List: &corev1.ReplicationControllerList{},
			Status: true, Generation: true, Garbage: rest.OrphanDependents, Scale: controllerScale(),
			Fields: func(obj runtime.Object) fields.Set {
				return fields.Set{"status.replicas": itoa(obj.(*corev1.ReplicationController).Status.Replicas)}
			},
			Print: prints("Name,Desired#,Current#,Ready#,Age", func(c *corev1.ReplicationController) []any {
				return []any{c.Name, int64(deref(c.Spec.Replicas)), int64(c.Status.Replicas), int64(c.Status.ReadyReplicas), age(c.CreationTimestamp)}
			})},
	}
}

// mergeStringData moves the write-only text of a secret to its data.
func mergeStringData(s *corev1.Secret) {
	if len(s.StringData) > 0 && s.Data == nil {
		s.Data = map[string][]byte{}
	}
	for k, v := range s.StringData {
		s.Data[k] = []byte(v)
	}
	s.StringData = nil
}

// pairFirst keeps a single value and the first of a list the same, as a client
// that knows only one of them expects. Where they differ the list is replaced.
func pairFirst(one *string, list *[]string) {
	switch {
	case len(*list) > 0 && *one == "":
		*one = (*list)[0]
	case *one != "" && len(*list) == 0:
		*list = []string{*one}
	case *one != "" && (*list)[0] != *one:
		*list = []string{*one}
	}
}

func deref[T any](p *T) T {
	if p == nil {
		return *new(T)
	}
	return *p
}

func nodeKind() *Kind {
	return &Kind{Version: "v1", Resource: "nodes", Short: []string{"no"}, Object: &corev1.Node{}, List: &corev1.NodeList{},
		Cluster: true, Status: true, StatusOnCreate: true,
		Create: func(obj runtime.Object) { pairCIDRs(obj.(*corev1.Node)) },
		Update: func(obj, _ runtime.Object) { pairCIDRs(obj.(*corev1.Node)) },
		Fields: func(obj runtime.Object) fields.Set {
			return fields.Set{"spec.unschedulable": strconv.FormatBool(obj.(*corev1.Node).Spec.Unschedulable)}
		},
		Print: prints("Name,Status,Roles,Age,Version|Internal-IP,External-IP,OS-Image,Kernel-Version,Container-Runtime", nodeCells)}
}

func pairCIDRs(n *corev1.Node) { pairFirst(&n.Spec.PodCIDR, &n.Spec.PodCIDRs) }

func nodeCells(n *corev1.Node) []any {
	status := "Unknown"
	for _, c := range n.Status.Conditions {
		if c.Type == corev1.NodeReady && c.Status == corev1.ConditionTrue {
			status = "Ready"
		} else if c.Type == corev1.NodeReady {
			status = "NotReady"
		}
	}
	if n.Spec.Unschedulable {
		status += ",SchedulingDisabled"
	}
	var roles []string
	for _, label := range labelKeys(n.Labels) {
		if role, ok := strings.CutPrefix(label, "node-role.kubernetes.io/"); ok && role != "" {
			roles = append(roles, role)
		}
	}
	address := func(kind corev1.NodeAddressType) string {
		for _, a := range n.Status.Addresses {
			if a.Type == kind {
				return a.Address
			}
		}
		return "<none>"
	}
	info := n.Status.NodeInfo
	unknown := func(s string) string {
		if s == "" {
			return "<unknown>"
		}
		return s
	}
	return []any{n.Name, status, orNone(strings.Join(roles, ",")), age(n.CreationTimestamp), info.KubeletVersion,
		address(corev1.NodeInternalIP), address(corev1.NodeExternalIP), unknown(info.OSImage), unknown(info.KernelVersion), unknown(info.ContainerRuntimeVersion)}
}

func serviceKind() *Kind {
	return &Kind{Version: "v1", Resource: "services", Short: []string{"svc"}, Categories: []string{"all"},
		Object: &corev1.Service{}, List: &corev1.ServiceList{}, Status: true, CreateOnPut: true,
		Fields: func(obj runtime.Object) fields.Set {
			s := obj.(*corev1.Service)
			return fields.Set{"spec.clusterIP": s.Spec.ClusterIP, "spec.type": string(s.Spec.Type)}
		},
		Print: prints("Name,Type,Cluster-IP,External-IP,Port(s),Age|Selector", func(s *corev1.Service) []any {
			ip := "<none>"
			if len(s.Spec.ClusterIPs) > 0 {
				ip = s.Spec.ClusterIPs[0]
			}
			return []any{s.Name, string(s.Spec.Type), ip, externalAddress(s), orNone(servicePorts(s)), age(s.CreationTimestamp), labels.FormatLabels(s.Spec.Selector)}
		})}
}

func servicePorts(s *corev1.Service) string {
	var out []string
	for _, p := range s.Spec.Ports {
		text := itoa(p.Port)
		if p.NodePort > 0 {
			text += ":" + itoa(p.NodePort)
		}
		out = append(out, text+"/"+string(p.Protocol))
	}
	return strings.Join(out, ",")
}

func externalAddress(s *corev1.Service) string {
	out := append([]string(nil), s.Spec.ExternalIPs...)
	switch s.Spec.Type {
	case corev1.ServiceTypeExternalName:
		return s.Spec.ExternalName
	case corev1.ServiceTypeLoadBalancer:
		for _, in := range s.Status.LoadBalancer.Ingress {
			if in.IP != "" {
				out = append(out, in.IP)
			} else {
				out = append(out, in.Hostname)
			}
		}
		if len(out) == 0 {
			return "<pending>"
		}
	}
	return orNone(strings.Join(out, ","))
}

func addresses(e *corev1.Endpoints) []string {
	var out []string
	for _, subset := range e.Subsets {
		for _, a := range subset.Addresses {
			if len(subset.Ports) == 0 {
				out = append(out, a.IP)
			}
			for _, p := range subset.Ports {
				out = append(out, hostPort(a.IP, p.Port))
			}
		}
	}
	return out
}

func accessModes(modes []corev1.PersistentVolumeAccessMode) string {
	short := map[corev1.PersistentVolumeAccessMode]string{corev1.ReadWriteOnce: "RWO", corev1.ReadOnlyMany: "ROX", corev1.ReadWriteMany: "RWX", corev1.ReadWriteOncePod: "RWOP"}
	var out []string
	for _, m := range modes {
		out = append(out, short[m])
	}
	return strings.Join(out, ",")
}

func volumeCells(v *corev1.PersistentVolume) []any {
	claim := ""
	if r := v.Spec.ClaimRef; r != nil {
		claim = r.Namespace + "/" + r.Name
	}
	capacity := v.Spec.Capacity[corev1.ResourceStorage]
	phase := string(v.Status.Phase)
	if v.DeletionTimestamp != nil {
		phase = "Terminating"
	}
	return []any{v.Name, capacity.String(), accessModes(v.Spec.AccessModes), string(v.Spec.PersistentVolumeReclaimPolicy), phase,
		claim, v.Spec.StorageClassName, v.Status.Reason, age(v.CreationTimestamp), string(deref(v.Spec.VolumeMode))}
}

func claimCells(c *corev1.PersistentVolumeClaim) []any {
	phase, size, modes := string(c.Status.Phase), "", ""
	if c.DeletionTimestamp != nil {
		phase = "Terminating"
	}
	if c.Spec.VolumeName != "" {
		q := c.Status.Capacity[corev1.ResourceStorage]
		size, modes = q.String(), accessModes(c.Status.AccessModes)
	}
	return []any{c.Name, phase, c.Spec.VolumeName, size, modes, deref(c.Spec.StorageClassName), age(c.CreationTimestamp), string(deref(c.Spec.VolumeMode))}
}

func quotaUse(q *corev1.ResourceQuota) string {
	var out []string
	for name, hard := range q.Status.Hard {
		used := q.Status.Used[name]
		out = append(out, fmt.Sprintf("%s: %s/%s", name, used.String(), hard.String()))
	}
	return strings.Join(sorted(out), ", ")
}

func eventKind() *Kind {
	return &Kind{Version: "v1", Resource: "events", Short: []string{"ev"}, Object: &corev1.Event{}, List: &corev1.EventList{},
		TTL: eventTTL, CreateOnPut: true, Garbage: rest.Unsupported,
		Fields: eventFields,
		Print:  prints("Last Seen,Type,Reason,Object,Message|SubObject,Source,First Seen,Count#,Name", eventCells)}
}

func eventFields(obj runtime.Object) fields.Set {
	e := obj.(*corev1.Event)
	source := e.Source.Component
	if source == "" {
		source = e.ReportingController
	}
	return fields.Set{
		"involvedObject.kind": e.InvolvedObject.Kind, "involvedObject.namespace": e.InvolvedObject.Namespace,
		"involvedObject.name": e.InvolvedObject.Name, "involvedObject.uid": string(e.InvolvedObject.UID),
		"involvedObject.apiVersion": e.InvolvedObject.APIVersion, "involvedObject.resourceVersion": e.InvolvedObject.ResourceVersion,
		"involvedObject.fieldPath": e.InvolvedObject.FieldPath,
		"reason":                   e.Reason, "reportingComponent": e.ReportingController, "source": source, "type": e.Type,
	}
}

func eventCells(e *corev1.Event) []any {
	first, last, count := e.FirstTimestamp.Time, e.LastTimestamp.Time, e.Count
	if first.IsZero() {
		first = e.EventTime.Time
	}
	if last.IsZero() {
		last = first
	}
	if e.Series != nil {
		last, count = e.Series.LastObservedTime.Time, e.Series.Count
	}
	source := e.Source.Component
	if source == "" {
		source = e.ReportingController
	}
	if host := e.Source.Host; host != "" {
		source += ", " + host
	}
	target := strings.ToLower(e.InvolvedObject.Kind)
	if e.InvolvedObject.Name != "" {
		target += "/" + e.InvolvedObject.Name
	}
	return []any{ageOf(last), e.Type, e.Reason, target, strings.TrimSpace(e.Message), e.InvolvedObject.FieldPath, source, ageOf(first), int64(max(count, 1)), e.Name}
}
