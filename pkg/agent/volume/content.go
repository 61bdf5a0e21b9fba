package volume

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"time"

	v1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"

	"meshd.dev/pkg/agent/podspec"
)

// file of a volume whose content comes from the API.
type file struct {
	data []byte
	mode os.FileMode
	// user owns the file when not nil.
	user *int64
}

// content is what a volume has to hold, by path below it.
func (v *Volumes) content(ctx context.Context, pod *v1.Pod, vol *v1.Volume, facts Facts, dir string) (map[string]file, time.Time, error) {
	g := &gathering{v: v, ctx: ctx, pod: pod, facts: facts, dir: dir, files: map[string]file{}}
	var err error
	switch {
	case vol.ConfigMap != nil:
		s := vol.ConfigMap
		g.mode = mode(s.DefaultMode)
		err = g.configMap(s.Name, s.Items, s.Optional)
	case vol.Secret != nil:
		s := vol.Secret
		g.mode = mode(s.DefaultMode)
		err = g.secret(s.SecretName, s.Items, s.Optional)
	case vol.DownwardAPI != nil:
		g.mode = mode(vol.DownwardAPI.DefaultMode)
		err = g.downward(vol.DownwardAPI.Items)
	case vol.Projected != nil:
		g.mode = mode(vol.Projected.DefaultMode)
		for _, s := range vol.Projected.Sources {
			if err = g.projection(s); err != nil {
				break
			}
		}
	default:
		err = fmt.Errorf("this kind of volume is not supported")
	}
	return g.files, g.next, err
}

func mode(m *int32) os.FileMode {
	if m == nil {
		return 0o644
	}
	return os.FileMode(*m) & 0o777
}

type gathering struct {
	v     *Volumes
	ctx   context.Context
	pod   *v1.Pod
	facts Facts
	dir   string
	mode  os.FileMode
	files map[string]file
	next  time.Time
}

func (g *gathering) put(path string, data []byte, m *int32) error {
	if !filepath.IsLocal(path) {
		return fmt.Errorf("path %q leaves the volume", path)
	}
	f := file{data: data, mode: g.mode}
	if m != nil {
		f.mode = mode(m)
	}
	g.files[filepath.Clean(path)] = f
	return nil
}

func (g *gathering) projection(s v1.VolumeProjection) error {
	switch {
	case s.ConfigMap != nil:
		return g.configMap(s.ConfigMap.Name, s.ConfigMap.Items, s.ConfigMap.Optional)
	case s.Secret != nil:
		return g.secret(s.Secret.Name, s.Secret.Items, s.Secret.Optional)
	case s.DownwardAPI != nil:
		return g.downward(s.DownwardAPI.Items)
	case s.ServiceAccountToken != nil:
		return g.token(s.ServiceAccountToken)
	}
	return fmt.Errorf("a projected source is of a kind that is not supported")
}

func (g *gathering) configMap(name string, items []v1.KeyToPath, optional *bool) error {
	cm, err := g.v.cfg.Objects.ConfigMap(g.pod.Namespace, name)
	if err != nil {
		return absent(err, optional)
	}
	data := map[string][]byte{}
	for k, s := range cm.Data {
		data[k] = []byte(s)
	}
	for k, b := range cm.BinaryData {
		data[k] = b
	}
	return g.keys("configmap", name, data, items, optional)
}

func (g *gathering) secret(name string, items []v1.KeyToPath, optional *bool) error {
	s, err := g.v.cfg.Objects.Secret(g.pod.Namespace, name)
	if err != nil {
		return absent(err, optional)
	}
	return g.keys("secret", name, s.Data, items, optional)
}

func absent(err error, optional *bool) error {
	if apierrors.IsNotFound(err) && optional != nil && *optional {
		return nil
	}
	return err
}

func (g *gathering) keys(kind, name string, data map[string][]byte, items []v1.KeyToPath, optional *bool) error {
	if items == nil {
		for k, b := range data {
			if err := g.put(k, b, nil); err != nil {
				return err
			}
		}
		return nil
	}
	for _, it := range items {
		b, ok := data[it.Key]
		if !ok {
			if optional != nil && *optional {
				continue
			}
			return fmt.Errorf("%s %s/%s has no key %q", kind, g.pod.Namespace, name, it.Key)
		}
		if err := g.put(it.Path, b, it.Mode); err != nil {
			return err
		}
	}
	return nil
}

func (g *gathering) downward(items []v1.DownwardAPIVolumeFile) error {
	for _, it := range items {
		var text string
		var err error
		if it.FieldRef != nil {
			text, err = podspec.Field(g.pod, it.FieldRef.FieldPath, g.facts.Node, g.facts.PodIPs)
		} else if it.ResourceFieldRef != nil {
			text, err = podspec.Resource(podspec.Find(g.pod, it.ResourceFieldRef.ContainerName), it.ResourceFieldRef, g.facts.Node)
		}
		if err != nil {
			return err
		}
		if err := g.put(it.Path, []byte(text), it.Mode); err != nil {
			return err
		}
	}
	return nil
}

// token keeps the one that is there while it is young.
func (g *gathering) token(s *v1.ServiceAccountTokenProjection) error {
	seconds := int64(3600)
	if s.ExpirationSeconds != nil {
		seconds = *s.ExpirationSeconds
	}
	path := s.Path
	if !filepath.IsLocal(path) {
		return fmt.Errorf("path %q leaves the volume", path)
	}
	old, _ := os.ReadFile(filepath.Join(g.dir, path))
	token := string(old)
	refresh, valid := tokenTimes(token)
	now := time.Now()
	if now.After(refresh) {
		fresh, err := g.v.cfg.Token(g.ctx, g.pod, s.Audience, seconds)
		switch {
		case err == nil:
			token = fresh
			if refresh, _ = tokenTimes(token); refresh.IsZero() {
				refresh = now.Add(time.Duration(seconds) * time.Second * 8 / 10)
			}
		case now.Before(valid):
			refresh = now.Add(30 * time.Second) // the old one still serves
		default:
			return fmt.Errorf("get service account token: %w", err)
		}
	}
	if g.next.IsZero() || refresh.Before(g.next) {
		g.next = refresh
	}
	f := file{data: []byte(token), mode: g.mode, user: soleUser(g.pod)}
	switch {
	case fsGroup(g.pod) != nil:
		f.mode, f.user = 0o600, nil
	case f.user != nil:
		f.mode = 0o600
	}
	g.files[filepath.Clean(path)] = f
	return nil
}

// soleUser is the user all containers run as, nil when they do not say or
// differ.
func soleUser(pod *v1.Pod) *int64 {
	var user *int64
	for _, list := range [][]v1.Container{pod.Spec.InitContainers, pod.Spec.Containers} {
		for _, c := range list {
			var u *int64
			if pod.Spec.SecurityContext != nil {
				u = pod.Spec.SecurityContext.RunAsUser
			}
			if c.SecurityContext != nil && c.SecurityContext.RunAsUser != nil {
				u = c.SecurityContext.RunAsUser
			}
			if u == nil || user != nil && *user != *u {
				return nil
			}
			user = u
		}
	}
	return user
}
