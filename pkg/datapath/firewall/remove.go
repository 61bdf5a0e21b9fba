package firewall

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"
)

// Exists reports whether our table is there.
func Exists() (bool, error) {
	t, err := read()
	if err != nil {
		return false, err
	}
	return t.exists, nil
}

// Remove takes our table away; that it is gone already is fine.
func Remove() error {
	c, err := dial()
	if err != nil {
		return err
	}
	c.DelTable(ours)
	if err := c.Flush(); err != nil && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("delete table: %w", err)
	}
	return nil
}
