package vm

import (
	"archive/tar"
	"bytes"
	"context"
	"debug/elf"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"slices"
	"strings"
)

// KernelEnv names a kernel package (.deb) to use instead of what FindKernel
// would find.
const KernelEnv = "MESHD_VM_KERNEL"

// KernelFolders are where a kernel package is looked for, in this order.
var KernelFolders = []string{"/var/cache/meshd", "/var/cache/apt/archives"}

const kernelPattern = "linux-image-[0-9]*-cloud-amd64_*.deb"

// ErrNoKernel: there is no kernel package on this host.
var ErrNoKernel = errors.New("no kernel package " + kernelPattern)

// FindKernel is the path of the kernel package to boot.
func FindKernel() (string, error) {
	if p := os.Getenv(KernelEnv); p != "" {
		return p, nil
	}
	for _, dir := range KernelFolders {
		found, _ := filepath.Glob(filepath.Join(dir, kernelPattern))
		if len(found) > 0 {
			slices.Sort(found)
			return found[len(found)-1], nil
		}
	}
	return "", fmt.Errorf("%w in %s", ErrNoKernel, strings.Join(KernelFolders, ", "))
}

// A Kernel is an image to boot and the modules that belong to it.
type Kernel struct {
	Image   []byte
	modules map[string][]byte // by name, dashes as underscores
}

// moduleFolders are below /lib/modules/<release>/kernel; the rest of the
// package is sound cards and the like.
var moduleFolders = []string{"net", "crypto", "lib", "arch/x86/crypto", "drivers/net"}

// ReadKernel takes image and network modules out of a Debian kernel package.
func ReadKernel(ctx context.Context, deb string) (*Kernel, error) {
	cmd := exec.CommandContext(ctx, "dpkg-deb", "--fsys-tarfile", deb)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("read kernel package: %w", err)
	}
	k, err := unpackKernel(tar.NewReader(out))
	_, _ = io.Copy(io.Discard, out) // lets dpkg-deb end by itself
	if err = errors.Join(err, cmd.Wait()); err != nil {
		return nil, fmt.Errorf("read kernel package %s: %w\n%s", deb, err, stderr.Bytes())
	}
	return k, nil
}

func unpackKernel(r *tar.Reader) (*Kernel, error) {
	k := &Kernel{modules: map[string][]byte{}}
	for {
		h, err := r.Next()
		if err == io.EOF {
			break
		}
		if err != nil {
			return nil, err
		}
		name := path.Clean("/" + h.Name)
		image := strings.HasPrefix(name, "/boot/vmlinuz-")
		if !image && !networkModule(name) {
			continue
		}
		b, err := io.ReadAll(r)
		if err != nil {
			return nil, err
		}
		if image {
			k.Image = b
		} else {
			k.modules[moduleName(name)] = b
		}
	}
	if k.Image == nil || len(k.modules) == 0 {
		return nil, errors.New("no /boot/vmlinuz-* or no uncompressed modules in it")
	}
	return k, nil
}

func networkModule(name string) bool {
	if !strings.HasSuffix(name, ".ko") {
		return false
	}
	_, below, ok := strings.Cut(name, "/kernel/")
	return ok && slices.ContainsFunc(moduleFolders, func(dir string) bool { return strings.HasPrefix(below, dir+"/") })
}

// moduleName is how the kernel calls the module in a file.
func moduleName(file string) string {
	return strings.ReplaceAll(strings.TrimSuffix(path.Base(file), ".ko"), "-", "_")
}

// Load lists the modules to load so that all the wanted ones work, each after
// those it depends on.
func (k *Kernel) Load(wanted ...string) ([]string, error) {
	var order []string
	seen := map[string]bool{}
	var visit func(string) error
	visit = func(name string) error {
		if seen[name] {
			return nil
		}
		seen[name] = true
		b, ok := k.modules[name]
		if !ok {
			return fmt.Errorf("kernel has no module %s", name)
		}
		needs, err := depends(b)
		if err != nil {
			return fmt.Errorf("module %s: %w", name, err)
		}
		for _, n := range needs {
			if err := visit(n); err != nil {
				return fmt.Errorf("%w, which %s needs", err, name)
			}
		}
		order = append(order, name)
		return nil
	}
	for _, name := range wanted {
		if err := visit(name); err != nil {
			return nil, err
		}
	}
	return order, nil
}

// depends reads what a module needs from its .modinfo section.
func depends(module []byte) ([]string, error) {
	f, err := elf.NewFile(bytes.NewReader(module))
	if err != nil {
		return nil, err
	}
	section := f.Section(".modinfo")
	if section == nil {
		return nil, errors.New("no .modinfo section")
	}
	b, err := section.Data()
	if err != nil {
		return nil, err
	}
	for _, field := range strings.Split(string(b), "\x00") {
		if list, ok := strings.CutPrefix(field, "depends="); ok && list != "" {
			return strings.Split(strings.ReplaceAll(list, "-", "_"), ","), nil
		}
	}
	return nil, nil
}
