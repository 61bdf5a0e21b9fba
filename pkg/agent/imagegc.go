package agent

import (
	"context"
	"errors"
	"maps"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"meshd.dev/pkg/durable"
)

// Images that this agent pulled are removed when their disk is fuller than the
// high mark, those longest unused first, until it is below the low one; none
// that was in use within imageRest. Images that a person imported are that
// person's: no registry may have them.
const (
	imageHigh = 85
	imageLow  = 80
	imageRest = 2 * time.Minute
)

// imageUse remembers when an image was last seen in use.
type imageUse struct{ since map[string]time.Time }

func (a *Agent) collectImages(ctx context.Context, use *imageUse) error {
	ours := a.pulled.all()
	if len(ours) == 0 {
		return nil
	}
	dirs, err := a.rt.ImageDirs(ctx)
	if err != nil || len(dirs) == 0 {
		return err
	}
	over := func(mark uint64) bool {
		return slices.ContainsFunc(dirs, func(d string) bool { return fullness(d) > mark })
	}
	if !over(imageHigh) {
		return nil
	}
	images, err := a.rt.Images(ctx)
	if err != nil {
		return err
	}
	used, err := a.imagesInUse(ctx)
	if err != nil {
		return err
	}
	var errs []error
	for _, image := range use.idle(images, ours, used, time.Now()) {
		if !over(imageLow) {
			break
		}
		a.cfg.Log.Info("removing unused image to free the disk", "image", image.Id, "tags", image.RepoTags)
		errs = append(errs, a.rt.RemoveImage(ctx, image.Id), a.pulled.drop(image.Id))
	}
	return errors.Join(errs...)
}

// pulledImages are the IDs of the images this agent pulled, kept on disk.
type pulledImages struct {
	path string

	mu  sync.Mutex
	ids map[string]bool
}

func loadPulled(path string) *pulledImages {
	p := &pulledImages{path: path, ids: map[string]bool{}}
	b, err := os.ReadFile(path)
	if err != nil {
		return p
	}
	for id := range strings.Lines(string(b)) {
		if id = strings.TrimSpace(id); id != "" {
			p.ids[id] = true
		}
	}
	return p
}

func (p *pulledImages) all() map[string]bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return maps.Clone(p.ids)
}

func (p *pulledImages) add(id string) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.ids[id] {
		return nil
	}
	p.ids[id] = true
	return p.write()
}

func (p *pulledImages) drop(id string) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.ids, id)
	return p.write()
}

func (p *pulledImages) write() error {
	ids := slices.Sorted(maps.Keys(p.ids))
	return durable.WriteFile(p.path, []byte(strings.Join(ids, "\n")+"\n"), 0o600)
}

// fullness of the disk of dir in percent.
func fullness(dir string) uint64 {
	var s unix.Statfs_t
	if err := unix.Statfs(dir, &s); err != nil || s.Blocks == 0 {
		return 0
	}
	return 100 - s.Bavail*100/s.Blocks
}

func (a *Agent) imagesInUse(ctx context.Context) (map[string]bool, error) {
	pods, err := a.rt.List(ctx)
	if err != nil {
		return nil, err
	}
	used := map[string]bool{}
	for _, p := range pods {
		for _, c := range p.Containers {
			used[c.Image], used[c.ImageID] = true, true
		}
	}
	for _, w := range a.all() {
		spec := w.object().Spec
		for _, c := range append(slices.Clone(spec.InitContainers), spec.Containers...) {
			used[c.Image] = true
		}
	}
	return used, nil
}

// idle are the images that may go, the longest unused first.
func (u *imageUse) idle(images []*cri.Image, ours, used map[string]bool, now time.Time) []*cri.Image {
	var out []*cri.Image
	for _, image := range images {
		if _, ok := u.since[image.Id]; !ok || inUse(image, used) {
			u.since[image.Id] = now
		}
		if ours[image.Id] && !image.Pinned && !inUse(image, used) && now.Sub(u.since[image.Id]) > imageRest {
			out = append(out, image)
		}
	}
	slices.SortFunc(out, func(a, b *cri.Image) int { return u.since[a.Id].Compare(u.since[b.Id]) })
	return out
}

func inUse(image *cri.Image, used map[string]bool) bool {
	names := append(append([]string{image.Id}, image.RepoTags...), image.RepoDigests...)
	return slices.ContainsFunc(names, func(n string) bool { return used[n] })
}
