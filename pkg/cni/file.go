package cni

import (
	"bytes"
	"errors"
	"io/fs"
	"os"

	"golang.org/x/sys/unix"
)

// openFile is os.OpenFile past Go's poller, which costs six system calls a file
// to be told that files on disk are always ready: a fifth of those of an ADD.
func openFile(path string, flags int) (*os.File, error) {
	for {
		fd, err := unix.Open(path, flags|unix.O_CLOEXEC, 0o644)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return nil, &fs.PathError{Op: "open", Path: path, Err: err}
		}
		return os.NewFile(uintptr(fd), path), nil
	}
}

// readLine reads a file of one short line.
func readLine(path string) (string, error) {
	f, err := openFile(path, unix.O_RDONLY)
	if err != nil {
		return "", err
	}
	defer f.Close()
	var line [256]byte
	n, err := f.Read(line[:])
	if n == 0 && err != nil {
		return "", err
	}
	return string(bytes.TrimSpace(line[:n])), nil
}
