package cni

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/containernetworking/cni/pkg/types"
)

// status says whether an ADD would do.
func status(c *conf, _ *call) error {
	if err := c.complete(); err != nil {
		return notReady(err)
	}
	s := c.store()
	if err := s.writable(); err != nil {
		return notReady(err)
	}
	err := c.daemonReady()
	if err == nil {
		err = firewallReady(c.Table)
	}
	if err != nil {
		return c.explained(notReady(err))
	}
	return s.hasRoom(c)
}

func notReady(err error) error {
	return types.NewError(types.ErrPluginNotAvailable, "not ready for ADD", err.Error())
}

// writable tries what ADD does.
func (s store) writable() error {
	unlock, err := s.lock()
	if err != nil {
		return err
	}
	defer unlock()
	temp := s.path(tempPrefix + "status")
	if err := os.WriteFile(temp, []byte("x"), 0o644); err != nil {
		return fmt.Errorf("write to state folder: %w", err)
	}
	return os.Remove(temp)
}

// daemonReady reads the ready file: empty or "ready" is ready, other content
// is the daemon's reason for not being so.
func (c *conf) daemonReady() error {
	if c.ReadyFile == "" {
		return nil
	}
	text, err := os.ReadFile(c.ReadyFile)
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("meshd has not said that it is ready (%s is missing): is it running?", filepath.Clean(c.ReadyFile))
	}
	if err != nil {
		return err
	}
	if reason := strings.TrimSpace(string(text)); reason != "" && reason != "ready" {
		return errors.New(reason)
	}
	return nil
}

// hasRoom reports an exhausted range before a pod finds out.
func (s store) hasRoom(c *conf) error {
	p, err := s.pool(c.ranges, c.reserved, 0)
	if err != nil {
		return notReady(err)
	}
	if _, err := p.choose(nil); err != nil {
		return notReady(err)
	}
	return nil
}

// maxReason bounds how much of what the daemon says is quoted.
const maxReason = 1024

// explained adds what the daemon says of itself to an error about the machine:
// that a table is missing is the smaller half of the story. What the file says
// decides nothing; a pod that can be attached is.
func (c *conf) explained(err error) error {
	var e *types.Error
	if err = coded(err); c.ReasonFile == "" || !errors.As(err, &e) || !slices.Contains(ofTheMachine, e.Code) {
		return err
	}
	f, openErr := os.Open(c.ReasonFile)
	if openErr != nil {
		return err // nothing is known
	}
	defer f.Close()
	at := "once"
	if i, err := f.Stat(); err == nil {
		at = "at " + i.ModTime().UTC().Format(time.RFC3339)
	}
	text, _ := io.ReadAll(io.LimitReader(f, maxReason))
	reason := strings.ToValidUTF8(strings.TrimSpace(string(text)), "")
	if reason == "" {
		return err
	}
	return types.NewError(e.Code, e.Msg, strings.TrimPrefix(e.Details+"; ", "; ")+"meshd on this machine said "+at+": "+reason)
}

// ofTheMachine are the codes of errors that are not about one pod.
var ofTheMachine = []uint{types.ErrTryAgainLater, types.ErrInternal, types.ErrPluginNotAvailable}
