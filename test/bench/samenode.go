package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"time"

	"github.com/cilium/ebpf"
	ebpflink "github.com/cilium/ebpf/link"
	"github.com/containernetworking/cni/libcni"
	types100 "github.com/containernetworking/cni/pkg/types/100"

	"meshd.dev/test/story"
)

// hop is a run of 64-byte packets between two pods of one machine.
type hop struct {
	Rate float64 // thousand packets a second that arrived
	CPU  float64 // microseconds a packet, of sender, receiver and what the kernel did for them
}

// The ways between two pods: ours with the shortcut, ours through the machine's
// stack, and that of the bridge plugin.
var ways = []string{"mesh", "long", "stock"}

// sameNode compares the ways between two pods of m1.
func sameNode(ctx context.Context, w *story.World, o options) ([]row, error) {
	out, err := w.Machine("m1").Run(ctx, "/usr/local/bin/bench", "samenode", fmt.Sprint(o.rounds))
	if err != nil {
		return nil, err
	}
	var all map[string][]hop
	if err := json.Unmarshal([]byte(out), &all); err != nil {
		return nil, fmt.Errorf("samenode: %w in %q", err, out)
	}
	of := func(who string, figure func(hop) float64) float64 {
		var fs []float64
		for _, h := range all[who] {
			fs = append(fs, figure(h))
		}
		return median(fs)
	}
	cpu, rate := func(h hop) float64 { return h.CPU }, func(h hop) float64 { return h.Rate }
	const what = "pod to pod of one machine, 64 B UDP"
	rows := []row{{what, fmt.Sprintf("%.2f CPU us a packet", of("mesh", cpu)), fmt.Sprintf("%.2f bridge plugin", of("stock", cpu)),
		fmt.Sprintf("ratio %.2f; goal <= 0.95, stretch 0.80; with the shortcut; theirs without firewall and connection tracking", of("mesh", cpu)/of("stock", cpu))},
		{what + ", no shortcut", fmt.Sprintf("%.2f CPU us a packet", of("long", cpu)), fmt.Sprintf("%.2f bridge plugin", of("stock", cpu)),
			fmt.Sprintf("ratio %.2f", of("long", cpu)/of("stock", cpu))},
		{what, fmt.Sprintf("%.0f thousand a second", of("mesh", rate)), fmt.Sprintf("%.0f bridge plugin", of("stock", rate)),
			fmt.Sprintf("without the shortcut %.0f", of("long", rate))}}
	if len(all["mesh"]) == 0 {
		rows = append(rows[1:2], row{what, "", "", "no shortcut: this kernel has no tcx"})
	}
	return rows, nil
}

