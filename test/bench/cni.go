package main

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/containernetworking/cni/libcni"

	"meshd.dev/test/story"
)

// A contestant attaches pods in one way, as a container runtime calls it.
type contestant struct {
	name string // for instance "bridge, dual stack"
	list *libcni.NetworkConfigList
	// slow ones run every twentieth time: ptp waits for duplicate address
	// detection.
	slow bool
}

const (
	// conflistPath is where meshd leaves its configuration for the runtime.
	conflistPath = "/etc/cni/net.d/10-meshd.conflist"
	// stockDir has the plugins of containernetworking/plugins, in the machines.
	stockDir = "/usr/local/bin/" + stockFolder
	// stockFolder in the folder of binaries.
	stockFolder = "stock-cni"

	single, dual = "IPv4", "dual stack"
	ours         = "mesh"
)

// stockPlugins in the version that go.mod names.
var stockPlugins = []string{"plugins/main/bridge", "plugins/main/ptp", "plugins/ipam/host-local"}

// buildStock builds them, and an empty program, into the folder of binaries,
// which all machines show.
func buildStock(ctx context.Context, bin string) error {
	dir := filepath.Join(bin, stockFolder)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	build := func(args ...string) error {
		out, err := exec.CommandContext(ctx, "go", append([]string{"build", "-ldflags", "-s -w", "-o", dir + "/"}, args...)...).CombinedOutput()
		if err != nil {
			return fmt.Errorf("build %v: %w\n%s", args, err, out)
		}
		return nil
	}
	temp, err := os.MkdirTemp("", "bench-empty-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(temp)
	source := filepath.Join(temp, "empty.go")
	if err := os.WriteFile(source, []byte("package main\n\nfunc main() {}\n"), 0o644); err != nil {
		return err
	}
	var packages []string
	for _, p := range stockPlugins {
		packages = append(packages, "github.com/containernetworking/plugins/"+p)
	}
	return errors.Join(build(packages...), build(source))
}

// stockConf is what a machine without us would attach its pods with.
func stockConf(kind, families string) ([]byte, error) {
	number := map[string]int{"bridge" + single: 1, "bridge" + dual: 2, "ptp" + single: 3, "ptp" + dual: 4}[kind+families]
	ranges := []any{[]any{map[string]string{"subnet": fmt.Sprintf("10.25%d.0.0/16", number)}}}
	routes := []any{map[string]string{"dst": "0.0.0.0/0"}}
	if families == dual {
		ranges = append(ranges, []any{map[string]string{"subnet": fmt.Sprintf("fd00:25%d::/64", number)}})
		routes = append(routes, map[string]string{"dst": "::/0"})
	}
	plugin := map[string]any{"type": kind, "ipam": map[string]any{"type": "host-local", "ranges": ranges, "routes": routes}}
	if kind == "bridge" {
		plugin["bridge"], plugin["isGateway"] = fmt.Sprintf("bench%d", number), true
	}
	return json.Marshal(map[string]any{"cniVersion": "1.0.0", "name": fmt.Sprintf("%s%d", kind, number), "plugins": []any{plugin}})
}

// ourConf is meshd's own, cut down to the families.
func ourConf(families string) ([]byte, error) {
	text, err := os.ReadFile(conflistPath)
	if err != nil {
		return nil, err
	}
	var list map[string]any
	if err := json.Unmarshal(text, &list); err != nil {
		return nil, err
	}
	plugin := list["plugins"].([]any)[0].(map[string]any)
	// Hundreds of pods in a few seconds are more than a quarantine of ten
	// seconds leaves of one /24.
	plugin["quarantineSeconds"] = 1
	if families == single {
		plugin["ranges"] = slices.DeleteFunc(plugin["ranges"].([]any), func(r any) bool { return netip.MustParsePrefix(r.(string)).Addr().Is6() })
	}
	return json.Marshal(list)
}

func contestants() (all []contestant, err error) {
	for _, families := range []string{single, dual} {
		for _, kind := range []string{ours, "bridge", "ptp"} {
			conf := stockConf
			if kind == ours {
				conf = func(_, families string) ([]byte, error) { return ourConf(families) }
			}
			text, err := conf(kind, families)
			if err != nil {
				return nil, fmt.Errorf("%s: %w", kind, err)
			}
			list, err := libcni.NetworkConfFromBytes(text)
			if err != nil {
				return nil, fmt.Errorf("%s: %w", kind, err)
			}
			all = append(all, contestant{kind + ", " + families, list, kind == "ptp" && families == dual})
		}
	}
	return all, nil
}

// took is what one call took; CPU is that of the processes it started, and of
// the kernel on their behalf.
type took struct{ Wall, CPU time.Duration }

// attached is what all calls of one contestant took.
type attached struct {
	Add, Del []took          // one at a time
	AddAll   []time.Duration // each of many at once
	DelAll   []time.Duration
	AddSum   []time.Duration // until the last of them was done
	DelSum   []time.Duration
	AtOnce   int
}

// arena is where contestants meet: one machine.
type arena struct {
	ctx     context.Context
	runtime *libcni.CNIConfig
	out     map[string]*attached
	ids     int
}

// attachInside runs in a machine: it measures all contestants, in rounds of
// shuffled order, and prints the times as JSON.
func attachInside(ctx context.Context, args []string) error {
	flags := flag.NewFlagSet("cni", flag.ContinueOnError)
	rounds := flags.Int("rounds", 200, "pods one after the other, a contestant")
	burst := flags.Int("burst", 100, "pods at once")
	bursts := flags.Int("bursts", 3, "how often")
	if err := flags.Parse(args); err != nil {
		return err
	}
	all, err := contestants()
	if err != nil {
		return err
	}
	cache, err := os.MkdirTemp("", "bench-cni-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(cache)
	a := &arena{ctx: ctx, out: map[string]*attached{}, runtime: libcni.NewCNIConfigWithCacheDir([]string{stockDir, "/opt/cni/bin", "/usr/lib/cni"}, cache, nil)}
	for _, c := range all { // bridges and folders are there from now on
		a.out[c.name] = &attached{}
		if err := a.one(c); err != nil {
			return fmt.Errorf("%s: %w", c.name, err)
		}
		*a.out[c.name] = attached{AtOnce: *burst}
	}
	a.out["empty"] = &attached{}
	for i := range *rounds {
		rand.Shuffle(len(all), func(i, j int) { all[i], all[j] = all[j], all[i] })
		for _, c := range all {
			if c.slow && i%20 != 0 {
				continue
			}
			if err := a.one(c); err != nil {
				return fmt.Errorf("%s: %w", c.name, err)
			}
		}
		if err := a.empty(); err != nil {
			return err
		}
	}
	for range *bursts {
		rand.Shuffle(len(all), func(i, j int) { all[i], all[j] = all[j], all[i] })
		for _, c := range all {
			if c.slow {
				continue
			}
			if err := a.many(c, *burst); err != nil {
				return fmt.Errorf("%s, %d at once: %w", c.name, *burst, err)
			}
		}
	}
	return json.NewEncoder(os.Stdout).Encode(a.out)
}

// links there are now.
func links() int {
	all, err := net.Interfaces()
	if err != nil {
		return 0
	}
	return len(all)
}

// quiet waits until the kernel has taken away the links of pods that are gone:
// it does so behind everybody's back, and keeps others from changing links
// meanwhile. Those of others may come and go, hence the limit.
func (a *arena) quiet(before int) {
	for deadline := time.Now().Add(10 * time.Second); links() > before && a.ctx.Err() == nil && time.Now().Before(deadline); {
		time.Sleep(4 * time.Millisecond)
	}
	a.settle(20 * time.Millisecond)
}

// settle lets those who watch namespaces come and go have their say.
func (a *arena) settle(d time.Duration) {
	select {
	case <-a.ctx.Done():
	case <-time.After(d):
	}
}

func (a *arena) netns() (string, error) {
	a.ids++
	id := fmt.Sprintf("bench-%d-%d", os.Getpid(), a.ids)
	if out, err := exec.CommandContext(a.ctx, "ip", "netns", "add", id).CombinedOutput(); err != nil {
		return "", fmt.Errorf("make namespace: %w: %s", err, out)
	}
	return id, nil
}

func (a *arena) drop(id string) error {
	if out, err := exec.CommandContext(a.ctx, "ip", "netns", "del", id).CombinedOutput(); err != nil {
		return fmt.Errorf("remove namespace: %w: %s", err, out)
	}
	return nil
}

func pod(id string) *libcni.RuntimeConf {
	return &libcni.RuntimeConf{ContainerID: id, NetNS: filepath.Join("/run/netns", id), IfName: "eth0",
		Args: [][2]string{{"IgnoreUnknown", "1"}, {"K8S_POD_NAMESPACE", "bench"}, {"K8S_POD_NAME", id}}}
}

// one attaches and detaches one new namespace.
func (a *arena) one(c contestant) (err error) {
	before := links()
	id, err := a.netns()
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, a.drop(id)); a.quiet(before) }()
	t := a.out[c.name]
	add, err := measure(func() error { _, err := a.runtime.AddNetworkList(a.ctx, c.list, pod(id)); return err })
	if err != nil {
		return fmt.Errorf("ADD: %w", err)
	}
	del, err := measure(func() error { return a.runtime.DelNetworkList(a.ctx, c.list, pod(id)) })
	if err != nil {
		return fmt.Errorf("DEL: %w", err)
	}
	t.Add, t.Del = append(t.Add, add), append(t.Del, del)
	return nil
}

