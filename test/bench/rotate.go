package main

import (
	"context"
	"errors"
	"fmt"
	"time"

	"meshd.dev/test/flows"
	"meshd.dev/test/netlab"
	"meshd.dev/test/story"
)

// rotate changes keys again and again, of one machine, of another, and of all
// at once, while a thousand questions a second go through the tunnels from m1
// to m3 and from m3 to m2, and counts those that are not answered.
func rotate(ctx context.Context, w *story.World, o options) (rows []row, err error) {
	var to []string
	for _, name := range []string{"m3", "m2"} {
		addr, err := w.MeshAddr(ctx, name)
		if err != nil {
			return nil, err
		}
		to = append(to, addr.String()+":"+flowsPort)
		server, err := w.Machine(name).Start(ctx, "flows", "/usr/local/bin/bench", "flows", "serve", to[len(to)-1])
		if err != nil {
			return nil, err
		}
		defer func() { err = errors.Join(err, netlab.Kill(context.WithoutCancel(ctx), server)) }()
	}
	before, err := dropped(ctx, w)
	if err != nil {
		return nil, err
	}
	var times []time.Duration
	var inner flows.Result
	outer, err := keepFlows(ctx, w, "m1", to[0], 1, func() (err error) {
		inner, err = keepFlows(ctx, w, "m3", to[1], 1, func() (err error) {
			times, err = changeKeys(ctx, w, o.rotations)
			return err
		})
		return err
	})
	if err != nil {
		return nil, err
	}
	after, err := dropped(ctx, w)
	if err != nil {
		return nil, err
	}
	asked, lost := outer.Asked+inner.Asked, outer.Unanswered()+inner.Unanswered()
	return []row{
		{fmt.Sprintf("%d changes of keys: of 1,000 questions a second each way unanswered", len(times)), fmt.Sprintf("%d of %d", lost, asked), "",
			fmt.Sprintf("%d in a row at most; goal 0; dropped %s; connections broken: %d", max(outer.Burst, inner.Burst), since(before, after), outer.Broken+inner.Broken)},
		{"a change of keys", sec(quantile(times, .5)) + " median", "", sec(quantile(times, 1)) + " at most"},
	}, nil
}

// changeKeys so many times.
func changeKeys(ctx context.Context, w *story.World, changes int) (times []time.Duration, err error) {
	for i := range changes {
		command := [][]string{{"m1", "meshctl", "keys", "rotate"}, {"m3", "meshctl", "keys", "rotate"}, {"m1", "meshctl", "keys", "rotate", "--all"}}[i%3]
		start := time.Now()
		if out, err := w.Machine(command[0]).Run(ctx, command[1:]...); err != nil {
			return times, fmt.Errorf("change of key %d: %w: %s", i, err, out)
		}
		times = append(times, time.Since(start))
	}
	return times, nil
}
