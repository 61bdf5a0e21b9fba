package vm

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"slices"
	"strings"
)

// Tools of this host the guest has as well.
var Tools = []string{"sh", "bash", "ip", "wg", "nft", "ss", "sysctl", "ping", "nsenter", "tcpdump", "tc", "conntrack",
	"iptables-nft", "iptables-legacy", "ip6tables-legacy",
	"cat", "cut", "grep", "ls", "rm", "sed", "sleep", "sort", "unshare"}

// texts are files of this host the tools read names from.
var texts = []string{"/etc/passwd", "/etc/protocols", "/etc/services", "/etc/iproute2"}

// A root collects the files of an initramfs. Paths are as the programs know
// them; as on Debian /bin, /sbin, /lib and /lib64 are links into /usr.
type root struct {
	files map[string]file
}

type file struct {
	mode fs.FileMode
	body []byte
}

func newRoot() *root {
	r := &root{files: map[string]file{}}
	for _, dir := range []string{"bin", "sbin", "lib", "lib64"} {
		r.files[dir] = file{fs.ModeSymlink | 0o777, []byte("usr/" + dir)}
	}
	for _, dir := range []string{"dev", "proc", "sys", "run", "tmp", "var"} {
		r.files[dir] = file{fs.ModeDir | 0o755, nil}
	}
	r.files["var/run"] = file{fs.ModeSymlink | 0o777, []byte("/run")}
	return r
}

func (r *root) add(name string, mode fs.FileMode, body []byte) {
	name = strings.TrimPrefix(path.Clean(name), "/")
	if top, _, _ := strings.Cut(name, "/"); r.files[top].mode&fs.ModeSymlink != 0 {
		name = "usr/" + name
	}
	r.dir(path.Dir(name))
	r.files[name] = file{mode, body}
}

// dir adds a folder and those above it.
func (r *root) dir(name string) {
	for name = strings.TrimPrefix(name, "/"); name != "."; name = path.Dir(name) {
		if _, ok := r.files[name]; !ok {
			r.files[name] = file{fs.ModeDir | 0o755, nil}
		}
	}
}

// copy adds a file of the host, at the same place or at as.
func (r *root) copy(from, as string) error {
	b, err := os.ReadFile(from)
	if err != nil {
		return err
	}
	info, err := os.Stat(from)
	if err != nil {
		return err
	}
	r.add(as, info.Mode().Perm(), b)
	return nil
}

// tool adds a program found in PATH, and the libraries it is linked with.
func (r *root) tool(name string) error {
	where, err := exec.LookPath(name)
	if err != nil {
		return err
	}
	if err := r.copy(where, "/usr/bin/"+name); err != nil {
		return err
	}
	out, err := exec.Command("ldd", where).Output()
	if exit := (&exec.ExitError{}); errors.As(err, &exit) {
		return nil // static
	} else if err != nil {
		return fmt.Errorf("libraries of %s: %w", name, err)
	}
	for _, word := range strings.Fields(string(out)) {
		if !strings.HasPrefix(word, "/") {
			continue
		}
		if err := r.copy(word, word); err != nil {
			return fmt.Errorf("libraries of %s: %w", name, err)
		}
	}
	return nil
}

// tree adds a file, or a folder and the files below it, if the host has it.
func (r *root) tree(from, as string) error {
	return filepath.WalkDir(from, func(name string, e fs.DirEntry, err error) error {
		switch {
		case errors.Is(err, fs.ErrNotExist) && name == from:
			return nil
		case err != nil:
			return err
		case !e.Type().IsRegular():
			return nil
		}
		return r.copy(name, as+strings.TrimPrefix(name, from))
	})
}

// write writes a cpio archive of the kind the kernel unpacks ("newc", see
// Documentation/driver-api/early-userspace/buffer-format.rst). It is not
// compressed: an emulated processor unpacks slowly.
func (r *root) write(w io.Writer) error {
	names := make([]string, 0, len(r.files))
	for name := range r.files {
		names = append(names, name)
	}
	slices.Sort(names) // a folder comes before what is in it
	buf := bufio.NewWriterSize(w, 1<<20)
	for i, name := range names {
		f := r.files[name]
		if err := entry(buf, i+1, name, unixMode(f.mode), f.body); err != nil {
			return err
		}
	}
	if err := entry(buf, 0, "TRAILER!!!", 0, nil); err != nil {
		return err
	}
	return buf.Flush()
}

func unixMode(m fs.FileMode) uint32 {
	kind := uint32(0o100000)
	switch {
	case m.IsDir():
		kind = 0o040000
	case m&fs.ModeSymlink != 0:
		kind = 0o120000
	}
	return kind | uint32(m.Perm())
}

// entry writes header and name, then the body, each padded to four bytes.
func entry(w io.Writer, inode int, name string, mode uint32, body []byte) error {
	header := "070701"
	for _, field := range []int{inode, int(mode), 0, 0, 1, 0, len(body), 0, 0, 0, 0, len(name) + 1, 0} {
		header += fmt.Sprintf("%08x", field)
	}
	head := header + name + "\x00"
	for _, part := range [][]byte{[]byte(head), padding(len(head)), body, padding(len(body))} {
		if _, err := w.Write(part); err != nil {
			return err
		}
	}
	return nil
}

func padding(n int) []byte { return make([]byte, (4-n%4)%4) }
