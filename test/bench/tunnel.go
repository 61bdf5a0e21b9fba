package main

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"strings"
	"time"

	"meshd.dev/test/story"
)

// A sample is one run of a load through a variant.
type sample struct {
	result
	cpu        float64 // seconds, of the variant's processes
	all        float64 // seconds, with the kernel's and iperf3's part
	background float64 // share of the machine that was busy with other things
}

// samples by variant and load.
type samples map[*variant]map[string][]sample

// tunnel compares our tunnel with others. All of them are up between the same
// two namespaces, and each round runs each of them once, in a new order: what
// else the machine does meets all of them alike.
func tunnel(ctx context.Context, _ *story.World, o options) ([]row, error) {
	bin, err := binaries(o)
	if err != nil {
		return nil, err
	}
	ours, jumbo, official, tailscale := bin.ours(1420), bin.ours(8920), bin.official(1420), bin.tailscale(1420)
	jumbo.name = "meshd on 9000"
	slack, clear, floor := bin.nebula(1420), vxlan(1420), plain()
	return inLab(ctx, []*variant{ours, jumbo, official, tailscale, slack, clear, floor}, func(l *lab) ([]row, error) {
		all := samples{}
		for range o.rounds {
			for _, part := range []struct {
				load load
				of   []*variant
			}{{oneTCP, l.variants}, {steady, []*variant{ours, official, tailscale, slack}}, {flood, []*variant{ours, official, tailscale, slack, clear}}} {
				if err := l.round(ctx, all, part.load, o.seconds, part.of...); err != nil {
					return nil, err
				}
			}
		}
		all.print(l)
		return all.rows(ours, jumbo, official, tailscale, slack, clear, floor), nil
	})
}

// inLab does something with a lab, and takes it away.
func inLab(ctx context.Context, variants []*variant, do func(*lab) ([]row, error)) (rows []row, err error) {
	l, err := newLab(ctx, variants)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, l.close()) }()
	return do(l)
}

// round runs a load once through each variant, in any order.
func (l *lab) round(ctx context.Context, all samples, what load, d time.Duration, vs ...*variant) error {
	for _, i := range rand.Perm(len(vs)) {
		v := vs[i]
		s, err := l.sample(ctx, what, d, v)
		if err != nil {
			return fmt.Errorf("%s, %s: %w", v.name, what.name, err)
		}
		if all[v] == nil {
			all[v] = map[string][]sample{}
		}
		all[v][what.name] = append(all[v][what.name], s)
	}
	return nil
}

func (l *lab) sample(ctx context.Context, what load, d time.Duration, v *variant) (s sample, err error) {
	before, err := l.clock(v)
	if err != nil {
		return s, err
	}
	watch, stop := context.WithCancel(ctx)
	watched := make(chan int64)
	go func() { watched <- v.watchMemory(watch) }()
	start := time.Now()
	s.result, err = what.run(ctx, l.ns[0], v.addr(1), d, l.iperf)
	stop()
	v.memory = max(v.memory, <-watched)
	if err != nil {
		return s, err
	}
	wall := time.Since(start)
	after, err := l.clock(v)
	s.cpu = (after.variant - before.variant).Seconds()
	s.all = (after.lab - before.lab).Seconds()
	s.background = max(0, (after.machine-before.machine).Seconds()-s.all) / wall.Seconds() / float64(after.cpus)
	return s, err
}

type clock struct {
	variant, lab, machine time.Duration
	cpus                  int
}

func (l *lab) clock(v *variant) (c clock, err error) {
	var errs [3]error
	c.variant, errs[0] = v.cpu.used()
	c.lab, errs[1] = l.all.used()
	c.machine, c.cpus, errs[2] = busy()
	return c, errors.Join(errs[:]...)
}

// watchMemory returns the most anonymous memory one end had until ctx ended.
func (v *variant) watchMemory(ctx context.Context) (most int64) {
	tick := time.NewTicker(100 * time.Millisecond)
	defer tick.Stop()
	for {
		for _, pid := range v.pids {
			if n, err := rssAnon(pid); err == nil {
				most = max(most, n)
			}
		}
		select {
		case <-ctx.Done():
			return most
		case <-tick.C:
		}
	}
}

