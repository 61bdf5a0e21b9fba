package netlab

import (
	"bufio"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"
)

// A hierarchy is one mounted cgroup tree of the host. A host with cgroup v2
// has one; one with v1 has one a controller, and often an empty v2 beside them.
type hierarchy struct {
	Path string `json:"path"` // where the host mounted it
	V2   bool   `json:"v2,omitempty"`
	// Options to mount a v1 hierarchy again.
	Options string `json:"options,omitempty"`
}

// leaf holds the machine's own processes on v2, where a group that hands
// controllers down may hold none itself.
const leaf = "init"

// hierarchies reads what the host has mounted.
func hierarchies() ([]hierarchy, error) {
	b, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return nil, fmt.Errorf("find cgroups: %w", err)
	}
	hs := parseHierarchies(string(b))
	if len(hs) == 0 {
		return nil, errors.New("find cgroups: none is mounted; mount cgroup2 on /sys/fs/cgroup")
	}
	return hs, nil
}

// parseHierarchies reads proc_pid_mountinfo(5).
func parseHierarchies(mountinfo string) []hierarchy {
	var hs []hierarchy
	for line := range strings.Lines(mountinfo) {
		left, right, ok := strings.Cut(strings.TrimSpace(line), " - ")
		l, r := strings.Fields(left), strings.Fields(right)
		if !ok || len(l) < 6 || len(r) < 3 || !strings.HasPrefix(l[4], "/sys/fs/cgroup") {
			continue
		}
		switch r[0] {
		case "cgroup2":
			hs = append(hs, hierarchy{Path: l[4], V2: true})
		case "cgroup":
			hs = append(hs, hierarchy{Path: l[4], Options: v1Options(r[2])})
		}
	}
	return hs
}

// v1Options keeps of a v1 mount's super options what names the hierarchy.
func v1Options(super string) string {
	var keep []string
	for o := range strings.SplitSeq(super, ",") {
		switch {
		case o == "rw" || o == "ro" || o == "xattr" || o == "clone_children" || strings.HasPrefix(o, "release_agent="):
		case strings.HasPrefix(o, "name="):
			keep = append(keep, "none", o)
		default:
			keep = append(keep, o)
		}
	}
	return strings.Join(keep, ",")
}

// unified says that the host has nothing but cgroup v2.
func unified(hs []hierarchy) bool { return len(hs) == 1 && hs[0].V2 }

// makeGroups makes group (a path like ml-x/m1) in every hierarchy.
func makeGroups(hs []hierarchy, group string) error {
	for _, h := range hs {
		parent := h.Path
		for name := range strings.SplitSeq(group, "/") {
			if h.V2 {
				handDown(parent)
			}
			child := filepath.Join(parent, name)
			if err := os.MkdirAll(child, 0o755); err != nil {
				return fmt.Errorf("make cgroup: %w", err)
			}
			if err := copyCPUSet(parent, child); err != nil {
				return err
			}
			parent = child
		}
		if unified(hs) {
			if err := os.MkdirAll(filepath.Join(parent, leaf), 0o755); err != nil {
				return fmt.Errorf("make cgroup: %w", err)
			}
		}
	}
	return nil
}

// handDown lets the children of a v2 group use its controllers. A controller
// that refuses is one the machines do without.
func handDown(dir string) {
	b, _ := os.ReadFile(filepath.Join(dir, "cgroup.controllers"))
	for c := range strings.FieldsSeq(string(b)) {
		_ = os.WriteFile(filepath.Join(dir, "cgroup.subtree_control"), []byte("+"+c), 0o644)
	}
}

// copyCPUSet gives a fresh v1 cpuset its parent's CPUs and memory nodes: no
// process may enter before.
func copyCPUSet(parent, child string) error {
	for _, f := range []string{"cpuset.cpus", "cpuset.mems"} {
		b, err := os.ReadFile(filepath.Join(child, f))
		if err != nil || strings.TrimSpace(string(b)) != "" {
			continue // not a cpuset, or set already
		}
		if b, err = os.ReadFile(filepath.Join(parent, f)); err != nil || strings.TrimSpace(string(b)) == "" {
			continue // v2: an empty file means "as the parent"
		}
		if err := os.WriteFile(filepath.Join(child, f), b, 0o644); err != nil {
			return fmt.Errorf("set %s of cgroup: %w", f, err)
		}
	}
	return nil
}

// joinGroups puts the calling process into group of every hierarchy; with
// below, into the leaf that holds the machine's own processes.
func joinGroups(hs []hierarchy, group string, below bool) error {
	for _, h := range hs {
		dir := filepath.Join(h.Path, group)
		if below && unified(hs) {
			dir = filepath.Join(dir, leaf)
		}
		if err := os.WriteFile(filepath.Join(dir, "cgroup.procs"), []byte("0"), 0o644); err != nil {
			return fmt.Errorf("enter cgroup: %w", err)
		}
	}
	return nil
}

// groupPids lists the processes in group and below it, as the host counts them.
func groupPids(hs []hierarchy, group string) []int {
	seen := map[int]bool{}
	var pids []int
	for _, h := range hs {
		_ = filepath.WalkDir(filepath.Join(h.Path, group), func(path string, d fs.DirEntry, err error) error {
			if err != nil || d.IsDir() || d.Name() != "cgroup.procs" {
				return nil // a group may go while we look
			}
			f, err := os.Open(path)
			if err != nil {
				return nil
			}
			defer f.Close()
			for s := bufio.NewScanner(f); s.Scan(); {
				if pid, err := strconv.Atoi(s.Text()); err == nil && pid > 0 && !seen[pid] {
					seen[pid] = true
					pids = append(pids, pid)
				}
			}
			return nil
		})
	}
	return pids
}

// removeGroups deletes group and all below it, waiting a little for processes
// that are on their way out.
func removeGroups(hs []hierarchy, group string) error {
	var err error
	for try := range 100 {
		if try > 0 {
			time.Sleep(20 * time.Millisecond)
		}
		err = nil
		for _, h := range hs {
			err = errors.Join(err, removeTree(filepath.Join(h.Path, group)))
		}
		if err == nil {
			return nil
		}
	}
	return fmt.Errorf("remove cgroups: %w", err)
}

// removeTree removes folders only, deepest first: the files of a cgroup cannot be removed.
func removeTree(dir string) error {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	var errs error
	for _, e := range entries {
		if e.IsDir() {
			errs = errors.Join(errs, removeTree(filepath.Join(dir, e.Name())))
		}
	}
	if err := os.Remove(dir); err != nil && !errors.Is(err, fs.ErrNotExist) {
		errs = errors.Join(errs, err)
	}
	return errs
}
