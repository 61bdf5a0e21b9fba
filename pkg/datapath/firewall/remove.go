package firewall

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"
)

// Exists reports whether our table is there.
func Exists() (bool, error) {
	t, err := once((*socket).read)
	if err != nil {
		return false, err
	}
	return t.exists, nil
}

// Remove takes our table away; that it is gone already is fine.
func Remove() error {
	s, err := dial()
	if err != nil {
		return err
	}
	defer s.close()
	s.nft.DelTable(ours)
	if err := s.nft.Flush(); err != nil && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("delete table: %w", err)
	}
	return nil
}
