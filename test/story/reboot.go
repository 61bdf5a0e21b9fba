package story

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"

	"meshd.dev/test/cluster"
)

// PowerCut is the story of a site that goes dark: every machine loses power at
// once, and what was promised is there when it comes back.
func PowerCut() []Step {
	return []Step{
		{"build images from static Go programs", buildImages},
		{"three machines on an underlay of their own", bootMachines},
		{"meshd server on m1", startServer},
		{"meshd join on m2 and m3, a token each", joinMachines},
		{"three nodes Ready", nodesReady},
		{"apply an application in plain YAML", applyApplication},
		{Running, applicationReady},
		{"all machines lose power and come back: pods, data, secret, keys are there", goDark},
		{"config map and secret, as files and as environment", configReaches},
		{"m1 reaches m3 by service name, underlay shows no payload", nameThroughTunnel},
	}
}

func goDark(ctx context.Context, w *World) (string, error) {
	ledger, err := w.PodOn(ctx, "ledger", "m2")
	if err != nil {
		return "", err
	}
	journal, err := w.Ask(ctx, ledger, "/file?path=/data/journal")
	if err != nil {
		return "", err
	}
	keys, err := w.publicKeys(ctx)
	if err != nil {
		return "", err
	}
	for _, m := range w.Lab.Machines() {
		if err := m.PowerOff(ctx); err != nil {
			return "", err
		}
	}
	on := time.Now()
	if err := w.startAgain(ctx); err != nil {
		return "", err
	}
	if err := w.allBack(ctx, on, journal); err != nil {
		return "", err
	}
	took := time.Since(on)
	if _, err := w.StatusHealthy(ctx, Names); err != nil {
		return "", err
	}
	after, err := w.publicKeys(ctx)
	if err == nil && after != keys {
		err = fmt.Errorf("tunnel keys were\n%sand are\n%s", keys, after)
	}
	return fmt.Sprintf("every pod serves again %s after power-on", cluster.Short(took)), err
}

// startAgain powers every machine on and starts what its init would.
func (w *World) startAgain(ctx context.Context) error {
	for _, m := range w.Lab.Machines() {
		if err := m.PowerOn(ctx); err != nil {
			return err
		}
		if _, err := m.StartContainerd(ctx); err != nil {
			return err
		}
		if m.Name == "m1" {
			continue
		}
		if err := w.Join(ctx, m.Name, ""); err != nil { // before its server is there
			return err
		}
	}
	return w.StartServer(ctx)
}

// allBack waits until each pod of the application answers as one started after
// t, and the ledger has its journal.
func (w *World) allBack(ctx context.Context, t time.Time, journal string) error {
	return cluster.Until(ctx, func(ctx context.Context) error {
		var all []corev1.Pod
		for app, n := range map[string]int{"web": 3, "everywhere": 3, "ledger": 1} {
			pods, err := w.Pods(ctx, app)
			if err != nil {
				return err
			}
			if len(pods) != n {
				return fmt.Errorf("%s: want %d pods, have\n%s", app, n, cluster.Describe(pods))
			}
			all = append(all, pods...)
		}
		for i := range all {
			id, err := w.Identity(ctx, &all[i])
			if err != nil {
				return err
			}
			if !cluster.Ready(all[i]) || id.Started.Before(t) {
				return fmt.Errorf("not back yet:\n%s", cluster.Describe(all[i:i+1]))
			}
			if all[i].Labels["app"] != "ledger" {
				continue
			}
			now, err := w.Ask(ctx, &all[i], "/file?path=/data/journal")
			if err != nil {
				return err
			}
			if !strings.HasPrefix(now, journal) || now == journal {
				return cluster.Final{Err: fmt.Errorf("the volume's journal was\n%sand is\n%s", journal, now)}
			}
		}
		return nil
	})
}

// publicKeys are the machines' tunnel keys, a line each.
func (w *World) publicKeys(ctx context.Context) (string, error) {
	out, err := w.Kubectl(ctx, "get", "nodes", "-o",
		`jsonpath={range .items[*]}{.metadata.name} {.metadata.annotations.meshd\.dev/public-key}{"\n"}{end}`)
	if err == nil && strings.Count(out, "\n") != len(Names) {
		err = errors.New("want a key a node, have\n" + out)
	}
	return out, err
}
