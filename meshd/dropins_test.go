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
		list[i].reader = filepath.Join(root, list[i].reader)
	}
	if err := os.MkdirAll(list[0].reader, 0o755); err != nil {
		t.Fatal(err)
	}
	written, err := installDropIns(list)
	if err != nil || !slices.Equal(written, []string{list[0].path(), list[1].path()}) {
		t.Fatalf("wrote %v, %v", written, err)
	}
	if written, err := installDropIns(list); err != nil || len(written) > 0 {
		t.Errorf("once more: wrote %v, %v", written, err)
	}
	b, err := os.ReadFile(list[0].path())
	if err != nil || !strings.Contains(string(b), "Name=mesh0* msh*") {
		t.Errorf("%s, %v", b, err)
	}
	if b, err := os.ReadFile(list[1].path()); err != nil || !strings.Contains(string(b), "ManageForeignRoutes=no") {
		t.Errorf("%s, %v", b, err)
	}
	if _, err := os.Stat(list[2].dir); !os.IsNotExist(err) {
		t.Error("a folder was made for a reader that is not here")
	}
}

// TestDropInsGo with the folder that was made for one, and no other.
func TestDropInsGo(t *testing.T) {
	root := t.TempDir()
	reader := filepath.Join(root, "network")
	if err := os.Mkdir(reader, 0o755); err != nil {
		t.Fatal(err)
	}
	list := []dropIn{{reader, reader, "a", "text"}, {reader, filepath.Join(root, "made"), "b", "text"}}
	if _, err := installDropIns(list); err != nil {
		t.Fatal(err)
	}
	for _, d := range list {
		for _, tr := range d.traces() {
			if err := tr.Remove(); err != nil {
				t.Errorf("%s: %v", tr, err)
			}
		}
		if left := d.traces(); len(left) > 0 {
			t.Errorf("left: %v", left)
		}
	}
	entries, err := os.ReadDir(root)
	if err != nil || len(entries) != 1 || entries[0].Name() != "network" {
		t.Errorf("left: %v, %v", entries, err)
	}
	if _, err := installDropIns(list); err != nil {
		t.Fatal(err)
	}
	yours := filepath.Join(root, "made", "yours")
	if err := os.WriteFile(yours, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	if got := list[1].traces(); len(got) != 1 {
		t.Errorf("a folder that holds %s is to be removed: %v", yours, got)
	}
}
