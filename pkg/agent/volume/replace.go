package volume

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
)

// The layout Kubernetes documents: the content lies in a folder of its own,
// ..data points to it, and every name one sees points through ..data. A change
// is one rename, so that a reader sees the old or the new and never a mixture.
const (
	dataLink = "..data"
	newLink  = "..data_new"
)

// replace makes dir hold exactly files and reports whether it had to change
// anything.
func replace(dir string, files map[string]file, group *int64) (bool, error) {
	if same(filepath.Join(dir, dataLink), files) {
		return false, tidy(dir, files)
	}
	fresh, err := os.MkdirTemp(dir, "..v")
	if err != nil {
		return false, err
	}
	done := false
	defer func() {
		if !done {
			_ = os.RemoveAll(fresh)
		}
	}()
	if err := os.Chmod(fresh, 0o755); err != nil {
		return false, err
	}
	for path, f := range files {
		if err := writeFile(fresh, path, f, group); err != nil {
			return false, err
		}
	}
	_ = os.Remove(filepath.Join(dir, newLink))
	if err := os.Symlink(filepath.Base(fresh), filepath.Join(dir, newLink)); err != nil {
		return false, err
	}
	if err := os.Rename(filepath.Join(dir, newLink), filepath.Join(dir, dataLink)); err != nil {
		return false, err
	}
	done = true
	return true, tidy(dir, files)
}

func writeFile(root, path string, f file, group *int64) error {
	full := filepath.Join(root, path)
	if err := os.MkdirAll(filepath.Dir(full), 0o755); err != nil {
		return err
	}
	if err := os.WriteFile(full, f.data, f.mode); err != nil {
		return err
	}
	mode := f.mode
	if group != nil {
		mode |= 0o440
		if err := os.Chown(full, -1, int(*group)); err != nil {
			return err
		}
	}
	if f.user != nil {
		if err := os.Chown(full, int(*f.user), -1); err != nil {
			return err
		}
	}
	return os.Chmod(full, mode)
}

// same reports whether the folder holds exactly files.
func same(dir string, files map[string]file) bool {
	root, err := filepath.EvalSymlinks(dir)
	if err != nil {
		return false
	}
	n := 0
	err = filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		rel, err := filepath.Rel(root, path)
		if err != nil {
			return err
		}
		f, ok := files[rel]
		data, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		if !ok || !bytes.Equal(f.data, data) {
			return errors.New("differs")
		}
		n++
		return nil
	})
	return err == nil && n == len(files)
}

// tidy makes the visible names, and removes those and the versions that are no
// longer of use.
func tidy(dir string, files map[string]file) error {
	want := map[string]bool{}
	for path := range files {
		top, _, _ := strings.Cut(path, "/")
		want[top] = true
	}
	current, err := os.Readlink(filepath.Join(dir, dataLink))
	if err != nil {
		return err
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	for _, e := range entries {
		name := e.Name()
		switch {
		case name == dataLink || name == current:
		case want[name] && e.Type()&fs.ModeSymlink != 0:
			delete(want, name)
		default:
			if err := os.RemoveAll(filepath.Join(dir, name)); err != nil {
				return err
			}
		}
	}
	for name := range want {
		if err := os.Symlink(filepath.Join(dataLink, name), filepath.Join(dir, name)); err != nil {
			return fmt.Errorf("link %s: %w", name, err)
		}
	}
	return nil
}
