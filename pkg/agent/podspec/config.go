package podspec

import (
	"fmt"
	"path/filepath"
	"strconv"
	"time"

	v1 "k8s.io/api/core/v1"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"meshd.dev/pkg/agent/runtime"
)

// LogDir is the folder of a pod's logs below root, as the kubelet names it.
func LogDir(root string, pod *v1.Pod) string {
	return filepath.Join(root, pod.Namespace+"_"+pod.Name+"_"+string(pod.UID))
}

// LogPath is the log of one run of a container, below LogDir.
func LogPath(container string, attempt int) string {
	return filepath.Join(container, strconv.Itoa(attempt)+".log")
}

// Sandbox is the configuration of a pod's sandbox.
func Sandbox(pod *v1.Pod, attempt uint32, hostname string, dns *cri.DNSConfig, logRoot string) *cri.PodSandboxConfig {
	cfg := &cri.PodSandboxConfig{
		Metadata:     &cri.PodSandboxMetadata{Name: pod.Name, Namespace: pod.Namespace, Uid: string(pod.UID), Attempt: attempt},
		Hostname:     hostname,
		LogDirectory: LogDir(logRoot, pod),
		DnsConfig:    dns,
		PortMappings: portMappings(pod),
		Labels:       podLabels(pod),
		Annotations:  pod.Annotations,
		Linux: &cri.LinuxPodSandboxConfig{
			SecurityContext: &cri.LinuxSandboxSecurityContext{
				NamespaceOptions: namespaces(pod),
				Privileged:       anyPrivileged(pod),
				Seccomp:          &cri.SecurityProfile{ProfileType: cri.SecurityProfile_RuntimeDefault},
			},
		},
	}
	if pod.Spec.HostNetwork {
		cfg.Hostname = ""
	}
	sc := pod.Spec.SecurityContext
	if sc == nil {
		return cfg
	}
	l := cfg.Linux.SecurityContext
	l.RunAsUser, l.RunAsGroup = number(sc.RunAsUser), number(sc.RunAsGroup)
	if l.RunAsUser == nil {
		l.RunAsGroup = nil // CRI refuses a group without a user
	}
	l.SupplementalGroups = groups(sc)
	l.SelinuxOptions = selinux(sc.SELinuxOptions)
	if len(sc.Sysctls) > 0 {
		cfg.Linux.Sysctls = map[string]string{}
	}
	for _, s := range sc.Sysctls {
		cfg.Linux.Sysctls[s.Name] = s.Value
	}
	return cfg
}

func podLabels(pod *v1.Pod) map[string]string {
	labels := map[string]string{}
	for k, v := range pod.Labels {
		labels[k] = v
	}
	labels[runtime.LabelPodName] = pod.Name
	labels[runtime.LabelPodNamespace] = pod.Namespace
	labels[runtime.LabelPodUID] = string(pod.UID)
	return labels
}

func portMappings(pod *v1.Pod) []*cri.PortMapping {
	if pod.Spec.HostNetwork {
		return nil
	}
	var out []*cri.PortMapping
	for _, list := range [][]v1.Container{pod.Spec.InitContainers, pod.Spec.Containers} {
		for _, c := range list {
			for _, p := range c.Ports {
				if p.HostPort == 0 {
					continue
				}
				m := &cri.PortMapping{ContainerPort: p.ContainerPort, HostPort: p.HostPort, HostIp: p.HostIP}
				switch p.Protocol {
				case v1.ProtocolUDP:
					m.Protocol = cri.Protocol_UDP
				case v1.ProtocolSCTP:
					m.Protocol = cri.Protocol_SCTP
				}
				out = append(out, m)
			}
		}
	}
	return out
}

func namespaces(pod *v1.Pod) *cri.NamespaceOption {
	n := &cri.NamespaceOption{Pid: cri.NamespaceMode_CONTAINER}
	if pod.Spec.ShareProcessNamespace != nil && *pod.Spec.ShareProcessNamespace {
		n.Pid = cri.NamespaceMode_POD
	}
	if pod.Spec.HostPID {
		n.Pid = cri.NamespaceMode_NODE
	}
	if pod.Spec.HostNetwork {
		n.Network = cri.NamespaceMode_NODE
	}
	if pod.Spec.HostIPC {
		n.Ipc = cri.NamespaceMode_NODE
	}
	return n
}

