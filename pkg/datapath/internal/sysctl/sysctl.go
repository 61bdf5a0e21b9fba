// Package sysctl sets what the kernel keeps below /proc/sys/net, also from
// inside a container.
package sysctl

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// hostProcSys is where manifests/ mount the machine's own /proc/sys/net, as
// the folder net: the /proc/sys of a container that is not privileged is
// read-only, whatever capabilities it has.
const hostProcSys = "/host/proc/sys"

// Path of a setting, named like net/ipv4/ip_forward.
func Path(name string) string { return filepath.Join("/proc/sys", name) }

// Set writes value to the setting called name.
func Set(name, value string) error {
	err := os.WriteFile(Path(name), []byte(value), 0o644)
	if errors.Is(err, unix.EROFS) {
		if host := os.WriteFile(filepath.Join(hostProcSys, name), []byte(value), 0o644); !errors.Is(host, fs.ErrNotExist) {
			return host
		}
	}
	return err
}
