package durable

import (
	"os"
	"path/filepath"
	"testing"
)

func TestWriteFile(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "made", "file")
	for _, content := range []string{"one", "two"} {
		if err := WriteFile(path, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		got, err := os.ReadFile(path)
		if err != nil || string(got) != content {
			t.Errorf("content %q, %v, want %q", got, err, content)
		}
	}
	info, err := os.Stat(path)
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("mode %v, %v", info.Mode(), err)
	}
	names, err := os.ReadDir(filepath.Dir(path))
	if err != nil || len(names) != 1 {
		t.Errorf("folder holds %v, %v, want the file alone", names, err)
	}
	for content, want := range map[string]bool{"two": false, "three": true} {
		if changed, err := WriteFileIfChanged(path, []byte(content), 0o600); err != nil || changed != want {
			t.Errorf("WriteFileIfChanged(%q) = %v, %v, want %v", content, changed, err, want)
		}
		if err := WriteFile(path, []byte("two"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := WriteFile("/proc/no/such/place", nil, 0o600); err == nil {
		t.Error("write into /proc succeeded")
	}
}
