package main

import (
	"archive/tar"
	"bytes"
	"encoding/json"
	"io"
	"os"
	"path/filepath"
	"testing"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/validate"
)

const ref = "registry.example/meshd:1.0"

func made(t *testing.T) string {
	t.Helper()
	bin, out := t.TempDir(), filepath.Join(t.TempDir(), "image.tar")
	for _, p := range programs {
		if err := os.WriteFile(filepath.Join(bin, p), []byte("program "+p), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	if err := run(bin, out, ref, "arm64"); err != nil {
		t.Fatal(err)
	}
	return out
}

// As docker load reads it: manifest.json, and what it names.
func TestDockerReadsIt(t *testing.T) {
	tag, err := name.NewTag(ref)
	if err != nil {
		t.Fatal(err)
	}
	img, err := tarball.ImageFromPath(made(t), &tag)
	if err != nil {
		t.Fatal(err)
	}
	if err := validate.Image(img); err != nil {
		t.Error(err)
	}
	config, err := img.ConfigFile()
	if err != nil {
		t.Fatal(err)
	}
	if config.Architecture != "arm64" || config.OS != "linux" || config.Config.Entrypoint[0] != "/meshd" {
		t.Errorf("config %+v", config)
	}
	layers, err := img.Layers()
	if err != nil || len(layers) != 1 {
		t.Fatalf("layers %v, %v", layers, err)
	}
	r, err := layers[0].Uncompressed()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	have := entries(t, r)
	for _, p := range programs {
		if string(have[p]) != "program "+p {
			t.Errorf("/%s holds %q", p, have[p])
		}
	}
}

// As containerd reads it: index.json, and from there by digest.
func TestContainerdReadsIt(t *testing.T) {
	f, err := os.Open(made(t))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	have := entries(t, f)
	var index v1.IndexManifest
	if err := json.Unmarshal(have["index.json"], &index); err != nil {
		t.Fatal(err)
	}
	d := index.Manifests[0]
	if d.Annotations["io.containerd.image.name"] != ref {
		t.Errorf("annotations %v", d.Annotations)
	}
	blob := func(d v1.Descriptor) []byte {
		b := have["blobs/"+d.Digest.Algorithm+"/"+d.Digest.Hex]
		if h, n, err := v1.SHA256(bytes.NewReader(b)); err != nil || h != d.Digest || n != d.Size {
			t.Errorf("blob %s: has digest %s and %d bytes, %v", d.Digest, h, n, err)
		}
		return b
	}
	manifest, err := v1.ParseManifest(bytes.NewReader(blob(d)))
	if err != nil {
		t.Fatal(err)
	}
	for _, d := range append(manifest.Layers, manifest.Config) {
		blob(d)
	}
	if len(have["oci-layout"]) == 0 {
		t.Error("no oci-layout")
	}
}

func TestSameBitsTwice(t *testing.T) {
	a, err := os.ReadFile(made(t))
	if err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(made(t))
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(a, b) {
		t.Error("the same programs gave two images")
	}
}

func TestMistakesAreNamed(t *testing.T) {
	if err := run(t.TempDir(), filepath.Join(t.TempDir(), "x"), ref, "amd64"); err == nil {
		t.Error("no programs, no error")
	}
	if err := run("", "", "UPPER:case:twice", "amd64"); err == nil {
		t.Error("a bad name, no error")
	}
}

func entries(t *testing.T, r io.Reader) map[string][]byte {
	t.Helper()
	have := map[string][]byte{}
	for tr := tar.NewReader(r); ; {
		h, err := tr.Next()
		if err == io.EOF {
			return have
		}
		if err != nil {
			t.Fatal(err)
		}
		if have[h.Name], err = io.ReadAll(tr); err != nil {
			t.Fatal(err)
		}
	}
}
