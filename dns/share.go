package dns

import (
	"fmt"
	"sync"

	"meshd.dev/dns/index"
)

// shared are the indexes a Corefile can name. They live outside the plugin
// because a reload of a Corefile makes new plugins, and the records must not
// be built anew for that.
var shared struct {
	mu      sync.Mutex
	indexes map[string]*index.Index
}

// DefaultIndex is the name of the index a Corefile that names none gets.
const DefaultIndex = "default"

// Share makes x known to Corefiles under name, in place of what had the name
// before, until the function it returns is called. Call it before CoreDNS
// starts.
func Share(name string, x *index.Index) (forget func()) {
	shared.mu.Lock()
	defer shared.mu.Unlock()
	if shared.indexes == nil {
		shared.indexes = map[string]*index.Index{}
	}
	shared.indexes[name] = x
	return func() {
		shared.mu.Lock()
		defer shared.mu.Unlock()
		if shared.indexes[name] == x {
			delete(shared.indexes, name)
		}
	}
}

func sharedIndex(name string) (*index.Index, error) {
	shared.mu.Lock()
	defer shared.mu.Unlock()
	x, ok := shared.indexes[name]
	if !ok {
		return nil, fmt.Errorf("no index %q: the program around CoreDNS has to call Share before it starts", name)
	}
	return x, nil
}
