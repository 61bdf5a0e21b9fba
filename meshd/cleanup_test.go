package main

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// fresh moves this test to a network namespace of its own; it ends with the
// thread, which is not given back.
func fresh(t *testing.T) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	runtime.LockOSThread()
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		t.Fatal(err)
	}
}

func shell(t *testing.T, script string) string {
	t.Helper()
	out, err := exec.Command("sh", "-ec", script).CombinedOutput()
	if err != nil {
		t.Fatalf("%s\n%v: %s", script, err, out)
	}
	return string(out)
}

// try is shell that may fail.
func try(script string) error {
	out, err := exec.Command("sh", "-ec", script).CombinedOutput()
	if err != nil {
		return fmt.Errorf("%s: %w: %s", script, err, out)
	}
	return nil
}

// lived is a machine on which meshd was, beside things of others.
func lived(t *testing.T) (c *cleanup, dir string) {
	fresh(t)
	dir = t.TempDir()
	shell(t, `
		ip link set lo up
		ip link add msh0123456789ab type veth peer name eth0
		ip link add msher type veth peer name mine
		ip tuntap add mesh0 mode tun
		ip link set mesh0 up
		ip route add 10.244.2.0/24 dev mesh0 proto 77
		ip route add blackhole 10.244.0.0/16 metric 16777216 proto 77
		ip route add blackhole 10.99.0.0/16 proto 99
		ip -6 route add blackhole fd00:10:244::/48 metric 16777216 proto 77
		nft add table inet meshd
		nft add table inet other
		mkdir -p /run/wireguard/mesh0.d; cd /run/wireguard; touch mesh0.sock mesh0.lock mesh0-next.lock mesh0.d/second wg0.sock
		cd `+dir+`; mkdir -p net.d bin state/node run
		echo meshd.dev/pkg/cni > bin/mesh; echo somebody else > bin/loopback; echo x > bin/bridge
		echo {} > net.d/10-meshd.conflist; echo {} > net.d/20-other.conflist
		touch state/lock state/node/wireguard.key run/meshd.sock
	`)
	return &cleanup{dataDir: dir + "/state", runDir: dir + "/run", cniConfDir: dir + "/net.d", cniBinDirs: []string{dir + "/bin", "/nowhere"}}, dir
}

func TestCleanup(t *testing.T) {
	c, dir := lived(t)
	var out strings.Builder
	if err := c.run(&out); err == nil || !strings.Contains(err.Error(), "2 pods are attached to the network of meshd") || out.Len() > 0 {
		t.Fatalf("with pods: %v\n%s", err, out.String())
	}
	shell(t, "ip link delete msher") // one too many by its prefix; pods' links are named by a hash
	want := strings.ReplaceAll(`# 1 pods are attached to the network of meshd and would lose it (msh0123456789ab): drain this machine first
rm DIR/net.d/10-meshd.conflist
ip link delete msh0123456789ab
rm DIR/bin/mesh
ip link delete mesh0
ip route flush table all proto 77; ip -6 route flush table all proto 77
nft delete table inet meshd
rm /var/run/wireguard/mesh0.sock
rm /var/run/wireguard/mesh0.lock
rm /var/run/wireguard/mesh0-next.lock
rm -r /var/run/wireguard/mesh0.d
rm -r DIR/run
`, "DIR", dir)
	for _, try := range []struct {
		name        string
		dryRun, all bool
	}{{"dry run", true, false}, {"done", false, false}, {"with state", false, true}} {
		out.Reset()
		c.force, c.dryRun, c.all = true, try.dryRun, try.all
		if err := c.run(&out); err != nil {
			t.Fatalf("%s: %v", try.name, err)
		}
		if try.all {
			want = "rm -r " + dir + "/state\n"
		}
		if out.String() != want {
			t.Errorf("%s:\n%s\nwant\n%s", try.name, out.String(), want)
		}
	}
	out.Reset()
	if err := c.run(&out); err != nil || out.String() != "# nothing of meshd is here\n" {
		t.Errorf("once more: %v %s", err, out.String())
	}
	left := shell(t, "ip -br link; ip route show table all; ip -6 route show table all; nft list tables; find "+dir+" -type f -printf '%P\n'; ls /run/wireguard")
	for _, ours := range []string{"mesh", "proto 77"} {
		if strings.Contains(left, ours) {
			t.Errorf("%q is still here:\n%s", ours, left)
		}
	}
	for _, theirs := range []string{"blackhole 10.99.0.0/16", "table inet other", "net.d/20-other.conflist", "bin/bridge", "bin/loopback", "wg0.sock"} {
		if !strings.Contains(left, theirs) {
			t.Errorf("%q is gone:\n%s", theirs, left)
		}
	}
}

func TestCleanupWaitsForMeshd(t *testing.T) {
	c, dir := lived(t)
	shell(t, "ip link delete msh0123456789ab; ip link delete msher")
	f, err := os.OpenFile(filepath.Join(dir, "state", "lock"), os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX); err != nil {
		t.Fatal(err)
	}
	var out strings.Builder
	if err := c.run(&out); err == nil || !strings.Contains(err.Error(), "meshd runs on this machine") {
		t.Errorf("%v\n%s", err, out.String())
	}
	if _, err := os.Stat(filepath.Join(dir, "net.d", "10-meshd.conflist")); err != nil {
		t.Error("refused, and yet something is gone:", err)
	}
}

// What could not be unmounted keeps what is on it.
func TestCleanupLeavesMountsWhole(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	dir := filepath.Join(t.TempDir(), "state")
	disk := filepath.Join(dir, "volumes")
	if err := os.MkdirAll(disk, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("tmpfs", disk, "tmpfs", 0, ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Unmount(disk, unix.MNT_DETACH) })
	data := filepath.Join(disk, "data")
	if err := os.WriteFile(data, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, tr := range folder(dir) {
		if err := tr.Remove(); err == nil || !strings.Contains(err.Error(), disk+" is mounted") {
			t.Errorf("%s: %v", tr, err)
		}
	}
	if _, err := os.Stat(data); err != nil {
		t.Error("data of another disk is gone:", err)
	}
}

func TestMountsBelow(t *testing.T) {
	all, err := mountsBelow("")
	if err != nil || !slices.Contains(all, "/proc") {
		t.Errorf("%v, %v", all, err)
	}
	if none, err := mountsBelow("/pro"); err != nil || len(none) > 0 {
		t.Errorf("mounts below a name that is the beginning of another: %v, %v", none, err)
	}
}
