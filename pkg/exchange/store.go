package exchange

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"meshd.dev/pkg/durable"
	"meshd.dev/pkg/mesh"
)

// Store is the preshared keys on disk, a file a node, mode 0600. Its methods
// may be called from any goroutine.
type Store struct {
	dir string

	mu    sync.Mutex
	nodes map[string]file
	// SetAside are files that held something else.
	setAside []string
}

// file of a node. UID is that of its Node object: another object by that name
// is another node.
type file struct {
	UID  string  `json:"uid"`
	Keys []entry `json:"keys"`
}

// entry is the preshared key of two keys, ours and the node's.
type entry struct {
	Own  mesh.Key  `json:"own"`
	Peer mesh.Key  `json:"peer"`
	PSK  []byte    `json:"psk"`
	Made time.Time `json:"made"`
}

// OpenStore reads what is in dir. A file that cannot be read is moved aside
// and its key agreed anew.
func OpenStore(dir string) (*Store, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("preshared keys: %w", err)
	}
	s := &Store{dir: dir, nodes: map[string]file{}}
	list, err := os.ReadDir(dir)
	if err != nil {
		return nil, fmt.Errorf("preshared keys: %w", err)
	}
	for _, e := range list {
		path := filepath.Join(dir, e.Name())
		if !e.Type().IsRegular() || strings.Contains(e.Name(), ".corrupt-") {
			continue
		}
		f, err := readFile(path)
		if err == nil {
			s.nodes[e.Name()] = f
			continue
		}
		aside := fmt.Sprintf("%s.corrupt-%d", path, time.Now().Unix())
		if err := os.Rename(path, aside); err != nil {
			return nil, fmt.Errorf("preshared keys: set aside: %w", err)
		}
		s.setAside = append(s.setAside, aside)
	}
	return s, nil
}

func readFile(path string) (file, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return file{}, err
	}
	return parseFile(b)
}

func parseFile(b []byte) (file, error) {
	var f file
	if err := parseStrictly(b, &f); err != nil {
		return f, err
	}
	for _, e := range f.Keys {
		if len(e.PSK) != len(Secret{}) {
			return f, fmt.Errorf("preshared key: want %d bytes, have %d", len(Secret{}), len(e.PSK))
		}
	}
	if f.UID == "" || len(f.Keys) == 0 {
		return f, errors.New("preshared key: none")
	}
	return f, nil
}

// get the preshared key of two keys. had is true when there ever was one with
// this node.
func (s *Store) get(n mesh.Node, own, peer mesh.Key) (e entry, ok, had bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	f, had := s.nodes[n.Name]
	if had = had && f.UID == n.UID; !had {
		return entry{}, false, false
	}
	i := slices.IndexFunc(f.Keys, func(e entry) bool { return e.Own == own && e.Peer == peer })
	if i < 0 {
		return entry{}, false, true
	}
	return f.Keys[i], true, true
}

// put one more on disk. Of the earlier ones those stay that useful says are
// of use, and the last in any case.
func (s *Store) put(n mesh.Node, own, peer mesh.Key, psk Secret, useful func(own, peer mesh.Key) bool) error {
	if n.Name == "" || n.UID == "" || strings.ContainsAny(n.Name, "/\x00") || n.Name[0] == '.' {
		return fmt.Errorf("preshared key: node %q with UID %q cannot have one", n.Name, n.UID)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	f := file{UID: n.UID}
	if old := s.nodes[n.Name]; old.UID == n.UID {
		for _, e := range old.Keys {
			if useful(e.Own, e.Peer) && (e.Own != own || e.Peer != peer) {
				f.Keys = append(f.Keys, e)
			}
		}
	}
	f.Keys = append(f.Keys, entry{own, peer, psk[:], time.Now().UTC().Truncate(time.Second)})
	b, err := json.Marshal(f)
	if err != nil {
		return fmt.Errorf("preshared key: %w", err)
	}
	if err := durable.WriteFile(filepath.Join(s.dir, n.Name), b, 0o600); err != nil {
		return fmt.Errorf("preshared key of %s: %w", n.Name, err)
	}
	s.nodes[n.Name] = f
	return nil
}

// keep those of the nodes in the cluster, and of no other.
func (s *Store) keep(state *mesh.State) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	var errs []error
	for name, f := range s.nodes {
		if n, ok := state.Node(name); ok && n.UID == f.UID {
			continue
		}
		err := os.Remove(filepath.Join(s.dir, name))
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, fmt.Errorf("forget preshared key: %w", err))
			continue
		}
		delete(s.nodes, name)
	}
	return errors.Join(errs...)
}
