// Command bench measures what meshd promises and prints one table. Every figure
// that depends on the machine stands beside a reference of the same run.
//
//	bench [-bin DIR] [-only crash,loss,cni,samenode,memory,throughput,restart,nodes,nocut,rotate,removed,tunnel,peers] [-rounds N]
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"slices"
	"strings"
	"syscall"
	"text/tabwriter"
	"time"

	"meshd.dev/test/netlab"
	"meshd.dev/test/story"
)

func main() {
	netlab.Init()
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

// A row of the table.
type row struct{ what, ours, reference, note string }

// An experiment measures one thing on a world of its kind.
type experiment struct {
	name string
	do   func(context.Context, *story.World, options) ([]row, error)
}

type options struct {
	kills, restarts, losses, attaches, burst, rounds, rotations, nice int
	bin                                                               string
	seconds                                                           time.Duration
}

// Experiments without a cluster, on one machine, on one with room for
// many nodes, and on three with the application of the demo.
var (
	onNone  = []experiment{{"tunnel", tunnel}, {"peers", peers}}
	onOne   = []experiment{{"memory", memory}, {"cni", attach}, {"samenode", sameNode}, {"crash", crash}}
	onThree = []experiment{{"throughput", throughput}, {"restart", restart}, {"nocut", noCut}, {"rotate", rotate}, {"loss", loss}, {"removed", removed}}
	onMany  = []experiment{{"nodes", nodes}}
)

func run(ctx context.Context, args []string) error {
	if len(args) > 0 && args[0] == "cni" { // inside a machine, see cni.go
		return attachInside(ctx, args[1:])
	}
	if len(args) > 1 && args[0] == "flows" { // inside a machine, see nocut.go
		return flowsInside(ctx, args[1:])
	}
	if len(args) > 0 && args[0] == "samenode" { // inside a machine, see samenode.go
		return hopInside(ctx, args[1:])
	}
	flags := flag.NewFlagSet("bench", flag.ContinueOnError)
	o := options{}
	flags.StringVar(&o.bin, "bin", "bin", "folder of meshd, meshctl, mesh and bench; in its folder tools the others")
	only := flags.String("only", "", "names of experiments, separated by commas")
	flags.IntVar(&o.kills, "kills", 50, "containers to kill")
	flags.IntVar(&o.restarts, "restarts", 100, "restarts of meshd under flows")
	flags.IntVar(&o.nice, "nice", 0, "priority of the restarted meshd")
	flags.IntVar(&o.losses, "losses", 5, "power cuts")
	flags.IntVar(&o.attaches, "attaches", 200, "pods to attach and detach one after the other, a plugin")
	flags.IntVar(&o.burst, "burst", 100, "pods to attach and detach at once, a plugin")
	flags.IntVar(&o.rounds, "rounds", 7, "rounds of throughput and tunnel")
	flags.IntVar(&o.rotations, "rotations", 100, "changes of keys")
	flags.DurationVar(&o.seconds, "seconds", 2*time.Second, "time of each measurement of tunnel")
	if err := flags.Parse(args); err != nil {
		return err
	}
	wanted := func(e experiment) bool {
		return *only == "" || slices.Contains(strings.Split(*only, ","), e.name)
	}
	var rows []row
	var errs error
	for _, part := range []struct {
		prepare     func(context.Context, *story.World) error
		experiments []experiment
	}{{nil, onNone}, {story.Idle, onOne}, {manyNodes, onMany}, {wholeApplication, onThree}} {
		es := slices.DeleteFunc(slices.Clone(part.experiments), func(e experiment) bool { return !wanted(e) })
		if len(es) == 0 {
			continue
		}
		more, err := onWorld(ctx, o, part.prepare, es)
		rows, errs = append(rows, more...), errors.Join(errs, err)
	}
	print(rows)
	return errs
}

// onWorld prepares a world, runs experiments on it and takes it away. Without
// prepare there is no world.
func onWorld(ctx context.Context, o options, prepare func(context.Context, *story.World) error, es []experiment) (rows []row, err error) {
	if prepare == nil {
		return doAll(ctx, nil, o, es)
	}
	work, err := os.MkdirTemp("", "meshd-bench-")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(work)
	w, err := story.New(story.Config{Bin: o.bin, Work: work, Manifest: "manifests/examples/demo.yaml"})
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, w.End(context.WithoutCancel(ctx))) }()
	if err := prepare(ctx, w); err != nil {
		w.Report(os.Stderr)
		return nil, err
	}
	return doAll(ctx, w, o, es)
}

func doAll(ctx context.Context, w *story.World, o options, es []experiment) (rows []row, errs error) {
	for _, e := range es {
		start := time.Now()
		more, err := e.do(ctx, w, o)
		rows = append(rows, more...)
		if err != nil {
			errs = errors.Join(errs, fmt.Errorf("%s: %w", e.name, err))
		}
		fmt.Fprintf(os.Stderr, "%s took %.0f s\n", e.name, time.Since(start).Seconds())
	}
	return rows, errs
}

// wholeApplication is the story up to the point where everything runs.
func wholeApplication(ctx context.Context, w *story.World) error {
	for _, s := range story.Steps() {
		if _, _, err := s.Run(ctx, w); err != nil {
			return fmt.Errorf("%s: %w", s.Name, err)
		}
		if s.Name == story.Running {
			return nil
		}
	}
	return errors.New("the story has no step at which the application runs")
}

func print(rows []row) {
	t := tabwriter.NewWriter(os.Stdout, 0, 8, 2, ' ', 0)
	fmt.Fprintln(t, "WHAT\tMESHD\tREFERENCE\tNOTE")
	for _, r := range rows {
		fmt.Fprintf(t, "%s\t%s\t%s\t%s\n", r.what, r.ours, r.reference, r.note)
	}
	t.Flush()
}
