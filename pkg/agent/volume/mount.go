package volume

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"

	"golang.org/x/sys/unix"
	v1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"meshd.dev/pkg/agent/podspec"
)

// Mounts are those a container's spec asks for, besides /etc/hosts and the
// termination message.
func (v *Volumes) Mounts(ctx context.Context, pod *v1.Pod, c *v1.Container, env []podspec.EnvVar) ([]*cri.Mount, error) {
	var out []*cri.Mount
	for i, m := range c.VolumeMounts {
		mount, err := v.mount(ctx, pod, c, i, env)
		if err != nil {
			return nil, fmt.Errorf("mount %s of container %s: %w", m.MountPath, c.Name, err)
		}
		out = append(out, mount)
	}
	return out, nil
}

func (v *Volumes) mount(ctx context.Context, pod *v1.Pod, c *v1.Container, i int, env []podspec.EnvVar) (*cri.Mount, error) {
	m := c.VolumeMounts[i]
	vol := find(pod, m.Name)
	if vol == nil {
		return nil, fmt.Errorf("the pod has no volume %q", m.Name)
	}
	host, err := v.path(ctx, pod, vol)
	if err != nil {
		return nil, err
	}
	sub := m.SubPath
	if m.SubPathExpr != "" {
		if sub, err = podspec.ExpandSubPath(m.SubPathExpr, env); err != nil {
			return nil, err
		}
	}
	if sub != "" {
		at := filepath.Join(v.podDir(pod.UID), "subpaths", c.Name, strconv.Itoa(i))
		if err := bindSubPath(host, sub, at, fsGroup(pod)); err != nil {
			return nil, err
		}
		host = at
	}
	target := m.MountPath
	if !filepath.IsAbs(target) {
		target = "/" + target
	}
	readOnly := m.ReadOnly || vol.PersistentVolumeClaim != nil && vol.PersistentVolumeClaim.ReadOnly || apiContent(vol)
	out := &cri.Mount{ContainerPath: target, HostPath: host, Readonly: readOnly}
	if m.MountPropagation != nil {
		switch *m.MountPropagation {
		case v1.MountPropagationHostToContainer:
			out.Propagation = cri.MountPropagation_PROPAGATION_HOST_TO_CONTAINER
		case v1.MountPropagationBidirectional:
			out.Propagation = cri.MountPropagation_PROPAGATION_BIDIRECTIONAL
		}
	}
	return out, nil
}

func apiContent(vol *v1.Volume) bool {
	return vol.ConfigMap != nil || vol.Secret != nil || vol.Projected != nil || vol.DownwardAPI != nil
}

func find(pod *v1.Pod, name string) *v1.Volume {
	for i := range pod.Spec.Volumes {
		if pod.Spec.Volumes[i].Name == name {
			return &pod.Spec.Volumes[i]
		}
	}
	return nil
}

// bindSubPath binds volume/sub to at. The pod may change its volume at any
// time, and point it anywhere, so the way down is walked by descriptors that
// cannot leave the volume.
func bindSubPath(volume, sub, at string, group *int64) error {
	root, err := os.OpenRoot(volume)
	if err != nil {
		return err
	}
	defer root.Close()
	if _, err := root.Stat(sub); errors.Is(err, os.ErrNotExist) {
		if err := root.MkdirAll(sub, 0o755); err != nil {
			return fmt.Errorf("make subPath %q: %w", sub, err)
		}
		if group != nil {
			_ = root.Chown(sub, -1, int(*group))
			_ = root.Chmod(sub, 0o775|os.ModeSetgid)
		}
	}
	// What the pod put there may be a pipe that nobody writes.
	f, err := root.OpenFile(sub, os.O_RDONLY|unix.O_NONBLOCK|unix.O_NOCTTY, 0)
	if err != nil {
		return fmt.Errorf("open subPath %q: %w", sub, err)
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return err
	}
	if err := makeTarget(at, st.IsDir()); err != nil {
		return err
	}
	if err := unix.Mount(fmt.Sprintf("/proc/self/fd/%d", f.Fd()), at, "", unix.MS_BIND|unix.MS_REC, ""); err != nil {
		return fmt.Errorf("bind subPath %q: %w", sub, err)
	}
	return nil
}

// makeTarget makes an empty mount point, taking away what an earlier run left.
func makeTarget(at string, dir bool) error {
	for unix.Unmount(at, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW) == nil {
	}
	if err := os.Remove(at); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	if dir {
		return os.MkdirAll(at, 0o750)
	}
	if err := os.MkdirAll(filepath.Dir(at), 0o750); err != nil {
		return err
	}
	f, err := os.OpenFile(at, os.O_CREATE|os.O_WRONLY, 0o640)
	if err != nil {
		return err
	}
	return f.Close()
}

// Hosts writes the pod's /etc/hosts and returns its path. The file is written
// in place, for containers have it mounted.
func (v *Volumes) Hosts(uid types.UID, text []byte) (string, error) {
	path := filepath.Join(v.podDir(uid), "etc-hosts")
	if old, err := os.ReadFile(path); err == nil && string(old) == string(text) {
		return path, nil
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o750); err != nil {
		return "", err
	}
	return path, os.WriteFile(path, text, 0o644)
}

// MessageFile makes the file a run of a container may leave its last words in.
func (v *Volumes) MessageFile(uid types.UID, container string, attempt int) (string, error) {
	path := filepath.Join(v.podDir(uid), "containers", container, strconv.Itoa(attempt))
	if err := os.MkdirAll(filepath.Dir(path), 0o750); err != nil {
		return "", err
	}
	if err := os.WriteFile(path, nil, 0o666); err != nil {
		return "", err
	}
	_ = os.Remove(filepath.Join(filepath.Dir(path), strconv.Itoa(attempt-3)))
	return path, os.Chmod(path, 0o666)
}
