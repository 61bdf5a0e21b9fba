package main

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"meshd.dev/pkg/cni"
	"meshd.dev/pkg/datapath"
	"meshd.dev/pkg/datapath/wireguard"
	"meshd.dev/pkg/mesh"
)

// cleanup says what of meshd is to go from this machine.
type cleanup struct {
	dataDir, runDir          string
	cniConfDir               string
	cniBinDirs               []string
	all, force, dryRun, stay bool
}

func cleanupCommand() *cobra.Command {
	c := &cleanup{}
	cmd := &cobra.Command{
		Use:   "cleanup",
		Short: "Take every trace of meshd off this machine",
		Long: `Cleanup removes what meshd leaves on a machine when it ends: the network
configuration for the container runtime, links of pods, tunnels, routes, the nft
table, the CNI plugin; with --all also keys, addresses and all other state. It
prints each step as the command a person would type.

It refuses while meshd runs here, and while pods are attached to its network:
they would be cut off. Stop meshd, move the pods away, and have the next network
installed first. The switch for forwarding packets (net.ipv4.ip_forward) stays
on: others may need it. So does the reservation of the tunnels' ports
(net.ipv4.ip_local_reserved_ports).`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := c.run(cmd.OutOrStdout()); err != nil || !c.stay {
				return err
			}
			<-cmd.Context().Done()
			return nil
		},
	}
	f := cmd.Flags()
	f.StringVar(&c.dataDir, "data-dir", "/var/lib/meshd", "folder of all state")
	f.StringVar(&c.runDir, "run-dir", "/run/meshd", "folder of sockets")
	f.StringVar(&c.cniConfDir, "cni-conf-dir", "/etc/cni/net.d", "folder the container runtime reads network configurations from")
	f.StringSliceVar(&c.cniBinDirs, "cni-bin-dir", []string{"/opt/cni/bin", "/usr/lib/cni"}, "folders the plugin may be in")
	f.BoolVar(&c.all, "all", false, "remove state as well: keys, addresses, a server's whole cluster, data of volumes")
	f.BoolVar(&c.force, "force", false, "go on although meshd runs or pods are attached")
	f.BoolVar(&c.dryRun, "dry-run", false, "print what would be done and do nothing")
	f.BoolVar(&c.stay, "stay", false, "wait for a signal afterwards; for a DaemonSet")
	return cmd
}

// trace is something to remove, printed as the command for it.
type trace interface {
	String() string
	Remove() error
}

// run removes in order and goes on after what fails.
func (c *cleanup) run(out io.Writer) error {
	if err := c.allowed(); err != nil {
		if !c.force && !c.dryRun {
			return fmt.Errorf("%w (--force goes on)", err)
		}
		fmt.Fprintln(out, "#", err)
	}
	traces, err := c.traces()
	if err != nil {
		return err
	}
	var errs []error
	for _, t := range traces {
		fmt.Fprintln(out, t)
		if c.dryRun {
			continue
		}
		if err := t.Remove(); err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", t, err))
		}
	}
	if len(traces) == 0 {
		fmt.Fprintln(out, "# nothing of meshd is here")
	}
	return errors.Join(errs...)
}

func (c *cleanup) allowed() error {
	held, err := stateLocked(c.dataDir)
	if err != nil {
		return err
	}
	if held {
		return fmt.Errorf("meshd runs on this machine (it holds %s/lock) and would make everything again: stop it first", c.dataDir)
	}
	links, err := cni.Links()
	if err != nil {
		return err
	}
	if len(links) > 0 {
		return fmt.Errorf("%d pods are attached to the network of meshd and would lose it (%s): drain this machine first", len(links), strings.Join(links, " "))
	}
	return nil
}

