package netlab

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"

	"golang.org/x/sys/unix"
)

// bootOrder is what a machine's first process must know.
type bootOrder struct {
	Hostname string      `json:"hostname"`
	Dir      string      `json:"dir"`   // the machine's folder on the host
	Group    string      `json:"group"` // its cgroup in every hierarchy
	Cgroups  []hierarchy `json:"cgroups"`
	Binaries string      `json:"binaries,omitempty"` // shown as /usr/local/bin
	BootID   string      `json:"bootID,omitempty"`   // empty: the host's
	System   *System     `json:"system,omitempty"`   // nil: the first process only buries the dead
}

// What of a machine is on its disk and so outlives a power cut, as disk/NAME
// of its folder. All the rest is memory or the host's, read-only.
var diskFolders = map[string]string{
	"etc": "/etc", "var": "/var", "opt": "/opt", "srv": "/srv", "root": "/root", "home": "/home", "local": "/usr/local",
}

// power starts the first process of a machine inside its cgroups and new
// namespaces, waits until it is up, and prints its process id. It goes between
// because a cgroup namespace begins at the group of whoever makes it, and
// because the machine must not be a child of the program that wanted it.
func power(arg string) error {
	var o bootOrder
	if err := json.Unmarshal([]byte(arg), &o); err != nil {
		return err
	}
	if err := joinGroups(o.Cgroups, o.Group, false); err != nil {
		return err
	}
	up, done, err := os.Pipe()
	if err != nil {
		return err
	}
	cmd := helper(bootName, o)
	cmd.ExtraFiles = []*os.File{done}
	cmd.Stderr = os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Setsid: true,
		Cloneflags: unix.CLONE_NEWNS | unix.CLONE_NEWPID | unix.CLONE_NEWNET |
			unix.CLONE_NEWUTS | unix.CLONE_NEWIPC | unix.CLONE_NEWCGROUP,
	}
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("start first process: %w", err)
	}
	done.Close()
	if n, _ := up.Read(make([]byte, 2)); n == 0 {
		_ = cmd.Wait()
		return errors.New("the first process ended before the machine was up")
	}
	fmt.Println(cmd.Process.Pid)
	return nil
}

// boot is process 1 of a machine: it makes the machine's file systems, says
// that it is up, and then only buries the dead, or makes room for the machine's
// own system.
func boot(arg string) error {
	var o bootOrder
	if err := json.Unmarshal([]byte(arg), &o); err != nil {
		return err
	}
	up := os.NewFile(3, "up")
	dead := make(chan os.Signal, 16)
	if o.System == nil {
		signal.Ignore(syscall.SIGTERM, syscall.SIGINT, syscall.SIGHUP, syscall.SIGPIPE)
		signal.Notify(dead, syscall.SIGCHLD)
	}
	if err := unix.Sethostname([]byte(o.Hostname)); err != nil {
		return fmt.Errorf("set host name: %w", err)
	}
	if err := makeRoot(o); err != nil {
		return err
	}
	if err := loopbackUp(); err != nil {
		return err
	}
	if _, err := up.WriteString("up"); err != nil {
		return err
	}
	up.Close()
	if o.System != nil {
		return o.System.start()
	}
	for range dead {
		bury()
	}
	return nil
}

// bury waits for every child that has ended.
func bury() {
	for {
		pid, err := unix.Wait4(-1, nil, unix.WNOHANG, nil)
		if err != nil || pid <= 0 {
			return
		}
	}
}

// A mount is one line of a machine's fstab.
type mount struct {
	source, target, fstype string
	flags                  uintptr
	options                string
}

func (m mount) String() string {
	return fmt.Sprintf("mount -t %s -o %s %s %s", m.fstype, m.options, m.source, m.target)
}

func (m mount) do(root string) error {
	target := filepath.Join(root, m.target)
	if m.flags&unix.MS_REMOUNT == 0 {
		if err := os.MkdirAll(target, 0o755); err != nil {
			return err
		}
	}
	if err := unix.Mount(m.source, target, m.fstype, m.flags, m.options); err != nil {
		return fmt.Errorf("%s: %w", m, err)
	}
	return nil
}

// makeRoot builds the machine's file systems and makes them its root.
func makeRoot(o bootOrder) error {
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("take mounts off the host's: %w", err)
	}
	root := filepath.Join(o.Dir, "root")
	if err := (mount{"tmpfs", "/", "tmpfs", 0, "mode=755,size=256m"}).do(root); err != nil {
		return err
	}
	if err := showHost(root); err != nil {
		return err
	}
	if o.System != nil {
		if err := o.System.programs(root); err != nil {
			return err
		}
	}
	for _, m := range fstab(o) {
		if err := m.do(root); err != nil {
			return err
		}
	}
	if o.System != nil {
		if err := errors.Join(makeDevices(root), readOnlySettings(root)); err != nil {
			return err
		}
	}
	if err := fixedFiles(root, o); err != nil {
		return err
	}
	return pivot(root)
}

