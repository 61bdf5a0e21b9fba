package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"meshd.dev/pkg/durable"
)

// dropIn is a file that tells a network manager of the machine to leave our
// links alone. It matters when the manager starts anew, or is told to look
// after every link there is.
type dropIn struct {
	dir, name, text string
}

func (d dropIn) path() string { return filepath.Join(d.dir, d.name) }

var dropIns = []dropIn{
	{"/etc/systemd/network", "00-meshd.network", `# Written by meshd: links of pods and tunnels are its own.
[Match]
Name=mesh0* msh*

[Link]
Unmanaged=yes
`},
	{"/etc/NetworkManager/conf.d", "00-meshd.conf", `# Written by meshd: links of pods and tunnels are its own.
[keyfile]
unmanaged-devices+=interface-name:mesh0*;interface-name:msh*
`},
}

// installDropIns writes those whose manager is here, which its folder says.
func installDropIns(list []dropIn) (written []string, err error) {
	var errs []error
	for _, d := range list {
		if info, err := os.Stat(d.dir); err != nil || !info.IsDir() {
			continue
		}
		changed, err := durable.WriteFileIfChanged(d.path(), []byte(d.text), 0o644)
		if err != nil {
			errs = append(errs, fmt.Errorf("leave our links alone: %w", err))
		}
		if changed {
			written = append(written, d.path())
		}
	}
	return written, errors.Join(errs...)
}

// hostConfig has the machine's own network managers leave our links alone.
// That it cannot be written is not worth a stop: what they remove comes back.
func (n *node) hostConfig() {
	written, err := installDropIns(dropIns)
	if err != nil {
		n.log.Warn("network managers of this machine", "err", err)
	}
	if len(written) > 0 {
		n.log.Info("network managers of this machine are told to leave our links alone; they read it when they start, or on `networkctl reload` and `nmcli general reload conf`", "wrote", written)
	}
}