func (c *cleanup) traces() ([]trace, error) {
	var all []trace
	conflists, err := filepath.Glob(filepath.Join(c.cniConfDir, "*"+conflistSuffix))
	if err != nil {
		return nil, err
	}
	fromCNI, err := cni.Traces(conflists, c.cniBinDirs...)
	if err != nil {
		return nil, err
	}
	for _, t := range fromCNI {
		all = append(all, t)
	}
	kernel, err := datapath.Traces(mesh.Device)
	if err != nil {
		return nil, err
	}
	for _, t := range kernel {
		all = append(all, t)
	}
	for _, device := range []string{mesh.Device, mesh.Device + mesh.SecondSuffix} {
		all = append(all, file(wireguard.SocketPath(device))...)
		all = append(all, file(wireguard.LockPath(device))...)
	}
	all = append(all, folder(filepath.Dir(wireguard.AskPath(mesh.Device)))...)
	for _, d := range dropIns {
		all = append(all, d.traces()...)
	}
	all = append(all, folder(c.runDir)...)
	if !c.all {
		return all, nil
	}
	mounts, err := mountsBelow(c.dataDir)
	if err != nil {
		return nil, err
	}
	for _, m := range mounts {
		if m == c.dataDir {
			continue // a container's door to it
		}
		all = append(all, removal{"umount " + m, func() error { return unix.Unmount(m, unix.MNT_DETACH) }})
	}
	return append(all, folder(c.dataDir)...), nil
}

// removal of a file, a folder or a mount.
type removal struct {
	text string
	do   func() error
}

func (r removal) String() string { return r.text }
func (r removal) Remove() error  { return r.do() }

func file(path string) []trace {
	if _, err := os.Lstat(path); err != nil {
		return nil
	}
	return []trace{removal{"rm " + path, func() error {
		if err := os.Remove(path); !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		return nil
	}}}
}

// folder and all in it. One that is a mount point itself, as in a container,
// stays and is emptied.
func folder(path string) []trace {
	entries, err := os.ReadDir(path)
	if err != nil {
		return nil
	}
	if !mountPoint(path) {
		return []trace{removal{"rm -r " + path, func() error { return removeAll(path) }}}
	}
	var all []trace
	for _, e := range entries {
		p := filepath.Join(path, e.Name())
		all = append(all, removal{"rm -r " + p, func() error { return removeAll(p) }})
	}
	return all
}

// removeAll leaves everything where it is while something is mounted in it:
// what is on another disk is not ours to delete.
func removeAll(path string) error {
	mounts, err := mountsBelow(path)
	if err != nil {
		return err
	}
	if len(mounts) > 0 {
		return fmt.Errorf("%s is mounted: unmount it first, or what is on it would go as well", strings.Join(mounts, ", "))
	}
	return os.RemoveAll(path)
}

func mountPoint(path string) bool {
	list, err := mountsBelow(path)
	return err == nil && slices.Contains(list, path)
}

// mountsBelow lists mount points at path and below it, the innermost first.
func mountsBelow(path string) ([]string, error) {
	f, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return nil, err
	}
	defer f.Close()
	var list []string
	for s := bufio.NewScanner(f); s.Scan(); {
		fields := strings.Fields(s.Text())
		if len(fields) < 5 {
			continue
		}
		at := octal.Replace(fields[4])
		if at == path || strings.HasPrefix(at, path+"/") {
			list = append(list, at)
		}
	}
	slices.Sort(list)
	slices.Reverse(list)
	return list, nil
}

// octal undoes how the kernel writes what would break a line of mountinfo.
var octal = strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`)

// stateLocked reports whether a meshd works on a state folder.
func stateLocked(dir string) (bool, error) {
	fd, err := unix.Open(filepath.Join(dir, "lock"), unix.O_RDWR|unix.O_CLOEXEC, 0)
	if errors.Is(err, unix.ENOENT) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("state folder: open %s/lock: %w", dir, err)
	}
	defer unix.Close(fd)
	return unix.Flock(fd, unix.LOCK_EX|unix.LOCK_NB) != nil, nil
}
