// Package object keeps the secrets and config maps that this node's pods refer
// to: each is got and watched alone, as the node's credentials allow, kept on
// disk for the time the API is away, and let go with the last pod that needs
// it.
package object

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"time"

	v1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/kubernetes"

	"meshd.dev/pkg/durable"
)

// Ref names one object.
type Ref struct {
	// Kind is "secrets" or "configmaps".
	Kind, Namespace, Name string
}

// Config of a Store.
type Config struct {
	Client kubernetes.Interface
	// Dir keeps config maps; SecretDir keeps secrets and must be in memory.
	Dir, SecretDir string
	// Changed is told which pods refer to an object that changed. It must not
	// block.
	Changed func([]types.UID)
	Log     *slog.Logger
}

// Store of the objects in use.
type Store struct {
	cfg Config
	ctx context.Context
	end context.CancelFunc
	wg  sync.WaitGroup

	mu      sync.Mutex
	entries map[Ref]*entry
	held    map[types.UID][]Ref
}

type entry struct {
	stop  context.CancelFunc
	ready chan struct{} // closed when obj or err is known
	once  sync.Once
	pods  map[types.UID]bool

	obj runtime.Object
	err error
}

// New makes a Store. Close ends its watches.
func New(cfg Config) *Store {
	ctx, end := context.WithCancel(context.Background())
	return &Store{cfg: cfg, ctx: ctx, end: end, entries: map[Ref]*entry{}, held: map[types.UID][]Ref{}}
}

// Close ends every watch and waits for them.
func (s *Store) Close() {
	s.end()
	s.wg.Wait()
}

// Hold says which objects a pod refers to; none lets go of all.
func (s *Store) Hold(pod types.UID, refs []Ref) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, r := range refs {
		s.entry(r).pods[pod] = true
	}
	for _, r := range s.held[pod] {
		if !contains(refs, r) {
			s.release(r, pod)
		}
	}
	s.held[pod] = refs
	if len(refs) == 0 {
		delete(s.held, pod)
	}
}

func contains(refs []Ref, r Ref) bool {
	for _, x := range refs {
		if x == r {
			return true
		}
	}
	return false
}

func (s *Store) entry(r Ref) *entry {
	e := s.entries[r]
	if e == nil {
		ctx, stop := context.WithCancel(s.ctx)
		e = &entry{stop: stop, ready: make(chan struct{}), pods: map[types.UID]bool{}}
		s.entries[r] = e
		s.wg.Go(func() { s.follow(ctx, r, e) })
	}
	return e
}

func (s *Store) release(r Ref, pod types.UID) {
	e := s.entries[r]
	if e == nil {
		return
	}
	delete(e.pods, pod)
	if len(e.pods) > 0 {
		return
	}
	e.stop()
	delete(s.entries, r)
	_ = os.Remove(s.path(r))
}

// Secret returns a secret some pod holds.
func (s *Store) Secret(namespace, name string) (*v1.Secret, error) {
	obj, err := s.get(Ref{"secrets", namespace, name})
	if err != nil {
		return nil, err
	}
	return obj.(*v1.Secret), nil
}

// ConfigMap returns a config map some pod holds.
func (s *Store) ConfigMap(namespace, name string) (*v1.ConfigMap, error) {
	obj, err := s.get(Ref{"configmaps", namespace, name})
	if err != nil {
		return nil, err
	}
	return obj.(*v1.ConfigMap), nil
}

// patience is how long the first answer of the API is waited for.
const patience = 5 * time.Second

func (s *Store) get(r Ref) (runtime.Object, error) {
	s.mu.Lock()
	e := s.entries[r]
	s.mu.Unlock()
	if e == nil {
		return nil, fmt.Errorf("%s %s/%s is not held by a pod", r.Kind, r.Namespace, r.Name)
	}
	select {
	case <-e.ready:
	case <-time.After(patience):
		return nil, fmt.Errorf("%s %s/%s: the API did not answer within %v", r.Kind, r.Namespace, r.Name, patience)
	case <-s.ctx.Done():
		return nil, s.ctx.Err()
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	return e.obj, e.err
}

// follow keeps the entry current until ctx ends.
func (s *Store) follow(ctx context.Context, r Ref, e *entry) {
	const first = 200 * time.Millisecond
	wait := first
	for ctx.Err() == nil {
		begin := time.Now()
		err := s.once(ctx, r, e)
		if ctx.Err() != nil {
			return
		}
		if time.Since(begin) > 10*time.Second {
			wait = first
		}
		s.cfg.Log.Debug("following object", "kind", r.Kind, "namespace", r.Namespace, "name", r.Name, "again in", wait, "err", err)
		select {
		case <-ctx.Done():
		case <-time.After(wait):
		}
		wait = min(2*wait, 10*time.Second)
	}
}

// once gets the object and follows it as long as the watch lives. The watch is
// opened first, so that nothing happens between the two unseen. It is opened at
// no version: that of an object which has not changed for long may be one the
// API no longer remembers.
func (s *Store) once(ctx context.Context, r Ref, e *entry) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	w, watchErr := s.open(ctx, r)
	if watchErr == nil {
		defer w.Stop()
	}
	obj, err := s.fetch(ctx, r)
	switch {
	case err == nil:
		s.set(r, e, obj, nil)
	case apierrors.IsNotFound(err):
		s.set(r, e, nil, err)
	case apierrors.IsForbidden(err):
		// No proof that it is gone: an API that has just started may not know
		// yet which pods are this node's.
		s.recall(r, e)
		if !s.has(e) {
			s.set(r, e, nil, err)
		}
		return err
	default:
		s.recall(r, e)
		return err
	}
	if watchErr != nil {
		return watchErr
	}
	return s.watch(ctx, r, e, w)
}

