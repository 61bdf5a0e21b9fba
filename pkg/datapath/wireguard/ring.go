package wireguard

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"time"

	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	"meshd.dev/pkg/durable"
	"meshd.dev/pkg/mesh"
)

// Ring is the private keys of this node on disk: the current one and, while
// the node changes its key, the next one. The two files are all there is to
// know about how far a change has come, so that one may crash anywhere:
//
//	wireguard.key alone             Steady
//	wireguard-next.key differs      Leaving the current key
//	wireguard-next.key is the same  Returning to the first device with it
//
// Its methods may be called from any goroutine.
type Ring struct {
	dir string

	mu       sync.Mutex
	keys     Keys
	private  [2]wgtypes.Key // current and next
	fresh    bool
	setAside string
	born     map[mesh.Key]birth
}

// Keys of a node as others know them.
type Keys struct {
	// Current is on the first device. Next is zero unless a change is on; it
	// is on the second device.
	Current, Next mesh.Key
	// Since when Current is the current one.
	Since time.Time
	// Generation counts the keys this node had, from 1; Made is when Current
	// was made.
	Generation int
	Made       time.Time
}

// Stage of a change of the key.
type Stage string

const (
	Steady    Stage = "steady"
	Leaving   Stage = "leaving"
	Returning Stage = "returning"
)

// Stage of the change.
func (k Keys) Stage() Stage { return StageOf(k.Current, k.Next) }

// StageOf a node with these keys.
func StageOf(current, next mesh.Key) Stage {
	switch {
	case next.IsZero():
		return Steady
	case next == current:
		return Returning
	}
	return Leaving
}

const (
	currentFile = "wireguard.key"
	nextFile    = "wireguard-next.key"
	bornFile    = "wireguard-keys.json"
)

// birth is what is remembered of a key for people; nothing depends on it.
type birth struct {
	Generation int       `json:"generation"`
	Made       time.Time `json:"made"`
}

// OpenRing reads the keys in dir and makes the first one when there is none.
// A file that holds something else is moved aside and named by SetAside.
func OpenRing(dir string) (*Ring, error) {
	r := &Ring{dir: dir, born: map[mesh.Key]birth{}}
	_, fresh, setAside, err := loadKey(r.path(currentFile))
	if err != nil {
		return nil, err
	}
	r.fresh, r.setAside = fresh, setAside
	if b, err := os.ReadFile(r.path(bornFile)); err == nil && len(b) < 4096 {
		_ = json.Unmarshal(b, &r.born) // for people only
	}
	return r, r.read()
}

func (r *Ring) path(file string) string { return filepath.Join(r.dir, file) }

// read takes the keys from the files. The next one is forgotten when it
// cannot be read: nobody may rely on it yet, or it is the current one.
func (r *Ring) read() error {
	current, err := r.file(currentFile)
	if err != nil {
		return err
	}
	next, err := r.file(nextFile)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		aside := fmt.Sprintf("%s.corrupt-%d", r.path(nextFile), time.Now().Unix())
		if err := os.Rename(r.path(nextFile), aside); err != nil {
			return fmt.Errorf("set corrupt private key aside: %w", err)
		}
		r.setAside = aside
	}
	r.private = [2]wgtypes.Key{current, next}
	info, err := os.Stat(r.path(currentFile))
	if err != nil {
		return err
	}
	r.keys = Keys{Current: public(current), Next: public(next), Since: info.ModTime(), Generation: 1, Made: info.ModTime()}
	if b, ok := r.born[r.keys.Current]; ok {
		r.keys.Generation, r.keys.Made = b.Generation, b.Made
	}
	return nil
}

func (r *Ring) file(name string) (wgtypes.Key, error) {
	b, err := os.ReadFile(r.path(name))
	if err != nil {
		return wgtypes.Key{}, err
	}
	key, err := parseKey(b)
	if err != nil {
		return key, fmt.Errorf("%s: %w", r.path(name), err)
	}
	return key, nil
}

func public(k wgtypes.Key) mesh.Key {
	if k == (wgtypes.Key{}) {
		return mesh.Key{}
	}
	return mesh.Key(k.PublicKey())
}

// Keys as they are now.
func (r *Ring) Keys() Keys {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.keys
}

// SetAside is where a corrupt private key was put, or empty.
func (r *Ring) SetAside() string { return r.setAside }

// Fresh says that the current key was made at this start: nobody knows it.
func (r *Ring) Fresh() bool { return r.fresh }

// Begin makes the next key. It changes nothing while a change is on.
func (r *Ring) Begin() error {
	return r.step(Steady, func() error {
		key, err := wgtypes.GeneratePrivateKey()
		if err != nil {
			return err
		}
		r.born = map[mesh.Key]birth{
			r.keys.Current: {r.keys.Generation, r.keys.Made},
			public(key):    {r.keys.Generation + 1, time.Now().UTC().Truncate(time.Second)},
		}
		b, err := json.Marshal(r.born)
		if err != nil {
			return err
		}
		if err := durable.WriteFile(r.path(bornFile), append(b, '\n'), 0o600); err != nil {
			return err
		}
		return writeKey(r.path(nextFile), key)
	})
}

// Adopt makes the next key the current one; both are the same from then on.
func (r *Ring) Adopt() error {
	return r.step(Leaving, func() error {
		return writeKey(r.path(currentFile), r.private[1])
	})
}

// Finish ends the change, or gives it up when the next key was not adopted.
func (r *Ring) Finish() error {
	return r.step("", func() error {
		err := os.Remove(r.path(nextFile))
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if err != nil {
			return err
		}
		return durable.SyncDir(r.dir)
	})
}

// step does one step, in stage from alone if it is given.
func (r *Ring) step(from Stage, do func() error) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if from != "" && r.keys.Stage() != from {
		return nil
	}
	if err := do(); err != nil {
		return fmt.Errorf("change the private key: %w", err)
	}
	return r.read()
}

// secret is the private key of a device: the second one has the next key, and
// the current one when there is none.
func (r *Ring) secret(second bool) wgtypes.Key {
	r.mu.Lock()
	defer r.mu.Unlock()
	if second && r.private[1] != (wgtypes.Key{}) {
		return r.private[1]
	}
	return r.private[0]
}
