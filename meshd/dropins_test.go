package main

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

func TestDropInsWhereTheirReaderIs(t *testing.T) {
	root := t.TempDir()
	list := slices.Clone(dropIns)
	for i := range list {
		list[i].dir = filepath.Join(root, list[i].dir)
	}
	if err := os.MkdirAll(list[0].dir, 0o755); err != nil {
		t.Fatal(err)
	}
	written, err := installDropIns(list)
	if err != nil || !slices.Equal(written, []string{list[0].path()}) {
		t.Fatalf("wrote %v, %v", written, err)
	}
	if written, err := installDropIns(list); err != nil || len(written) > 0 {
		t.Errorf("once more: wrote %v, %v", written, err)
	}
	b, err := os.ReadFile(list[0].path())
	if err != nil || !strings.Contains(string(b), "Name=mesh0* msh*") {
		t.Errorf("%s, %v", b, err)
	}
	if _, err := os.Stat(list[1].dir); !os.IsNotExist(err) {
		t.Error("a folder was made for a reader that is not here")
	}
}
