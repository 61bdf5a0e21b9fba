package main

import (
	"context"
	"fmt"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"

	"meshd.dev/test/story"
)

// removed deletes the Node of m3 and reports how long its peers still take it
// for one of them, and the API its certificate.
func removed(ctx context.Context, w *story.World, _ options) ([]row, error) {
	key, err := w.Machine("m3").Run(ctx, "wg", "show", "mesh0", "public-key")
	if err != nil {
		return nil, err
	}
	const api = `while meshctl --kubeconfig /var/lib/meshd/node/node.kubeconfig kubectl get nodes >/dev/null 2>&1; do :; done`
	peer := fmt.Sprintf(`while wg show mesh0 peers | grep -qF %q; do sleep 0.01; done`, strings.TrimSpace(key))
	waits := []struct{ machine, what, until string }{{"m1", "its peers", peer}, {"m2", "its peers", peer}, {"m3", "the API", api}}
	at := make([]time.Time, len(waits))
	group, ctx := errgroup.WithContext(ctx)
	for i, wait := range waits {
		group.Go(func() (err error) {
			at[i], err = moment(w.Machine(wait.machine).Run(ctx, "sh", "-ec", wait.until+"; date +%s%N"))
			return err
		})
	}
	deleted, err := moment(w.Machine("m1").Run(ctx, "sh", "-ec", "meshctl kubectl delete node m3 --wait=false >/dev/null; date +%s%N"))
	if err != nil {
		return nil, err
	}
	if err := group.Wait(); err != nil {
		return nil, err
	}
	after := func(t time.Time) string { return sec(max(0, t.Sub(deleted))) }
	last := at[0]
	if at[1].After(last) {
		last = at[1]
	}
	return []row{{"a node is deleted: refused by its peers, by the API", after(last) + ", " + after(at[2]), "",
		"after kubectl said so; aim 2 s. The API waits a second for a node that may just be joining"}}, nil
}

// moment is what date +%s%N printed last.
func moment(out string, err error) (time.Time, error) {
	if err != nil {
		return time.Time{}, err
	}
	words := strings.Fields(out)
	if len(words) == 0 {
		return time.Time{}, fmt.Errorf("no time in %q", out)
	}
	n, err := strconv.ParseInt(words[len(words)-1], 10, 64)
	return time.Unix(0, n), err
}
