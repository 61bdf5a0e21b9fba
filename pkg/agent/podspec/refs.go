package podspec

import (
	v1 "k8s.io/api/core/v1"

	"meshd.dev/pkg/agent/object"
)

// Refs are the secrets and config maps a pod refers to.
func Refs(pod *v1.Pod) []object.Ref {
	r := &refs{ns: pod.Namespace, seen: map[object.Ref]bool{}}
	for _, s := range pod.Spec.ImagePullSecrets {
		r.secret(s.Name)
	}
	for _, list := range [][]v1.Container{pod.Spec.InitContainers, pod.Spec.Containers} {
		for i := range list {
			r.container(&list[i])
		}
	}
	for i := range pod.Spec.Volumes {
		r.volume(&pod.Spec.Volumes[i])
	}
	return r.list
}

type refs struct {
	ns   string
	seen map[object.Ref]bool
	list []object.Ref
}

func (r *refs) add(kind, name string) {
	ref := object.Ref{Kind: kind, Namespace: r.ns, Name: name}
	if name != "" && !r.seen[ref] {
		r.seen[ref] = true
		r.list = append(r.list, ref)
	}
}

func (r *refs) secret(name string)    { r.add("secrets", name) }
func (r *refs) configMap(name string) { r.add("configmaps", name) }

func (r *refs) container(c *v1.Container) {
	for _, f := range c.EnvFrom {
		if f.SecretRef != nil {
			r.secret(f.SecretRef.Name)
		}
		if f.ConfigMapRef != nil {
			r.configMap(f.ConfigMapRef.Name)
		}
	}
	for _, e := range c.Env {
		if e.ValueFrom == nil {
			continue
		}
		if k := e.ValueFrom.SecretKeyRef; k != nil {
			r.secret(k.Name)
		}
		if k := e.ValueFrom.ConfigMapKeyRef; k != nil {
			r.configMap(k.Name)
		}
	}
}

func (r *refs) volume(v *v1.Volume) {
	switch {
	case v.Secret != nil:
		r.secret(v.Secret.SecretName)
	case v.ConfigMap != nil:
		r.configMap(v.ConfigMap.Name)
	case v.Projected != nil:
		for _, s := range v.Projected.Sources {
			if s.Secret != nil {
				r.secret(s.Secret.Name)
			}
			if s.ConfigMap != nil {
				r.configMap(s.ConfigMap.Name)
			}
		}
	}
}
