// Package volume makes the folders and files a pod mounts: empty ones, the
// host's, and those whose content comes from the API, which are replaced whole
// by one rename when the content changes.
package volume

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"
	v1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"

	"meshd.dev/pkg/agent/podspec"
	"meshd.dev/pkg/durable"
)

// Config of Volumes.
type Config struct {
	// Dir holds a folder a pod, named by its UID.
	Dir string
	// Objects are the config maps and secrets.
	Objects podspec.Objects
	// Token gets a service account token for the pod, and says when it ends.
	Token func(ctx context.Context, pod *v1.Pod, audience string, seconds int64) (string, error)
	// Claim finds the volume a claim is bound to.
	Claim func(ctx context.Context, namespace, name string) (*v1.PersistentVolume, error)
	Log   *slog.Logger
}

// Volumes of the pods of a node.
type Volumes struct{ cfg Config }

// New makes Volumes.
func New(cfg Config) *Volumes { return &Volumes{cfg: cfg} }

// Facts about the pod's place that its files may tell.
type Facts struct {
	Node   podspec.Node
	PodIPs []string
}

func (v *Volumes) podDir(uid types.UID) string { return filepath.Join(v.cfg.Dir, string(uid)) }

// Dir is the folder of a volume that is made here, such as an emptyDir.
func (v *Volumes) Dir(uid types.UID, name string) string { return v.dir(uid, name) }

// dir is the folder of a volume that this package makes itself.
func (v *Volumes) dir(uid types.UID, name string) string {
	return filepath.Join(v.podDir(uid), "volumes", name)
}

// Setup makes every volume of the pod be there, with the content it has to
// have now. It may be called again at any time. The time it returns is when it
// should be, for tokens end; zero for never.
func (v *Volumes) Setup(ctx context.Context, pod *v1.Pod, facts Facts) (time.Time, error) {
	var next time.Time
	var errs []error
	for i := range pod.Spec.Volumes {
		vol := &pod.Spec.Volumes[i]
		again, err := v.setup(ctx, pod, vol, facts)
		if err != nil {
			errs = append(errs, fmt.Errorf("volume %s: %w", vol.Name, err))
		}
		if !again.IsZero() && (next.IsZero() || again.Before(next)) {
			next = again
		}
	}
	return next, errors.Join(errs...)
}

func (v *Volumes) setup(ctx context.Context, pod *v1.Pod, vol *v1.Volume, facts Facts) (time.Time, error) {
	dir := v.dir(pod.UID, vol.Name)
	switch {
	case vol.EmptyDir != nil:
		return time.Time{}, v.emptyDir(pod, dir, vol.EmptyDir)
	case vol.HostPath != nil:
		return time.Time{}, hostPath(vol.HostPath)
	case vol.PersistentVolumeClaim != nil:
		_, err := v.claimed(ctx, pod, vol)
		return time.Time{}, err
	}
	files, next, err := v.content(ctx, pod, vol, facts, dir)
	if err != nil {
		return time.Time{}, err
	}
	if err := makeDir(dir); err != nil {
		return time.Time{}, err
	}
	if secretive(vol) {
		if err := mountTmpfs(dir, "mode=0755"); err != nil {
			return time.Time{}, err
		}
	}
	changed, err := replace(dir, files, fsGroup(pod))
	if err != nil {
		return time.Time{}, err
	}
	if changed {
		v.cfg.Log.Debug("volume written", "pod", pod.Name, "namespace", pod.Namespace, "volume", vol.Name)
	}
	return next, nil
}

// secretive volumes never touch a disk.
func secretive(vol *v1.Volume) bool { return vol.Secret != nil || vol.Projected != nil }

func fsGroup(pod *v1.Pod) *int64 {
	if pod.Spec.SecurityContext == nil {
		return nil
	}
	return pod.Spec.SecurityContext.FSGroup
}

func makeDir(dir string) error {
	if err := os.MkdirAll(filepath.Dir(dir), 0o750); err != nil {
		return err
	}
	if err := os.Mkdir(dir, 0o755); err != nil && !errors.Is(err, os.ErrExist) {
		return err
	}
	return nil
}

func (v *Volumes) emptyDir(pod *v1.Pod, dir string, e *v1.EmptyDirVolumeSource) error {
	if err := makeDir(dir); err != nil {
		return err
	}
	if e.Medium == v1.StorageMediumMemory {
		options := "mode=0777"
		if e.SizeLimit != nil && e.SizeLimit.Sign() > 0 {
			options += fmt.Sprintf(",size=%d", e.SizeLimit.Value())
		}
		if err := mountTmpfs(dir, options); err != nil {
			return err
		}
	}
	mode := os.FileMode(0o777)
	if g := fsGroup(pod); g != nil {
		mode |= os.ModeSetgid
		if err := os.Chown(dir, -1, int(*g)); err != nil {
			return err
		}
	}
	return os.Chmod(dir, mode)
}

