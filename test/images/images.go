// Package images builds the container images the tests run: static Go programs
// of this repository, packed as image tars without a registry or a container
// engine.
package images

import (
	"archive/tar"
	"bytes"
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
)

// The images, by the names pods use.
const (
	Pause = "meshd.local/pause:1"
	Echo  = "meshd.local/echo:1"
)

// programs are the folders below this one, by image.
var programs = map[string]string{Pause: "pause", Echo: "echo"}

// Build compiles the programs and writes one tar an image into dir; it returns
// their paths. It needs the go command and this repository's sources.
func Build(ctx context.Context, dir string) ([]string, error) {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, err
	}
	root, err := moduleRoot(ctx)
	if err != nil {
		return nil, err
	}
	var tars []string
	for _, image := range []string{Pause, Echo} {
		program := programs[image]
		binary := filepath.Join(dir, program)
		build := exec.CommandContext(ctx, "go", "build", "-ldflags=-s -w", "-o", binary, "./test/images/"+program)
		build.Dir, build.Env = root, append(os.Environ(), "CGO_ENABLED=0")
		if out, err := build.CombinedOutput(); err != nil {
			return nil, fmt.Errorf("build %s: %w\n%s", program, err, out)
		}
		path := filepath.Join(dir, program+".tar")
		if err := write(path, image, binary); err != nil {
			return nil, fmt.Errorf("pack %s: %w", image, err)
		}
		tars = append(tars, path)
	}
	return tars, nil
}

func moduleRoot(ctx context.Context) (string, error) {
	out, err := exec.CommandContext(ctx, "go", "env", "GOMOD").Output()
	if err != nil {
		return "", fmt.Errorf("find the module: %w", err)
	}
	mod := strings.TrimSpace(string(out))
	if !filepath.IsAbs(mod) || mod == os.DevNull {
		return "", fmt.Errorf("find the module: run inside the repository")
	}
	return filepath.Dir(mod), nil
}

// write packs one program as the only file of image, and the image as a tar.
func write(path, image, binary string) error {
	tag, err := name.NewTag(image)
	if err != nil {
		return err
	}
	layer, err := fileLayer(binary)
	if err != nil {
		return err
	}
	img, err := mutate.AppendLayers(empty.Image, layer)
	if err != nil {
		return err
	}
	file, err := img.ConfigFile()
	if err != nil {
		return err
	}
	file = file.DeepCopy()
	file.OS, file.Architecture = "linux", runtime.GOARCH
	file.Config = v1.Config{Entrypoint: []string{"/" + filepath.Base(binary)}, Env: []string{"PATH=/"}, WorkingDir: "/"}
	if img, err = mutate.ConfigFile(img, file); err != nil {
		return err
	}
	return tarball.WriteToFile(path, tag, img)
}

// fileLayer holds binary at the root, and the folders a program expects.
func fileLayer(binary string) (v1.Layer, error) {
	b, err := os.ReadFile(binary)
	if err != nil {
		return nil, err
	}
	var buf bytes.Buffer
	w := tar.NewWriter(&buf)
	for _, dir := range []string{"tmp/", "etc/", "data/"} {
		if err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeDir, Name: dir, Mode: 0o1777}); err != nil {
			return nil, err
		}
	}
	if err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: filepath.Base(binary), Mode: 0o755, Size: int64(len(b))}); err != nil {
		return nil, err
	}
	if _, err := w.Write(b); err != nil {
		return nil, err
	}
	if err := w.Close(); err != nil {
		return nil, err
	}
	return tarball.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(buf.Bytes())), nil })
}
