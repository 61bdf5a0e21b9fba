package cni

import (
	"encoding/json"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"syscall"

	"github.com/containernetworking/cni/pkg/skel"
	"github.com/containernetworking/cni/pkg/types"
	types100 "github.com/containernetworking/cni/pkg/types/100"
	"github.com/containernetworking/cni/pkg/version"
	"golang.org/x/sys/unix"
)

// Main runs the plugin once, as the environment and standard input say, and
// gives the exit code. about is printed when there is no CNI_COMMAND.
func Main(about string) int {
	// One thread: it visits namespaces, and a test counts its system calls.
	runtime.LockOSThread()
	p := &plugin{version: types100.ImplementedSpecVersion}
	verbs := skel.CNIFuncs{
		Add: p.verb(p.add), Del: p.verb(p.del), Check: p.verb(p.check), GC: p.verb(p.gc), Status: p.verb(p.status),
	}
	if filepath.Base(os.Args[0]) == LoopbackType {
		verbs = loopbackFuncs()
	}
	err := skel.PluginMainFuncsWithError(verbs, version.PluginSupports("0.3.1", "0.4.0", "1.0.0", "1.1.0"), about)
	if err == nil {
		return 0
	}
	text, _ := json.MarshalIndent(struct {
		CNIVersion string `json:"cniVersion"`
		*types.Error
	}{p.version, err}, "", "    ")
	_, _ = os.Stdout.Write(append(text, '\n'))
	return 1
}

type plugin struct {
	// version of the specification in use, for errors.
	version string
}

// verb reads the configuration before f and gives errors a code after it.
func (p *plugin) verb(f func(*conf, *skel.CmdArgs) error) func(*skel.CmdArgs) error {
	return func(cmd *skel.CmdArgs) error {
		c, err := parseConf(cmd.StdinData)
		if err != nil {
			return err
		}
		if c.CNIVersion != "" {
			p.version = c.CNIVersion
		}
		return coded(f(c, cmd))
	}
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
