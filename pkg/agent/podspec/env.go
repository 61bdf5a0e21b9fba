package podspec

import (
	"fmt"
	"math"
	"strconv"
	"strings"

	v1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/resource"
	"k8s.io/apimachinery/pkg/util/validation"
)

// Objects are the config maps and secrets a pod refers to. An error for which
// errors.IsNotFound holds means that the object does not exist.
type Objects interface {
	Secret(namespace, name string) (*v1.Secret, error)
	ConfigMap(namespace, name string) (*v1.ConfigMap, error)
}

// Node is what a spec may ask about the node.
type Node struct {
	IPs []string
	// Allocatable stands in for limits that are not set.
	Allocatable v1.ResourceList
}

// EnvVar is one variable, in the order they are given to the container.
type EnvVar struct{ Name, Value string }

// Env resolves the environment of a container.
func Env(pod *v1.Pod, c *v1.Container, node Node, podIPs []string, objects Objects) ([]EnvVar, error) {
	e := &environment{index: map[string]int{}}
	for _, from := range c.EnvFrom {
		if err := e.from(pod, from, objects); err != nil {
			return nil, err
		}
	}
	for _, v := range c.Env {
		if v.ValueFrom == nil {
			e.set(v.Name, Expand(v.Value, e.lookup))
			continue
		}
		value, ok, err := valueFrom(pod, c, v.ValueFrom, node, podIPs, objects)
		if err != nil {
			return nil, fmt.Errorf("environment variable %s: %w", v.Name, err)
		}
		if ok {
			e.set(v.Name, value)
		}
	}
	return e.vars, nil
}

type environment struct {
	vars  []EnvVar
	index map[string]int
}

func (e *environment) set(name, value string) {
	if i, ok := e.index[name]; ok {
		e.vars[i].Value = value
		return
	}
	e.index[name] = len(e.vars)
	e.vars = append(e.vars, EnvVar{name, value})
}

func (e *environment) lookup(name string) (string, bool) {
	i, ok := e.index[name]
	if !ok {
		return "", false
	}
	return e.vars[i].Value, true
}

func (e *environment) from(pod *v1.Pod, from v1.EnvFromSource, objects Objects) error {
	data := map[string]string{}
	switch {
	case from.ConfigMapRef != nil:
		cm, err := objects.ConfigMap(pod.Namespace, from.ConfigMapRef.Name)
		if err != nil {
			return optional(err, from.ConfigMapRef.Optional)
		}
		data = cm.Data
	case from.SecretRef != nil:
		s, err := objects.Secret(pod.Namespace, from.SecretRef.Name)
		if err != nil {
			return optional(err, from.SecretRef.Optional)
		}
		for k, v := range s.Data {
			data[k] = string(v)
		}
	}
	for _, k := range sortedKeys(data) {
		if len(validation.IsEnvVarName(from.Prefix+k)) == 0 {
			e.set(from.Prefix+k, data[k])
		}
	}
	return nil
}

// optional swallows the absence of what need not be there.
func optional(err error, may *bool) error {
	if errors.IsNotFound(err) && may != nil && *may {
		return nil
	}
	return err
}

func valueFrom(pod *v1.Pod, c *v1.Container, src *v1.EnvVarSource, node Node, podIPs []string, objects Objects) (string, bool, error) {
	switch {
	case src.FieldRef != nil:
		v, err := Field(pod, src.FieldRef.FieldPath, node, podIPs)
		return v, true, err
	case src.ResourceFieldRef != nil:
		of := c
		if src.ResourceFieldRef.ContainerName != "" {
			of = Find(pod, src.ResourceFieldRef.ContainerName)
		}
		v, err := Resource(of, src.ResourceFieldRef, node)
		return v, true, err
	case src.ConfigMapKeyRef != nil:
		ref := src.ConfigMapKeyRef
		cm, err := objects.ConfigMap(pod.Namespace, ref.Name)
		if err != nil {
			return "", false, optional(err, ref.Optional)
		}
		if v, ok := cm.Data[ref.Key]; ok {
			return v, true, nil
		}
		return "", false, missingKey(ref.Key, "configmap", pod.Namespace, ref.Name, ref.Optional)
	case src.SecretKeyRef != nil:
		ref := src.SecretKeyRef
		s, err := objects.Secret(pod.Namespace, ref.Name)
		if err != nil {
			return "", false, optional(err, ref.Optional)
		}
		if v, ok := s.Data[ref.Key]; ok {
			return string(v), true, nil
		}
		return "", false, missingKey(ref.Key, "secret", pod.Namespace, ref.Name, ref.Optional)
	}
	return "", false, fmt.Errorf("valueFrom names no source this agent knows")
}

