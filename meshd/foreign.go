package main

import (
	"fmt"
	"os"
	"path/filepath"
)

// preferred is a network configuration that a container runtime prefers to
// ours, whose file is named own: it takes the first by name. Empty: none.
func preferred(dir, own string) (path string, err error) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return "", err
	}
	for _, e := range entries { // sorted by name
		switch filepath.Ext(e.Name()) {
		case ".conf", ".conflist", ".json":
		default:
			continue
		}
		if e.Name() >= own {
			break
		}
		return filepath.Join(dir, e.Name()), nil
	}
	return "", nil
}

// checkForeign names such a configuration on the board. dir is where the
// runtime looks; empty while that is not known.
func (n *node) checkForeign(dir string) (path string) {
	if dir == "" {
		return ""
	}
	path, err := preferred(dir, n.cfg.CNIConf)
	switch {
	case err != nil:
		n.board.Report("cni/foreign", err, "mount the folder in which the container runtime looks for network configurations; --cni-conf-dir names it")
	case path != "":
		n.board.Fail("cni/foreign", fmt.Sprintf("%s comes before %s: the container runtime attaches pods to that network, not to this one", path, n.cfg.CNIConf),
			"switch the other network off and remove that file on this machine; meshd leaves it alone")
	default:
		n.board.OK("cni/foreign")
	}
	return path
}

// confDir is where the container runtime looks for configurations, as far as
// it is known.
func (n *node) confDir() string {
	if n.guest != nil {
		return n.cfg.CNIConfDir
	}
	n.installing.Lock()
	defer n.installing.Unlock()
	if n.installed == nil {
		return ""
	}
	return filepath.Dir(n.installed.conf)
}