// empty is the floor: to start and end a static program that does nothing.
func (a *arena) empty() error {
	t, err := measure(func() error {
		cmd := exec.CommandContext(a.ctx, filepath.Join(stockDir, "empty"))
		cmd.Stdin, cmd.Stdout, cmd.Stderr = strings.NewReader("{}"), &bytes.Buffer{}, &bytes.Buffer{}
		return cmd.Run()
	})
	a.out["empty"].Add = append(a.out["empty"].Add, t)
	return err
}

func measure(f func() error) (took, error) {
	cpu, start := children(), time.Now()
	err := f()
	wall := time.Since(start)
	return took{wall, children() - cpu}, err
}

// children is the CPU time of all processes we started and that ended.
func children() time.Duration {
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_CHILDREN, &u); err != nil {
		return 0
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// many attaches n namespaces at once, and then detaches them at once.
func (a *arena) many(c contestant, n int) (err error) {
	before := links()
	ids := make([]string, n)
	for i := range ids {
		if ids[i], err = a.netns(); err != nil {
			return err
		}
	}
	defer func() {
		for _, id := range ids {
			err = errors.Join(err, a.drop(id))
		}
		a.quiet(before)
	}()
	a.settle(200 * time.Millisecond)
	t := a.out[c.name]
	all, sum, err := atOnce(ids, func(id string) error { _, err := a.runtime.AddNetworkList(a.ctx, c.list, pod(id)); return err })
	if err != nil {
		return fmt.Errorf("ADD: %w", err)
	}
	t.AddAll, t.AddSum = append(t.AddAll, all...), append(t.AddSum, sum)
	all, sum, err = atOnce(ids, func(id string) error { return a.runtime.DelNetworkList(a.ctx, c.list, pod(id)) })
	if err != nil {
		return fmt.Errorf("DEL: %w", err)
	}
	t.DelAll, t.DelSum = append(t.DelAll, all...), append(t.DelSum, sum)
	return nil
}

// atOnce calls f for each of ids and returns what each took, and all of them.
func atOnce(ids []string, f func(string) error) (each []time.Duration, sum time.Duration, err error) {
	each, errs := make([]time.Duration, len(ids)), make([]error, len(ids))
	var group sync.WaitGroup
	start := time.Now()
	for i, id := range ids {
		group.Go(func() {
			errs[i] = f(id)
			each[i] = time.Since(start)
		})
	}
	group.Wait()
	return each, time.Since(start), errors.Join(errs...)
}

// attach runs the comparison inside m1, where the plugins' files are.
func attach(ctx context.Context, w *story.World, o options) ([]row, error) {
	if err := buildStock(ctx, o.bin); err != nil {
		return nil, err
	}
	out, err := w.Machine("m1").Run(ctx, "/usr/local/bin/bench", "cni", "-rounds", fmt.Sprint(o.attaches), "-burst", fmt.Sprint(o.burst))
	if err != nil {
		return nil, err
	}
	return rowsOfAttach(out)
}

func rowsOfAttach(out string) ([]row, error) {
	var all map[string]*attached
	if err := json.Unmarshal([]byte(out), &all); err != nil {
		return nil, err
	}
	floor := all["empty"]
	if floor == nil {
		return nil, fmt.Errorf("cni: no times in %q", out)
	}
	rows := []row{{"CNI: an empty static Go program", "", msOf(floor.Add, .5) + " p50", fmt.Sprintf("p99 %s; CPU %s; the floor of any plugin; %d times", msOf(floor.Add, .99), cpuOf(floor.Add), len(floor.Add))}}
	for _, families := range []string{single, dual} {
		of := func(kind string) *attached { return cmp.Or(all[kind+", "+families], &attached{}) }
		we, bridge, ptp := of(ours), of("bridge"), of("ptp")
		rows = append(rows,
			alone("CNI ADD, "+families, we.Add, bridge.Add, ptp.Add),
			alone("CNI DEL, "+families, we.Del, bridge.Del, ptp.Del),
			together(fmt.Sprintf("CNI ADD, %s, %d at once", families, we.AtOnce), we.AddAll, bridge.AddAll, ptp.AddAll, we.AddSum, bridge.AddSum),
			together(fmt.Sprintf("CNI DEL, %s, %d at once", families, we.AtOnce), we.DelAll, bridge.DelAll, ptp.DelAll, we.DelSum, bridge.DelSum))
	}
	a, b := all[ours+", "+single], all[ours+", "+dual]
	if a != nil && b != nil {
		rows = append(rows, row{"CNI ADD, dual stack to IPv4", fmt.Sprintf("%.2f", ratio(walls(b.Add), walls(a.Add))), "", "ratio of the medians"})
	}
	return rows, nil
}

// alone is one call at a time.
func alone(what string, we, bridge, ptp []took) row {
	note := fmt.Sprintf("ratio to bridge %.2f; p99 %s (bridge %s); CPU %s (bridge %s)", ratio(walls(we), walls(bridge)), msOf(we, .99), msOf(bridge, .99), cpuOf(we), cpuOf(bridge))
	return row{what, msOf(we, .5) + " p50", msOf(bridge, .5) + " bridge, " + msOf(ptp, .5) + " ptp", note + fmt.Sprintf("; n %d, %d, %d", len(we), len(bridge), len(ptp))}
}

// together is many at once: what each took until its end.
func together(what string, we, bridge, ptp, sum, bridgeSum []time.Duration) row {
	reference := ms(quantile(bridge, .5)) + " bridge"
	if len(ptp) > 0 {
		reference += ", " + ms(quantile(ptp, .5)) + " ptp"
	}
	return row{what, ms(quantile(we, .5)) + " p50", reference,
		fmt.Sprintf("ratio to bridge %.2f; p99 %s (bridge %s); all done after %s (bridge %s)", ratio(we, bridge), ms(quantile(we, .99)), ms(quantile(bridge, .99)), ms(quantile(sum, .5)), ms(quantile(bridgeSum, .5)))}
}

func walls(all []took) []time.Duration {
	out := make([]time.Duration, len(all))
	for i, t := range all {
		out[i] = t.Wall
	}
	return out
}

func msOf(all []took, q float64) string { return ms(quantile(walls(all), q)) }

func cpuOf(all []took) string {
	var cpu []time.Duration
	for _, t := range all {
		cpu = append(cpu, t.CPU)
	}
	return ms(quantile(cpu, .5))
}

func ratio(a, b []time.Duration) float64 {
	if len(b) == 0 {
		return 0
	}
	return float64(quantile(a, .5)) / float64(quantile(b, .5))
}
