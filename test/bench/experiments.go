package main

import (
	"context"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"time"

	"meshd.dev/test/story"
)

// memory lists the processes of a single-node cluster with one pod.
func memory(ctx context.Context, w *story.World, _ options) ([]row, error) {
	select { // the figure of interest is the one after the start
	case <-time.After(20 * time.Second):
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	var rows []row
	var rss, anon int64
	for _, p := range w.Machine("m1").Processes() {
		name := p.Name()
		if len(p.Argv) > 1 && name == "meshd" {
			name += " " + p.Argv[1]
		}
		rows = append(rows, row{"memory of " + name, mib(p.RSS), "", mib(p.Anon) + " of it anonymous"})
		rss, anon = rss+p.RSS, anon+p.Anon
	}
	slices.SortFunc(rows, func(a, b row) int { return len(b.ours) - len(a.ours) })
	return append(rows, row{"memory of the single-node stack", mib(rss), "", mib(anon) + " of it anonymous; one pod"}), nil
}

func crash(ctx context.Context, w *story.World, o options) ([]row, error) {
	times, err := w.Crashes(ctx, o.kills)
	if err != nil {
		return nil, err
	}
	return []row{{"kill -9 of a container to main() again", ms(quantile(times, .5)) + " p50", "",
		fmt.Sprintf("p90 %s, p99 %s, max %s of %d", ms(quantile(times, .9)), ms(quantile(times, .99)), ms(quantile(times, 1)), len(times))}}, nil
}

func loss(ctx context.Context, w *story.World, o options) ([]row, error) {
	var losses []story.Loss
	var returns []story.Return
	for i := range o.losses {
		if i > 0 { // the pods that moved away do not move back by themselves
			if err := w.Spread(ctx, "web"); err != nil {
				return nil, err
			}
		}
		l, err := w.LosePower(ctx)
		if err != nil {
			return nil, fmt.Errorf("%w (so far: %s)", err, l)
		}
		b, err := w.ComeBack(ctx)
		if err != nil {
			return nil, fmt.Errorf("%w (so far: %s)", err, b)
		}
		losses, returns = append(losses, l), append(returns, b)
	}
	of := func(what string, get func(i int) time.Duration) row {
		var all []time.Duration
		for i := range losses {
			all = append(all, get(i))
		}
		return row{what, sec(quantile(all, .5)) + " median", "",
			fmt.Sprintf("%s to %s in %d runs", sec(quantile(all, 0)), sec(quantile(all, 1)), len(all))}
	}
	return []row{
		of("machine lost to out of DNS", func(i int) time.Duration { return losses[i].DNS }),
		of("machine lost to out of the EndpointSlice", func(i int) time.Duration { return losses[i].Slice }),
		of("machine lost to last failed request through the Service", func(i int) time.Duration { return losses[i].Service }),
		of("machine lost to node not Ready", func(i int) time.Duration { return losses[i].Node }),
		of("machine lost to 3 pods ready elsewhere", func(i int) time.Duration { return losses[i].Replaced }),
		of("power on to node Ready", func(i int) time.Duration { return returns[i].Ready }),
		of("power on to everything whole", func(i int) time.Duration { return returns[i].Whole }),
	}, nil
}

// throughput compares one TCP connection through the tunnel with one over the
// plain underlay, in rounds of shuffled order.
func throughput(ctx context.Context, w *story.World, o options) ([]row, error) {
	from, to := w.Machine("m1"), w.Machine("m3")
	inner, err := w.MeshAddr(ctx, "m3")
	if err != nil {
		return nil, err
	}
	results := map[netip.Addr][]float64{}
	for range o.rounds {
		addrs := []netip.Addr{inner, to.IPv4()}
		rand.Shuffle(len(addrs), func(i, j int) { addrs[i], addrs[j] = addrs[j], addrs[i] })
		for _, a := range addrs {
			bits, err := story.Throughput(ctx, from, to, a, 2*time.Second)
			if err != nil {
				return nil, err
			}
			results[a] = append(results[a], bits)
		}
	}
	tunnel, plain := median(results[inner]), median(results[to.IPv4()])
	return []row{{"one TCP connection through the tunnel", gbit(tunnel), gbit(plain) + " plain underlay",
		fmt.Sprintf("ratio %.2f; medians of %d rounds of 2 s; veth hands 64 KB segments on whole", tunnel/plain, o.rounds)}}, nil
}

// quantile of durations; q from 0 to 1.
func quantile(ds []time.Duration, q float64) time.Duration {
	if len(ds) == 0 {
		return 0
	}
	s := slices.Sorted(slices.Values(ds))
	return s[min(len(s)-1, int(q*float64(len(s))))]
}

func median(fs []float64) float64 {
	s := slices.Sorted(slices.Values(fs))
	return s[len(s)/2]
}

func ms(d time.Duration) string  { return fmt.Sprintf("%.1f ms", float64(d)/1e6) }
func sec(d time.Duration) string { return fmt.Sprintf("%.2f s", d.Seconds()) }
func mib(b int64) string         { return fmt.Sprintf("%.1f MiB", float64(b)/(1<<20)) }
func gbit(bits float64) string   { return fmt.Sprintf("%.2f Gbit/s", bits/1e9) }