// of is the median of a figure over all rounds.
func (a samples) of(v *variant, what load, figure func(sample) float64) float64 {
	var fs []float64
	for _, s := range a[v][what.name] {
		fs = append(fs, figure(s))
	}
	if len(fs) == 0 {
		return 0
	}
	return median(fs)
}

func bits(s sample) float64       { return s.Bits }
func perGB(s sample) float64      { return s.cpu / s.Bytes * 1e9 }
func perPacket(s sample) float64  { return s.cpu / s.Packets * 1e6 }
func rate(s sample) float64       { return s.Packets / s.Seconds / 1e3 }
func background(s sample) float64 { return s.background }

// rows are the goals, ours against each reference.
func (a samples) rows(ours, jumbo, official, tailscale, slack, clear, floor *variant) []row {
	compare := func(goal string, what load, figure func(sample) float64, unit string, x, y *variant) row {
		fx, fy := a.of(x, what, figure), a.of(y, what, figure)
		return row{"tunnel, " + what.name, fmt.Sprintf("%.2f %s", fx, unit), fmt.Sprintf("%.2f %s", fy, y.name), fmt.Sprintf("ratio %.2f; goal %s; background %.0f and %.0f %%", fx/fy, goal, 100*a.of(x, what, background), 100*a.of(y, what, background))}
	}
	gbits := func(s sample) float64 { return bits(s) / 1e9 }
	rows := []row{
		compare(">= 0.45, stretch 0.57", oneTCP, gbits, "Gbit/s", ours, floor),
		compare("<= 0.65, stretch 0.5", oneTCP, perGB, "CPU s/GB", ours, official),
		compare("none", oneTCP, perGB, "CPU s/GB", ours, tailscale),
		compare(">= 4.5", oneTCP, gbits, "Gbit/s", ours, slack),
		compare("<= 0.25", oneTCP, perGB, "CPU s/GB", ours, slack),
		compare(">= 1.4", oneTCP, gbits, "Gbit/s", jumbo, ours),
		compare("<= 0.66, stretch 0.37", steady, perPacket, "CPU us a packet", ours, official),
		compare(">= 1, stretch 1.7", flood, rate, "thousand a second", ours, slack),
		compare("none", flood, rate, "thousand a second", ours, clear),
	}
	rows = append(rows, row{"tunnel, memory of one end under load", mib(ours.memory), mib(official.memory) + " official",
		fmt.Sprintf("ratio %.2f; goal <= 0.33; not backed by files", float64(ours.memory)/float64(official.memory))})
	return rows
}

// print lists every variant's medians.
func (a samples) print(l *lab) {
	w := &strings.Builder{}
	fmt.Fprintf(w, "%-22s %8s %8s %8s | %8s %8s | %8s %8s | %s\n", "medians", "Gbit/s", "CPU s/GB", "with all", "10k: us", "with all", "64B k/s", "us", "memory, background")
	total := func(s sample) float64 { return s.all }
	for _, v := range l.variants {
		var bg []float64
		for _, ss := range a[v] {
			for _, s := range ss {
				bg = append(bg, background(s))
			}
		}
		fmt.Fprintf(w, "%-22s %8.2f %8.2f %8.2f | %8.1f %8.1f | %8.1f %8.1f | %s, %.0f %%\n", v.name,
			a.of(v, oneTCP, bits)/1e9, a.of(v, oneTCP, perGB), a.of(v, oneTCP, func(s sample) float64 { return total(s) / s.Bytes * 1e9 }),
			a.of(v, steady, perPacket), a.of(v, steady, func(s sample) float64 { return total(s) / s.Packets * 1e6 }),
			a.of(v, flood, rate), a.of(v, flood, perPacket), mib(v.memory), 100*median(bg))
	}
	fmt.Fprint(os.Stderr, w.String())
}