func (s *Store) fetch(ctx context.Context, r Ref) (runtime.Object, error) {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	if r.Kind == "secrets" {
		return notNil(s.cfg.Client.CoreV1().Secrets(r.Namespace).Get(ctx, r.Name, metav1.GetOptions{}))
	}
	return notNil(s.cfg.Client.CoreV1().ConfigMaps(r.Namespace).Get(ctx, r.Name, metav1.GetOptions{}))
}

func notNil[T runtime.Object](obj T, err error) (runtime.Object, error) {
	if err != nil {
		return nil, err
	}
	return obj, nil
}

func (s *Store) watch(ctx context.Context, r Ref, e *entry, w watch.Interface) error {
	for {
		select {
		case <-ctx.Done():
			return nil
		case ev, ok := <-w.ResultChan():
			if !ok {
				return errors.New("watch ended")
			}
			switch ev.Type {
			case watch.Added, watch.Modified:
				if !s.stale(e, ev.Object) {
					s.set(r, e, ev.Object, nil)
				}
			case watch.Deleted:
				if !s.stale(e, ev.Object) {
					s.set(r, e, nil, apierrors.NewNotFound(schema.GroupResource{Resource: r.Kind}, r.Name))
				}
			case watch.Error:
				return apierrors.FromObject(ev.Object)
			}
		}
	}
}

// stale reports whether an object is older than the one we have.
func (s *Store) stale(e *entry, obj runtime.Object) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return e.obj != nil && number(obj) < number(e.obj)
}

// has reports whether an object is held, of whatever age.
func (s *Store) has(e *entry) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return e.obj != nil
}

// number of an object's resource version.
func number(obj runtime.Object) uint64 {
	m, ok := obj.(metav1.Object)
	if !ok {
		return 0
	}
	n, _ := strconv.ParseUint(m.GetResourceVersion(), 10, 64)
	return n
}

func (s *Store) open(ctx context.Context, r Ref) (watch.Interface, error) {
	opts := metav1.ListOptions{FieldSelector: fields.OneTermEqualSelector("metadata.name", r.Name).String()}
	if r.Kind == "secrets" {
		return s.cfg.Client.CoreV1().Secrets(r.Namespace).Watch(ctx, opts)
	}
	return s.cfg.Client.CoreV1().ConfigMaps(r.Namespace).Watch(ctx, opts)
}

// set stores what the API said and tells the pods when it is news.
func (s *Store) set(r Ref, e *entry, obj runtime.Object, err error) {
	s.mu.Lock()
	news := version(obj) != version(e.obj) || (err == nil) != (e.err == nil)
	e.obj, e.err = obj, err
	var pods []types.UID
	for uid := range e.pods {
		pods = append(pods, uid)
	}
	s.mu.Unlock()
	e.once.Do(func() { close(e.ready) })
	if !news {
		return
	}
	s.keep(r, obj)
	s.cfg.Changed(pods)
}

func version(obj runtime.Object) string {
	if m, ok := obj.(metav1.Object); ok {
		return string(m.GetUID()) + "/" + m.GetResourceVersion()
	}
	return ""
}

func (s *Store) path(r Ref) string {
	dir := s.cfg.Dir
	if r.Kind == "secrets" {
		dir = s.cfg.SecretDir
	}
	sum := sha256.Sum256([]byte(r.Namespace + "/" + r.Name)) // names may be longer than files'
	return filepath.Join(dir, r.Kind+"-"+hex.EncodeToString(sum[:16])+".json")
}

func (s *Store) keep(r Ref, obj runtime.Object) {
	if obj == nil {
		_ = os.Remove(s.path(r))
		return
	}
	b, err := json.Marshal(obj)
	if err == nil {
		_, err = durable.WriteFileIfChanged(s.path(r), b, 0o600)
	}
	if err != nil {
		s.cfg.Log.Warn("keeping object for the time the API is away", "err", err)
	}
}

// recall uses what was kept when the API has not answered yet.
func (s *Store) recall(r Ref, e *entry) {
	select {
	case <-e.ready:
		return
	default:
	}
	b, err := os.ReadFile(s.path(r))
	if err != nil {
		return
	}
	var obj runtime.Object = &v1.ConfigMap{}
	if r.Kind == "secrets" {
		obj = &v1.Secret{}
	}
	if err := json.Unmarshal(b, obj); err != nil {
		s.cfg.Log.Warn("kept object is not readable", "path", s.path(r), "err", err)
		return
	}
	s.set(r, e, obj, nil)
}
