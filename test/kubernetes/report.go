package kubernetes

import (
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"
)

// Report leaves all logs of the cluster in the folder Config.Logs, and prints
// where they are and what a person needs first who asks why a step failed.
func (w *World) Report(out io.Writer) {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	_ = os.RemoveAll(w.cfg.Logs)
	if err := w.collect(ctx, out); err != nil {
		fmt.Fprintln(out, "not all logs could be kept:", err)
	}
	path, err := filepath.Abs(w.cfg.Logs)
	if err != nil {
		path = w.cfg.Logs
	}
	fmt.Fprintf(out, "--- all logs are in %s\n", path)
}

// collect copies the machines' logs and asks each machine and the API how it is.
func (w *World) collect(ctx context.Context, out io.Writer) error {
	for _, m := range w.Lab.Machines() {
		dir := filepath.Join(w.cfg.Logs, m.Name)
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return err
		}
		// A container's log is a link into the folder of its pod.
		if err := os.CopyFS(filepath.Join(dir, "log"), os.DirFS(m.Disk("/var/log"))); err != nil {
			fmt.Fprintln(out, err)
		}
		if !m.On() {
			fmt.Fprintf(out, "--- %s is off\n", m.Name)
			continue
		}
		for name, argv := range map[string][]string{
			"network":   {"sh", "-c", "ip addr; ip route show table all; ip rule; ip -6 rule; wg show; ls -l /etc/cni/net.d /opt/cni/bin"},
			"nftables":  {"nft", "list", "ruleset"},
			"sandboxes": {"ctr", "-n", "k8s.io", "containers", "list"},
		} {
			text, err := m.Run(ctx, argv...)
			if err != nil {
				text += "\n" + err.Error() + "\n"
			}
			if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
				return err
			}
		}
	}
	for _, name := range w.nodes {
		if w.API == nil {
			break
		}
		text, err := w.Status(ctx, name)
		fmt.Fprintf(out, "--- %s: meshctl status\n%s", name, text)
		if err != nil {
			fmt.Fprintln(out, err)
		}
	}
	return w.askAPI(ctx, out)
}

func (w *World) askAPI(ctx context.Context, out io.Writer) error {
	if w.API == nil {
		return nil
	}
	for name, args := range map[string]string{
		"objects": "get nodes,pods,daemonsets,services,endpointslices -A -o wide", "nodes.yaml": "get nodes -o yaml",
		"pods": "describe pods -A", "events": "get events -A --sort-by=.lastTimestamp",
	} {
		text, err := w.Kubectl(ctx, strings.Fields(args)...)
		if err != nil {
			text += "\n" + err.Error() + "\n"
		}
		if err := os.WriteFile(filepath.Join(w.cfg.Logs, name), []byte(text), 0o644); err != nil {
			return err
		}
		if name == "objects" || name == "events" {
			fmt.Fprintf(out, "--- kubectl %s\n%s", args, text)
		}
	}
	return nil
}