// hopInside runs in a machine: it attaches two namespaces with each plugin and
// sends between them, n times each by turns, and prints the runs as JSON.
func hopInside(ctx context.Context, args []string) (err error) {
	if len(args) != 1 {
		return errors.New("samenode: want the number of rounds")
	}
	n, err := strconv.Atoi(args[0])
	if err != nil {
		return err
	}
	lists := map[string]*libcni.NetworkConfigList{}
	if lists["mesh"], err = libcni.ConfListFromFile(conflistPath); err != nil {
		return err
	}
	lists["long"] = lists["mesh"]
	if lists["stock"], err = libcni.ConfListFromBytes([]byte(bridgeList)); err != nil {
		return err
	}
	cache, err := os.MkdirTemp("", "bench-cni-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(cache)
	runtime := libcni.NewCNIConfigWithCacheDir([]string{"/opt/cni/bin", "/usr/lib/cni"}, cache, nil)
	to, links := map[string]string{}, map[string]string{}
	for who, list := range lists {
		for _, id := range []string{"bench-" + who + "-a", "bench-" + who + "-b"} {
			addr, link, detach, err := attachPod(ctx, runtime, list, id)
			if err != nil {
				return fmt.Errorf("%s: %w", who, err)
			}
			defer func() { err = errors.Join(err, detach()) }()
			to[who], links[id] = addr, link // of b
		}
	}
	whos := slices.Clone(ways)
	if err := settleWays(ctx, links); errors.Is(err, ebpf.ErrNotSupported) {
		whos = []string{"long", "stock"}
	} else if err != nil {
		return err
	}
	all := map[string][]hop{}
	for _, who := range whos { // what went on for two seconds is on the shortcut, and from the same port again at once
		if _, err := hopOnce(ctx, "bench-"+who+"-a", "bench-"+who+"-b", to[who], "-t", "4"); err != nil {
			return fmt.Errorf("%s: %w", who, err)
		}
	}
	for range n {
		rand.Shuffle(len(whos), func(i, j int) { whos[i], whos[j] = whos[j], whos[i] })
		for _, who := range whos {
			h, err := hopOnce(ctx, "bench-"+who+"-a", "bench-"+who+"-b", to[who], "-t", "2")
			if err != nil {
				return fmt.Errorf("%s: %w", who, err)
			}
			all[who] = append(all[who], h)
		}
	}
	return json.NewEncoder(os.Stdout).Encode(all)
}

// settleWays waits until there is a program at the pods' links that shall have
// the shortcut, and none at those that shall not: a place for filters, without
// any, keeps meshd from putting it there.
func settleWays(ctx context.Context, links map[string]string) error {
	for _, id := range []string{"bench-long-a", "bench-long-b"} {
		if err := sh("tc qdisc add dev " + links[id] + " clsact"); err != nil {
			return err
		}
	}
	for _, way := range []struct {
		who  string
		want int
	}{{"mesh", 1}, {"long", 0}} {
		for _, end := range []string{"a", "b"} {
			link, err := net.InterfaceByName(links["bench-"+way.who+"-"+end])
			if err != nil {
				return err
			}
			query := ebpflink.QueryOptions{Target: link.Index, Attach: ebpf.AttachTCXIngress}
			if _, err := ebpflink.QueryPrograms(query); err != nil {
				return err
			}
			if err := until(ctx, func() error {
				have, err := ebpflink.QueryPrograms(query)
				if err == nil && len(have.Programs) != way.want {
					err = fmt.Errorf("%d programs at %s, want %d: what does meshctl status say of the shortcut?", len(have.Programs), link.Name, way.want)
				}
				return err
			}); err != nil {
				return err
			}
		}
	}
	return nil
}

// attachPod makes a namespace and attaches it, and returns its IPv4 address and
// its link on the host.
func attachPod(ctx context.Context, runtime *libcni.CNIConfig, list *libcni.NetworkConfigList, id string) (addr, link string, detach func() error, err error) {
	if err := sh("ip netns add " + id + "; ip -n " + id + " link set lo up"); err != nil {
		return "", "", nil, err
	}
	rt := &libcni.RuntimeConf{ContainerID: id, NetNS: "/run/netns/" + id, IfName: "eth0",
		Args: [][2]string{{"IgnoreUnknown", "1"}, {"K8S_POD_NAMESPACE", "bench"}, {"K8S_POD_NAME", id}}}
	detach = func() error {
		return errors.Join(runtime.DelNetworkList(context.WithoutCancel(ctx), list, rt), sh("ip netns del "+id))
	}
	result, err := runtime.AddNetworkList(ctx, list, rt)
	if err == nil {
		var r *types100.Result
		if r, err = types100.GetResult(result); err == nil {
			for _, ip := range r.IPs {
				if ip.Address.IP.To4() != nil {
					return ip.Address.IP.String(), hostLink(r), detach, nil
				}
			}
			err = errors.New("it got no IPv4 address")
		}
	}
	return "", "", nil, errors.Join(err, detach())
}

// hostLink is the first of a result's that is not in the pod.
func hostLink(r *types100.Result) string {
	for _, i := range r.Interfaces {
		if i.Sandbox == "" {
			return i.Name
		}
	}
	return ""
}

// hopOnce floods, always from the same port. The CPU time of the two programs is all there
// is: the kernel does its part for a packet on their time.
func hopOnce(ctx context.Context, from, to, addr string, args ...string) (h hop, err error) {
	server := exec.CommandContext(ctx, "ip", "netns", "exec", to, "iperf3", "-s", "-1", "-B", addr)
	if err := server.Start(); err != nil {
		return h, err
	}
	defer func() {
		if server.ProcessState == nil {
			_ = server.Process.Kill()
			_ = server.Wait()
		}
	}()
	var client *exec.Cmd
	var r result
	err = until(ctx, func() error { // the server listens in a moment
		client = exec.CommandContext(ctx, "ip", slices.Concat([]string{"netns", "exec", from, "iperf3", "-J", "--cport", "5202", "-c", addr}, args, flood.args)...)
		out, _ := client.Output()
		var err error
		r, err = parseIperf(out)
		return err
	})
	if err != nil {
		return h, err
	}
	if err := server.Wait(); err != nil {
		return h, err
	}
	var cpu time.Duration
	for _, p := range []*os.ProcessState{client.ProcessState, server.ProcessState} {
		cpu += p.UserTime() + p.SystemTime()
	}
	return hop{rate(sample{result: r}), cpu.Seconds() / r.Packets * 1e6}, nil
}

// bridgeList is the bridge plugin as it is, without masquerading.
const bridgeList = `{"cniVersion": "1.0.0", "name": "hop", "plugins": [
 {"type": "bridge", "bridge": "hop0", "isGateway": true,
  "ipam": {"type": "host-local", "ranges": [[{"subnet": "10.251.0.0/16"}]], "routes": [{"dst": "0.0.0.0/0"}]}}]}`
