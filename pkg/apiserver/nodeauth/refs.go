package nodeauth

import corev1 "k8s.io/api/core/v1"

// refsOf collects the Secrets, ConfigMaps, claims and the service account a
// pod needs on its node. Volume kinds our agent does not know entitle to
// nothing.
func refsOf(pod *corev1.Pod) podRefs {
	p := podRefs{uid: pod.UID, serviceAccount: pod.Spec.ServiceAccountName}
	if pod.Status.Phase == corev1.PodSucceeded || pod.Status.Phase == corev1.PodFailed {
		return p
	}
	p.refs = map[ref]bool{}
	for _, s := range pod.Spec.ImagePullSecrets {
		p.add(secretRef, s.Name)
	}
	for i := range pod.Spec.Volumes {
		p.addVolume(pod.Name, &pod.Spec.Volumes[i])
	}
	for i := range pod.Spec.InitContainers {
		p.addEnv(pod.Spec.InitContainers[i].Env, pod.Spec.InitContainers[i].EnvFrom)
	}
	for i := range pod.Spec.Containers {
		p.addEnv(pod.Spec.Containers[i].Env, pod.Spec.Containers[i].EnvFrom)
	}
	for i := range pod.Spec.EphemeralContainers {
		p.addEnv(pod.Spec.EphemeralContainers[i].Env, pod.Spec.EphemeralContainers[i].EnvFrom)
	}
	return p
}

func (p podRefs) add(kind refKind, name string) {
	if name != "" {
		p.refs[ref{kind, name}] = true
	}
}

func (p podRefs) addVolume(podName string, v *corev1.Volume) {
	switch {
	case v.Secret != nil:
		p.add(secretRef, v.Secret.SecretName)
	case v.ConfigMap != nil:
		p.add(configMapRef, v.ConfigMap.Name)
	case v.PersistentVolumeClaim != nil:
		p.add(claimRef, v.PersistentVolumeClaim.ClaimName)
	case v.Ephemeral != nil:
		p.add(claimRef, podName+"-"+v.Name)
	case v.CSI != nil && v.CSI.NodePublishSecretRef != nil:
		p.add(secretRef, v.CSI.NodePublishSecretRef.Name)
	case v.Projected != nil:
		for _, s := range v.Projected.Sources {
			if s.Secret != nil {
				p.add(secretRef, s.Secret.Name)
			}
			if s.ConfigMap != nil {
				p.add(configMapRef, s.ConfigMap.Name)
			}
		}
	}
}

func (p podRefs) addEnv(env []corev1.EnvVar, from []corev1.EnvFromSource) {
	for _, e := range env {
		if e.ValueFrom == nil {
			continue
		}
		if s := e.ValueFrom.SecretKeyRef; s != nil {
			p.add(secretRef, s.Name)
		}
		if c := e.ValueFrom.ConfigMapKeyRef; c != nil {
			p.add(configMapRef, c.Name)
		}
	}
	for _, e := range from {
		if e.SecretRef != nil {
			p.add(secretRef, e.SecretRef.Name)
		}
		if e.ConfigMapRef != nil {
			p.add(configMapRef, e.ConfigMapRef.Name)
		}
	}
}
