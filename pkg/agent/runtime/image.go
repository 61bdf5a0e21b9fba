package runtime

import (
	"context"
	"time"

	"google.golang.org/grpc/backoff"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// reconnect is quick: the socket is local, and nothing runs without it.
var reconnect = backoff.Config{BaseDelay: 50 * time.Millisecond, Multiplier: 2, Jitter: 0.2, MaxDelay: time.Second}

// Image returns what the runtime has under that name, or nil.
func (c *Client) Image(ctx context.Context, name string) (*cri.Image, error) {
	r, err := call(ctx, quick, "look for image "+name, func(ctx context.Context) (*cri.ImageStatusResponse, error) {
		return c.img.ImageStatus(ctx, &cri.ImageStatusRequest{Image: &cri.ImageSpec{Image: name}})
	})
	if err != nil {
		return nil, err
	}
	return r.Image, nil
}

// Images lists all of them.
func (c *Client) Images(ctx context.Context) ([]*cri.Image, error) {
	r, err := call(ctx, quick, "list images", func(ctx context.Context) (*cri.ListImagesResponse, error) {
		return c.img.ListImages(ctx, &cri.ListImagesRequest{})
	})
	if err != nil {
		return nil, err
	}
	return r.Images, nil
}

// Pull fetches an image; auth may be nil. It returns the image's reference.
func (c *Client) Pull(ctx context.Context, name string, auth *cri.AuthConfig, sandbox *cri.PodSandboxConfig) (string, error) {
	r, err := call(ctx, pulling, "pull image "+name, func(ctx context.Context) (*cri.PullImageResponse, error) {
		return c.img.PullImage(ctx, &cri.PullImageRequest{Image: &cri.ImageSpec{Image: name}, Auth: auth, SandboxConfig: sandbox})
	})
	if err != nil {
		return "", err
	}
	return r.ImageRef, nil
}

// RemoveImage removes an image by ID.
func (c *Client) RemoveImage(ctx context.Context, id string) error {
	_, err := call(ctx, usual, "remove image "+id, func(ctx context.Context) (*cri.RemoveImageResponse, error) {
		return c.img.RemoveImage(ctx, &cri.RemoveImageRequest{Image: &cri.ImageSpec{Image: id}})
	})
	return ignoreNotFound(err)
}

// ImageDirs are the folders images lie in.
func (c *Client) ImageDirs(ctx context.Context) ([]string, error) {
	r, err := call(ctx, quick, "ask where images lie", func(ctx context.Context) (*cri.ImageFsInfoResponse, error) {
		return c.img.ImageFsInfo(ctx, &cri.ImageFsInfoRequest{})
	})
	if err != nil {
		return nil, err
	}
	var dirs []string
	for _, fs := range r.ImageFilesystems {
		if fs.FsId != nil {
			dirs = append(dirs, fs.FsId.Mountpoint)
		}
	}
	return dirs, nil
}
