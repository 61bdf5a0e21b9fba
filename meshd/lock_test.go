package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// A meshd that was killed a moment ago is waited for, one that runs is not
// got round.
func TestLockState(t *testing.T) {
	dir := t.TempDir()
	before, err := os.Create(filepath.Join(dir, "lock"))
	if err != nil {
		t.Fatal(err)
	}
	defer before.Close()
	if err := unix.Flock(int(before.Fd()), unix.LOCK_EX); err != nil {
		t.Fatal(err)
	}
	if err := lockState(dir); err == nil || !strings.Contains(err.Error(), "another meshd works on it") {
		t.Fatalf("beside another: %v", err)
	}
	time.AfterFunc(lockPatience/4, func() { before.Close() })
	if err := lockState(dir); err != nil {
		t.Errorf("after the other ended: %v", err)
	}
}
