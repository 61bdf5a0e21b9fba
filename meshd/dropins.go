package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"meshd.dev/pkg/durable"
)

// dropIn is a file that tells a network manager of the machine to leave alone
// what is ours. It matters when the manager starts anew, or is told to look
// after every link there is.
type dropIn struct {
	reader    string // a folder that is there where the manager is
	dir, name string
	text      string
}

func (d dropIn) path() string { return filepath.Join(d.dir, d.name) }

var dropIns = []dropIn{
	{"/etc/systemd/network", "/etc/systemd/network", "00-meshd.network", `# Written by meshd: links of pods and tunnels are its own.
[Match]
Name=mesh0* msh*

[Link]
Unmanaged=yes
`},
	// Our blackholes have no link by which they could be left alone: networkd
	// removes them with the first link that it sets up, whichever that is, at
	// boot too, and nothing stands then between programs and the underlay.
	{"/etc/systemd/network", "/etc/systemd/networkd.conf.d", "00-meshd.conf", `# Written by meshd: routes that networkd did not make stay, such as those that
# keep what is sent to pods from leaving in clear.
[Network]
ManageForeignRoutes=no
`},
	{"/etc/NetworkManager/conf.d", "/etc/NetworkManager/conf.d", "00-meshd.conf", `# Written by meshd: links of pods and tunnels are its own.
[keyfile]
unmanaged-devices+=interface-name:mesh0*;interface-name:msh*
`},
}

// installDropIns writes those whose manager is here.
func installDropIns(list []dropIn) (written []string, err error) {
	var errs []error
	for _, d := range list {
		if info, err := os.Stat(d.reader); err != nil || !info.IsDir() {
			continue
		}
		changed, err := d.write()
		if err != nil {
			errs = append(errs, fmt.Errorf("leave alone what is ours: %w", err))
		}
		if changed {
			written = append(written, d.path())
		}
	}
	return written, errors.Join(errs...)
}

func (d dropIn) write() (changed bool, err error) {
	if err := os.MkdirAll(d.dir, 0o755); err != nil {
		return false, err
	}
	return durable.WriteFileIfChanged(d.path(), []byte(d.text), 0o644)
}

// traces are the file, and its folder where it is ours alone.
func (d dropIn) traces() []trace {
	all := file(d.path())
	entries, err := os.ReadDir(d.dir)
	if d.dir == d.reader || err != nil || len(entries) > 1 || len(entries) != len(all) || mountPoint(d.dir) {
		return all
	}
	return append(all, removal{"rmdir " + d.dir, func() error { return os.Remove(d.dir) }})
}

// hostConfig has the machine's own network managers leave alone what is ours.
// That it cannot be written is not worth a stop: what they remove comes back.
func (n *node) hostConfig() {
	written, err := installDropIns(dropIns)
	if err != nil {
		n.log.Warn("network managers of this machine", "err", err)
	}
	if len(written) > 0 {
		n.log.Info("network managers of this machine are told to leave alone what is ours; they read it when they start (of links also on `networkctl reload` and `nmcli general reload conf`)", "wrote", written)
	}
}
