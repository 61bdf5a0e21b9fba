package story

import (
	"context"
	"fmt"
	"io"
	"os"
	"strings"
	"time"
)

// Report prints what a person needs who asks why a step failed: status and the
// end of the logs of every machine.
func (w *World) Report(out io.Writer) {
	if w.Lab == nil {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	for _, m := range w.Lab.Machines() {
		if !m.On() {
			fmt.Fprintf(out, "--- %s is off\n", m.Name)
			continue
		}
		fmt.Fprintf(out, "--- %s: meshctl status\n", m.Name)
		status, err := m.Run(ctx, "meshctl", "status")
		fmt.Fprint(out, status)
		if err != nil {
			fmt.Fprintln(out, err)
		}
		fmt.Fprintf(out, "--- %s: end of meshd's log\n%s\n", m.Name, w.MeshdLog(m.Name, 25))
		fmt.Fprintf(out, "--- %s: what containerd complains of\n%s\n", m.Name, complaints(m.Disk("/var/log/containerd.log"), 8))
	}
	if w.API != nil {
		for _, args := range [][]string{{"get", "nodes,pods", "-A", "-o", "wide"}, {"get", "events", "-A"}} {
			text, err := w.Kubectl(ctx, args...)
			fmt.Fprintf(out, "--- kubectl %v\n%s", args, text)
			if err != nil {
				fmt.Fprintln(out, err)
			}
		}
	}
}

// complaints are the last n lines of containerd's log above level info.
func complaints(path string, n int) string {
	b, err := os.ReadFile(path)
	if err != nil {
		return err.Error()
	}
	var lines []string
	for line := range strings.Lines(string(b)) {
		if !strings.Contains(line, "level=info") && !strings.Contains(line, "level=debug") {
			lines = append(lines, line)
		}
	}
	return strings.Join(lines[max(0, len(lines)-n):], "")
}
