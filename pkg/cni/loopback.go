package cni

import (
	"errors"
	"io/fs"
	"net"
	"os"
	"path/filepath"

	"github.com/containernetworking/cni/pkg/types"
	types100 "github.com/containernetworking/cni/pkg/types/100"

	"meshd.dev/pkg/cni/rtnl"
)

// LoopbackType is the plugin that containerd before 2.0 calls for every pod,
// ahead of the network. Where nobody installed one, our binary under that name
// does what the stock one does: it sets lo up.
const LoopbackType = "loopback"

// loopbackVerbs are those of that plugin. The kernel takes lo away with the
// namespace, so there is nothing to undo.
func loopbackVerbs() verbs {
	nothing := func(*conf, *call) error { return nil }
	return verbs{add: addLoopback, del: nothing, check: nothing, gc: nothing, status: nothing}
}

func addLoopback(c *conf, cmd *call) error {
	ns, err := openNetns(cmd.netns)
	if err != nil {
		return err
	}
	defer ns.Close()
	if err := ns.visit(setLoopbackUp); err != nil {
		return err
	}
	lo := 0
	return types.PrintResult(&types100.Result{
		CNIVersion: types100.ImplementedSpecVersion,
		Interfaces: []*types100.Interface{{Name: "lo", Mac: "00:00:00:00:00:00", Sandbox: cmd.netns}},
		IPs: []*types100.IPConfig{
			{Interface: &lo, Address: net.IPNet{IP: net.IPv4(127, 0, 0, 1), Mask: net.CIDRMask(8, 32)}},
			{Interface: &lo, Address: net.IPNet{IP: net.IPv6loopback, Mask: net.CIDRMask(128, 128)}},
		},
	}, c.CNIVersion)
}

func setLoopbackUp() error {
	conn, err := rtnl.Open()
	if err != nil {
		return err
	}
	defer conn.Close()
	return conn.Do(rtnl.LinkSet{Index: loopback, Name: "lo", Up: true})
}

// InstallLoopback puts src into binDir as "loopback" as well, unless there is
// one already: that one belongs to somebody else, or is ours and current.
func InstallLoopback(src, binDir string) (changed bool, err error) {
	if same, err := equalFiles(src, filepath.Join(binDir, LoopbackType)); err == nil && same {
		return install(src, binDir, LoopbackType)
	}
	own, err := os.ReadFile(filepath.Join(binDir, LoopbackType))
	switch {
	case errors.Is(err, fs.ErrNotExist):
	case err != nil:
		return false, err
	case !builtHere(own):
		return false, nil
	}
	return install(src, binDir, LoopbackType)
}
