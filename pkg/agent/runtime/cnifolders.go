package runtime

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"

	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// CNIFolders asks the runtime on socket which folders it reads network
// configurations and runs plugins from. containerd tells them in the verbose
// form of its status; a runtime that does not gives ErrNoFolders.
func CNIFolders(ctx context.Context, socket string) (confDir, binDir string, err error) {
	c, err := Dial(socket)
	if err != nil {
		return "", "", err
	}
	defer c.conn.Close()
	ctx, cancel := context.WithTimeout(ctx, quick)
	defer cancel()
	resp, err := c.rt.Status(ctx, &cri.StatusRequest{Verbose: true})
	if err != nil {
		return "", "", fmt.Errorf("status of runtime %s: %w", socket, err)
	}
	return parseFolders(resp.GetInfo()["config"])
}

// ErrNoFolders says that the runtime keeps its CNI folders to itself.
var ErrNoFolders = errors.New("the runtime does not say where its CNI folders are")

func parseFolders(config string) (confDir, binDir string, err error) {
	var c struct {
		CNI struct {
			ConfDir string   `json:"confDir"`
			BinDir  string   `json:"binDir"`
			BinDirs []string `json:"binDirs"` // containerd 2.1 and later
		} `json:"cni"`
	}
	if config == "" || json.Unmarshal([]byte(config), &c) != nil {
		return "", "", ErrNoFolders
	}
	if c.CNI.BinDir == "" && len(c.CNI.BinDirs) > 0 {
		c.CNI.BinDir = c.CNI.BinDirs[0]
	}
	if c.CNI.ConfDir == "" || c.CNI.BinDir == "" {
		return "", "", ErrNoFolders
	}
	return c.CNI.ConfDir, c.CNI.BinDir, nil
}
