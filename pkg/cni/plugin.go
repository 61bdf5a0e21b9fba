package cni

import (
	"encoding/json"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"syscall"

	"github.com/containernetworking/cni/pkg/types"
	types100 "github.com/containernetworking/cni/pkg/types/100"
	"golang.org/x/sys/unix"
)

// Main runs the plugin once, as the environment and standard input say, and
// gives the exit code. name is printed when there is no CNI_COMMAND.
func Main(name string) int {
	// One thread for all but the wait for the disk: it visits namespaces, and a
	// test counts its system calls.
	runtime.LockOSThread()
	stackSink = growStack(len(name))
	if os.Getenv("CNI_COMMAND") == "" {
		about(name)
		return 0
	}
	v := verbs{add: add, del: del, check: check, gc: gc, status: status}
	if filepath.Base(os.Args[0]) == LoopbackType {
		v = loopbackVerbs()
	}
	c, err := v.run(os.Getenv, os.Stdin, os.Stdout)
	if err == nil {
		return 0
	}
	_, _ = os.Stdout.Write(errorText(c, err))
	return 1
}

// growStack makes the stack as large as an ADD needs it while it is all but
// empty: Go would copy it three times on the way down, frame by frame, which
// was 0.15 ms.
//
//go:noinline
func growStack(i int) byte {
	var room [16 << 10]byte
	room[i&0xfff] = 1
	return room[i&0xff]
}

var stackSink byte // so that growStack is not optimised away

// errorText is an error as the specification has it, in the version in use.
func errorText(c *conf, err error) []byte {
	e := &types.Error{}
	errors.As(coded(err), &e)
	version := types100.ImplementedSpecVersion
	if c != nil && c.CNIVersion != "" {
		version = c.CNIVersion
	}
	text, _ := json.MarshalIndent(struct {
		CNIVersion string `json:"cniVersion"`
		*types.Error
	}{version, e}, "", "    ")
	return append(text, '\n')
}

// coded gives an error without a code the one that fits: what went wrong with
// files is code 5, everything else 999.
func coded(err error) error {
	var have *types.Error
	var path *fs.PathError
	var link *os.LinkError
	switch {
	case err == nil || errors.As(err, &have):
		return err
	case errors.Is(err, errBusy):
		return types.NewError(types.ErrTryAgainLater, "attachment is busy", err.Error())
	case errors.As(err, &path), errors.As(err, &link), errors.Is(err, syscall.ENOSPC), errors.Is(err, syscall.EIO):
		return types.NewError(types.ErrIOFailure, "I/O failure", err.Error())
	}
	return types.NewError(types.ErrInternal, "cannot do it", err.Error())
}

func isGone(err error) bool { return errors.Is(err, unix.ENODEV) }

func ignoreGone(err error) error {
	if isGone(err) {
		return nil
	}
	return err
}
