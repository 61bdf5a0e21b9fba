package cni

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"runtime"

	"github.com/containernetworking/cni/pkg/types"
	"golang.org/x/sys/unix"

	"meshd.dev/pkg/cni/rtnl"
)

// netns is an open network namespace file.
type netns struct {
	f             *os.File
	device, inode uint64
}

// nsfsMagic is NSFS_MAGIC of linux/magic.h.
const nsfsMagic = 0x6e736673

// openNetns opens the namespace the runtime named.
func openNetns(path string) (*netns, error) {
	f, err := openFile(path, unix.O_RDONLY)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, types.NewError(types.ErrUnknownContainer, "network namespace does not exist", "CNI_NETNS="+path)
	}
	if err != nil {
		return nil, types.NewError(types.ErrInvalidEnvironmentVariables, "cannot open CNI_NETNS", err.Error())
	}
	n := &netns{f: f}
	var fsStat unix.Statfs_t
	if err := unix.Fstatfs(int(f.Fd()), &fsStat); err != nil || fsStat.Type != nsfsMagic {
		f.Close()
		return nil, types.NewError(types.ErrInvalidEnvironmentVariables, "CNI_NETNS is not a namespace", path)
	}
	if n.device, n.inode, err = identity(f); err != nil {
		f.Close()
		return nil, err
	}
	return n, nil
}

func identity(f *os.File) (device, inode uint64, err error) {
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return 0, 0, fmt.Errorf("stat %s: %w", f.Name(), err)
	}
	return uint64(st.Dev), st.Ino, nil
}

// netnsIs says whether path still is the namespace with that identity.
func netnsIs(path string, device, inode uint64) bool {
	var st unix.Stat_t
	return unix.Stat(path, &st) == nil && uint64(st.Dev) == device && st.Ino == inode
}

func (n *netns) Close() error { return n.f.Close() }

// open opens a socket in the namespace.
func (n *netns) open() (c *rtnl.Conn, err error) {
	err = n.visit(func() error {
		c, err = rtnl.Open()
		return err
	})
	return c, err
}

// visit runs f with the calling thread in the namespace. A thread that does
// not find its way back is never given to anybody else.
func (n *netns) visit(f func() error) error {
	runtime.LockOSThread()
	home, err := openFile("/proc/thread-self/ns/net", unix.O_RDONLY)
	if err != nil {
		runtime.UnlockOSThread()
		return fmt.Errorf("open own network namespace: %w", err)
	}
	defer home.Close()
	if d, i, err := identity(home); err == nil && d == n.device && i == n.inode {
		runtime.UnlockOSThread()
		return types.NewError(types.ErrInvalidEnvironmentVariables, "CNI_NETNS is the host's own namespace", n.f.Name())
	}
	if err := unix.Setns(int(n.f.Fd()), unix.CLONE_NEWNET); err != nil {
		runtime.UnlockOSThread()
		return fmt.Errorf("enter network namespace %s: %w", n.f.Name(), err)
	}
	err = f()
	if back := unix.Setns(int(home.Fd()), unix.CLONE_NEWNET); back != nil {
		return errors.Join(err, fmt.Errorf("leave network namespace %s: %w", n.f.Name(), back))
	}
	runtime.UnlockOSThread()
	return err
}