func missingKey(key, kind, ns, name string, may *bool) error {
	if may != nil && *may {
		return nil
	}
	return fmt.Errorf("key %q is not in %s %s/%s", key, kind, ns, name)
}

// Find is the container of that name, or nil.
func Find(pod *v1.Pod, name string) *v1.Container {
	for i := range pod.Spec.InitContainers {
		if pod.Spec.InitContainers[i].Name == name {
			return &pod.Spec.InitContainers[i]
		}
	}
	for i := range pod.Spec.Containers {
		if pod.Spec.Containers[i].Name == name {
			return &pod.Spec.Containers[i]
		}
	}
	return nil
}

// Field is the value of a downward API field path.
func Field(pod *v1.Pod, path string, node Node, podIPs []string) (string, error) {
	if base, key, ok := subscript(path); ok {
		switch base {
		case "metadata.labels":
			return pod.Labels[key], nil
		case "metadata.annotations":
			return pod.Annotations[key], nil
		}
	}
	switch path {
	case "metadata.name":
		return pod.Name, nil
	case "metadata.namespace":
		return pod.Namespace, nil
	case "metadata.uid":
		return string(pod.UID), nil
	case "metadata.labels":
		return quoted(pod.Labels), nil
	case "metadata.annotations":
		return quoted(pod.Annotations), nil
	case "spec.nodeName":
		return pod.Spec.NodeName, nil
	case "spec.serviceAccountName":
		return pod.Spec.ServiceAccountName, nil
	case "status.hostIP":
		return first(node.IPs), nil
	case "status.hostIPs":
		return strings.Join(node.IPs, ","), nil
	case "status.podIP":
		return first(podIPs), nil
	case "status.podIPs":
		return strings.Join(podIPs, ","), nil
	}
	return "", fmt.Errorf("field path %q is not supported", path)
}

func first(s []string) string {
	if len(s) == 0 {
		return ""
	}
	return s[0]
}

// subscript splits metadata.labels['key'].
func subscript(path string) (base, key string, ok bool) {
	base, rest, ok := strings.Cut(path, "['")
	if !ok || !strings.HasSuffix(rest, "']") {
		return "", "", false
	}
	return base, strings.TrimSuffix(rest, "']"), true
}

// quoted is the format of labels and annotations in downward API files.
func quoted(m map[string]string) string {
	var b strings.Builder
	for i, k := range sortedKeys(m) {
		if i > 0 {
			b.WriteByte('\n')
		}
		fmt.Fprintf(&b, "%s=%s", k, strconv.Quote(m[k]))
	}
	return b.String()
}

// Resource is the value of a downward API resource field of container c.
func Resource(c *v1.Container, ref *v1.ResourceFieldSelector, node Node) (string, error) {
	if c == nil {
		return "", fmt.Errorf("container %q of resource %s does not exist", ref.ContainerName, ref.Resource)
	}
	kind, name, _ := strings.Cut(ref.Resource, ".")
	var q resource.Quantity
	var ok bool
	switch kind {
	case "limits":
		if q, ok = c.Resources.Limits[v1.ResourceName(name)]; !ok {
			q = node.Allocatable[v1.ResourceName(name)]
		}
	case "requests":
		if q, ok = c.Resources.Requests[v1.ResourceName(name)]; !ok {
			q = c.Resources.Limits[v1.ResourceName(name)]
		}
	default:
		return "", fmt.Errorf("resource %q is not supported", ref.Resource)
	}
	value, divisor := q.Value(), ref.Divisor.Value()
	if name == string(v1.ResourceCPU) {
		value, divisor = q.MilliValue(), ref.Divisor.MilliValue()
		if divisor == 0 {
			divisor = 1000
		}
	}
	if divisor == 0 {
		divisor = 1
	}
	return strconv.FormatInt(int64(math.Ceil(float64(value)/float64(divisor))), 10), nil
}

// Expand replaces $(NAME) by the variable's value, and $$ by $. A reference to
// a variable that is not there stays as it is.
func Expand(s string, lookup func(string) (string, bool)) string {
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		if s[i] != '$' || i+1 == len(s) {
			b.WriteByte(s[i])
			continue
		}
		switch s[i+1] {
		case '$':
			b.WriteByte('$')
			i++
		case '(':
			end := strings.IndexByte(s[i:], ')')
			if end < 0 {
				b.WriteString(s[i:])
				return b.String()
			}
			ref := s[i : i+end+1]
			if v, ok := lookup(ref[2 : len(ref)-1]); ok {
				b.WriteString(v)
			} else {
				b.WriteString(ref)
			}
			i += end
		default:
			b.WriteByte('$')
		}
	}
	return b.String()
}
