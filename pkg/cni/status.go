package cni

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/containernetworking/cni/pkg/skel"
	"github.com/containernetworking/cni/pkg/types"
)

// status says whether an ADD would do.
func (p *plugin) status(c *conf, _ *skel.CmdArgs) error {
	if err := c.complete(); err != nil {
		return notReady(err)
	}
	s := c.store()
	if err := s.writable(); err != nil {
		return notReady(err)
	}
	if err := c.daemonReady(); err != nil {
		return notReady(err)
	}
	if err := firewallReady(c.Table); err != nil {
		return notReady(err)
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
