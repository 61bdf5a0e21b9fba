// Package plan decides what a pod needs next. It is pure: from the pod's
// object, what the runtime has of it, the verdicts of its probes, what failed
// lately and the time, to a list of operations that read like sentences.
package plan

import (
	"slices"
	"strings"
	"time"
)

// State of a container in the runtime.
type State string

// The states CRI knows.
const (
	Created State = "created"
	Running State = "running"
	Exited  State = "exited"
	Unknown State = "unknown"
)

// Sandbox is what the runtime has of a pod's sandbox.
type Sandbox struct {
	ID      string
	Attempt uint32
	Ready   bool
	Created time.Time
	IPs     []string
}

// Container is what the runtime has of one run of a container. A restart makes
// a new one, with the next Attempt.
type Container struct {
	ID, Name, SandboxID        string
	Attempt                    int
	State                      State
	Created, Started, Finished time.Time
	ExitCode                   int32
	Reason, Message            string
	Image, ImageID             string
	LogPath                    string
	// Hash of the spec this one was made from.
	Hash string
	// Backoff was waited for before this one was made. The next wait follows
	// from it, so that it outlives the agent.
	Backoff time.Duration
}

// Observed is everything the runtime has of a pod. Both lists have the newest
// first.
type Observed struct {
	Sandboxes  []Sandbox
	Containers []Container
}

// Sandbox is the newest sandbox, or nil.
func (o *Observed) Sandbox() *Sandbox {
	if len(o.Sandboxes) == 0 {
		return nil
	}
	return &o.Sandboxes[0]
}

// Latest is the newest container of that name, or nil.
func (o *Observed) Latest(name string) *Container { return o.find(name, 0) }

// Previous is the one before Latest, or nil.
func (o *Observed) Previous(name string) *Container { return o.find(name, 1) }

func (o *Observed) find(name string, skip int) *Container {
	for i := range o.Containers {
		if o.Containers[i].Name != name {
			continue
		}
		if skip == 0 {
			return &o.Containers[i]
		}
		skip--
	}
	return nil
}

// IDs of all there is.
func (o *Observed) IDs() []string {
	var ids []string
	for _, s := range o.Sandboxes {
		ids = append(ids, s.ID)
	}
	for _, c := range o.Containers {
		ids = append(ids, c.ID)
	}
	return ids
}

// Running reports whether any container of the pod may have a process.
func (o *Observed) Running() bool {
	for _, c := range o.Containers {
		if c.State == Running || c.State == Unknown {
			return true
		}
	}
	return false
}

// Sort puts the newest first, as the other methods need it.
func (o *Observed) Sort() {
	slices.SortFunc(o.Containers, compareContainers)
	slices.SortFunc(o.Sandboxes, compareSandboxes)
}

func compareContainers(a, b Container) int {
	if a.Attempt != b.Attempt {
		return b.Attempt - a.Attempt
	}
	if c := b.Created.Compare(a.Created); c != 0 {
		return c
	}
	return strings.Compare(a.ID, b.ID)
}

func compareSandboxes(a, b Sandbox) int {
	if a.Attempt != b.Attempt {
		return int(b.Attempt) - int(a.Attempt)
	}
	if c := b.Created.Compare(a.Created); c != 0 {
		return c
	}
	return strings.Compare(a.ID, b.ID)
}