// showHost puts the host's programs and libraries into root, read-only: /usr
// and whichever of /bin, /sbin, /lib… are links into it or folders of their own.
func showHost(root string) error {
	for _, name := range []string{"/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32"} {
		if to, err := os.Readlink(name); err == nil {
			if err := os.Symlink(to, root+name); err != nil {
				return err
			}
			continue
		}
		if _, err := os.Stat(name); err != nil {
			continue
		}
		for _, m := range []mount{
			{name, name, "", unix.MS_BIND | unix.MS_REC, ""},
			{"", name, "", unix.MS_BIND | unix.MS_REMOUNT | unix.MS_RDONLY, ""},
		} {
			if err := m.do(root); err != nil {
				return err
			}
		}
	}
	return nil
}

// fstab lists what a machine mounts over the host's programs, in order.
func fstab(o bootOrder) []mount {
	var ms []mount
	for name, target := range diskFolders {
		ms = append(ms, mount{filepath.Join(o.Dir, "disk", name), target, "", unix.MS_BIND, ""})
	}
	if o.Binaries != "" {
		ms = append(ms, mount{o.Binaries, "/usr/local/bin", "", unix.MS_BIND, ""},
			mount{"", "/usr/local/bin", "", unix.MS_BIND | unix.MS_REMOUNT | unix.MS_RDONLY, ""})
	}
	dev := mount{"/dev", "/dev", "", unix.MS_BIND, ""}
	if o.System != nil {
		dev = mount{"tmpfs", "/dev", "tmpfs", unix.MS_NOSUID, "mode=755,size=4m"}
	}
	ms = append(ms,
		mount{"proc", "/proc", "proc", 0, ""},
		mount{"sysfs", "/sys", "sysfs", 0, ""},
		dev,
		mount{"devpts", "/dev/pts", "devpts", 0, "newinstance,ptmxmode=0666,mode=0620"},
		mount{"tmpfs", "/dev/shm", "tmpfs", 0, "size=64m"},
		mount{"tmpfs", "/run", "tmpfs", 0, "mode=755,size=256m"},
		mount{"tmpfs", "/tmp", "tmpfs", 0, "mode=1777,size=512m"},
	)
	return append(ms, cgroupMounts(o.Cgroups)...)
}

// cgroupMounts shows the machine its own cgroup as the root of every hierarchy.
// The empty v2 beside v1 is left out: some runtimes refuse that mixture.
func cgroupMounts(hs []hierarchy) []mount {
	if unified(hs) {
		return []mount{{"cgroup2", "/sys/fs/cgroup", "cgroup2", 0, ""}}
	}
	ms := []mount{{"tmpfs", "/sys/fs/cgroup", "tmpfs", 0, "mode=755"}}
	for _, h := range hs {
		if !h.V2 {
			ms = append(ms, mount{"cgroup", h.Path, "cgroup", 0, h.Options})
		}
	}
	return ms
}

// fixedFiles makes what a machine expects of a fresh boot. The kernel's boot id
// is the same for all; the file over it makes every power cycle a new boot.
func fixedFiles(root string, o bootOrder) error {
	for _, dir := range []string{"/run/lock", "/run/netns", "/mnt", "/media", "/boot"} {
		if err := os.MkdirAll(root+dir, 0o755); err != nil {
			return err
		}
	}
	if unified(o.Cgroups) {
		if err := os.WriteFile(root+"/sys/fs/cgroup/"+leaf+"/cgroup.procs", []byte("0"), 0o644); err != nil {
			return fmt.Errorf("enter cgroup: %w", err)
		}
	}
	if o.BootID == "" {
		return nil
	}
	if err := os.WriteFile(root+"/run/boot_id", []byte(o.BootID+"\n"), 0o444); err != nil {
		return err
	}
	if err := unix.Mount(root+"/run/boot_id", root+"/proc/sys/kernel/random/boot_id", "", unix.MS_BIND, ""); err != nil {
		return fmt.Errorf("give the boot an id of its own: %w", err)
	}
	return nil
}

// pivot makes root the root and lets go of the host's.
func pivot(root string) error {
	old := filepath.Join(root, "old")
	if err := os.Mkdir(old, 0o700); err != nil {
		return err
	}
	if err := unix.PivotRoot(root, old); err != nil {
		return fmt.Errorf("pivot_root: %w", err)
	}
	if err := os.Chdir("/"); err != nil {
		return err
	}
	if err := unix.Unmount("/old", unix.MNT_DETACH); err != nil {
		return fmt.Errorf("let go of the host's root: %w", err)
	}
	if err := os.Remove("/old"); err != nil {
		return err
	}
	return unix.Mount("", "/", "", unix.MS_REC|unix.MS_SHARED, "")
}
