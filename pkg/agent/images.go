package agent

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"time"

	v1 "k8s.io/api/core/v1"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"meshd.dev/pkg/agent/plan"
	"meshd.dev/pkg/agent/podspec"
)

// ensureImage has the image there as the pull policy wants it. One that is
// there already is not asked for anywhere, unless the policy is Always.
func (w *worker) ensureImage(ctx context.Context, pod *v1.Pod, c *v1.Container, sandbox *cri.PodSandboxConfig) (*cri.Image, error) {
	name := strings.TrimSpace(c.Image)
	if name == "" {
		return nil, &failure{"InvalidImageName", errors.New("the image has no name")}
	}
	image, err := w.a.rt.Image(ctx, name)
	if err != nil {
		return nil, &failure{"ImageInspectError", err}
	}
	switch {
	case image != nil && c.ImagePullPolicy != v1.PullAlways:
		w.a.event(pod, c.Name, v1.EventTypeNormal, "Pulled", fmt.Sprintf("Container image %q already present on machine", name))
		return image, nil
	case c.ImagePullPolicy == v1.PullNever:
		err := fmt.Errorf("container image %q is not present with pull policy of Never", name)
		w.a.event(pod, c.Name, v1.EventTypeWarning, "ErrImageNeverPull", err.Error())
		return nil, &failure{"ErrImageNeverPull", err}
	}
	return w.pull(ctx, pod, c, name, sandbox)
}

func (w *worker) pull(ctx context.Context, pod *v1.Pod, c *v1.Container, name string, sandbox *cri.PodSandboxConfig) (*cri.Image, error) {
	begin := time.Now()
	w.a.event(pod, c.Name, v1.EventTypeNormal, "Pulling", fmt.Sprintf("Pulling image %q", name))
	var last error
	for _, auth := range append(w.credentials(pod, name), nil) {
		ref, err := w.a.rt.Pull(ctx, name, auth, sandbox)
		if err != nil {
			last = err
			continue
		}
		w.a.event(pod, c.Name, v1.EventTypeNormal, "Pulled", fmt.Sprintf("Successfully pulled image %q in %v", name, time.Since(begin).Round(time.Millisecond)))
		image, err := w.a.rt.Image(ctx, name)
		if err != nil || image == nil {
			image = &cri.Image{Id: ref}
		}
		if err := w.a.pulled.add(image.Id); err != nil {
			w.a.cfg.Log.Warn("remember pulled image", "image", name, "err", err)
		}
		return image, nil
	}
	if ctx.Err() == nil {
		w.a.event(pod, c.Name, v1.EventTypeWarning, "Failed", fmt.Sprintf("Failed to pull image %q: %v", name, last))
		w.a.event(pod, c.Name, v1.EventTypeNormal, "BackOff", fmt.Sprintf("Back-off pulling image %q", name))
	}
	return nil, &failure{plan.ErrImagePull, last}
}

// credentials are those of the pod's pull secrets that fit the image, the
// most precise first.
func (w *worker) credentials(pod *v1.Pod, image string) []*cri.AuthConfig {
	var out []*cri.AuthConfig
	for _, ref := range pod.Spec.ImagePullSecrets {
		s, err := w.a.objects.Secret(pod.Namespace, ref.Name)
		if err != nil {
			w.a.event(pod, "", v1.EventTypeWarning, "FailedToRetrieveImagePullSecret", err.Error())
			continue
		}
		found, err := pullCredentials(s, image)
		if err != nil {
			w.a.event(pod, "", v1.EventTypeWarning, "FailedToRetrieveImagePullSecret", fmt.Sprintf("secret %s: %v", ref.Name, err))
			continue
		}
		out = append(out, found...)
	}
	return out
}

// registryAuth is an entry of docker's configuration file.
type registryAuth struct {
	Username, Password, Auth, IdentityToken, RegistryToken string
}

// pullCredentials reads a secret of type dockerconfigjson or dockercfg.
func pullCredentials(s *v1.Secret, image string) ([]*cri.AuthConfig, error) {
	auths := map[string]registryAuth{}
	switch {
	case s.Data[v1.DockerConfigJsonKey] != nil:
		var file struct{ Auths map[string]registryAuth }
		if err := json.Unmarshal(s.Data[v1.DockerConfigJsonKey], &file); err != nil {
			return nil, err
		}
		auths = file.Auths
	case s.Data[v1.DockerConfigKey] != nil:
		if err := json.Unmarshal(s.Data[v1.DockerConfigKey], &auths); err != nil {
			return nil, err
		}
	default:
		return nil, fmt.Errorf("it has neither %s nor %s", v1.DockerConfigJsonKey, v1.DockerConfigKey)
	}
	var best []*cri.AuthConfig
	precise := -1
	for place, a := range auths {
		n := podspec.RegistryMatch(place, image)
		if n < 0 || n < precise {
			continue
		}
		if n > precise {
			best, precise = nil, n
		}
		best = append(best, a.cri(place))
	}
	return best, nil
}

func (a registryAuth) cri(place string) *cri.AuthConfig {
	out := &cri.AuthConfig{Username: a.Username, Password: a.Password, IdentityToken: a.IdentityToken, RegistryToken: a.RegistryToken, ServerAddress: place}
	if b, err := base64.StdEncoding.DecodeString(strings.TrimSpace(a.Auth)); err == nil && a.Auth != "" {
		if user, pass, ok := strings.Cut(string(b), ":"); ok {
			out.Username, out.Password = user, strings.TrimRight(pass, "\x00")
		}
	}
	return out
}