func hostPath(h *v1.HostPathVolumeSource) error {
	kind := v1.HostPathUnset
	if h.Type != nil {
		kind = *h.Type
	}
	st, err := os.Stat(h.Path)
	switch {
	case kind == v1.HostPathUnset:
		return nil
	case errors.Is(err, os.ErrNotExist) && kind == v1.HostPathDirectoryOrCreate:
		return os.MkdirAll(h.Path, 0o755)
	case errors.Is(err, os.ErrNotExist) && kind == v1.HostPathFileOrCreate:
		f, err := os.OpenFile(h.Path, os.O_CREATE|os.O_WRONLY, 0o644)
		if err != nil {
			return err
		}
		return f.Close()
	case err != nil:
		return fmt.Errorf("hostPath type check failed: %w", err)
	}
	mode := st.Mode()
	ok := false
	switch kind {
	case v1.HostPathDirectory, v1.HostPathDirectoryOrCreate:
		ok = mode.IsDir()
	case v1.HostPathFile, v1.HostPathFileOrCreate:
		ok = mode.IsRegular()
	case v1.HostPathSocket:
		ok = mode&os.ModeSocket != 0
	case v1.HostPathCharDev:
		ok = mode&os.ModeCharDevice != 0
	case v1.HostPathBlockDev:
		ok = mode&os.ModeDevice != 0 && mode&os.ModeCharDevice == 0
	}
	if !ok {
		return fmt.Errorf("hostPath type check failed: %s is not a %s", h.Path, kind)
	}
	return nil
}

// claimed is the path of the volume a claim is bound to. A claim is bound once
// and for all, so what the API said is kept for the time it is away.
func (v *Volumes) claimed(ctx context.Context, pod *v1.Pod, vol *v1.Volume) (string, error) {
	note := filepath.Join(v.podDir(pod.UID), "claims", vol.Name)
	if b, err := os.ReadFile(note); err == nil && len(b) > 0 {
		return string(b), nil
	}
	claim := vol.PersistentVolumeClaim.ClaimName
	pv, err := v.cfg.Claim(ctx, pod.Namespace, claim)
	if err != nil {
		return "", err
	}
	path, err := local(pv)
	if err != nil {
		return "", fmt.Errorf("persistentVolumeClaim %s: %w", claim, err)
	}
	return path, durable.WriteFile(note, []byte(path), 0o600)
}

// local is the folder of a volume that lies on this machine.
func local(pv *v1.PersistentVolume) (string, error) {
	switch {
	case pv.Spec.Local != nil:
		if _, err := os.Stat(pv.Spec.Local.Path); err != nil {
			return "", fmt.Errorf("local volume %s: %w", pv.Name, err)
		}
		return pv.Spec.Local.Path, nil
	case pv.Spec.HostPath != nil:
		return pv.Spec.HostPath.Path, hostPath(pv.Spec.HostPath)
	}
	return "", fmt.Errorf("volume %s is neither hostPath nor local: not supported", pv.Name)
}

// path is where a volume lies on the host.
func (v *Volumes) path(ctx context.Context, pod *v1.Pod, vol *v1.Volume) (string, error) {
	switch {
	case vol.HostPath != nil:
		return vol.HostPath.Path, nil
	case vol.PersistentVolumeClaim != nil:
		return v.claimed(ctx, pod, vol)
	}
	return v.dir(pod.UID, vol.Name), nil
}

func mountTmpfs(dir, options string) error {
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err == nil && st.Type == unix.TMPFS_MAGIC && isMountPoint(dir) {
		return nil
	}
	if err := unix.Mount("tmpfs", dir, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV, options); err != nil {
		return fmt.Errorf("mount tmpfs on %s: %w", dir, err)
	}
	return nil
}

// MemoryDir makes dir a folder that never touches a disk, readable by root.
func MemoryDir(dir string) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	return mountTmpfs(dir, "mode=0700")
}

func isMountPoint(dir string) bool {
	var a, b unix.Stat_t
	if unix.Lstat(dir, &a) != nil || unix.Lstat(filepath.Dir(dir), &b) != nil {
		return false
	}
	return a.Dev != b.Dev
}

// Teardown removes everything this package made for the pod.
func (v *Volumes) Teardown(uid types.UID) error {
	if uid == "" || strings.ContainsAny(string(uid), "/") {
		return fmt.Errorf("tear down volumes: %q is no pod UID", uid)
	}
	dir := v.podDir(uid)
	mounts, err := mountsBelow(dir)
	if err != nil {
		return err
	}
	for _, m := range mounts {
		if err := unix.Unmount(m, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW); err != nil && !errors.Is(err, unix.EINVAL) {
			return fmt.Errorf("unmount %s: %w", m, err)
		}
	}
	if left, err := mountsBelow(dir); err != nil || len(left) > 0 {
		return errors.Join(err, fmt.Errorf("tear down volumes of pod %s: %d mounts are left", uid, len(left)))
	}
	if err := os.RemoveAll(dir); err != nil {
		return fmt.Errorf("tear down volumes of pod %s: %w", uid, err)
	}
	return nil
}

// mountsBelow are the mount points below dir, the deepest first.
func mountsBelow(dir string) ([]string, error) {
	b, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return nil, err
	}
	var out []string
	for line := range strings.Lines(string(b)) {
		fields := strings.Fields(line)
		if len(fields) < 5 {
			continue
		}
		if at := unescape(fields[4]); strings.HasPrefix(at, dir+"/") {
			out = append([]string{at}, out...)
		}
	}
	return out, nil
}

// unescape undoes the octal escapes of mountinfo.
func unescape(s string) string {
	return strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`).Replace(s)
}

// Pods are the pods that have a folder.
func (v *Volumes) Pods() ([]types.UID, error) {
	entries, err := os.ReadDir(v.cfg.Dir)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	var out []types.UID
	for _, e := range entries {
		if e.IsDir() {
			out = append(out, types.UID(e.Name()))
		}
	}
	return out, nil
}
