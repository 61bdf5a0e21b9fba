package logs

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"time"
)

// The size at which a log is rotated, and how many files of one container's
// run there may be.
const (
	MaxSize  = 10 << 20
	MaxFiles = 5
)

// Rotate puts the log at path aside when it is larger than size and has the
// runtime open a new one. It keeps the newest files-1 old ones.
func Rotate(path string, size int64, files int, reopen func() error) error {
	st, err := os.Stat(path)
	if errors.Is(err, os.ErrNotExist) {
		return reopen() // an earlier rotation ended half way
	}
	if err != nil || st.Size() < size {
		return err
	}
	old, err := filepath.Glob(path + ".*")
	if err != nil {
		return err
	}
	slices.Sort(old) // the names end in their times
	for len(old) > files-2 && len(old) > 0 {
		if err := os.Remove(old[0]); err != nil {
			return err
		}
		old = old[1:]
	}
	aside := path + "." + time.Now().UTC().Format("20060102-150405.000")
	if err := os.Rename(path, aside); err != nil {
		return err
	}
	if err := reopen(); err != nil {
		return errors.Join(fmt.Errorf("reopen log %s: %w", path, err), os.Rename(aside, path))
	}
	return nil
}
