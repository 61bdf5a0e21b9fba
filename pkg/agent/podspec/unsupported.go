// Package podspec says what a pod's spec means for the runtime: the sandbox
// and container configurations of CRI, the environment, the resolver's
// configuration; and which fields this agent cannot honour.
package podspec

import (
	"fmt"
	"strings"

	v1 "k8s.io/api/core/v1"
)

// Unsupported names every field of the spec that the agent cannot honour, and
// why; empty when it can run the pod.
func Unsupported(pod *v1.Pod) string {
	r := &refusal{}
	r.pod(&pod.Spec)
	for i := range pod.Spec.Volumes {
		r.volume(&pod.Spec.Volumes[i])
	}
	for i := range pod.Spec.InitContainers {
		r.container(fmt.Sprintf("spec.initContainers[%d]", i), &pod.Spec.InitContainers[i])
	}
	for i := range pod.Spec.Containers {
		r.container(fmt.Sprintf("spec.containers[%d]", i), &pod.Spec.Containers[i])
	}
	return strings.Join(r.texts, "; ")
}

type refusal struct{ texts []string }

func (r *refusal) when(bad bool, field, why string) {
	if bad {
		r.texts = append(r.texts, field+": "+why)
	}
}

func (r *refusal) pod(s *v1.PodSpec) {
	r.when(len(s.EphemeralContainers) > 0, "spec.ephemeralContainers", "ephemeral containers are not supported")
	r.when(len(s.ResourceClaims) > 0, "spec.resourceClaims", "dynamic resource allocation is not supported")
	r.when(s.OS != nil && s.OS.Name != v1.Linux, "spec.os.name", "only linux is supported")
	r.when(s.HostUsers != nil && !*s.HostUsers, "spec.hostUsers", "user namespaces are not supported")
	r.when(s.RuntimeClassName != nil && *s.RuntimeClassName != "", "spec.runtimeClassName", "runtime classes are not supported")
	r.when(s.Resources != nil && len(s.Resources.Limits)+len(s.Resources.Requests) > 0, "spec.resources", "pod-level resources are not supported; set them on containers")
	if sc := s.SecurityContext; sc != nil {
		r.when(sc.WindowsOptions != nil, "spec.securityContext.windowsOptions", "windows is not supported")
		r.when(sc.SupplementalGroupsPolicy != nil && *sc.SupplementalGroupsPolicy == v1.SupplementalGroupsPolicyStrict,
			"spec.securityContext.supplementalGroupsPolicy", "Strict is not supported")
	}
}

func (r *refusal) container(at string, c *v1.Container) {
	r.when(len(c.VolumeDevices) > 0, at+".volumeDevices", "block volumes are not supported")
	r.when(len(c.Resources.Claims) > 0, at+".resources.claims", "dynamic resource allocation is not supported")
	for name := range c.Resources.Limits {
		r.when(!knownResource(name), fmt.Sprintf("%s.resources.limits[%s]", at, name), "device plugins and huge pages are not supported")
	}
	for _, rule := range c.RestartPolicyRules {
		r.when(rule.Action != v1.ContainerRestartRuleActionRestart, at+".restartPolicyRules", fmt.Sprintf("action %s is not supported", rule.Action))
	}
	for i, e := range c.Env {
		r.when(e.ValueFrom != nil && e.ValueFrom.FileKeyRef != nil, fmt.Sprintf("%s.env[%d].valueFrom.fileKeyRef", at, i), "environment from files is not supported")
	}
	for i, m := range c.VolumeMounts {
		r.when(m.RecursiveReadOnly != nil && *m.RecursiveReadOnly == v1.RecursiveReadOnlyEnabled, fmt.Sprintf("%s.volumeMounts[%d].recursiveReadOnly", at, i), "Enabled is not supported")
		r.when(len(m.BindMountOptions) > 0, fmt.Sprintf("%s.volumeMounts[%d].bindMountOptions", at, i), "mount options are not supported")
	}
	r.when(c.Lifecycle != nil && c.Lifecycle.StopSignal != nil, at+".lifecycle.stopSignal", "set the stop signal in the image")
	if sc := c.SecurityContext; sc != nil {
		r.when(sc.WindowsOptions != nil, at+".securityContext.windowsOptions", "windows is not supported")
	}
}

func knownResource(name v1.ResourceName) bool {
	switch name {
	case v1.ResourceCPU, v1.ResourceMemory, v1.ResourceEphemeralStorage:
		return true
	}
	return false
}

func (r *refusal) volume(v *v1.Volume) {
	at := "spec.volumes[" + v.Name + "]"
	switch {
	case v.EmptyDir != nil:
		r.when(strings.HasPrefix(string(v.EmptyDir.Medium), "HugePages"), at+".emptyDir.medium", "huge pages are not supported")
	case v.Projected != nil:
		for i, s := range v.Projected.Sources {
			r.when(s.ClusterTrustBundle != nil, fmt.Sprintf("%s.projected.sources[%d].clusterTrustBundle", at, i), "cluster trust bundles are not supported")
			r.when(s.PodCertificate != nil, fmt.Sprintf("%s.projected.sources[%d].podCertificate", at, i), "pod certificates are not supported")
		}
	case v.HostPath != nil, v.ConfigMap != nil, v.Secret != nil, v.DownwardAPI != nil, v.PersistentVolumeClaim != nil:
	default:
		r.when(true, at, "this kind of volume is not supported; there are emptyDir, hostPath, configMap, secret, downwardAPI, projected and persistentVolumeClaim (of a hostPath or local volume)")
	}
}
