package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"time"

	"github.com/containernetworking/cni/libcni"
)

// stock is what a machine without us would attach its pods with. The figure is
// for IPv4 alone; ours attaches both families.
const stock = `{"cniVersion": "1.0.0", "name": "stock", "plugins": [
 {"type": "bridge", "bridge": "bench0", "isGateway": true,
  "ipam": {"type": "host-local", "ranges": [[{"subnet": "10.250.0.0/16"}]], "routes": [{"dst": "0.0.0.0/0"}]}}]}`

// conflistPath is where meshd leaves its configuration for the runtime.
const conflistPath = "/etc/cni/net.d/10-meshd.conflist"

// times of one plugin.
type times struct{ Add, Del []time.Duration }

// attachInside runs in a machine: n times each, in shuffled order, it attaches
// a namespace and detaches it again, and prints the times as JSON.
func attachInside(ctx context.Context, args []string) error {
	if len(args) != 1 {
		return errors.New("cni: want the number of rounds")
	}
	n, err := strconv.Atoi(args[0])
	if err != nil {
		return err
	}
	lists := map[string]*libcni.NetworkConfigList{}
	if lists["mesh"], err = libcni.ConfListFromFile(conflistPath); err != nil {
		return err
	}
	if lists["stock"], err = libcni.ConfListFromBytes([]byte(stock)); err != nil {
		return err
	}
	cache, err := os.MkdirTemp("", "bench-cni-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(cache)
	runtime := libcni.NewCNIConfigWithCacheDir([]string{"/opt/cni/bin", "/usr/lib/cni"}, cache, nil)
	all := map[string]*times{"mesh": {}, "stock": {}}
	for i := range n {
		names := []string{"mesh", "stock"}
		rand.Shuffle(2, func(i, j int) { names[i], names[j] = names[j], names[i] })
		for _, name := range names {
			if err := once(ctx, runtime, lists[name], fmt.Sprintf("bench-%s-%d", name, i), all[name]); err != nil {
				return fmt.Errorf("%s: %w", name, err)
			}
		}
	}
	return json.NewEncoder(os.Stdout).Encode(all)
}

// once attaches and detaches one new namespace.
func once(ctx context.Context, runtime *libcni.CNIConfig, list *libcni.NetworkConfigList, id string, t *times) (err error) {
	if out, err := exec.CommandContext(ctx, "ip", "netns", "add", id).CombinedOutput(); err != nil {
		return fmt.Errorf("make namespace: %w: %s", err, out)
	}
	defer func() {
		out, e := exec.CommandContext(ctx, "ip", "netns", "del", id).CombinedOutput()
		if e != nil {
			err = errors.Join(err, fmt.Errorf("remove namespace: %w: %s", e, out))
		}
	}()
	rt := &libcni.RuntimeConf{ContainerID: id, NetNS: filepath.Join("/run/netns", id), IfName: "eth0",
		Args: [][2]string{{"IgnoreUnknown", "1"}, {"K8S_POD_NAMESPACE", "bench"}, {"K8S_POD_NAME", id}}}
	start := time.Now()
	if _, err := runtime.AddNetworkList(ctx, list, rt); err != nil {
		return fmt.Errorf("ADD: %w", err)
	}
	t.Add = append(t.Add, time.Since(start))
	start = time.Now()
	if err := runtime.DelNetworkList(ctx, list, rt); err != nil {
		return fmt.Errorf("DEL: %w", err)
	}
	t.Del = append(t.Del, time.Since(start))
	return nil
}

func rowsOfAttach(out string) ([]row, error) {
	var all map[string]*times
	if err := json.Unmarshal([]byte(out), &all); err != nil {
		return nil, err
	}
	mesh, stock := all["mesh"], all["stock"]
	if mesh == nil || stock == nil {
		return nil, fmt.Errorf("cni: no times in %q", out)
	}
	line := func(what string, a, b []time.Duration) row {
		return row{what, ms(quantile(a, .5)) + " p50", ms(quantile(b, .5)) + " bridge+host-local",
			fmt.Sprintf("p90 %s against %s of %d; ours dual stack, theirs IPv4", ms(quantile(a, .9)), ms(quantile(b, .9)), len(a))}
	}
	return []row{line("CNI ADD", mesh.Add, stock.Add), line("CNI DEL", mesh.Del, stock.Del)}, nil
}
