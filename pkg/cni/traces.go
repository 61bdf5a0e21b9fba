package cni

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"meshd.dev/pkg/cni/rtnl"
)

// Trace is something of ours on the machine. Its text is the command by which
// a person would remove it.
type Trace struct {
	text   string
	remove func() error
}

func (t Trace) String() string { return t.text }

// Remove takes it away; that it is gone already is fine.
func (t Trace) Remove() error { return t.remove() }

// Links are the names of the host's ends of pods that are attached. Call it in
// the host's network namespace.
func Links() ([]string, error) {
	host, err := rtnl.Open()
	if err != nil {
		return nil, err
	}
	defer host.Close()
	links, err := ourLinks(host)
	if err != nil {
		return nil, fmt.Errorf("list links: %w", err)
	}
	var names []string
	for _, l := range links {
		names = append(names, l.Name)
	}
	return names, nil
}

// Traces lists what is installed for the container runtime, and the links of
// pods: the configurations first, so that no pod comes while the rest goes.
func Traces(conflists []string, binDirs ...string) ([]Trace, error) {
	var traces []Trace
	for _, path := range conflists {
		traces = append(traces, fileTrace(path))
	}
	links, err := Links()
	if err != nil {
		return nil, err
	}
	for _, name := range links {
		traces = append(traces, Trace{"ip link delete " + name, func() error { return deleteLinkOf(name) }})
	}
	for _, dir := range binDirs {
		for _, name := range []string{PluginType, LoopbackType} {
			path := filepath.Join(dir, name)
			if b, err := os.ReadFile(path); err == nil && builtHere(b) {
				traces = append(traces, fileTrace(path))
			}
		}
	}
	return traces, nil
}

func deleteLinkOf(name string) error {
	host, err := rtnl.Open()
	if err != nil {
		return err
	}
	defer host.Close()
	return deleteLink(host, name)
}

func fileTrace(path string) Trace {
	return Trace{"rm " + path, func() error {
		if err := os.Remove(path); !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		return nil
	}}
}

// builtHere reports whether a program was built from this tree.
func builtHere(program []byte) bool { return bytes.Contains(program, []byte("meshd.dev/pkg/cni")) }
