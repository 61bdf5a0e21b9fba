package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"syscall"
	"time"

	"meshd.dev/test/cluster"
	"meshd.dev/test/flows"
	"meshd.dev/test/netlab"
	"meshd.dev/test/story"
)

// flowsPort is where m3 echoes.
const flowsPort = "7007"

// noCut has a hundred connections and a thousand questions a second go from m1
// to m3 through the tunnel while meshd there is stopped, killed and replaced
// again and again, and then while nothing happens, for comparison.
func noCut(ctx context.Context, w *story.World, o options) (rows []row, err error) {
	addr, err := w.MeshAddr(ctx, "m3")
	if err != nil {
		return nil, err
	}
	to := addr.String() + ":" + flowsPort
	server, err := w.Machine("m3").Start(ctx, "flows", "/usr/local/bin/bench", "flows", "serve", to)
	if err != nil {
		return nil, err
	}
	defer func() { err = firstOf(err, netlab.Kill(context.WithoutCancel(ctx), server)) }()
	begin := time.Now()
	before, err := dropped(ctx, w)
	if err != nil {
		return nil, err
	}
	cut, err := keepFlows(ctx, w, "m1", to, 100, func() error {
		for i := range o.restarts {
			if err := restartOnce(ctx, w, o, []string{"m1", "m3"}[i%2], i%3); err != nil {
				return fmt.Errorf("restart %d: %w", i+1, err)
			}
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	took := time.Since(begin)
	after, err := dropped(ctx, w)
	if err != nil {
		return nil, err
	}
	calm, err := keepFlows(ctx, w, "m1", to, 100, func() error {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(min(took, time.Minute)):
			return nil
		}
	})
	if err != nil {
		return nil, err
	}
	return []row{
		{fmt.Sprintf("%d restarts of meshd: connections broken", o.restarts), fmt.Sprintf("%d of %d", cut.Broken, cut.Connections), fmt.Sprintf("%d of %d without", calm.Broken, calm.Connections), "stopped, killed, replaced by turns, on both ends; goal 0"},
		{"UDP questions unanswered", fmt.Sprintf("%d of %d", cut.Unanswered(), cut.Asked), fmt.Sprintf("%d of %d without", calm.Unanswered(), calm.Asked), "about 1,000 asked a second; dropped " + since(before, after)},
		{"longest time without an answer", ms(cut.Gap), ms(calm.Gap) + " without", "aim 0 more; -nice 19 tells what a restart does from the CPU it takes"},
	}, nil
}

func firstOf(a, b error) error {
	if a != nil {
		return a
	}
	return b
}

// restartOnce ends meshd on a machine in one of three ways and waits until it
// is back and healthy.
func restartOnce(ctx context.Context, w *story.World, o options, name string, way int) error {
	// Whoever is started by this thread has its priority.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	if err := syscall.Setpriority(syscall.PRIO_PROCESS, 0, o.nice); err != nil {
		return err
	}
	defer func() { _ = syscall.Setpriority(syscall.PRIO_PROCESS, 0, 0) }()
	pid := w.Meshd(name)
	switch way {
	case 0: // killed
		if err := netlab.Kill(ctx, pid); err != nil {
			return err
		}
		return w.ReviveMeshd(ctx, name)
	case 2: // another file
		if err := replaceFile(filepath.Join(o.bin, "meshd")); err != nil {
			return err
		}
	}
	if err := syscall.Kill(pid, syscall.SIGTERM); err != nil {
		return err
	}
	if err := cluster.Until(ctx, func(context.Context) error {
		if netlab.Alive(pid) {
			return fmt.Errorf("meshd on %s has not ended", name)
		}
		return nil
	}); err != nil {
		return err
	}
	return w.ReviveMeshd(ctx, name)
}

// drops are packets that the kernels of m1 and m3 say they dropped, by place.
type drops struct{ sockets, queues, routes int }

// dropped until now: at full sockets, in front of the tunnel because its process
// did not take them, and for want of a route.
func dropped(ctx context.Context, w *story.World) (d drops, err error) {
	for _, name := range []string{"m1", "m3"} {
		out, err := w.Machine(name).Run(ctx, "sh", "-ec", `
			awk '$1 == "Udp:" && !n { for (i = 2; i <= NF; i++) if ($i == "RcvbufErrors") n = i; next } $1 == "Udp:" { print $n }' /proc/net/snmp
			awk '$1 == "mesh0:" { print $5 + $13 }' /proc/net/dev
			awk '$1 == "IpExt:" && !n { for (i = 2; i <= NF; i++) if ($i == "InNoRoutes") n = i; next } $1 == "IpExt:" { print $n }' /proc/net/netstat`)
		if err != nil {
			return d, err
		}
		var here drops
		if _, err := fmt.Sscan(out, &here.sockets, &here.queues, &here.routes); err != nil {
			return d, fmt.Errorf("drops of %s: %w: %q", name, err, out)
		}
		d = drops{d.sockets + here.sockets, d.queues + here.queues, d.routes + here.routes}
	}
	return d, nil
}

func since(a, b drops) string {
	return fmt.Sprintf("%d at full sockets, %d in front of mesh0, %d without a route", b.sockets-a.sockets, b.queues-a.queues, b.routes-a.routes)
}

// replaceFile puts a copy of a file in its place, as an upgrade does. The
// machines see the folder it is in.
func replaceFile(path string) error {
	old, err := os.Open(path)
	if err != nil {
		return err
	}
	defer old.Close()
	next, err := os.OpenFile(path+".next", os.O_CREATE|os.O_WRONLY|os.O_TRUNC, 0o755)
	if err != nil {
		return err
	}
	if _, err := io.Copy(next, old); err != nil {
		next.Close()
		return err
	}
	return firstOf(next.Close(), os.Rename(path+".next", path))
}

// keepFlows has flows go from a machine while f runs.
func keepFlows(ctx context.Context, w *story.World, from, to string, connections int, f func() error) (r flows.Result, err error) {
	cmd := w.Machine(from).Command(ctx, "/usr/local/bin/bench", "flows", "ask", to, strconv.Itoa(connections))
	in, err := cmd.StdinPipe()
	if err != nil {
		return r, err
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return r, err
	}
	cmd.Stderr = os.Stderr
	if err := cmd.Start(); err != nil {
		return r, err
	}
	said := json.NewDecoder(out)
	var ready string
	if err := said.Decode(&ready); err != nil {
		return r, fmt.Errorf("flows to %s: %w", to, err)
	}
	err = f()
	in.Close()
	err = firstOf(err, said.Decode(&r))
	return r, firstOf(err, cmd.Wait())
}

// flowsInside is the part of this program that runs in a machine.
func flowsInside(ctx context.Context, args []string) error {
	if args[0] == "serve" {
		return flows.Serve(ctx, args[1])
	}
	n, err := strconv.Atoi(args[2])
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	go func() { _, _ = io.Copy(io.Discard, os.Stdin); cancel() }()
	r, err := flows.Probe(ctx, args[1], n, func() { fmt.Println(`"ready"`) })
	if err != nil {
		return err
	}
	return json.NewEncoder(os.Stdout).Encode(r)
}
