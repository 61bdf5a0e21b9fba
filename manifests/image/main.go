// Image packs meshd's static programs as a container image, without a registry
// or a container engine: one tar that is an OCI image layout (index.json) and
// what `docker save` writes (manifest.json) at once, so that
//
//	ctr -n k8s.io images import FILE
//	docker load -i FILE
//	kind load image-archive FILE
//
// all take it. The same programs give the same bits.
package main

import (
	"archive/tar"
	"bytes"
	"cmp"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"slices"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

// programs of the image, in its root.
var programs = []string{"meshd", "meshctl", "mesh", "meshd-wireguard"}

func main() {
	bin := flag.String("bin", "bin", "folder of the programs")
	out := flag.String("o", "bin/meshd-image.tar", "file to write")
	ref := flag.String("name", "meshd.dev/meshd:dev", "name and tag of the image")
	arch := flag.String("arch", runtime.GOARCH, "architecture of the programs, as GOARCH")
	flag.Parse()
	if err := run(*bin, *out, *ref, *arch); err != nil {
		fmt.Fprintln(os.Stderr, "image:", err)
		os.Exit(1)
	}
}

func run(bin, out, ref, arch string) error {
	tag, err := name.NewTag(ref)
	if err != nil {
		return fmt.Errorf("-name: %w", err)
	}
	img, err := build(bin, arch)
	if err != nil {
		return err
	}
	var archive bytes.Buffer
	if err := write(&archive, tag, img); err != nil {
		return err
	}
	temp := out + ".new"
	if err := os.WriteFile(temp, archive.Bytes(), 0o644); err != nil {
		return err
	}
	if err := os.Rename(temp, out); err != nil {
		return err
	}
	digest, err := img.Digest()
	if err != nil {
		return err
	}
	fmt.Printf("%s  %s  %s\n", out, tag, digest)
	return nil
}

// build makes the image: one layer, nothing below it.
func build(bin, arch string) (v1.Image, error) {
	var files bytes.Buffer
	w := tar.NewWriter(&files)
	for _, program := range programs {
		b, err := os.ReadFile(filepath.Join(bin, program))
		if err != nil {
			return nil, fmt.Errorf("%w; make builds it", err)
		}
		if err := add(w, program, b, 0o755); err != nil {
			return nil, err
		}
	}
	if err := w.Close(); err != nil {
		return nil, err
	}
	layer, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(files.Bytes())), nil },
		tarball.WithMediaType(types.OCILayer))
	if err != nil {
		return nil, err
	}
	img := mutate.ConfigMediaType(mutate.MediaType(empty.Image, types.OCIManifestSchema1), types.OCIConfigJSON)
	img, err = mutate.Append(img, mutate.Addendum{Layer: layer, History: v1.History{CreatedBy: "make image"}})
	if err != nil {
		return nil, err
	}
	config, err := img.ConfigFile()
	if err != nil {
		return nil, err
	}
	config = config.DeepCopy()
	config.OS, config.Architecture = "linux", arch
	config.Config = v1.Config{Entrypoint: []string{"/meshd"}, Env: []string{"PATH=/"}, WorkingDir: "/"}
	return mutate.ConfigFile(img, config)
}

// write puts the image into a tar of both kinds.
func write(out io.Writer, tag name.Tag, img v1.Image) error {
	files := map[string][]byte{"oci-layout": []byte(`{"imageLayoutVersion":"1.0.0"}`)}
	blob := func(h v1.Hash, b []byte) string {
		path := "blobs/" + h.Algorithm + "/" + h.Hex
		files[path] = b
		return path
	}
	manifest, err := img.RawManifest()
	if err != nil {
		return err
	}
	digest, err := img.Digest()
	if err != nil {
		return err
	}
	blob(digest, manifest)
	config, err := img.RawConfigFile()
	if err != nil {
		return err
	}
	configHash, err := img.ConfigName()
	if err != nil {
		return err
	}
	configPath := blob(configHash, config)
	var layerPaths []string
	layers, err := img.Layers()
	if err != nil {
		return err
	}
	for _, l := range layers {
		h, b, err := compressed(l)
		if err != nil {
			return err
		}
		layerPaths = append(layerPaths, blob(h, b))
	}
	file, err := img.ConfigFile()
	if err != nil {
		return err
	}
	index := v1.IndexManifest{SchemaVersion: 2, MediaType: types.OCIImageIndex, Manifests: []v1.Descriptor{{
		MediaType: types.OCIManifestSchema1, Digest: digest, Size: int64(len(manifest)),
		Platform:    &v1.Platform{OS: "linux", Architecture: file.Architecture},
		Annotations: map[string]string{"io.containerd.image.name": tag.Name(), "org.opencontainers.image.ref.name": tag.TagStr()},
	}}}
	docker := tarball.Manifest{{Config: configPath, RepoTags: []string{tag.Name()}, Layers: layerPaths}}
	for path, v := range map[string]any{"index.json": index, "manifest.json": docker} {
		if files[path], err = json.Marshal(v); err != nil {
			return err
		}
	}
	return pack(out, files)
}

func compressed(l v1.Layer) (v1.Hash, []byte, error) {
	h, err := l.Digest()
	if err != nil {
		return h, nil, err
	}
	r, err := l.Compressed()
	if err != nil {
		return h, nil, err
	}
	defer r.Close()
	b, err := io.ReadAll(r)
	return h, b, err
}

// pack writes files in an order of their own, all of the same time.
func pack(out io.Writer, files map[string][]byte) error {
	w := tar.NewWriter(out)
	var paths []string
	for path := range files {
		paths = append(paths, path)
	}
	slices.SortFunc(paths, func(a, b string) int { return cmp.Compare(a, b) })
	for _, path := range paths {
		if err := add(w, path, files[path], 0o644); err != nil {
			return err
		}
	}
	return w.Close()
}

func add(w *tar.Writer, path string, b []byte, mode int64) error {
	if err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: path, Mode: mode, Size: int64(len(b)), Format: tar.FormatUSTAR}); err != nil {
		return err
	}
	_, err := w.Write(b)
	return err
}
