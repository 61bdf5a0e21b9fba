// Command demo tells the story of package test/story on this host and prints a
// line a step with the time it took. It ends non-zero at the first step that
// fails.
//
//	demo [-bin DIR] [-keep]        tell the story; -keep leaves the machines running
//	demo exec MACHINE COMMAND...   run a command in a machine that was kept
//	demo down                      take every trace away
package main

import (
	"cmp"
	"context"
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"os/signal"
	"strings"
	"syscall"
	"time"

	"meshd.dev/test/netlab"
	"meshd.dev/test/story"
)

// labName of the demo; one at a time. LAB in the environment names another one
// for exec and down, as tests leave it that are told to keep theirs.
var labName = cmp.Or(os.Getenv("LAB"), "demo")

const usage = `demo [-bin DIR] [-keep]        tell the story; -keep leaves the machines running
demo exec MACHINE COMMAND...   run a command in a machine that was kept
demo down                      take every trace away

`

func main() {
	netlab.Init()
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "demo:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string) error {
	if len(args) > 0 && args[0] == "down" {
		return down(ctx)
	}
	if len(args) > 2 && args[0] == "exec" {
		return execIn(ctx, args[1], args[2:])
	}
	flags := flag.NewFlagSet("demo", flag.ContinueOnError)
	flags.Usage = func() {
		fmt.Fprint(flags.Output(), usage)
		flags.PrintDefaults()
	}
	bin := flags.String("bin", "bin", "folder of meshd, meshctl and mesh")
	keep := flags.Bool("keep", false, "leave the machines running")
	manifest := flags.String("manifest", "manifests/examples/demo.yaml", "the application")
	if err := flags.Parse(args); errors.Is(err, flag.ErrHelp) {
		return nil
	} else if err != nil {
		return err
	}
	if flags.NArg() > 0 {
		return fmt.Errorf("%q: want nothing, down, or exec MACHINE COMMAND...", strings.Join(flags.Args(), " "))
	}
	if err := down(ctx); err != nil {
		return err
	}
	work, err := os.MkdirTemp("", "meshd-demo-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(work)
	w, err := story.New(story.Config{Name: labName, Keep: *keep, Bin: *bin, Work: work, Manifest: *manifest})
	if err != nil {
		return err
	}
	err = tell(ctx, w)
	if *keep && w.Lab != nil {
		explain()
		return err
	}
	return errors.Join(err, w.End(context.WithoutCancel(ctx)))
}

// tell runs the steps and prints the table.
func tell(ctx context.Context, w *story.World) error {
	start := time.Now()
	for i, s := range story.Steps() {
		note, took, err := s.Run(ctx, w)
		verdict := "ok"
		if err != nil {
			verdict = "FAIL"
		}
		fmt.Printf("%2d  %-4s %7.2fs  %-58s %s\n", i+1, verdict, took.Seconds(), s.Name, note)
		if ctx.Err() != nil {
			return fmt.Errorf("stopped in step %d, %s: %w", i+1, s.Name, context.Cause(ctx))
		}
		if err != nil {
			w.Report(os.Stdout)
			return fmt.Errorf("step %d, %s: %w", i+1, s.Name, err)
		}
	}
	fmt.Printf("    all  %7.2fs\n", time.Since(start).Seconds())
	return nil
}

func explain() {
	fmt.Print(`
The machines m1, m2 and m3 run on. Every command below is run inside one of them:

  bin/demo exec m1 meshctl status
  bin/demo exec m1 meshctl kubectl get pods -A -o wide
  bin/demo exec m2 bash                          (look around: ip, wg, nft, ctr work as on a real machine)

A kubectl of your own in /usr/bin works in them as well:

  bin/demo exec m1 kubectl --kubeconfig ` + story.AdminKubeconfig + ` get nodes

make demo-down takes them away.
`)
}

// down destroys the demo's machines if there are any.
func down(ctx context.Context) error {
	l, err := netlab.Open(labName)
	if errors.Is(err, fs.ErrNotExist) {
		return netlab.Sweep(ctx)
	}
	if err != nil {
		return err
	}
	if err := l.Destroy(ctx); err != nil {
		return err
	}
	for _, trace := range l.Traces() {
		err = errors.Join(err, errors.New("left behind: "+trace))
	}
	return err
}

// machinesOn says which machines a command could run in.
func machinesOn(l *netlab.Lab) string {
	var names []string
	for _, m := range l.Machines() {
		if m.On() {
			names = append(names, m.Name)
		}
	}
	if len(names) == 0 {
		return "all are off: make demo KEEP=1 makes them anew"
	}
	return "there are " + strings.Join(names, ", ")
}

func execIn(ctx context.Context, machine string, argv []string) error {
	l, err := netlab.Open(labName)
	if errors.Is(err, fs.ErrNotExist) {
		return errors.New("no demo is kept: make demo KEEP=1")
	}
	if err != nil {
		return err
	}
	m := l.Machine(machine)
	if m == nil || !m.On() {
		return fmt.Errorf("machine %s: none of that name is on; %s", machine, machinesOn(l))
	}
	cmd := m.Command(ctx, argv...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	err = cmd.Run()
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		os.Exit(exit.ExitCode())
	}
	return err
}