func anyPrivileged(pod *v1.Pod) bool {
	for _, list := range [][]v1.Container{pod.Spec.InitContainers, pod.Spec.Containers} {
		for _, c := range list {
			if c.SecurityContext != nil && c.SecurityContext.Privileged != nil && *c.SecurityContext.Privileged {
				return true
			}
		}
	}
	return false
}

// Run is one run of a container: what its configuration needs beyond the spec.
type Run struct {
	Attempt int
	Backoff time.Duration
	Env     []EnvVar
	Mounts  []*cri.Mount
	// Image is what the runtime runs; it may be more precise than the spec's.
	Image string
	// MessageFile is where the container's termination message lies on the
	// host.
	MessageFile string
	// SeccompDir holds profiles of type Localhost.
	SeccompDir string
	// NodeMemory in bytes and OOMFloor, the lowest oom_score_adj the agent may
	// ask for.
	NodeMemory, OOMFloor int64
}

// Container is the configuration of a container.
func Container(pod *v1.Pod, c *v1.Container, run Run) (*cri.ContainerConfig, error) {
	security, err := security(pod, c, run.SeccompDir)
	if err != nil {
		return nil, err
	}
	lookup := lookupIn(run.Env)
	cfg := &cri.ContainerConfig{
		Metadata:   &cri.ContainerMetadata{Name: c.Name, Attempt: uint32(run.Attempt)},
		Image:      &cri.ImageSpec{Image: run.Image, UserSpecifiedImage: c.Image},
		Command:    expandAll(c.Command, lookup),
		Args:       expandAll(c.Args, lookup),
		WorkingDir: c.WorkingDir,
		Mounts:     run.Mounts,
		Labels: map[string]string{
			runtime.LabelPodName: pod.Name, runtime.LabelPodNamespace: pod.Namespace,
			runtime.LabelPodUID: string(pod.UID), runtime.LabelContainerName: c.Name,
		},
		Annotations: map[string]string{
			runtime.AnnotationHash:        Hash(c),
			runtime.AnnotationRestarts:    strconv.Itoa(run.Attempt),
			runtime.AnnotationMessagePath: c.TerminationMessagePath,
			runtime.AnnotationMessageFrom: string(c.TerminationMessagePolicy),
			runtime.AnnotationMessageFile: run.MessageFile,
			runtime.AnnotationBackoff:     run.Backoff.String(),
		},
		LogPath:   LogPath(c.Name, run.Attempt),
		Stdin:     c.Stdin,
		StdinOnce: c.StdinOnce,
		Tty:       c.TTY,
		Linux: &cri.LinuxContainerConfig{
			Resources:       linuxResources(pod, c, run.NodeMemory, run.OOMFloor),
			SecurityContext: security,
		},
	}
	for _, e := range run.Env {
		cfg.Envs = append(cfg.Envs, &cri.KeyValue{Key: e.Name, Value: []byte(e.Value)})
	}
	return cfg, nil
}

func lookupIn(env []EnvVar) func(string) (string, bool) {
	m := make(map[string]string, len(env))
	for _, e := range env {
		m[e.Name] = e.Value
	}
	return func(name string) (string, bool) { v, ok := m[name]; return v, ok }
}

func expandAll(list []string, lookup func(string) (string, bool)) []string {
	var out []string
	for _, s := range list {
		out = append(out, Expand(s, lookup))
	}
	return out
}

// ExpandSubPath is a subPathExpr with its variables; one that is missing is an
// error, for an empty path would mean the whole volume.
func ExpandSubPath(expr string, env []EnvVar) (string, error) {
	var missing string
	lookup := lookupIn(env)
	out := Expand(expr, func(name string) (string, bool) {
		v, ok := lookup(name)
		if !ok {
			missing = name
		}
		return v, ok
	})
	if missing != "" {
		return "", fmt.Errorf("subPathExpr %q: there is no variable %s", expr, missing)
	}
	return out, nil
}
