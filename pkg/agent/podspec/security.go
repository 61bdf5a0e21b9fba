package podspec

import (
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strconv"

	v1 "k8s.io/api/core/v1"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// What a container must not see or change of the kernel.
var (
	maskedPaths = []string{
		"/proc/asound", "/proc/acpi", "/proc/interrupts", "/proc/kcore", "/proc/keys", "/proc/latency_stats",
		"/proc/timer_list", "/proc/timer_stats", "/proc/sched_debug", "/proc/scsi",
		"/sys/firmware", "/sys/devices/virtual/powercap",
	}
	readonlyPaths = []string{"/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"}
)

// effective is the container's security context with the pod's for what it
// leaves open.
func effective(pod *v1.Pod, c *v1.Container) v1.SecurityContext {
	var sc v1.SecurityContext
	if c.SecurityContext != nil {
		sc = *c.SecurityContext
	}
	p := pod.Spec.SecurityContext
	if p == nil {
		return sc
	}
	if sc.RunAsUser == nil {
		sc.RunAsUser = p.RunAsUser
	}
	if sc.RunAsGroup == nil {
		sc.RunAsGroup = p.RunAsGroup
	}
	if sc.RunAsNonRoot == nil {
		sc.RunAsNonRoot = p.RunAsNonRoot
	}
	if sc.SeccompProfile == nil {
		sc.SeccompProfile = p.SeccompProfile
	}
	if sc.AppArmorProfile == nil {
		sc.AppArmorProfile = p.AppArmorProfile
	}
	if sc.SELinuxOptions == nil {
		sc.SELinuxOptions = p.SELinuxOptions
	}
	return sc
}

func security(pod *v1.Pod, c *v1.Container, seccompDir string) (*cri.LinuxContainerSecurityContext, error) {
	sc := effective(pod, c)
	out := &cri.LinuxContainerSecurityContext{
		NamespaceOptions: namespaces(pod),
		Privileged:       yes(sc.Privileged),
		ReadonlyRootfs:   yes(sc.ReadOnlyRootFilesystem),
		RunAsUser:        number(sc.RunAsUser),
		RunAsGroup:       number(sc.RunAsGroup),
		NoNewPrivs:       sc.AllowPrivilegeEscalation != nil && !*sc.AllowPrivilegeEscalation,
		SelinuxOptions:   selinux(sc.SELinuxOptions),
		Apparmor:         appArmor(sc.AppArmorProfile),
	}
	var err error
	if out.Seccomp, err = seccomp(sc.SeccompProfile, seccompDir); err != nil {
		return nil, err
	}
	if pod.Spec.SecurityContext != nil {
		out.SupplementalGroups = groups(pod.Spec.SecurityContext)
	}
	if sc.ProcMount == nil || *sc.ProcMount != v1.UnmaskedProcMount {
		out.MaskedPaths, out.ReadonlyPaths = maskedPaths, readonlyPaths
	}
	if sc.Capabilities != nil {
		out.Capabilities = &cri.Capability{}
		for _, k := range sc.Capabilities.Add {
			out.Capabilities.AddCapabilities = append(out.Capabilities.AddCapabilities, string(k))
		}
		for _, k := range sc.Capabilities.Drop {
			out.Capabilities.DropCapabilities = append(out.Capabilities.DropCapabilities, string(k))
		}
	}
	return out, nil
}

// UseImageUser completes the user from the image: CRI refuses a group without
// a user, and runAsNonRoot must be proved.
func UseImageUser(pod *v1.Pod, c *v1.Container, cfg *cri.ContainerConfig, image *cri.Image) error {
	sc := effective(pod, c)
	l := cfg.Linux.SecurityContext
	if l.RunAsUser == nil && l.RunAsGroup != nil {
		switch {
		case image.GetUsername() != "":
			l.RunAsUsername = image.Username
		default:
			l.RunAsUser = &cri.Int64Value{Value: image.GetUid().GetValue()}
		}
	}
	if !yes(sc.RunAsNonRoot) {
		return nil
	}
	switch {
	case sc.RunAsUser != nil && *sc.RunAsUser == 0:
		return errors.New("container's runAsUser breaks non-root policy")
	case sc.RunAsUser != nil:
		return nil
	case image.GetUsername() != "":
		if n, err := strconv.Atoi(image.Username); err == nil && n > 0 {
			return nil
		}
		return fmt.Errorf("container has runAsNonRoot and image has non-numeric user (%s), cannot verify user is non-root", image.Username)
	case image.GetUid().GetValue() == 0:
		return errors.New("container has runAsNonRoot and image will run as root")
	}
	return nil
}

func yes(b *bool) bool { return b != nil && *b }

func number(n *int64) *cri.Int64Value {
	if n == nil {
		return nil
	}
	return &cri.Int64Value{Value: *n}
}

func groups(sc *v1.PodSecurityContext) []int64 {
	out := slices.Clone(sc.SupplementalGroups)
	if sc.FSGroup != nil {
		out = append(out, *sc.FSGroup)
	}
	return out
}

func selinux(o *v1.SELinuxOptions) *cri.SELinuxOption {
	if o == nil {
		return nil
	}
	return &cri.SELinuxOption{User: o.User, Role: o.Role, Type: o.Type, Level: o.Level}
}

func seccomp(p *v1.SeccompProfile, dir string) (*cri.SecurityProfile, error) {
	out := &cri.SecurityProfile{ProfileType: cri.SecurityProfile_Unconfined}
	if p == nil {
		return out, nil
	}
	switch p.Type {
	case v1.SeccompProfileTypeRuntimeDefault:
		out.ProfileType = cri.SecurityProfile_RuntimeDefault
	case v1.SeccompProfileTypeLocalhost:
		if p.LocalhostProfile == nil || !filepath.IsLocal(*p.LocalhostProfile) {
			return nil, errors.New("seccompProfile of type Localhost names no file below " + dir)
		}
		out.ProfileType = cri.SecurityProfile_Localhost
		out.LocalhostRef = filepath.Join(dir, *p.LocalhostProfile)
	}
	return out, nil
}

func appArmor(p *v1.AppArmorProfile) *cri.SecurityProfile {
	if p == nil {
		return nil
	}
	out := &cri.SecurityProfile{}
	switch p.Type {
	case v1.AppArmorProfileTypeUnconfined:
		out.ProfileType = cri.SecurityProfile_Unconfined
	case v1.AppArmorProfileTypeLocalhost:
		out.ProfileType = cri.SecurityProfile_Localhost
		if p.LocalhostProfile != nil {
			out.LocalhostRef = *p.LocalhostProfile
		}
	}
	return out
}
