package plan

import (
	"maps"
	"slices"
	"strings"
	"testing"
)

// Memory of what is no more goes; that of names stays, which are few.
func TestForgive(t *testing.T) {
	failures := map[string]Failure{}
	for _, key := range []string{"start/x", "sandbox", "volumes", "status", "kill/c0", "kill/c1", "kill/c0/sooner", "kill/c1/sooner", "remove/c0", "remove/c1", "sandbox/s0", "sandbox/s1"} {
		failures[key] = Failure{}
	}
	down := map[string]bool{"s0": true, "s1": true}
	Forgive(failures, down, Observed{Sandboxes: []Sandbox{{ID: "s1"}}, Containers: []Container{{ID: "c1"}}})
	got := strings.Join(slices.Sorted(maps.Keys(failures)), " ") + "; " + strings.Join(slices.Sorted(maps.Keys(down)), " ")
	if want := "kill/c1 kill/c1/sooner remove/c1 sandbox sandbox/s1 start/x status volumes; s1"; got != want {
		t.Errorf("got %s, want %s", got, want)
	}
}
