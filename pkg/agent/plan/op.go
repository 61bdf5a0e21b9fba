package plan

import (
	"fmt"
	"maps"
	"strings"
	"time"
)

// Verb of an operation.
type Verb string

// What can be done to a pod.
const (
	SetupVolumes    Verb = "set up volumes"
	CreateSandbox   Verb = "create sandbox"
	StopSandbox     Verb = "stop sandbox"
	RemoveSandbox   Verb = "remove sandbox"
	StartContainer  Verb = "start container"
	KillContainer   Verb = "kill container"
	RemoveContainer Verb = "remove container"
	TeardownVolumes Verb = "tear down volumes"
	// Forget ends the pod on this node: its object is deleted for good and
	// its checkpoint removed.
	Forget Verb = "forget pod"
)

// Op is one operation. Which fields count depends on the Verb.
type Op struct {
	Verb Verb
	// ID of the sandbox or container; empty for what is yet to be made.
	ID string
	// Name of the container.
	Name    string
	Attempt int
	// Backoff that was waited for before this start.
	Backoff time.Duration
	// Grace between the polite signal and the other one.
	Grace time.Duration
	// Reason a kill is told to the user with.
	Reason string
}

// Key names what the operation works on; two operations of the same key must
// not run at the same time.
func (o Op) Key() string {
	switch o.Verb {
	case StartContainer:
		return "start/" + o.Name
	case KillContainer:
		return "kill/" + o.ID
	case RemoveContainer:
		return "remove/" + o.ID
	case StopSandbox, RemoveSandbox:
		return "sandbox/" + o.ID
	case CreateSandbox:
		return "sandbox"
	case SetupVolumes, TeardownVolumes:
		return "volumes"
	default:
		return string(o.Verb)
	}
}

// Forgive drops what is remembered of containers and sandboxes that are no
// more: failures by Op.Key, and sandboxes that are down.
func Forgive(failures map[string]Failure, down map[string]bool, obs Observed) {
	there := map[string]bool{}
	for _, id := range obs.IDs() {
		there[id] = true
	}
	maps.DeleteFunc(down, func(id string, _ bool) bool { return !there[id] })
	maps.DeleteFunc(failures, func(key string, _ Failure) bool {
		what, id, _ := strings.Cut(key, "/")
		id, _, _ = strings.Cut(id, "/") // of a kill sooner than another
		return (what == "kill" || what == "remove" || what == "sandbox") && id != "" && !there[id]
	})
}

func (o Op) String() string {
	switch o.Verb {
	case StartContainer:
		return fmt.Sprintf("start container %s #%d after %v", o.Name, o.Attempt, o.Backoff)
	case KillContainer:
		return fmt.Sprintf("kill container %s (%s) within %v: %s", o.Name, o.ID, o.Grace, o.Reason)
	case RemoveContainer:
		return fmt.Sprintf("remove container %s (%s)", o.Name, o.ID)
	case CreateSandbox:
		return fmt.Sprintf("create sandbox #%d", o.Attempt)
	case StopSandbox, RemoveSandbox:
		return fmt.Sprintf("%s %s", o.Verb, o.ID)
	default:
		return string(o.Verb)
	}
}
